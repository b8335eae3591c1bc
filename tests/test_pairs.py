from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_dpo import PairBatch, PairLogps
from lit_dpo.scoring.inputs import padded

segments = st.lists(st.integers(1, 99), min_size=1, max_size=6)
pairs_lists = st.lists(st.tuples(segments, segments, segments), min_size=1, max_size=5)
PAIRS = [([1, 2, 3], [4, 5], [6]), ([7], [8], [9, 10, 11, 12])]


def slow_indices(pairs):
    """Sources, targets and completions of the flat line, token by token."""
    sources, targets, sequences, start = [], [], [], 0
    for number, (prompt, chosen, rejected) in enumerate(pairs):
        last_of_prompt = start + len(prompt) - 1
        for branch, (completion, first) in enumerate(
            [(chosen, start + len(prompt)), (rejected, start + len(prompt) + len(chosen))]
        ):
            for i, token in enumerate(completion):
                sources.append(last_of_prompt if i == 0 else first + i - 1)
                targets.append(token)
                sequences.append(2 * number + branch)
        start += len(prompt) + len(chosen) + len(rejected)
    return sources, targets, sequences


@given(pairs=pairs_lists)
@settings(max_examples=200)
def test_indices_against_a_loop(pairs):
    batch = PairBatch.from_lists(pairs)
    sources, targets, sequences = slow_indices(pairs)
    assert batch.sources.tolist() == sources
    assert batch.targets.tolist() == targets
    assert batch.sequences.tolist() == sequences
    assert batch.completion_lengths.tolist() == [len(x) for _, c, r in pairs for x in (c, r)]
    assert batch.longest == max(len(p) + len(x) for p, c, r in pairs for x in (c, r))
    assert batch.shape == tuple((len(p), len(c), len(r)) for p, c, r in pairs)
    assert len(batch) == len(pairs)


@given(pairs=pairs_lists)
@settings(max_examples=100)
def test_padded_rows_against_a_loop(pairs):
    batch = PairBatch.from_lists(pairs)
    ids, mask, sources = padded(batch, pad_id=0)
    rows = [[*p, *x] for p, c, r in pairs for x in (c, r)]
    width = max(map(len, rows))
    assert ids.tolist() == [row + [0] * (width - len(row)) for row in rows]
    assert mask.tolist() == [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    prompts = [len(p) for p, _, _ in pairs for _ in range(2)]
    expected = [
        row * width + place - 1
        for row, (prompt, tokens) in enumerate(zip(prompts, rows, strict=True))
        for place in range(prompt, len(tokens))
    ]
    assert sources.tolist() == expected
    following = ids.flatten()[sources + 1]
    assert torch.equal(following, batch.targets)


def test_layout_by_hand():
    batch = PairBatch.from_lists(PAIRS)
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 1, 2, 3, 4]
    assert batch.lengths.tolist() == [[3, 2, 1], [1, 1, 4]]
    assert batch.row_ids.tolist() == [0, 1]
    assert batch.weights is None
    assert batch.targets.tolist() == [4, 5, 6, 8, 9, 10, 11, 12]
    assert batch.sources.tolist() == [2, 3, 2, 6, 6, 8, 9, 10]
    assert batch.sequences.tolist() == [0, 0, 1, 2, 3, 3, 3, 3]
    assert batch.longest == 5


def test_padded_by_hand():
    ids, mask, sources = padded(PairBatch.from_lists(PAIRS), pad_id=99)
    assert ids.tolist() == [
        [1, 2, 3, 4, 5],
        [1, 2, 3, 6, 99],
        [7, 8, 99, 99, 99],
        [7, 9, 10, 11, 12],
    ]
    assert mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert mask.dtype == torch.int64
    assert sources.tolist() == [2, 3, 7, 10, 15, 16, 17, 18]


def test_rows_and_weights_travel_along():
    batch = PairBatch.from_lists(PAIRS, row_ids=[17, 4], weights=[1.0, 0.0])
    assert batch.row_ids.tolist() == [17, 4]
    assert batch.weights.tolist() == [1.0, 0.0]


def test_shape_is_read_from_lengths():
    made = PairBatch.from_lists(PAIRS)
    again = PairBatch(made.input_ids, made.position_ids, made.lengths, made.row_ids)
    assert again.shape == ((3, 2, 1), (1, 1, 4))


@pytest.mark.parametrize("pairs", [[], [([], [1], [2])], [([1], [], [2])], [([1], [2], []), ([1], [2], [3])]])
def test_nothing_may_be_empty(pairs):
    with pytest.raises(ValueError, match="at least one pair, and each prompt and completion at least one token"):
        PairBatch.from_lists(pairs)


def test_to_moves_every_tensor_and_keeps_the_shape():
    batch = PairBatch.from_lists(PAIRS, weights=[1.0, 0.5])
    moved = batch.to("meta")
    for name in ("input_ids", "position_ids", "lengths", "row_ids", "weights"):
        assert getattr(moved, name).device.type == "meta"
    assert moved.shape == batch.shape
    assert moved.longest == 5
    assert moved.sequences.shape == (8,)  # known without reading the device
    assert PairBatch.from_lists(PAIRS).to("cpu").weights is None


def test_pin_memory_pins_every_tensor(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self.clone())
    batch = PairBatch.from_lists(PAIRS, weights=[1.0, 0.5])
    copy = batch.pin_memory()
    tensors = [batch.input_ids, batch.position_ids, batch.lengths, batch.row_ids, batch.weights]
    assert {id(t) for t in pinned} == {id(t) for t in tensors}
    assert torch.equal(copy.input_ids, batch.input_ids)
    assert copy.shape == batch.shape


@pytest.mark.gpu
def test_pinned_batch_moves_to_the_device():
    batch = PairBatch.from_lists(PAIRS).pin_memory()
    assert batch.input_ids.is_pinned()
    moved = batch.to("cuda")
    assert moved.sources.tolist() == batch.sources.tolist()


def made_logps():
    def values(a, b, c, d):
        return torch.tensor([a, b]), torch.tensor([c, d])

    inner = PairLogps(*values(-4.0, -8.0, -1.0, -2.0), torch.tensor([2, 4]), torch.tensor([1, 1]))
    outer = values(-10.0, -6.0, -30.0, -9.0)
    for tensor in (*outer, inner.chosen, inner.rejected):
        tensor.requires_grad_()
    return PairLogps(*outer, torch.tensor([5, 2]), torch.tensor([10, 3]), {3: inner})


def made_tokens():
    """Two pairs of 2 and 1, then 1 and 3 tokens, with a layer and a column."""
    counts = torch.tensor([2, 1]), torch.tensor([1, 3])
    inner = PairLogps(*torch.tensor([[-2.0, -1.0], [-1.0, -3.0]]), *counts, tokens=-torch.ones(7))
    tokens = torch.tensor([-1.0, -2.0, -4.0, -5.0, -6.0, -7.0, -8.0], requires_grad=True)
    sums = torch.tensor([-3.0, -5.0]), torch.tensor([-4.0, -21.0])
    return PairLogps(*sums, *counts, {3: inner}, tokens, {"margin": torch.tensor([0.5, 2.0])})


def test_tokens_are_split_by_completion():
    assert made_tokens().completion_lengths.tolist() == [2, 1, 1, 3]
    parts = made_tokens().split_tokens()
    assert [part.tolist() for part in parts] == [[-1.0, -2.0], [-4.0], [-5.0], [-6.0, -7.0, -8.0]]
    with pytest.raises(ValueError, match=r"^There are no log-probs of single tokens here: score the batch with"):
        made_logps().split_tokens()


def test_cat_keeps_tokens_layers_and_columns_in_order():
    both = PairLogps.cat([made_tokens(), made_tokens()])
    assert both.chosen.tolist() == [-3.0, -5.0, -3.0, -5.0]
    assert both.tokens.tolist() == made_tokens().tokens.tolist() * 2
    assert both.layers[3].tokens.tolist() == [-1.0] * 14
    assert both.columns["margin"].tolist() == [0.5, 2.0, 0.5, 2.0]
    assert [part.sum().item() for part in both.split_tokens()][0::2] == both.chosen.tolist()
    plain = PairLogps.cat([made_logps(), made_logps()])
    assert (plain.tokens, plain.columns) == (None, {})
    with pytest.raises(ValueError, match=r"^Only some of these batches have log-probs of single tokens: score all"):
        PairLogps.cat([made_tokens(), replace(made_tokens(), tokens=None)])


def test_means_and_zeros_of_tokens_add_up_to_those_of_the_completions():
    means = made_tokens().per_token()
    assert means.tokens.tolist() == pytest.approx([-0.5, -1.0, -4.0, -5.0, -2.0, -7 / 3, -8 / 3])
    for values in (means, means.layers[3], made_tokens().zeros()):
        sums = torch.stack([part.sum() for part in values.split_tokens()])
        assert sums[0::2].tolist() == pytest.approx(values.chosen.tolist())
        assert sums[1::2].tolist() == pytest.approx(values.rejected.tolist())
    assert means.columns["margin"].tolist() == made_tokens().zeros().columns["margin"].tolist() == [0.5, 2.0]
    assert means.layers[3].tokens.tolist() == pytest.approx([-0.5, -0.5, -1.0, -1.0, -1 / 3, -1 / 3, -1 / 3])
    assert not made_tokens().zeros().tokens.requires_grad


def test_detach_cuts_tokens_too():
    cut = made_tokens().detach()
    assert made_tokens().tokens.requires_grad
    assert not cut.tokens.requires_grad
    assert torch.equal(cut.tokens, made_tokens().tokens)
    assert cut.columns["margin"].tolist() == [0.5, 2.0]
    assert made_logps().detach().tokens is None


def test_margin():
    assert made_logps().margin.tolist() == [20.0, 3.0]


def test_per_token_divides_each_by_its_own_count_in_layers_too():
    means = made_logps().per_token()
    assert means.chosen.tolist() == [-2.0, -3.0]
    assert means.rejected.tolist() == [-3.0, -3.0]
    assert means.layers[3].chosen.tolist() == [-2.0, -2.0]
    assert means.layers[3].rejected.tolist() == [-1.0, -2.0]
    assert means.chosen_tokens.tolist() == [5, 2]


def test_detach_cuts_the_graph_in_layers_too():
    values = made_logps()
    cut = values.detach()
    for before, after in ((values, cut), (values.layers[3], cut.layers[3])):
        assert torch.equal(before.chosen, after.chosen)
        assert torch.equal(before.rejected, after.rejected)
        assert before.chosen.requires_grad
        assert not after.chosen.requires_grad
        assert not after.rejected.requires_grad


def test_zeros_have_the_form_of_the_values():
    values = made_logps().zeros()
    for zero in (values, values.layers[3]):
        assert zero.chosen.tolist() == zero.rejected.tolist() == [0.0, 0.0]
        assert not zero.chosen.requires_grad
    assert values.rejected_tokens.tolist() == [10, 3]


def test_tokens_of_context_are_not_among_the_targets():
    batch = PairBatch.from_lists([([1, 2], [3, ~4, ~5, 6], [7]), ([8], [9], [~10, 11])])
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert batch.targets.tolist() == [3, 6, 7, 9, 11]
    assert batch.sources.tolist() == [1, 4, 1, 7, 9]
    assert batch.sequences.tolist() == [0, 0, 1, 2, 3]
    assert batch.completion_lengths.tolist() == [2, 1, 1, 1]
    _, _, sources = padded(batch)
    assert sources.tolist() == [1, 4, 7, 12, 19]
    (first, second) = batch.split(7)
    assert (first.targets.tolist(), second.targets.tolist()) == ([3, 6, 7], [9, 11])
    with pytest.raises(ValueError, match="at least one scored token"):
        PairBatch.from_lists([([1], [~2], [3])])
