"""Mistakes in a loss, a reference or a partition of one's own are told in one sentence that says what to mend."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from lit_dpo import (
    CachedReference,
    DPOLoss,
    FrozenReference,
    MixedReference,
    PairLogps,
    Partition,
    Pool,
    PreferenceLoss,
    Reference,
    WeightedLoss,
)
from lit_dpo.cli import main
from lit_dpo.stepwise import fit_stepwise
from tests import runs

pytestmark = [*runs.QUIET, pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")]


@dataclass(frozen=True)
class OneArgument(PreferenceLoss):
    def __call__(self, policy):
        return -policy.margin


class Undecorated(PreferenceLoss):
    beta: float = 0.1

    def __call__(self, policy, reference):
        return -policy.margin


class OnlyAnotherCall(DPOLoss):
    """Without a decorator, as it has no options of its own."""

    columns: ClassVar[tuple[str, ...]] = ()

    def __call__(self, policy, reference):
        return 2 * super().__call__(policy, reference)


@dataclass(frozen=True)
class Undeclared(PreferenceLoss):
    def __call__(self, policy, reference):
        return -policy.margin * policy.columns["doubt"]


@dataclass(frozen=True)
class Letters(PreferenceLoss):
    columns = "doubt"

    def __call__(self, policy, reference):
        return -policy.margin * policy.columns["doubt"]


@dataclass(frozen=True)
class Detached(PreferenceLoss):
    def __call__(self, policy, reference):
        return -policy.margin.detach()


@dataclass(frozen=True)
class UndeclaredTokens(PreferenceLoss):
    def __call__(self, policy, reference):
        return -torch.stack([tokens.sum() for tokens in policy.split_tokens()[::2]])


@dataclass(eq=False)
class NothingReturned(Reference):
    def score(self, policy, batch, scorer):
        scorer(policy, batch)


@dataclass(eq=False)
class OneForAll(Reference):
    def score(self, policy, batch, scorer):
        return PairLogps(*torch.zeros(4, 1))


@dataclass(eq=False)
class NoScorer(Reference):
    def score(self, policy, batch):
        return PairLogps(*torch.zeros(4, len(batch)))


class NoPool(Partition):
    def next(self, step):
        return None


@pytest.mark.parametrize(
    ("loss", "sentence"),
    [
        (
            OneArgument(),
            r"`OneArgument.__call__` .* \(self, policy, reference\), but takes \(self, policy\):",
        ),
        (Undecorated(), r"`Undecorated` must be a dataclass, .* options beta .*`@dataclass\(frozen=True\)`"),
    ],
)
def test_a_class_that_is_no_loss_is_refused_where_it_is_given(loss, sentence):
    with pytest.raises(ValueError, match=sentence):
        runs.module(loss=loss)
    with pytest.raises(ValueError, match=sentence):
        WeightedLoss((DPOLoss(), loss), (1.0, 1.0))
    runs.module(loss=OnlyAnotherCall())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"loss": Undeclared()}, r"`Undeclared` asks for 'doubt', .*`columns`"),
        ({"loss": Letters()}, r"`columns` of `Letters` must be a tuple .*`columns = \('doubt',\)`"),
        ({"loss": Detached()}, "`Detached` has no gradient"),
        ({"loss": UndeclaredTokens()}, "a loss that reads them declares `needs_tokens = True`"),
        ({"reference": NothingReturned()}, r"`NothingReturned.score` must return a `PairLogps` .*, got a NoneType"),
        ({"reference": OneForAll()}, r"`OneForAll.score` must .* shape \(\d+,\), got log-probs of shape \(1,\)"),
        ({"reference": MixedReference([FrozenReference(), NothingReturned()])}, r"`NothingReturned.score` must return"),
        ({"reference": CachedReference(of=NothingReturned())}, r"`NothingReturned.score` must return"),
    ],
)
def test_what_is_wrong_in_a_run_is_said_in_a_sentence(options, sentence, tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_DPO_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=sentence) as caught:
        runs.fit(runs.module(**options), runs.data(runs.pairs_file(tmp_path)), max_steps=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("nested", [lambda inner: inner, lambda inner: CachedReference(of=inner)])
def test_a_reference_with_other_arguments_is_refused_where_it_is_given(nested):
    with pytest.raises(ValueError, match=r"`NoScorer.score` is called with \(self, policy, batch, scorer\), but takes"):
        runs.module(reference=nested(NoScorer()))


def test_a_partition_with_other_arguments_is_refused_before_anything_is_made(tmp_path):
    data = runs.data(runs.pairs_file(tmp_path), partition=NoPool())
    with pytest.raises(ValueError, match=r"`NoPool.next` .* \(self, step, pool\), but takes \(self, step\)"):
        fit_stepwise(runs.module(), data, lambda folder: pytest.fail("a Trainer was made"), tmp_path / "steps")
    assert not (tmp_path / "steps").exists()


def test_a_prompt_is_not_taken_for_a_list_of_letters():
    with pytest.raises(ValueError, match=r"`prompts` must be a list .*`\[prompt\]`"):
        Pool(["a"], generate=lambda *_: pytest.fail("sampled")).sample("Name a colour.")


MODULES = {
    "their_syntax": "import torch\ndef f(:\n",
    "their_import": "import torch\nimport no_such_package_at_all\n",
    "their_thawed": "from dataclasses import dataclass\nfrom lit_dpo import PreferenceLoss\n\n\n@dataclass\n"
    "class Theirs(PreferenceLoss):\n    beta: float = 0.1\n",
    "their_classes": "from dataclasses import dataclass\nimport lit_dpo\n\n\nclass Loss:\n    pass\n\n\n"
    "def function(policy, reference):\n    return -policy.margin\n\n\n@dataclass(eq=False)\n"
    "class Ref(lit_dpo.Reference):\n    pass\n\n\nclass Part(lit_dpo.Partition):\n    pass\n",
}


@pytest.mark.parametrize(
    ("package", "option", "value", "words"),
    [
        ("their_syntax", "model.loss", "Theirs", ["SyntaxError", "mend `their_syntax.py`, line 2"]),
        ("their_import", "model.loss", "Theirs", ["no_such_package_at_all", "mend `their_import.py`, line 2"]),
        ("their_thawed", "model.loss", "Theirs", ["non-frozen dataclass", "mend `their_thawed.py`, line 5"]),
        ("their_absent", "model.loss", "Theirs", ["`--allow-import their_absent`", "PYTHONPATH=. lit-dpo"]),
        ("their_classes.py", "model.loss", "Loss", ["without its ending, `--allow-import their_classes`"]),
        ("their_classes", "model.loss", "Loss", ["`their_classes.Loss` is no subclass of `PreferenceLoss`"]),
        ("their_classes", "model.loss", "function", ["`their_classes.function` is no subclass of `PreferenceLoss`"]),
        ("their_classes", "model.reference", "Loss", ["`their_classes.Loss` is no subclass of `Reference`"]),
        ("their_classes", "model.reference", "Ref", ["`model.reference`: `their_classes.Ref` lacks a method"]),
        ("their_classes", "data.partition", "Part", ["`data.partition`: `their_classes.Part` lacks a method"]),
    ],
)
def test_a_mistake_in_a_file_of_ones_own_is_named_with_its_place(
    package, option, value, words, tmp_path, monkeypatch, capsys
):
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    path = f"{package.removesuffix('.py')}.{value}"
    line = refused(capsys, ["fit", "--config", "dpo", "--allow-import", package, f"--{option}", path])
    assert [word for word in words if word not in line] == []
    assert "Did you mean" not in line


def test_an_unknown_key_of_a_configuration_gets_the_nearest_option(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("model:\n  los:\n    class_path: DPOLoss\n")
    line = refused(capsys, ["fit", "--config", str(path)])
    assert "there is no option `model.los.class_path`" in line
    assert "Did you mean model.loss" in line


def refused(capsys, args):
    """The one line that a command ends with, which must fail."""
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    [line] = [line for line in text.splitlines() if line.startswith("lit-dpo: error: ")]
    return line
