"""Which pairs each step of stepwise training trains on."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from lit_dpo.data.opening import Opening

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lit_dpo.data.encode import PairEncoder
    from lit_dpo.data.pair import Pair
    from lit_dpo.sampling import Completion, Sampler

Prompt = str | Sequence[Mapping[str, str]]
"""Plain text, or chat messages with `role` and `content`."""


class Pool:
    """The training pairs, held-out ones left out, and the policy that starts a step.

    `fit_stepwise` makes one for each step. To try a partition by itself, make one of names and functions:

    >>> import torch
    >>> pool = Pool(["easy", "hard"], score=lambda step: torch.tensor([1.5, -0.5]))
    >>> pool.rows, pool.margins()
    (2, tensor([ 1.5000, -0.5000]))

    Args:
        sources: Name of the data source of each pair, by row number.
        folder: The folder of the step.
        score: Gives the margins of the policy that starts a step, numbered from 0; `None` means this one.
        generate: Gives completions; called with the arguments of `sample`.
        complete: Gives completions; called with the arguments of `complete`.
        processes: Number of this process, and how many there are that can talk to each other.
        gather: Makes one of what they have found, each under its own numbers.
        encoder: Makes what encodes rows as they are trained on.
        pairs: Gives the pairs as texts.
        model: Loads the model that starts a step.
        logps: Gives log-probs; called with the arguments of `logps`.
        progress: Tells whether this process draws on a terminal how far it is.
        allow_changes: Whether the user lets a run go on whose data have changed.
        policy: What decides the policy that starts the step and how it is asked, as plain values.

    Attributes:
        sources: Name of the data source of each pair, by row number.
        allow_changes: As given.
        policy: As given.
    """

    def __init__(
        self,
        sources: Sequence[str],
        folder: Path | None = None,
        score: Callable[[int | None], Tensor] | None = None,
        generate: Callable[..., list[list[str]]] | None = None,
        complete: Callable[[Sequence[Prompt | Opening], Sampler], Iterator[list[Completion]]] | None = None,
        processes: tuple[int, int] = (0, 1),
        gather: Callable[[dict[int, Any]], dict[int, Any]] = dict,
        encoder: Callable[[], PairEncoder] | None = None,
        pairs: Callable[[], Sequence[Pair]] | None = None,
        model: Callable[[int], tuple[PreTrainedModel, PreTrainedTokenizerBase]] | None = None,
        logps: Callable[..., Iterator[list[float]]] | None = None,
        progress: Callable[[], bool] | None = None,
        allow_changes: bool = False,
        policy: Mapping[str, object] | None = None,
    ) -> None:
        self.sources, self._progress, self.allow_changes = sources, progress, allow_changes
        self.policy = dict(policy or {})
        self._encoder = encoder
        self._pairs, self._model, self._logps = pairs, model, logps
        self._complete, self._processes, self._gather = complete, processes, gather
        self._folder, self._score, self._generate = folder, score, generate

    @property
    def progress(self) -> bool:
        """Whether this process draws on a terminal how far it is."""
        return self._progress is not None and self._progress()

    @property
    def rows(self) -> int:
        """Number of pairs; their row numbers count from 0."""
        return len(self.sources)

    @property
    def folder(self) -> Path:
        """The folder of the step, made when it is asked for: for files of the partition's own.

        Every process of a run calls `Partition.next`, so that several of them may write there at a time.

        Raises:
            ValueError: There is none.
        """
        if self._folder is None:
            raise ValueError("This pool has no folder: run the partition through `fit_stepwise`.")
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder

    def at(self, step: int) -> Pool:
        """This pool, with the folder of an earlier step."""
        found = copy.copy(self)
        found._folder = self._folder and self._folder.with_name(f"partition_{step}")
        return found

    def folder_of(self, step: int) -> Path:
        """The folder of an earlier step, which holds what it has left."""
        return self.folder.with_name(f"partition_{step}")

    def pairs(self) -> Sequence[Pair]:
        """The pairs as texts, by row number; the data are read again for it, and each text when it is asked for.

        Raises:
            ValueError: There are none.
        """
        if self._pairs is None:
            raise ValueError("This pool has no texts: run the partition through `fit_stepwise`.")
        return self._pairs()

    def model(self, step: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model that starts a step, this one or an earlier one, and its tokenizer; a copy that may be changed.

        Raises:
            ValueError: There is none.
        """
        if self._model is None:
            raise ValueError("Models need `fit_stepwise`: run the partition through it.")
        return self._model(step)

    def margins(self, step: int | None = None) -> Tensor:
        """Log-prob of chosen minus that of rejected under the policy that starts the step, in nats.

        The first call scores all pairs; the values are kept in the folder of the step, so that a resumed run has the
        same ones. They are the same on all processes.

        Args:
            step: Another step, up to this one, counted from 0: its starting policy scores.

        Returns:
            Shape `(rows,)`, float64.

        Raises:
            ValueError: There is no policy.
        """
        if self._score is None:
            raise ValueError("Margins need the policy that starts the step: run the partition through `fit_stepwise`.")
        return self._score(step)

    def sample(
        self,
        prompts: Sequence[Prompt],
        samples: int = 1,
        temperature: float = 1.0,
        max_new_tokens: int = 256,
        seed: int = 0,
        batch_size: int = 32,
    ) -> list[list[str]]:
        """Completions of prompts by the policy that starts the step, as text without special tokens.

        The policy is loaded for the call. The random numbers of a completion depend on `seed`, the step, its prompt,
        how often that came before, and the number of the sample alone; see `lit_dpo.sampling.Sampler`. A resumed step
        gets the same completions from the same arguments, by any number of processes. Several processes share the
        prompts once they are connected.

        Args:
            prompts: Texts, or lists of chat messages, which the chat template renders.
            samples: Completions of each prompt.
            temperature: Divides the logits, at least 0; 0 takes the likeliest token each time.
            max_new_tokens: Tokens of a completion at most; one that reaches them has no end.
            seed: Seed of the random numbers.
            batch_size: Prompts to complete at a time; it does not change what they get.

        Returns:
            For each prompt its completions.

        Raises:
            ValueError: There is no policy, or an argument is out of its range.
        """
        if self._generate is None:
            raise ValueError("Samples need the policy that starts the step: run the partition through `fit_stepwise`.")
        if isinstance(prompts, str):
            raise ValueError("`prompts` must be a list of prompts, got a text: give `[prompt]`.")
        if min(samples, max_new_tokens, batch_size) < 1 or temperature < 0:
            raise ValueError(
                "`samples`, `max_new_tokens` and `batch_size` must be at least 1 and `temperature` at least 0, got "
                f"{samples}, {max_new_tokens}, {batch_size} and {temperature}."
            )
        if temperature == 0 and samples > 1:
            raise ValueError("At `temperature` 0 all samples are equal: ask for one, or set it above 0.")
        return self._generate(prompts, samples, temperature, max_new_tokens, seed, batch_size)

    @property
    def encoder(self) -> PairEncoder:
        """What encodes rows as they are trained on.

        Raises:
            ValueError: There is none.
        """
        if self._encoder is None:
            raise ValueError("This pool encodes no rows: run the partition through `fit_stepwise`.")
        return self._encoder()

    def complete(self, prompts: Sequence[Prompt | Opening], sampler: Sampler) -> Iterator[list[Completion]]:
        """Completions of prompts with their token ids, one prompt after the other, by this process alone.

        Args:
            prompts: Texts, or lists of chat messages, which the chat template renders; or openings alone, which are
                gone on with as they are.
            sampler: How to sample.

        Returns:
            An iterator over the completions of each prompt, in order. The policy is in memory until its end.

        Raises:
            ValueError: There is no policy.
        """
        if self._complete is None:
            raise ValueError("Samples need the policy that starts the step: run the partition through `fit_stepwise`.")
        return self._complete(prompts, sampler)

    def logps(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Sequence[int]]], step: int
    ) -> Iterator[list[float]]:
        """Log-probs of completions, one prompt after the other, by this process alone; no prompt changes another's.

        Args:
            prompts: As of `complete`.
            completions: For each prompt its completions as token ids, at least one; none of them empty.
            step: The model that starts this step scores: this one or an earlier one.

        Returns:
            An iterator over the sums over tokens, in nats, of each prompt's completions.

        Raises:
            ValueError: There is no such model.
        """
        if self._logps is None:
            raise ValueError("Log-probs need the model that starts a step: run the partition through `fit_stepwise`.")
        return self._logps(prompts, completions, step)

    def share(self, count: int) -> range:
        """Of so many numbers from 0 those that are this process's; all until the processes are connected."""
        rank, processes = self._processes
        return range(rank, count, processes)

    def gathered(self, found: dict[int, Any]) -> dict[int, Any]:
        """What the processes have found, each under its own numbers, as one on all of them."""
        return self._gather(found)


class Partition(ABC):
    """Says which pairs each step of stepwise training trains on.

    Training runs one step after the other, and the policy at the end of one is the starting policy and the reference of
    the next (stepwise DPO, https://arxiv.org/abs/2403.19270).

    Attributes:
        other_reference: Whether a model of its own may be the reference in every step instead.
        first_reference: Whether the model that starts the first step is the reference of all of them.
        restarts: Whether each step trains that model anew; samples are those of what the step before has made.
        rows_alone: Whether `next` looks at the number of pairs and the names of their sources alone. Then `lit-dpo
            check` asks it too, without a policy or a folder, and counts all steps.
    """

    other_reference: ClassVar[bool] = False
    first_reference: ClassVar[bool] = False
    restarts: bool = False
    rows_alone: ClassVar[bool] = False

    @abstractmethod
    def next(self, step: int, pool: Pool) -> Tensor | Sequence[Mapping[str, object]] | None:
        """What the step trains on.

        The answer must depend on its arguments and the files in `pool.folder` alone: a resumed run asks again, and
        so does every process of a run. New pairs are written to `pairs.jsonl` in the folder of the step before they
        are trained on; a run that finds them there does not ask for them again.

        Args:
            step: Number of the step, from 0.
            pool: The training pairs, and the policy that starts the step.

        Returns:
            Row numbers of the pool, an integer tensor of at least one; or new pairs, each a row as a data file has it,
            with the usual column names; or `None` when the step before was the last.

        Raises:
            ValueError: The pool cannot be divided in this way.
        """

    def resumed(self, step: int, pool: Pool) -> None:  # noqa: B027 - most have nothing to compare
        """Look at a step whose new pairs an earlier run has written, which are going to be trained on as they are.

        Args:
            step: Number of the step, from 0.
            pool: As for `next`.

        Raises:
            ValueError: They were made under other options, so that this run must not go on with them.
        """
