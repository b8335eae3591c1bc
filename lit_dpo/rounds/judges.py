"""Judges: what a completion is worth."""

from __future__ import annotations

import hashlib
import inspect
import math
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch

from lit_dpo.data.partition import Pool, Prompt
from lit_dpo.pretrained import read_classifier, read_tokenizer
from lit_dpo.references.table import fingerprint
from lit_dpo.rounds.permission import refuse_function


class JudgeError(ValueError):
    """A judge did not do its work; what it judged before is kept."""


class Judge(ABC):
    """Says what completions are worth. A judge of your own has a `score`, and an `identity` if its options decide it.

    Attributes:
        prompts_at_once: Prompts whose completions it is given at a time. What it said of them is kept when it has
            said it of all.
    """

    prompts_at_once: ClassVar[int] = 1

    @abstractmethod
    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Sequence[float | None]:
        """Scores of completions.

        Args:
            prompts: The prompt of each completion: text, or messages.
            completions: As text.

        Returns:
            One finite number each, a larger one for a better completion; `None` for no opinion, in which case the
            completion is in no pair.

        Raises:
            JudgeError: It cannot; the message says why.
        """

    def identity(self) -> dict[str, Any]:
        """What decides its scores, as plain values: a round that was begun with another judge does not go on."""
        return {"judge": f"{type(self).__module__}.{type(self).__qualname__}"}

    def prepare(self, step: int, pool: Pool) -> None:  # noqa: B027 - most need no round
        """Know the round before anything else is asked: for a judge that looks at the policy.

        Args:
            step: Number of the round.
            pool: Gives the models that start this and earlier rounds.
        """

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Give back what it holds, at the end of a round."""


def checked(scores: object, wanted: int) -> list[float | None]:
    """Scores as plain numbers.

    Raises:
        JudgeError: They are too few or too many, or one is no finite number.
    """
    given = list(scores) if isinstance(scores, Sequence) else None
    if given is None or len(given) != wanted:
        said = "no list of scores" if given is None else f"{len(given)} scores"
        raise JudgeError(f"The judge gave {said} for {wanted} completions: give one each, `None` for no opinion.")
    return [None if score is None else _number(score) for score in given]


def _number(score: object) -> float:
    """A score as a plain number; raises JudgeError if it is none."""
    try:
        found = float(score) if isinstance(score, bool | int | float) else math.nan
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise JudgeError(
            f"The judge gave the score {repr(score)[:80]}: give a finite number, or `None` for no opinion; `.item()` "
            "makes a plain number of what NumPy or PyTorch give."
        )
    return found


class Verifier(Judge):
    """A function of yours that says whether a completion is right, or how good it is.

    From the command line, its module needs `--allow-import`. It is called in this process and gets the completion as
    text; nothing that the model says is executed by anybody else.

    Args:
        function: Called with a prompt (text, or messages) and a completion; `True` or a number, a larger one for a
            better completion.
        seconds: How long one call may take, where the system can interrupt it: on Unix, in the main thread.

    Raises:
        ValueError: `seconds` is not above 0, or the command line has not permitted the function.
    """

    def __init__(self, function: Callable[[Any, str], bool | float | None], seconds: float = 60.0) -> None:
        if not seconds > 0:
            raise ValueError(f"`seconds` must be above 0, got {seconds}.")
        refuse_function(function)
        self.function, self.seconds = function, seconds

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float | None]:
        """One call a completion.

        Raises:
            JudgeError: The function raised an error or took too long.
        """
        found: list[float | None] = []
        for prompt, completion in zip(prompts, completions, strict=True):
            try:
                with _interrupted_after(self.seconds):
                    found.append(self.function(prompt, completion))
            except (Exception, SystemExit, _TooSlowError) as error:
                problem = str(error) if isinstance(error, _TooSlowError) else f"raised {type(error).__name__}: {error}"
                raise JudgeError(
                    f"The verifier `{self._name}` {problem} (prompt {prompt!r}, completion {completion!r}): correct it "
                    "and go on; what was judged before is kept."
                ) from error
        return found

    @property
    def _name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def identity(self) -> dict[str, Any]:
        """The name of the function, and the digest of its code, as far as that can be read."""
        try:
            source = inspect.getsource(self.function)
        except (OSError, TypeError):
            source = ""
        return {**super().identity(), "function": self._name, "code": hashlib.sha256(source.encode()).hexdigest()}


class _TooSlowError(BaseException):
    """No function's `except Exception` takes it for a wrong answer."""


@contextmanager
def _interrupted_after(seconds: float) -> Iterator[None]:
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    late = _TooSlowError(f"took more than {seconds:g} seconds")
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True
        raise late

    before = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, before)
    if stopped:  # and the function caught it
        raise late


class RewardModel(Judge):
    """A reward model: a sequence classifier with one output, which reads prompt and completion by its own template.

    Completions of equal length are scored together, so that nothing is padded and none depends on another.

    Args:
        model: A hub name or folder.
        batch_size: Completions at a time, at least 1.

    Raises:
        ValueError: `batch_size` is below 1.
    """

    prompts_at_once = 32

    def __init__(self, model: str, batch_size: int = 64) -> None:
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        self.model, self.batch_size = model, batch_size
        self._loaded: tuple[Any, Any] | None = None

    def _open(self) -> tuple[Any, Any]:
        if self._loaded is None:
            model: Any = read_classifier(self.model)
            if model.config.num_labels != 1:
                raise ValueError(
                    f"`{self.model}` has {model.config.num_labels} outputs, and a reward model has one: give another."
                )
            model.config.get_text_config().pad_token_id = model.config.pad_token_id = -1  # nothing is padded
            model.to("cuda" if torch.cuda.is_available() else "cpu")
            self._loaded = model.eval(), read_tokenizer(self.model)
        return self._loaded

    @torch.no_grad()
    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float | None]:
        """Its output for each, in float32."""
        model, _ = self._open()
        ids = [self._ids(prompt, said) for prompt, said in zip(prompts, completions, strict=True)]
        found: list[float | None] = [None] * len(ids)
        for length in sorted({len(one) for one in ids}):
            rows = [row for row, one in enumerate(ids) if len(one) == length]
            for start in range(0, len(rows), self.batch_size):
                some = rows[start : start + self.batch_size]
                batch = torch.tensor([ids[row] for row in some], device=model.device)
                logits = model(input_ids=batch, attention_mask=torch.ones_like(batch)).logits  # (some, 1)
                for row, value in zip(some, logits[:, 0].float().tolist(), strict=True):
                    found[row] = value
        return found

    def _ids(self, prompt: Prompt, completion: str) -> list[int]:
        _, tokenizer = self._open()
        if tokenizer.chat_template is None:
            if not isinstance(prompt, str):
                raise JudgeError(
                    f"The tokenizer of `{self.model}` has no chat template for prompts in messages: use a reward "
                    "model that has one, or prompts of text."
                )
            return list(tokenizer(prompt + completion).input_ids)
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        text = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": completion}], tokenize=False)
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    def identity(self) -> dict[str, Any]:
        """Its name and the fingerprint of its weights."""
        weights = self._open()[0].state_dict().items()
        return {**super().identity(), "model": str(Path(self.model)), "weights": fingerprint(weights)}

    def close(self) -> None:
        """Free its memory."""
        self._loaded = None
