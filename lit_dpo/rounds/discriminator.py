"""A judge that learns: a scalar head on a copy of a language model, trained on pairs with labels of a better judge."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification

from lit_dpo.checkpoints.durable import replace_folder, write_json
from lit_dpo.checkpoints.finite import first_nonfinite
from lit_dpo.data.partition import Prompt
from lit_dpo.models import load_model
from lit_dpo.pretrained import read_tokenizer
from lit_dpo.rounds.judges import JudgeError, RewardModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AGREEMENT = "agreement.json"
Labelled = tuple[Prompt, str, str]
"""A prompt, its better and its worse completion."""


class Discriminator(RewardModel):
    """A reward model that learns from labelled pairs, for `Discriminated`, which trains it in each round.

    It is a sequence classifier with one output on a copy of a language model, in float32. The loss of a pair is that of
    Bradley and Terry, `-log sigmoid(score of the better - score of the worse)`; the optimizer is AdamW without weight
    decay, gradients are clipped to norm 1, and dropout is off. On one CPU the same pairs give the same weights. What
    `save` has written is a reward model: `RewardModel(model=FOLDER)` judges with it.

    Source: Singhal et al., D2PO: discriminator-guided DPO with response evaluation models,
    https://arxiv.org/abs/2405.01511, with its learning rate and epochs.

    Args:
        base: Hub name or folder of the language model that it starts from, with its own tokenizer and chat template;
            `None` is the model that starts the first round.
        lr: Learning rate, above 0.
        epochs: Passes over the pairs, at least 1.
        batch_size: Pairs of an optimizer step, at least 1.
        folds: Its agreement with held-out labels is measured by so many further trainings, each of which leaves one
            part of the pairs out (cross-validation); at least 2.
        seed: Of the first weights of the head, and of the order of pairs.

    Raises:
        ValueError: An option is out of its range.
    """

    def __init__(
        self,
        base: str | None = None,
        lr: float = 1e-4,
        epochs: int = 4,
        batch_size: int = 8,
        folds: int = 4,
        seed: int = 0,
    ) -> None:
        for name, value, least in (("epochs", epochs, 1), ("batch_size", batch_size, 1), ("folds", folds, 2)):
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        if not lr > 0:
            raise ValueError(f"`lr` must be above 0, got {lr}.")
        super().__init__("the discriminator")
        self.base, self.lr, self.epochs, self.folds, self.seed = base, lr, epochs, folds, seed
        self.pairs_a_step = batch_size

    def identity(self) -> dict[str, Any]:
        """Its options, since these and its pairs decide its weights."""
        names = ("base", "lr", "epochs", "pairs_a_step", "folds", "seed")
        return {"discriminator": {name: getattr(self, name) for name in names}}

    def fit(
        self, pairs: Sequence[Labelled], start: tuple[PreTrainedModel, PreTrainedTokenizerBase]
    ) -> tuple[float, int]:
        """Train on labelled pairs, all of them, and measure how often it is right about pairs that it has not seen.

        Args:
            pairs: At least 2.
            start: Model and tokenizer to start from if it names no `base`; the model may be changed.

        Returns:
            The share of held-out pairs whose better completion scores more, an equal score being half of one; and how
            many pairs were held out.

        Raises:
            ValueError: There are too few pairs, or the model has no form with a scalar output.
            JudgeError: Its weights do not stay finite.
        """
        if len(pairs) < 2:
            raise ValueError(
                f"A discriminator needs at least 2 labelled pairs, got {len(pairs)}: have more of them labelled."
            )
        if self.base is not None:
            start = load_model(self.base), read_tokenizer(self.base)
        folds = min(self.folds, len(pairs))
        right = 0.0
        for fold in range(folds):
            self._loaded = self._train([pair for n, pair in enumerate(pairs) if n % folds != fold], start)
            held_out = pairs[fold::folds]
            better = self.score([prompt for prompt, _, _ in held_out], [text for _, text, _ in held_out])
            worse = self.score([prompt for prompt, _, _ in held_out], [text for _, _, text in held_out])
            for one, other in zip(better, worse, strict=True):
                assert one is not None  # for the types
                assert other is not None
                right += 1.0 if one > other else 0.5 if one == other else 0.0
        self._loaded = self._train(pairs, start)
        return right / len(pairs), len(pairs)

    def _train(
        self, pairs: Sequence[Labelled], start: tuple[PreTrainedModel, PreTrainedTokenizerBase]
    ) -> tuple[Any, Any]:
        model = _with_head(start[0], self.seed)
        self._loaded = model, start[1]
        ids = [(self._ids(prompt, better), self._ids(prompt, worse)) for prompt, better, worse in pairs]
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=0.0)
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.epochs):
            for rows in torch.randperm(len(ids), generator=generator).split(self.pairs_a_step):
                sides = [ids[row][side] for side in (0, 1) for row in rows.tolist()]
                scores = self._forward(model, sides)  # (2 * rows,), the better ones first
                better, worse = scores.chunk(2)
                loss = -logsigmoid(better - worse).mean()
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
        if name := first_nonfinite(model.named_parameters()):
            raise JudgeError(f"The discriminator's weights are not finite, `{name}` first: lower its `lr`.")
        return model, start[1]

    @staticmethod
    def _forward(model: Any, ids: Sequence[Sequence[int]]) -> Tensor:
        """Scores with their gradients, shape `(len(ids),)`; texts of equal length together, so that none is padded."""
        found: dict[int, Tensor] = {}
        for length in sorted({len(one) for one in ids}):
            rows = [row for row, one in enumerate(ids) if len(one) == length]
            batch = torch.tensor([ids[row] for row in rows], device=model.device)
            logits = model(input_ids=batch, attention_mask=torch.ones_like(batch)).logits  # (rows, 1)
            found |= zip(rows, logits[:, 0].unbind(), strict=True)
        return torch.stack([found[row] for row in range(len(ids))])

    def _open(self) -> tuple[Any, Any]:
        if self._loaded is None:
            raise JudgeError(
                "The discriminator has not been trained: use it in `Discriminated`, or `RewardModel` with the folder "
                "of one that has been."
            )
        return self._loaded

    def save(self, folder: Path, measured: Mapping[str, Any]) -> None:
        """Write it as a reward model, whole or not at all, and to the disk before this returns.

        Args:
            folder: Where; nothing may stand there.
            measured: What is known of it, for `agreement.json` in the folder.

        Raises:
            OSError: It cannot be written.
        """
        model, tokenizer = self._open()
        with replace_folder(folder) as part:
            _pad(model.config, None)
            model.save_pretrained(part)
            _pad(model.config, -1)
            tokenizer.save_pretrained(part)
            write_json(part / AGREEMENT, dict(measured))

    def load(self, folder: Path) -> None:
        """Go on with what `save` has written.

        Raises:
            ValueError: It is damaged.
        """
        self._loaded = RewardModel(str(folder))._open()


def _with_head(start: PreTrainedModel, seed: int) -> Any:
    """A sequence classifier with one output on a copy of a language model, in float32.

    Code that comes with the model never runs for it, trusted or not.

    Raises:
        ValueError: transformers has none for its architecture.
    """
    config: Any = copy.deepcopy(start.config)
    config.num_labels = 1
    config.architectures = None
    _pad(config, None)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: Any = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False).float()
        own = getattr(start, start.base_model_prefix).state_dict()
        getattr(model, model.base_model_prefix).load_state_dict(own)
    except (ValueError, AttributeError, RuntimeError) as error:
        own_code = "trust_remote_code" in str(error)
        reason = "Python code of its own would, which is not run" if own_code else str(error).splitlines()[0]
        raise ValueError(
            f"A {start.config.model_type} cannot be given a scalar output, which a discriminator needs ({reason}): "
            "name another model as its `base`."
        ) from error
    _pad(model.config, -1)
    return model.eval().to(start.device)  # in evaluation mode dropout is off


def _pad(config: Any, token: int | None) -> None:
    """Set the id that pads; no text has the id -1, so that the score of each is read at its last token."""
    config.get_text_config().pad_token_id = config.pad_token_id = token
