"""An exact epsilon, and bugs to plant in DP-SGD.

Each bug puts a wrong method in place of a public one of a part, and what is claimed stays.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from groundwire.callbacks.privacy.clipping import AdaptiveClipping, Clipping, FlatClipping, Norms
from groundwire.callbacks.privacy.sampling import PoissonSampler


def gaussian_epsilon(sigma: float, releases: int, delta: float) -> float:
    """Exact for full participation: T releases are one of ``sigma / sqrt(T)``; Balle and Wang's delta, bisected."""
    mu, phi = math.sqrt(releases) / sigma, lambda x: math.erfc(-x / math.sqrt(2)) / 2
    low, high = 0.0, 500.0
    for _ in range(100):
        middle = (low + high) / 2
        above = phi(mu / 2 - middle / mu) - math.exp(middle) * phi(-mu / 2 - middle / mu) > delta
        low, high = (middle, high) if above else (low, middle)
    return high


def no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise is accounted for, but not added."""
    for kind in (Clipping, AdaptiveClipping):
        monkeypatch.setattr(kind, "gradient_noise", lambda self, noise_multiplier, expected_batch: 0.0)


def clipping_after_averaging(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of the gradients is clipped, instead of each of them; they have to be orthogonal to each other."""

    def weights(self: FlatClipping, squared_norms: Norms) -> Norms:
        records = torch.stack(list(squared_norms.values())).sum(0)
        norm_of_mean = records.sum().sqrt() / len(records)  # of orthogonal vectors, squared norms add up
        factor = (self.max_grad_norm / norm_of_mean).clamp(max=1.0)
        return {p: factor.expand_as(norm) for p, norm in squared_norms.items()}

    monkeypatch.setattr(FlatClipping, "weights", weights)


def fixed_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each record takes part once an epoch, in order, instead of by its own coin in every step."""

    def draw(self: PoissonSampler, step: int) -> Tensor:
        first = step % self.steps_per_epoch * self.logical_batch
        return torch.arange(first, first + self.logical_batch)

    monkeypatch.setattr(PoissonSampler, "draw", draw)
