"""Completions before, while and after training, to see with one's own eyes what was learned."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from rich.console import Console
from rich.text import Text

from lit_dpo.callbacks.progress import ProgressLine, finish_progress
from lit_dpo.data.prompts import Prompt, prompt_ids
from lit_dpo.files import refuse_special
from lit_dpo.module import PreferenceModule
from lit_dpo.plain_text import obeyed_by_none
from lit_dpo.sampling import REPEATING, Completion, Sampler, repetition


class SampleCompletions(Callback):
    """Print the policy's greedy completions of some prompts when training starts and ends.

    Args:
        prompts: User messages; a tokenizer without a chat template gets them as plain text.
        max_new_tokens: Tokens of a completion at most.
    """

    def __init__(self, prompts: list[str], max_new_tokens: int = 40) -> None:
        self.prompts, self.max_new_tokens = prompts, max_new_tokens

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what the policy says before training."""
        self._show("Before training", pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what it says after."""
        finish_progress(trainer)
        self._show("After training", pl_module)

    def _show(self, title: str, module: LightningModule) -> None:
        assert isinstance(module, PreferenceModule)
        completions = [complete(module, prompt, self.max_new_tokens) for prompt in self.prompts]
        _print(title, list(zip(self.prompts, completions, strict=True)))


def complete(module: PreferenceModule, prompt: str, max_new_tokens: int) -> str:
    """The policy's greedy completion of a user message, as text."""
    [completion] = _completions(module, [prompt], Sampler(temperature=0.0, max_new_tokens=max_new_tokens))
    return completion.text.strip()


def _completions(module: PreferenceModule, prompts: Sequence[str], sampler: Sampler) -> list[Completion]:
    """One completion of each user message."""
    assert module.policy is not None
    ids = [prompt_ids(module.tokenizer, Prompt(text, "", line=True)) for text in prompts]
    return [completion for [completion] in sampler(module.policy, module.tokenizer, ids)]


class SamplePrompts(Callback):
    """Show the policy's completions of some prompts at each validation of a fit, and count those that went wrong.

    They are printed, appended to `samples.jsonl` in the run's folder if the run logs at all, and counted:
    `val/samples/unfinished` is the share that the model did not end, `val/samples/repeating` the share of which at
    least half stood in the completion before (see `lit_dpo.sampling.repetition`). Training is the same as without.
    Where weights are sharded this callback is off, and says so.

    Args:
        prompts: User messages; a tokenizer without a chat template gets them as plain text.
        max_new_tokens: Tokens of a completion at most.
        temperature: Divides the logits, at least 0; 0 takes the most likely token each time.
        seed: Of the random numbers; they are the same at each validation.

    Raises:
        ValueError: There is no prompt, or an option is out of its range.
    """

    def __init__(self, prompts: list[str], max_new_tokens: int = 40, temperature: float = 0.0, seed: int = 0) -> None:
        if not prompts:
            raise ValueError("`prompts` must name at least one prompt, or leave `SamplePrompts` out.")
        self.prompts = prompts
        self.sampler = Sampler(1, temperature, max_new_tokens=max_new_tokens, seed=seed)
        self._off = False
        self._path: Path | None = None
        self._written: set[int] = set()  # steps

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out whether this strategy can sample, and what an interrupted run has written already."""
        self._off = pl_module.device_mesh is not None or not isinstance(
            trainer.strategy, SingleDeviceStrategy | DDPStrategy
        )
        if self._off:
            kind = type(trainer.strategy).__name__
            rank_zero_info(f"SamplePrompts is off: {kind} may shard the weights, and sampling needs them whole.")
            return
        folder = trainer.log_dir  # asked for on every process, because they agree on it
        self._path = Path(folder, "samples.jsonl") if trainer.loggers and folder else None
        first = trainer.is_global_zero
        self._written = _steps_in(self._path) if self._path is not None and first else set()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample on every process, which all say the same, and show it on the first."""
        if self._off or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        assert isinstance(pl_module, PreferenceModule)
        with trainer.precision_plugin.forward_context():
            found = _completions(pl_module, self.prompts, self.sampler)
        repeated = [repetition(completion.ids) for completion in found]
        wrong = {
            "unfinished": [not completion.finished for completion in found],
            "repeating": [share >= REPEATING for share in repeated],
        }
        for name, marks in wrong.items():
            pl_module.log(f"val/samples/{name}", sum(marks) / len(marks), batch_size=1, sync_dist=True)
        if trainer.is_global_zero:
            self._show(trainer, found, wrong)
            self._write(trainer, found, repeated)

    def _show(self, trainer: Trainer, found: Sequence[Completion], wrong: Mapping[str, list[bool]]) -> None:
        bar = trainer.progress_bar_callback
        say = bar.print if isinstance(bar, ProgressLine) else Console().print
        counts = ", ".join(f"{sum(marks)} {name}" for name, marks in wrong.items())
        say(Text(f"Samples at step {trainer.global_step}: {counts} of {len(found)}", style="bold"))
        for prompt, completion in zip(self.prompts, found, strict=True):
            say(Text(f"  {obeyed_by_none(prompt)}", style="dim"))
            say(Text(f"  -> {completion.text.strip()!r}"))

    def _write(self, trainer: Trainer, found: Sequence[Completion], repeated: Sequence[float]) -> None:
        """Append a line for each prompt, once for each step however often a run was interrupted."""
        path, step = self._path, trainer.global_step
        if path is None or step in self._written:
            return
        self._written.add(step)
        rows = [
            {"step": step, "prompt": prompt, "completion": completion.text, "ids": completion.ids}
            | {"finished": completion.finished, "repetition": share}
            for prompt, completion, share in zip(self.prompts, found, repeated, strict=True)
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))


def _steps_in(path: Path) -> set[int]:
    """Steps whose samples a file of ours holds; a last line that a crash has cut off is removed."""
    if not path.exists():
        return set()
    refuse_special(path, links=False)
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("rb+") as file:
            file.truncate(len(whole))
    try:
        return {int(json.loads(line)["step"]) for line in whole.splitlines()}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"`{path}` holds something else than samples: move it away.") from error


@rank_zero_only
def _print(title: str, rows: list[tuple[str, str]]) -> None:
    console = Console()
    console.print(Text(title, style="bold"))
    for prompt, completion in rows:
        console.print(Text(f"  {obeyed_by_none(prompt)}", style="dim"))
        console.print(Text(f"  -> {completion!r}"))
