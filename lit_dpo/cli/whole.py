"""The tools that take the whole configuration of a fit: what it would train, and whether it would run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lit_dpo.cli.app import PreferenceCLI
from lit_dpo.cli.flags import Flags
from lit_dpo.tools.check import check
from lit_dpo.tools.inspect import inspect

_NOTHING_WRITTEN: dict[str, Any] = {  # of the Trainer, whatever the configuration says
    "logger": False,
    "callbacks": [],
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class WholeConfigurationCLI(PreferenceCLI):
    """Parses what `fit` takes, and hands module, data and Trainer to a function that writes no run.

    Args:
        name: `inspect` or `check`.
        args: The arguments behind it.
        flags: What only the command line may say.
    """

    def __init__(self, name: str, args: Sequence[str], flags: Flags) -> None:
        self._name, self._overwrite = name, flags.overwrite
        self._callbacks: list[Any] = []
        if flags.overwrite and name != "inspect":
            raise ValueError(f"`{name}` writes no file: leave `--overwrite` out.")
        super().__init__(["fit", *args], replace(flags, overwrite=False))

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of the tool."""
        super().add_arguments_to_parser(parser)
        if self._name == "check":
            parser.add_argument("--memory", type=float | None, default=None)
            return
        parser.add_argument("--pairs", type=int, default=4)
        parser.add_argument("--score", type=bool, default=False)
        parser.add_argument("--html", type=str | None, default=None)

    def before_instantiate_classes(self) -> None:
        """Refuse a checkpoint, and leave loggers and the run's own files out before anything is made."""
        if self._get(self.config, "ckpt_path") is not None:
            raise ValueError(f"`{self._name}` looks at a run before its first step: leave `--ckpt_path` out.")
        super().before_instantiate_classes()
        self.config["fit"]["trainer"]["logger"] = False
        self.save_config_callback = None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer of the configuration without anything that writes; its callbacks are kept aside."""
        callbacks = self._get(self.config_init, "trainer", default={}).get("callbacks") or []
        self._callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        return self._make_trainer()

    def _make_trainer(self, **options: Any) -> Trainer:
        return LightningCLI.instantiate_trainer(self, **{**_NOTHING_WRITTEN, "callbacks": [], **options})

    def _run_subcommand(self, subcommand: str) -> None:
        if self._name == "inspect":
            options = {name: self._get(self.config_init, name) for name in ("pairs", "score", "html")}
            inspect(self.model, self.datamodule, self.trainer, overwrite=self._overwrite, **options)
        else:
            saves = self._get(self.config_init, "trainer.enable_checkpointing") is not False
            memory = self._get(self.config_init, "memory")
            what = (self.model, self.datamodule, self.trainer, self._make_trainer, self._callbacks)
            if status := check(*what, saves=saves, memory=memory):
                raise SystemExit(status)
