"""Diffusion-DPO on points in the plane: a loss of this package over denoising errors instead of log-probs.

A diffusion model has no log-probs of its samples that could be computed. Diffusion-DPO (Wallace et al.,
https://arxiv.org/abs/2311.12908) puts half of the negative denoising error in their place: with the same time step and
the same noise for both samples of a pair, the loss is
``-logsigmoid(-0.5 * beta * ((e_w - e_l) - (e_w_ref - e_l_ref)))``, e being the mean squared error of the predicted
noise. That is `DPOLoss` over a `PairLogps` of these values.

Here a small network first learns to denoise a ring of four equally likely modes. Then pairs say that a point of the
right-hand mode is better than one of another mode. The share of samples at that mode is measured before and after. With
the environment variable FIGURE set to the name of a file, both sets of samples are drawn into it (with matplotlib).
"""

import copy
import os
from collections.abc import Iterator

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lit_dpo import DPOLoss, PairLogps

STEPS = 40  # of the diffusion
KEPT = torch.linspace(0.9999, 0.02, STEPS)  # share of a point's variance that is left at each step
MODES = torch.tensor([[1.5, 0.0], [0.0, 1.5], [-1.5, 0.0], [0.0, -1.5]])


def points(modes: Tensor) -> Tensor:
    """A point near each of these modes, shape ``(batch, 2)``."""
    return MODES[modes] + 0.15 * torch.randn(len(modes), 2)


class Denoiser(nn.Module):
    """Predicts the noise in a point from the noisy point and the time step."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Embedding(STEPS, 64)
        self.first = nn.Linear(2, 64)
        self.rest = nn.Sequential(nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, noisy: Tensor, step: Tensor) -> Tensor:
        """Noise, shape ``(batch, 2)``, of points ``(batch, 2)`` at steps ``(batch,)``."""
        noise: Tensor = self.rest(self.first(noisy) + self.time(step))
        return noise


def errors(model: nn.Module, clean: Tensor, step: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the predicted noise, shape ``(batch,)``."""
    kept = KEPT[step, None]
    predicted = model(kept.sqrt() * clean + (1 - kept).sqrt() * noise, step)
    return (predicted - noise).square().mean(1)


class Pairs(IterableDataset[tuple[Tensor, Tensor]]):
    """Batches of preferred points, of the first mode, and others, of any other mode."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield points(torch.zeros(256, dtype=torch.long)), points(torch.randint(1, 4, (256,)))


class DiffusionDPO(L.LightningModule):
    """A policy, its frozen copy as the reference, and DPO over denoising errors.

    Args:
        start: The denoiser to start from.
        beta: Strength of the pull to the reference. Images take 5000, whose errors are means over many more numbers.
    """

    def __init__(self, start: Denoiser, beta: float = 50.0) -> None:
        super().__init__()
        self.policy = copy.deepcopy(start)
        self.reference = copy.deepcopy(start).requires_grad_(False)
        self.loss = DPOLoss(beta=beta)
        self.losses: list[float] = []

    @staticmethod
    def logps(model: nn.Module, batch: tuple[Tensor, Tensor], step: Tensor, noise: Tensor) -> PairLogps:
        """Half of the negative errors in the place of log-probs."""
        chosen, rejected = (-0.5 * errors(model, clean, step, noise) for clean in batch)
        return PairLogps(chosen, rejected, torch.ones_like(step), torch.ones_like(step))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The mean loss over the pairs of a batch, with one time step and one noise for both sides of a pair."""
        step, noise = torch.randint(STEPS, (len(batch[0]),)), torch.randn_like(batch[0])
        policy = self.logps(self.policy, batch, step, noise)
        with torch.no_grad():
            reference = self.logps(self.reference, batch, step, noise)
        loss = self.loss(policy, reference).mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over the policy."""
        return torch.optim.AdamW(self.policy.parameters(), lr=3e-4)


def pretrained(steps: int = 800) -> Denoiser:
    """A denoiser of all four modes."""
    model = Denoiser()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        clean = points(torch.randint(4, (256,)))
        loss = errors(model, clean, torch.randint(STEPS, (256,)), torch.randn(256, 2)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def samples(model: nn.Module, count: int = 1000) -> Tensor:
    """Points that a denoiser makes out of noise, without adding any on the way (DDIM), shape ``(count, 2)``."""
    found = torch.randn(count, 2)
    for number in reversed(range(STEPS)):
        kept, before = KEPT[number], KEPT[number - 1] if number else torch.tensor(1.0)
        noise = model(found, torch.full((count,), number))
        clean = (found - (1 - kept).sqrt() * noise) / kept.sqrt()
        found = before.sqrt() * clean + (1 - before).sqrt() * noise
    return found


def mass(found: Tensor) -> float:
    """Share of the points that lie nearest to the preferred mode."""
    return float((torch.cdist(found, MODES).argmin(1) == 0).float().mean())


L.seed_everything(0, verbose=False)
start = pretrained()
module = DiffusionDPO(start)
trainer = L.Trainer(
    max_steps=100,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(module, DataLoader(Pairs(), batch_size=None))
before, after = samples(start), samples(module.policy)
print(f"loss: {module.losses[0]:.4f} at the start, {sum(module.losses[-20:]) / 20:.4f} at the end")
print(f"samples at the preferred mode: {mass(before):.1%} before, {mass(after):.1%} after")
print(f"samples within 0.6 of a mode: {(torch.cdist(after, MODES).amin(1) < 0.6).float().mean():.1%} after")
assert abs(module.losses[0] - 0.6931) < 1e-3  # log 2
assert mass(after) > 1.5 * mass(before)

if figure := os.environ.get("FIGURE"):
    import matplotlib.pyplot as plt

    plot, (left, right) = plt.subplots(1, 2, figsize=(8, 4), sharex=True, sharey=True)
    for axes, found, title in ((left, before, "before"), (right, after, "after")):
        axes.scatter(*found.T, s=2)
        axes.set_title(f"{title}: {mass(found):.0%} at the preferred mode")
    plot.savefig(figure)
