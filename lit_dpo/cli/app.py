"""The command line: `lit-dpo fit|validate|test|predict` on LightningCLI, and the tools."""

from __future__ import annotations

import importlib
import inspect
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jsonargparse
import torch
import yaml
from jsonargparse import set_parsing_settings
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

import lit_dpo.strategies  # noqa: F401 - registers `fsdp2`
from lit_dpo.callbacks import LastCheckpoint, PairPredictionWriter, PolicyLine, ProgressLine, RunSummary, Stopped
from lit_dpo.checkpoints.changes import refuse_changes
from lit_dpo.checkpoints.claim import agreed, forget_handed_down, handed_down, is_first, number_of
from lit_dpo.checkpoints.durable import replace_file
from lit_dpo.checkpoints.foreign import refuse_foreign_checkpoint
from lit_dpo.checkpoints.io import make_durable
from lit_dpo.checkpoints.run import Run, check_checkpoint, refuse_foreign_logs
from lit_dpo.cli.configs import with_paths
from lit_dpo.cli.flags import KEPT, Flags, import_packages, kept, resuming, take_flags
from lit_dpo.cli.messages import one_sentence, users_fault
from lit_dpo.cli.parser import IMPORTABLE, PLUGGABLE, Parser, completed, subclass_names
from lit_dpo.cli.private import CheckpointsSetNoOptions, switching_forgets_options
from lit_dpo.cli.quiet import quiet
from lit_dpo.cli.tools import TOOLS, WHOLE, as_options
from lit_dpo.data import PreferenceDataModule
from lit_dpo.module import PreferenceModule
from lit_dpo.plain_text import plain
from lit_dpo.pretrained import trusting_remote_code
from lit_dpo.rounds.permission import permitting
from lit_dpo.stepwise import fit_stepwise
from lit_dpo.watch import watch_over


class SaveConfig(SaveConfigCallback):
    """Save the whole configuration of a fit as `config.yaml` in its folder, but never over another file.

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
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_hyperparams(self._options(pl_module))

    def _options(self, module: LightningModule) -> dict[str, Any]:
        """All options of the run, those of the model by their own names; Lightning logs what the module keeps."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=True))
        options = config.pop("model")
        return {**{name: value for name, value in options.items() if name not in module.hparams}, **config}


class PreferenceCLI(CheckpointsSetNoOptions):
    """LightningCLI for `PreferenceModule` and `PreferenceDataModule`.

    Args:
        args: Command-line arguments.
        flags: What only the command line may say.
    """

    def __init__(self, args: Sequence[str], flags: Flags) -> None:
        self._flags = flags
        self._called = args[0] if args and args[0] in LightningCLI.subcommands() else None
        self._continued: Run | None = None  # the run that is resumed
        self._changed: list[str] | None = None  # options that differ from that run's, if its own are known
        self._logged: set[str | None] = set()  # folders that loggers of this process wrote to
        self._runs: list[Run] = []  # what this process made, or may have made
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

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Lightning's, without the option to load checkpoints that run code: if one is called by name, that one alone.

        To build the parser of one takes as long as to parse with it.
        """
        known = {name: {*skipped, "weights_only"} for name, skipped in LightningCLI.subcommands().items()}
        return {name: skipped for name, skipped in known.items() if self._called in (name, None)}

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
        parser.add_argument(
            "--first_reference",
            type=bool,
            default=False,
            help="In stepwise training, log validations against the first model too, as val/first/...",
        )

    def before_instantiate_classes(self) -> None:
        """Set the number of threads before the first tensor is made, and find what to resume before anything loads."""
        if self._flags.overwrite and self.subcommand != "predict":
            raise ValueError("`--overwrite` is for `predict` alone: leave it out.")
        if self._get(self.config, "first_reference") and self.subcommand != "fit":
            raise ValueError("`--first_reference` is for `fit` alone: leave it out, or add `--first_reference false`.")
        threads = self._get(self.config, "threads")
        if threads is not None:
            torch.set_num_threads(threads)
        checkpoint = self._get(self.config, "ckpt_path")
        if checkpoint is not None and checkpoint not in _LIGHTNINGS_OWN:
            self._find_checkpoint(str(checkpoint))

    def _find_checkpoint(self, given: str) -> None:
        """Settle which checkpoint is meant and which folder the run goes on in; refuse a changed configuration."""
        root = Path(self._get(self.config, "trainer.default_root_dir") or os.getcwd())
        if given == "last":
            named: Run | None = Run(known) if (known := handed_down()) else Run.newest(root)
            run = named
        else:
            named = Run.named(Path(given))
            run = named or Run.of(Path(given))
            run = run if run is not None and run.is_in(root) else None
        path = (named and named.last) or Path(given)
        stepwise = run is not None and named is not None and run.is_stepwise and self.subcommand == "fit"
        if not stepwise:
            check_checkpoint(path)
        self.config[str(self.subcommand)]["ckpt_path"] = None if stepwise else str(path)
        if self.subcommand != "fit":
            return
        self._continued = run
        self.save_config_kwargs["resumed"] = run is not None
        parser = self._parser(self.subcommand)
        current = parser.dump(self.config[self.subcommand], skip_none=False)
        begun = run or Run.of(path)
        saved = begun.config if begun is not None else None
        changed = refuse_changes(saved, current, self._flags.allow_changes, partial(completed, parser))
        self._changed = None if run is None or saved is None else changed

    def _as_before(self, option: str) -> bool:
        """Whether the run that is resumed had this option too, and so made what it leads to."""
        return self._changed is not None and not any(name.startswith(option) for name in self._changed)

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
            writer = PairPredictionWriter(self._get(self.config_init, "predictions"))
            writer.overwrite = self._flags.overwrite
            callbacks.append(writer)
        folder = kwargs.get("default_root_dir") or config.get("default_root_dir") or os.getcwd()
        checkpoints = self.subcommand == "fit" and config.get("enable_checkpointing") is not False
        if checkpoints and "://" not in str(folder) and not _has(callbacks, LastCheckpoint):
            callbacks.append(LastCheckpoint())
        if config.get("logger") in (None, True):
            kwargs["logger"] = False  # a fit has its own, see `_log_to`
        if self.subcommand == "fit" and not self._as_before("trainer.callbacks"):
            for callback in callbacks:
                refuse_foreign_checkpoint(callback, self._get(self.config, "ckpt_path"))
        return super().instantiate_trainer(**{"callbacks": callbacks, "default_root_dir": folder, **kwargs})

    def _log_to(self, run: Run, trainer: Trainer) -> None:
        """Have a run log to a csv file in its folder, up to date at every moment, besides what else it logs to."""
        for logger in trainer.loggers:
            ours = self._as_before("trainer.logger") or getattr(logger, "log_dir", None) in self._logged
            refuse_foreign_logs(logger, Path(trainer.default_root_dir), ours)
        self._logged |= {getattr(logger, "log_dir", None) for logger in trainer.loggers}
        if is_first():
            run.rotate_metrics()
        own = CSVLogger(run.folder.parent, name=None, version=number_of(run.folder), flush_logs_every_n_steps=1)
        trainer.loggers = [own, *trainer.loggers]

    def _run_folder(self) -> Path:
        """The folder to go on in, or a new one, the same on all processes."""

        def choose() -> Path:
            if self._continued is None:
                self._runs.append(Run.claim(Path(self.trainer.default_root_dir)))
            return (self._continued or self._runs[-1]).folder

        return agreed(self.trainer, choose)

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            self.datamodule.allow_changes = self._flags.allow_changes
            make_durable(self.trainer)
            watch_over(self.trainer)
            if subcommand == "fit" and self.datamodule.stepwise:
                if self._get(self.config, "ckpt_path") is not None:
                    raise ValueError("Stepwise training goes on with `ckpt_path: last` alone, as a whole.")
                resume = self._continued is not None
                first = self._get(self.config, "first_reference")
                folder = self._run_folder()
                if not resume and is_first():  # the first step may be long in its beginnings
                    with replace_file(folder / "config.yaml") as file:
                        file.write(self._parser(subcommand).dump(self.config[subcommand], skip_unset=False).encode())
                fit_stepwise(self.model, self.datamodule, self._fresh_trainer, folder, resume, first)
                return
            if self._get(self.config, "first_reference"):
                raise ValueError(
                    "`--first_reference` compares the steps of stepwise training: set a `--data.partition` of several "
                    "steps, or leave it out, as `val/` is measured from the first model already."
                )
            root = self.trainer.default_root_dir
            if subcommand == "fit" and "://" in root:
                self.trainer.loggers = [CSVLogger(root, name=None, flush_logs_every_n_steps=1), *self.trainer.loggers]
            elif subcommand == "fit" and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
                self._log_to(Run(self._run_folder()), self.trainer)
            super()._run_subcommand(subcommand)
        except BaseException as error:
            if isinstance(error, Exception) and users_fault(error):
                for run in reversed(self._runs):
                    run.abandon()
            if is_first() and any(run.is_stepwise for run in (self._continued, *self._runs) if run is not None):
                error.add_note(KEPT)
            raise
        finally:
            forget_handed_down()

    def _fresh_trainer(self, folder: Path) -> Trainer:
        """A Trainer with callbacks of its own, for one partition."""
        self.config_init = self.parser.instantiate_classes(self.config)
        trainer = self.instantiate_trainer(default_root_dir=str(folder))
        if number_of(folder, "partition") < 0:  # it only scores
            trainer.loggers = []
            return trainer
        run = Run(folder / "version_0")
        if is_first():
            self._runs.append(Run.make(run.folder))
        self._log_to(run, trainer)
        return trainer


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
        paths, hidden = with_paths(given)
        args, flags = take_flags(paths)
        for name in hidden if is_first() else ():
            sys.stderr.write(f"`--config {name}`: the file `{name}` is taken, not the shipped configuration.\n")
        short = (f"lit_dpo.{name}" for base in PLUGGABLE for name in subclass_names(base))
        set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=[*IMPORTABLE, *short, *flags.packages])
        import_packages(flags.packages)
        with trusting_remote_code(flags.trust_remote_code), permitting(flags.packages, flags.allow_command):
            if args[:1] and args[0] in TOOLS:
                _run_tool(args[0], args[1:], flags)
            elif args[:1] and args[0] in WHOLE:
                importlib.import_module("lit_dpo.cli.whole").WholeConfigurationCLI(args[0], args[1:], flags)
            else:
                PreferenceCLI(args, flags)
    except Stopped as stopped:
        if getattr(rank_zero_only, "rank", 0) == 0:
            ours = any(part.startswith("version_") for part in stopped.checkpoint.parts[-5:-2])
            command = shlex.join(["lit-dpo", *resuming(given, "last" if ours else str(stopped.checkpoint))])
            sys.stderr.write(
                f"\nStopped by {stopped.name} after step {stopped.step}; saved {stopped.checkpoint}\n"
                f"To go on: {command}\n"
            )
        raise
    except (KeyboardInterrupt, SystemExit) as stopped:
        if isinstance(stopped, KeyboardInterrupt) or isinstance(stopped.__context__, KeyboardInterrupt):
            sys.stderr.write(f"lit-dpo: interrupted\n{kept(stopped, given)}")
            raise SystemExit(128 + signal.SIGINT) from None  # Lightning says 1
        raise
    except Exception as error:
        if os.environ.get("LIT_DPO_TRACEBACK") or not users_fault(error):
            raise
        text = plain(one_sentence(error))  # which may quote a file that somebody else wrote
        if "No supported gpu backend" in text or "CUDA" in text:
            text += " To run without a GPU, use `--trainer.accelerator cpu`."
        sys.stderr.write(f"lit-dpo: error: {text}\n(LIT_DPO_TRACEBACK=1 shows where it came from.)\n")
        sys.stderr.write(kept(error, given))
        raise SystemExit(2) from error


def _run_tool(name: str, args: list[str], flags: Flags) -> None:
    """Call the function that a command is."""
    tool = TOOLS[name]
    function = getattr(importlib.import_module(tool.module), tool.function)
    parameters = inspect.signature(function).parameters
    if flags.overwrite and "overwrite" not in parameters:
        raise ValueError(f"`{name}` has no `--overwrite`: name a new file or folder instead.")
    switches = [parameter.name for parameter in parameters.values() if isinstance(parameter.default, bool)]
    given = [*as_options(tool, args, switches), *(["--overwrite", "true"] if flags.overwrite else [])]
    jsonargparse.auto_cli(function, args=given, prog=f"lit-dpo {name}", parser_class=Parser)


def _has(callbacks: list[Any], kind: type) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)
