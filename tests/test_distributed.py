"""Two processes train what one trains: the same metrics, the same weights, the same files, with uneven tails."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import distributed, runs

pytestmark = runs.QUIET

TOGETHER = ("fsdp2", "ddp,fsdp1")  # by one start of two processes; FSDP1 by a stand-in, see `distributed.FSDP1OnCPU`
STRATEGIES = ("fsdp2", pytest.param("ddp", marks=pytest.mark.slow), pytest.param("fsdp1", marks=pytest.mark.slow))


REST = tuple(name for name in distributed.VARIANTS if name not in distributed.QUICK)
VARIANTS = [*distributed.QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in REST)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The files, and the folder in which one process has trained on them."""
    folder = tmp_path_factory.mktemp("one")
    files = distributed.files(folder)
    distributed.train(folder, files)
    distributed.variants(folder, files)
    return files, folder


@pytest.fixture(scope="module")
def together(alone, tmp_path_factory):
    """The folder in which two processes have trained on them with a strategy, variants of one group included."""
    folder, started = tmp_path_factory.mktemp("two"), set()

    def folder_of(strategy, variants=distributed.QUICK):
        names = next(names for names in TOGETHER if strategy in names)
        if (names, variants) not in started:
            started.add((names, variants))
            runs.launch(["tests.distributed", str(folder), names, "|".join(variants), *alone[0]])
            if variants == REST and ("alone", REST) not in started:
                started.add(("alone", REST))
                distributed.variants(alone[1], alone[0], names=REST)
        return folder / strategy

    return folder_of


def rewards(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_train_what_one_trains(strategy, alone, together):
    one, two = alone[1], together(strategy)
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (one, two)]
    assert metrics[1] == pytest.approx(metrics[0], abs=2e-6, rel=1e-6)
    states = [torch.load(folder / "plain.ckpt", weights_only=True)["state_dict"] for folder in (one, two)]
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=1e-5)
    exported = runs.weights(AutoModelForCausalLM.from_pretrained(two / "export"))
    assert runs.same(exported, {name.removeprefix("policy."): value for name, value in states[1].items()})
    assert not (two / "export.ckpt").exists()

    assert len(rewards(two)) == 5
    for mine, expected in zip(rewards(two), rewards(one), strict=True):
        assert mine == pytest.approx(expected, abs=1e-4)
    assert {path.name for path in two.glob("*.jsonl*")} == {"predictions.jsonl"}

    margins = [json.loads(path.read_text()) for path in sorted(two.glob("margins_*.json"))]
    assert len(margins) == 2
    for mine in margins:
        assert mine == pytest.approx(json.loads((one / "margins_0.json").read_text()), rel=1e-5)
    for part in ("partition_0", "partition_1"):
        rows = [json.loads((folder / "steps" / part / "DONE").read_text())["rows"] for folder in (one, two)]
        assert rows[1] == rows[0]
        models = [AutoModelForCausalLM.from_pretrained(f / "steps" / part / "export") for f in (one, two)]
        torch.testing.assert_close(*map(runs.weights, reversed(models)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_other_models_adapters_and_references(strategy, variant, alone, together):
    """Under FSDP2 the second process never loads a model: its script refuses to."""
    group = distributed.QUICK if variant in distributed.QUICK else REST
    folders = (alone[1], together(strategy, group))
    one, two = (json.loads((folder / "variants.json").read_text())[variant] for folder in folders)
    if strategy == "fsdp1" and variant.startswith("synced"):
        assert two["refused"].endswith("use `--trainer.strategy fsdp2`.")
        return
    assert two == pytest.approx(one, abs=2e-5, rel=1e-5)
