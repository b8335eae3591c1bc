"""A checkpoint that release 0.1.0 wrote goes on with the losses that 0.1.0 itself went on with, loads and exports."""

import json
import shutil
from pathlib import Path

import lightning as L
import pytest
from transformers import AutoModelForCausalLM

from lit_dpo import DPOLoss, FrozenReference, IntermediateLoss, PreferenceModule, SFTLoss, WeightedLoss
from lit_dpo.export import export_checkpoint
from tests import runs
from tests.data.checkpoint_0_1_0 import make

pytestmark = runs.QUIET
FOLDER = Path(make.__file__).parent
LOSS = WeightedLoss((IntermediateLoss(DPOLoss(beta=0.2), layers=(1,)), SFTLoss()), (1.0, 0.5))


@pytest.fixture
def checkpoint(tmp_path):
    for name in ("last.ckpt", "last.ckpt.json"):
        shutil.copy(FOLDER / name, tmp_path / name)
    return tmp_path / "last.ckpt"


def test_it_goes_on_with_the_same_losses(checkpoint, tmp_path):
    recorded = json.loads((FOLDER / "losses.json").read_text())
    L.seed_everything(0)
    found = make.run(tmp_path / "run", make.STEPS, str(checkpoint))
    expected = [float.fromhex(loss) for loss in recorded["losses"][recorded["saved"] :]]
    # (Another version of PyTorch rounds otherwise.)
    assert [float.fromhex(loss) for loss in found] == pytest.approx(expected, rel=1e-5)


def test_its_options_and_weights_load(checkpoint):
    module = PreferenceModule.load_from_checkpoint(checkpoint, weights_only=True)
    assert module.loss == LOSS
    assert isinstance(module.reference, FrozenReference)


def test_it_is_exported(checkpoint, tmp_path):
    folder = export_checkpoint(str(checkpoint), str(tmp_path / "out"))
    assert AutoModelForCausalLM.from_pretrained(folder).config.hidden_size == make.MODEL["hidden_size"]
