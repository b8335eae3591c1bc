"""What experiments ask a module for: predictions, values of single pairs, a history, and losses made of functions."""

import dataclasses
import json
import re

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

import lit_dpo
from lit_dpo import CachedReference, DPOLoss, IntermediateLoss, PreferenceLoss, SFTLoss, SimPOLoss, WeightedLoss, score
from lit_dpo.callbacks import PairPredictionWriter
from lit_dpo.cli import main
from lit_dpo.models import load_model
from lit_dpo.tokenizers import quickstart_tokenizer
from tests import runs

pytestmark = [*runs.QUIET, pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")]


def predicted(module, rows, folder, **options):
    writer = PairPredictionWriter(str(folder / "out.jsonl"))
    data = runs.data(rows, predict=rows, eval_batch_size=3)
    runs.trainer(callbacks=[writer], **options).predict(module, data, return_predictions=False)
    found = [json.loads(line) for line in writer.path.read_text().splitlines()]
    writer.path.unlink()
    return found, list(data.predict_dataloader())


@pytest.mark.parametrize("reference", [None, CachedReference], ids=["live", "cached"])
def test_predictions_hold_the_reference_and_on_request_every_token(reference, tmp_path):
    rows = runs.rows(5)
    reference = reference and reference(str(tmp_path / "cache"))
    module = runs.module(lr=0.1, reference=reference, predict_tokens=True)
    runs.fit(module, runs.data(rows), max_steps=2)
    found, batches = predicted(module, rows, tmp_path)
    start = load_model(runs.LLAMA, quickstart_tokenizer())
    assert sorted(row["row_id"] for row in found) == sorted(n for batch in batches for n in batch.row_ids.tolist())
    by_row = {row["row_id"]: row for row in found}
    for batch in batches:
        for prefix, model in (("", module.policy.eval()), ("reference_", start)):
            with torch.no_grad():
                whole = score(model, batch, per_token=True)
            for number, tokens in enumerate(whole.split_tokens()):
                pair, side = divmod(number, 2)
                row, name = by_row[int(batch.row_ids[pair])], ("chosen", "rejected")[side]
                assert row[f"{prefix}tokens_{name}"] == pytest.approx(tokens.tolist(), rel=1e-4, abs=1e-4)
                assert row[f"{prefix}logp_{name}"] == pytest.approx(float(tokens.sum()), rel=1e-4)
    assert len(found) == 5
    assert any(abs(row["logp_chosen"] - row["reference_logp_chosen"]) > 0.1 for row in found)


def test_without_a_request_there_are_no_tokens_and_without_a_reference_none_of_its(tmp_path):
    rows = runs.rows(3)
    [row, *_], _ = predicted(runs.module(), rows, tmp_path)
    assert [name for name in row if "logp" in name or "tokens_" in name] == [
        "logp_chosen", "logp_rejected", "reference_logp_chosen", "reference_logp_rejected",
    ]  # fmt: skip
    [row, *_], _ = predicted(runs.module(loss=SimPOLoss()), rows, tmp_path)
    assert [name for name in row if "logp" in name or "tokens_" in name] == ["logp_chosen", "logp_rejected"]


def test_the_command_line_writes_tokens(tmp_path):
    rows = runs.pairs_file(tmp_path, 3)
    out = tmp_path / "out.jsonl"
    main(
        ["predict", f"--model.model={json.dumps(runs.LLAMA)}", "--model.tokenizer=quickstart", f"--data.train={rows}",
         f"--data.predict={rows}", "--model.predict_tokens=true", "--trainer.accelerator=cpu",
         f"--trainer.default_root_dir={tmp_path}", f"--predictions={out}"]
    )  # fmt: skip
    for line in out.read_text().splitlines():
        row = json.loads(line)
        assert sum(row["reference_tokens_rejected"]) == pytest.approx(row["reference_logp_rejected"], rel=1e-4)


class Watch(Callback):
    """Remember what the module tells after each batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append((pl_module.last_pairs, batch, float(outputs["loss"])))


def test_callbacks_see_every_pair_of_a_training_step():
    rows = runs.rows(12)
    watch, module = Watch(), runs.module(loss=DPOLoss(beta=0.5))
    calls, original = [], DPOLoss.__call__

    class Counted(DPOLoss):
        def __call__(self, policy, reference):
            calls.append(1)
            return original(self, policy, reference)

    module.loss = Counted(beta=0.5)
    runs.fit(
        module,
        runs.data(rows, batch_size=3, validation_fraction=0),
        accumulate_grad_batches=2,
        callbacks=[watch],
        max_epochs=2,
    )
    assert len(calls) == len(watch.seen) == 8
    for pairs, batch, loss in watch.seen:
        assert pairs.row_ids.tolist() == batch.row_ids.tolist()
        assert len(pairs.row_ids) == 3
        margin = pairs.chosen_rewards - pairs.rejected_rewards
        expected = torch.log1p(torch.exp(-margin.double()))
        torch.testing.assert_close(pairs.losses.double(), expected, rtol=1e-5, atol=1e-6)
        assert float(pairs.losses.mean()) == pytest.approx(loss * 2, rel=1e-5)  # Lightning divides for accumulation
        assert not any(value.requires_grad for value in (pairs.losses, pairs.chosen_rewards, pairs.rejected_rewards))
    assert sorted(row for pairs, _, _ in watch.seen[:4] for row in pairs.row_ids.tolist()) == list(range(12))
    assert float(watch.seen[-1][0].losses.mean()) < float(watch.seen[0][0].losses.mean())


def test_a_history_needs_no_logger_and_survives_a_resume(tmp_path):
    def fit(steps, ckpt_path=None, **options):
        module = runs.module()
        data = runs.data(runs.rows(12), batch_size=2, validation=runs.rows(4, start=30))
        settings = {"log_every_n_steps": 2, "val_check_interval": 4, **options}
        run = runs.trainer(tmp_path, max_steps=steps, **settings)
        run.fit(module, data, ckpt_path=ckpt_path)
        return module, run

    def measured(history):
        return [{name: value for name, value in row.items() if "second" not in name} for row in history]

    module, _ = fit(6, logger=CSVLogger(tmp_path, name=None, version=""))
    history = module.history
    assert [row["step"] for row in history] == [2, 4, 6]
    assert {"train/loss", "train/grad_norm", "lr", "train/tokens_per_second"} < history[0].keys()
    assert "val/rewards/margins" in history[1]
    assert all(type(value) in (int, float) for row in history for value in row.values())
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    names = lines[0].split(",")
    logged = [dict(zip(names, line.split(","), strict=True)) for line in lines[1:]]
    losses = [float(row["train/loss"]) for row in logged if row["train/loss"]]
    assert [row["train/loss"] for row in history] == pytest.approx(losses)
    other, run = fit(3)
    assert [row["step"] for row in other.history] == [2]
    run.save_checkpoint(tmp_path / "three.ckpt")
    again, _ = fit(6, ckpt_path=tmp_path / "three.ckpt")
    assert measured(again.history) == measured(history)


@pytest.mark.slow
def test_sft_leaves_rejected_completions_out_of_training_and_changes_nothing_else():
    rows = runs.rows(12)

    class Both(SFTLoss):
        """The same loss, that is given both completions."""

        needs_rejected = True

    ends, sizes = [], []
    for loss in (SFTLoss(), Both(), WeightedLoss((SFTLoss(), SFTLoss(length_normalize=False)), (1.0, 0.0))):
        for options in ({"form": "flat"}, {"form": "padded"}, {"max_tokens": 60}):
            module = runs.module({**runs.NEOX}, lr=1e-2, loss=loss, dtype="float64", **options)
            seen = []
            hook = lambda model, args, kwargs, out, seen=seen: seen.append(out.last_hidden_state.shape[:2].numel())  # noqa: E731
            module.configure_model()
            module.policy.base_model.register_forward_hook(hook, with_kwargs=True)
            run = runs.fit(
                module,
                runs.data(rows, batch_size=4, validation=rows[:3]),
                limit_val_batches=0,
                max_steps=2,
                log_every_n_steps=1,
            )
            ends.append(torch.cat([p.detach().flatten() for p in module.policy.parameters()]))
            sizes.append(sum(seen[-2:]))
            names = set(run.callback_metrics)
            assert ("train/rewards/margins" in names) == isinstance(loss, Both)
            assert (module.last_pairs.rejected_rewards is None) != isinstance(loss, Both)
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-12)
    assert sizes[0] < sizes[3]
    assert sizes[1] < sizes[4]
    run = runs.trainer()
    run.validate(module, runs.data(rows, validation=rows[:3]), verbose=False)
    assert "val/rewards/margins" in run.callback_metrics


def sigmoid_of_margins(policy, reference):
    return -torch.nn.functional.logsigmoid(0.1 * (policy.margin - reference.margin))


def test_a_function_is_refused_with_the_lines_that_make_a_loss_of_it():
    with pytest.raises(ValueError, match=r"^`loss` must be a `PreferenceLoss`, got a function") as error:
        runs.module(loss=sigmoid_of_margins)
    text = str(error.value)
    lines = text[text.index("@") :]
    assert len(lines.splitlines()) == 3
    scope = {"dataclasses": dataclasses, "lit_dpo": lit_dpo, "sigmoid_of_margins": sigmoid_of_margins}
    exec(lines, {**scope, "__name__": "written"}, scope)
    ends = []
    for loss in (scope["MyLoss"](), DPOLoss(beta=0.1)):
        module = runs.module(loss=loss)
        runs.fit(module, runs.data(runs.rows(8)), max_steps=2)
        ends.append(runs.weights(module.policy))
    assert issubclass(scope["MyLoss"], PreferenceLoss)
    torch.testing.assert_close(ends[0], ends[1])
    for make, name in (
        (lambda loss: runs.module(loss=loss), "loss"),
        (lambda loss: WeightedLoss(losses=(DPOLoss(), loss)), "losses"),
        (lambda loss: IntermediateLoss(base=loss, layers=(1,)), "base"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"`{name}` must be a `PreferenceLoss`, got a function")):
            make(lambda policy, reference: policy.margin)
        with pytest.raises(ValueError, match=re.escape(f"`{name}` must be a `PreferenceLoss`, got 3")):
            make(3)
    with pytest.raises(ValueError, match=r"give `DPOLoss\(...\)` instead of the class"):
        runs.module(loss=DPOLoss)
