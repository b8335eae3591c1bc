"""The command line: ``lit-dpo fit|validate|test|predict`` on LightningCLI, and ``lit-dpo export``."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import torch
from jsonargparse import set_parsing_settings
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

import lit_dpo.strategies  # noqa: F401 - registers `fsdp2`
from lit_dpo.callbacks import LastCheckpoint, PairPredictionWriter, PolicyLine, ProgressLine, RunSummary, Stopped
from lit_dpo.checkpoints import make_durable
from lit_dpo.cli.messages import one_sentence, users_fault
from lit_dpo.cli.parser import PLUGGABLE, Parser, subclass_names, switching_forgets_options
from lit_dpo.cli.quiet import quiet
from lit_dpo.data import PreferenceDataModule
from lit_dpo.export import export_checkpoint
from lit_dpo.module import PreferenceModule
from lit_dpo.runs import (
    check_checkpoint,
    discard,
    is_stepwise,
    last_checkpoint,
    new_version,
    newest_run,
    refuse_changes,
    rotate_metrics,
    run_of,
    saved_config,
)
from lit_dpo.sources import trusting_remote_code
from lit_dpo.stepwise import fit_stepwise
from lit_dpo.watch import watch_over

_EXPORT = "export"


class SaveConfig(SaveConfigCallback):
    """Save the whole configuration of a fit as ``config.yaml`` in its folder, but never over another file.

    Args:
        resumed: The run goes on in its folder, where its configuration is and was compared with.
    """

    def __init__(self, *args: Any, resumed: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.resumed = resumed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save, on the first process."""
        if stage != "fit":
            return
        path = Path(trainer.log_dir or trainer.default_root_dir) / self.config_filename
        if trainer.strategy.broadcast(path.exists()):
            if not self.resumed:
                rank_zero_warn(f"`{path}` exists already, so the configuration of this run is not saved there.")
        else:
            super().setup(trainer, pl_module, stage)


class PreferenceCLI(LightningCLI):
    """LightningCLI for `PreferenceModule` and `PreferenceDataModule`.

    Args:
        args: Command-line arguments.
        allow_changes: Resume with another configuration than the checkpoint's.
    """

    def __init__(self, args: Sequence[str], allow_changes: bool = False) -> None:
        self._allow_changes = allow_changes
        self._continued: Path | None = None  # the folder of the run that is resumed
        with switching_forgets_options():
            super().__init__(
                PreferenceModule,
                PreferenceDataModule,
                parser_class=Parser,
                seed_everything_default=0,
                auto_configure_optimizers=False,
                save_config_callback=SaveConfig,
                args=list(args),
            )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, without the option to load checkpoints that run code."""
        return {name: {*skipped, "weights_only"} for name, skipped in LightningCLI.subcommands().items()}

    def _parse_ckpt_path(self) -> None:
        """Leave options alone: Lightning would let a checkpoint's override explicit ones, and import what they name."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options that are neither the Trainer's, nor the module's, nor the data's."""
        parser.add_argument(
            "--predictions", type=str, default="predictions.jsonl", help="File that `predict` writes, one pair a line."
        )
        parser.add_argument(
            "--threads",
            type=PositiveInt | None,
            default=None,
            help="CPU threads of torch; without it all cores. A tiny model on a busy machine is faster with 1.",
        )

    def before_instantiate_classes(self) -> None:
        """Set the number of threads before the first tensor is made, and find what to resume before anything loads."""
        threads = self._get(self.config, "threads")
        if threads is not None:
            torch.set_num_threads(threads)
        checkpoint = self._get(self.config, "ckpt_path")
        if checkpoint is not None and checkpoint not in _LIGHTNINGS_OWN:
            self._find_checkpoint(str(checkpoint))

    def _find_checkpoint(self, given: str) -> None:
        """Settle which checkpoint is meant and which folder the run goes on in; refuse a changed configuration."""
        root = Path(self._get(self.config, "trainer.default_root_dir") or os.getcwd())
        run = newest_run(root) if given == "last" else run_of(Path(given), root)
        stepwise = run is not None and given == "last" and is_stepwise(run) and self.subcommand == "fit"
        path = (run and given == "last" and last_checkpoint(run)) or Path(given)
        if not stepwise:
            check_checkpoint(path)
        self.config[str(self.subcommand)]["ckpt_path"] = None if stepwise else str(path)
        if self.subcommand != "fit":
            return
        self._continued = run
        self.save_config_kwargs["resumed"] = run is not None
        current = self._parser(self.subcommand).dump(self.config[self.subcommand], skip_none=False)
        refuse_changes(saved_config(run, path), current, self._allow_changes)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer of the config, with a progress bar, a summary at the end, and metrics in a csv file."""
        config = self._get(self.config_init, "trainer", default={})
        callbacks = config.get("callbacks") or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        if config.get("enable_progress_bar") is not False and not _has(callbacks, ProgressBar):
            callbacks.append(ProgressLine())
        if self.subcommand == "fit" and config.get("enable_model_summary") is not False:
            callbacks.append(PolicyLine())
            kwargs["enable_model_summary"] = False  # Lightning's: nine lines for one model
        if self.subcommand == "fit" and not _has(callbacks, RunSummary):
            callbacks.append(RunSummary())
        if self.subcommand == "predict":
            callbacks.append(PairPredictionWriter(self._get(self.config_init, "predictions")))
        folder = kwargs.get("default_root_dir") or config.get("default_root_dir") or os.getcwd()
        checkpoints = self.subcommand == "fit" and config.get("enable_checkpointing") is not False
        if checkpoints and "://" not in str(folder) and not _has(callbacks, LastCheckpoint):
            callbacks.append(LastCheckpoint())
        if config.get("logger") in (None, True):
            kwargs["logger"] = self._metrics_file(Path(folder)) if self.subcommand == "fit" else False
        return super().instantiate_trainer(**{"callbacks": callbacks, "default_root_dir": folder, **kwargs})

    def _metrics_file(self, folder: Path) -> CSVLogger:
        """Metrics as a csv file that is up to date at every moment, in a new folder or in that of the resumed run."""
        version, run = None, self._continued
        if run is not None and is_stepwise(run):
            run = folder / "version_0" if run in folder.parents else None  # of a partition
        if run is not None and run.is_dir():
            version = int(run.name.removeprefix("version_"))
            if getattr(rank_zero_only, "rank", 0) == 0:
                rotate_metrics(run)
        return CSVLogger(folder, name=None, version=version, flush_logs_every_n_steps=1)

    def _run_subcommand(self, subcommand: str) -> None:
        folder: Path | None = None
        try:
            self.datamodule.allow_changes = self._allow_changes
            make_durable(self.trainer)
            watch_over(self.trainer)
            if subcommand == "fit" and self.datamodule.stepwise:
                if self._get(self.config, "ckpt_path") is not None:
                    raise ValueError("Stepwise training goes on with `ckpt_path: last` alone, as a whole.")
                folder = self._continued or new_version(Path(self.trainer.default_root_dir))
                resume = self._continued is not None
                fit_stepwise(self.model, self.datamodule, self._fresh_trainer, folder, resume)
            else:
                logger = self.trainer.logger
                folder = Path(logger.log_dir) if isinstance(logger, CSVLogger) and logger.name == "" else None
                super()._run_subcommand(subcommand)
        except Exception as error:
            if folder is not None and self.trainer.is_global_zero and users_fault(error):
                discard(folder)
            raise

    def _fresh_trainer(self, folder: Path) -> Trainer:
        """A Trainer with callbacks of its own, for one partition."""
        self.config_init = self.parser.instantiate_classes(self.config)
        return self.instantiate_trainer(default_root_dir=str(folder))


# What a configuration may name: narrow paths, none of which runs or loads anything by itself.
_IMPORTABLE = (
    *(f"lit_dpo.{name}" for name in ("losses", "reference", "cached_reference", "schedules", "callbacks")),
    *(
        f"lit_dpo.{name}"
        for name in ("data.partition", "models.LoRA", "LoRA", "strategies.FSDP2Strategy", "WarmupDecay")
    ),
    *(f"lightning.pytorch.{name}" for name in ("callbacks", "loggers", "strategies", "profilers", "plugins")),
    *("lightning.fabric.plugins.environments", "lightning.fabric.plugins.io"),  # where some of its plugins are defined
    *("lightning.Callback", "torch.optim", "torch.distributed.fsdp"),
)
_LIGHTNINGS_OWN = ("best", "hpc")  # checkpoint paths that Lightning resolves by itself


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; an error of the user's prints one sentence and exits with status 2, without a traceback.

    Args:
        args: Command-line arguments, by default the process's own.
    """
    given = list(sys.argv[1:] if args is None else args)
    with quiet(training=given[:1] == ["fit"]):
        _run(given)


def _run(given: list[str]) -> None:
    try:
        args, packages, allow_changes, trust = _take_flags(given)
        short = (f"lit_dpo.{name}" for base in PLUGGABLE for name in subclass_names(base))
        set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=[*_IMPORTABLE, *short, *packages])
        with trusting_remote_code(trust):
            if args[:1] == [_EXPORT]:
                jsonargparse.auto_cli(export_checkpoint, args=args[1:], prog=f"lit-dpo {_EXPORT}", parser_class=Parser)
            else:
                PreferenceCLI(args, allow_changes)
    except Stopped as stopped:
        if getattr(rank_zero_only, "rank", 0) == 0:
            ours = any(part.startswith("version_") for part in stopped.checkpoint.parts[-5:-2])
            command = shlex.join(["lit-dpo", *_resuming(given, "last" if ours else str(stopped.checkpoint))])
            sys.stderr.write(
                f"\nStopped by {stopped.name} after step {stopped.step}; saved {stopped.checkpoint}\n"
                f"To go on: {command}\n"
            )
        raise
    except (KeyboardInterrupt, SystemExit) as stopped:
        interrupted = isinstance(stopped, KeyboardInterrupt) or isinstance(stopped.__context__, KeyboardInterrupt)
        if interrupted:
            sys.stderr.write("lit-dpo: interrupted\n")
            raise SystemExit(128 + signal.SIGINT) from None  # Lightning says 1
        raise
    except Exception as error:
        if os.environ.get("LIT_DPO_TRACEBACK") or not users_fault(error):
            raise
        text = one_sentence(error)
        if "No supported gpu backend" in text or "CUDA" in text:
            text += " To run without a GPU, use `--trainer.accelerator cpu`."
        sys.stderr.write(f"lit-dpo: error: {text}\n(LIT_DPO_TRACEBACK=1 shows where it came from.)\n")
        raise SystemExit(2) from error


def _take_flags(args: list[str]) -> tuple[list[str], list[str], bool, bool]:
    """Split off the flags that only the command line may set.

    Returns:
        The other arguments, the allowed packages, whether changes are allowed, and whether models' own code may run.
    """
    rest, packages, allow_changes, trust = [], [], False, False
    remaining = iter(args)
    for argument in remaining:
        name, _, value = argument.partition("=")
        if name == "--allow-changes":
            allow_changes = True
        elif argument == "--trust-remote-code":
            trust = True
        elif name == "--allow-import":
            package = value or next(remaining, "")
            if not all(part.isidentifier() for part in package.split(".")):
                raise ValueError(f"`--allow-import` needs the import path of a package, got {package!r}.")
            packages.append(package)
        else:
            rest.append(argument)
    return rest, packages, allow_changes, trust


def _resuming(args: Sequence[str], checkpoint: str) -> list[str]:
    """The same arguments, to go on with the run from a checkpoint."""
    rest: list[str] = []
    remaining = iter(args)
    for argument in remaining:
        if argument == "--ckpt_path":
            next(remaining, None)
        elif not argument.startswith("--ckpt_path="):
            rest.append(argument)
    return [*rest, "--ckpt_path", checkpoint]


def _has(callbacks: list[Any], kind: type) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)
