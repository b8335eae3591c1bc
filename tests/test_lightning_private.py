"""Private parts of Lightning and jsonargparse: touched in two files, there still, and still needed.

If a test with *still* in its name fails, the other library has changed: what the test is about can go, or must move.
"""

import re
import signal
from pathlib import Path

import jsonargparse
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from torchmetrics import MeanMetric

import lit_dpo
from lit_dpo import lightning_private
from lit_dpo.cli import private
from lit_dpo.losses import PreferenceLoss
from tests import runs

pytestmark = [*runs.QUIET, pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")]

PACKAGE = Path(lit_dpo.__file__).parent
PRIVATE = re.compile(
    r"trainer\._|_loop\._|loop\._|\._should|_data_fetcher|_signal_connector|_parse_ckpt_path|jsonargparse\._|"
    r"from jsonargparse import _|parser\._actions|_subcommands_action|(module|self|data)\._trainer\b|_update_count"
)


def test_they_are_touched_in_two_files_alone():
    touched = {
        path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if PRIVATE.search(path.read_text())
    }
    assert touched == {"lightning_private.py", "cli/private.py"}


@pytest.mark.parametrize("module", [lightning_private, private], ids=lambda module: module.__name__)
def test_each_names_the_test_that_tells_when_it_can_go(module):
    parts = [part for part in vars(module).values() if getattr(part, "__module__", "") == module.__name__]
    public = [part for part in parts if not part.__name__.startswith("_")]
    named = [re.findall(r"Can go with\s+`(\w+)`", part.__doc__) for part in public]
    assert all(len(names) == 1 and names[0] in globals() for names in named), named


class Noting(Callback):
    """Remember what holds after each training batch."""

    def __init__(self):
        self.handlers, self.batches = set(), []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.handlers.add(signal.getsignal(signal.SIGTERM))
        self.batches.append((lightning_private.accumulates(trainer), lightning_private.validates_now(trainer)))


@pytest.fixture
def fitted(monkeypatch):
    def fit(prepare=lambda trainer: None, **options):
        noting = Noting()
        trainer = runs.trainer(callbacks=[noting], max_epochs=1, limit_train_batches=6, limit_val_batches=1, **options)
        prepare(trainer)
        trainer.fit(BoringModel())
        return noting

    return fit


def test_a_trainer_still_takes_signals(fitted):
    ours = signal.getsignal(signal.SIGTERM)
    assert fitted().handlers != {ours}
    assert fitted(lightning_private.leave_signals).handlers == {ours}


def test_a_module_without_a_trainer_still_raises():
    module = LightningModule()
    with pytest.raises(RuntimeError):
        _ = module.trainer
    assert lightning_private.attached_trainer(module) is None
    module.trainer = trainer = runs.trainer()
    assert lightning_private.attached_trainer(module) is trainer


def test_loops_still_tell_nothing_in_public(fitted):
    assert fitted(accumulate_grad_batches=2, val_check_interval=4).batches == [
        (True, False), (False, False), (True, False), (False, True), (True, False), (False, False),
    ]  # fmt: skip
    loop = Trainer(logger=False, accelerator="cpu").fit_loop
    names = {name for part in (loop, loop.epoch_loop) for name in dir(part) if not name.startswith("_")}
    assert not {name for name in names if re.search("accumul|check_val|fetcher", name)}


@pytest.mark.filterwarnings("error")
def test_a_restored_metric_still_warns():
    metric = MeanMetric()
    metric.mean_value, metric.weight = torch.tensor(6.0), torch.tensor(2.0)
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        metric.compute()
    metric = MeanMetric()
    metric.mean_value, metric.weight = torch.tensor(6.0), torch.tensor(2.0)
    lightning_private.mark_updated(metric)
    assert metric.compute() == 3


class Wide(BoringModel):
    """A module with an option."""

    def __init__(self, width: int = 1):
        super().__init__()
        self.width = width


def test_a_checkpoint_still_sets_options(tmp_path):
    torch.save({"hyper_parameters": {"width": 7}}, tmp_path / "wide.ckpt")
    widths = []
    for kind in (LightningCLI, private.CheckpointsSetNoOptions):
        quiet = type("Quiet", (kind,), {"_run_subcommand": lambda self, name: None})
        options = {"logger": False, "accelerator": "cpu"}
        arguments = ["validate", "--ckpt_path", str(tmp_path / "wide.ckpt")]
        made = quiet(Wide, args=arguments, trainer_defaults=options, seed_everything_default=False)
        widths.append(made.model.width)
    assert widths == [7, 1]


def test_another_class_still_keeps_options():
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--loss", type=PreferenceLoss)

    def beta():
        given = ["--loss=lit_dpo.losses.DPOLoss", "--loss.beta=0.7", "--loss=lit_dpo.losses.IPOLoss"]
        return parser.parse_args(given).loss.init_args.beta

    assert beta() == 0.7
    with private.switching_forgets_options():
        assert beta() == 0.1
    assert beta() == 0.7


def test_parsers_still_list_no_options():
    parser, command = jsonargparse.ArgumentParser(), jsonargparse.ArgumentParser()
    parser.add_argument("--first", type=int)
    command.add_argument("--second", type=int)
    parser.add_subcommands().add_subcommand("go", command)
    assert {"--first", "--second"} <= set(private.all_options(parser))
    assert not {name for name in dir(parser) if re.fullmatch("actions|options|option_strings|get_options", name)}
