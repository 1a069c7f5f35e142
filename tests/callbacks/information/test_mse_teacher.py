from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import brier_score_loss
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from groundwire.callbacks.information import SquaredErrorTeacher
from groundwire.datamodules import Digits
from helpers.callbacks import check_step_callback
from helpers.edge import CLASSES, Classifier, Rounds, fit, loader, mlp, trainer


class ByHand(Classifier):
    """Squared error of the softmax, plus a share of the cross entropy."""

    def __init__(self, mix: float = 0.0, divisor: int = 1, ce_steps: int = 0) -> None:
        super().__init__(mlp())
        self.mix, self.divisor, self.ce_steps = mix, divisor, ce_steps

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        z = self(x)
        own = F.cross_entropy(z, y)
        if self.trainer.global_step < self.ce_steps:
            return own
        wanted = y.to(z) if y.ndim == 2 else F.one_hot(y, CLASSES).to(z)
        return F.mse_loss(z.softmax(dim=1), wanted, reduction="sum") / len(y) / self.divisor + self.mix * own


def test_it_is_a_step_callback() -> None:
    check_step_callback(lambda: SquaredErrorTeacher(mix=0.1), off=lambda: SquaredErrorTeacher(ce_epochs=100))


@pytest.mark.parametrize(
    ("callback", "by_hand"),
    [
        ({}, {}),
        ({"mix": 0.3}, {"mix": 0.3}),
        ({"reduction": "mean"}, {"divisor": CLASSES}),
        ({"ce_epochs": 1}, {"ce_steps": 4}),
        ({"ce_epochs": 2, "mix": 0.5}, {"ce_steps": 8, "mix": 0.5}),
    ],
)
def test_trains_as_the_objective_written_by_hand(callback: dict[str, Any], by_hand: dict[str, Any]) -> None:
    run = {"precision": "64-true", "steps": 10}
    plugged, _, losses = fit("auto", Classifier(mlp()), callbacks=[SquaredErrorTeacher(**callback)], **run)
    own, _, own_losses = fit("auto", ByHand(**by_hand), **run)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(own_losses), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(plugged, own, rtol=1e-9, atol=1e-11)
    plain, _, _ = fit("auto", Classifier(mlp()), **run)
    assert (plugged - plain).abs().max() > 1e-3


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_accumulated_gradients(precision: Any) -> None:
    run = {"precision": precision, "accumulate_grad_batches": 2}
    plugged, _, _ = fit("auto", Classifier(mlp()), callbacks=[SquaredErrorTeacher(mix=0.1)], **run)
    own, _, _ = fit("auto", ByHand(mix=0.1), **run)
    torch.testing.assert_close(plugged, own, rtol=1e-4, atol=1e-5)


def test_distributions_are_welcome_as_labels() -> None:
    data = loader()
    x, y = data.dataset.tensors  # type: ignore[attr-defined]
    soft = 0.7 * F.one_hot(y, CLASSES).float() + 0.3 * F.one_hot(y.roll(1), CLASSES).float()
    mixed: Any = DataLoader(TensorDataset(x, soft), batch_size=24)
    plugged, _, _ = fit("auto", Classifier(mlp()), mixed, callbacks=[SquaredErrorTeacher()], precision="64-true")
    own, _, _ = fit("auto", ByHand(), mixed, precision="64-true")
    torch.testing.assert_close(plugged, own, rtol=1e-9, atol=1e-11)


def test_the_modules_own_loss_is_still_logged() -> None:
    _, t, losses = fit("auto", callbacks=[SquaredErrorTeacher(mix=0.5)], steps=1)
    logged = {name: float(value) for name, value in t.callback_metrics.items()}
    assert losses[0] == pytest.approx(logged["mse_teacher/brier"] + 0.5 * logged["train/loss"])


def test_brier_score_on_held_out_digits_is_lower_than_of_cross_entropy() -> None:
    data = Digits(flatten=True, seed=0, train_fraction=0.2)
    data.setup("fit")
    x, y = data.test_data
    found: dict[str, list[float]] = {"ce": [], "mse": []}
    for seed in (0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            start = Classifier(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)))
        for name, callbacks in (("ce", []), ("mse", [SquaredErrorTeacher()])):
            module = copy.deepcopy(start)
            trainer(steps=200, callbacks=callbacks).fit(module, Digits(flatten=True, seed=0, train_fraction=0.2))
            with torch.no_grad():
                p = module(x).softmax(dim=1).numpy()
            found[name].append(sum(brier_score_loss((y == c).numpy(), p[:, c]) for c in range(10)))
    assert np.mean(found["mse"]) < np.mean(found["ce"])


def test_comes_closer_to_a_known_posterior_than_cross_entropy() -> None:
    """Three Gaussians of unequal spread and a linear network, which cannot have their posterior, known in closed form.

    Of all it can have, squared error picks the nearest one; cross entropy another.
    """
    centres, spread = torch.tensor([[0.0, 1.0], [0.9, -0.5], [-0.9, -0.5]]), torch.tensor([0.3, 0.8, 2.0])

    def draw(n: int, seed: int) -> tuple[Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed)
        y = torch.randint(0, 3, (n,), generator=g)
        return centres[y] + spread[y, None] * torch.randn(n, 2, generator=g), y

    x_new, _ = draw(20_000, 100)
    log_density = -(torch.cdist(x_new, centres) ** 2) / (2 * spread**2) - 2 * spread.log()
    posterior = log_density.softmax(dim=1)
    for seed in (0, 1):
        batch: Any = Rounds(draw(3000, seed))
        distance = {}
        for name, callbacks in (("ce", []), ("mse", [SquaredErrorTeacher()])):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                module = Classifier(nn.Linear(2, 3), lr=5e-2)
            trainer(steps=150, callbacks=callbacks).fit(module, batch)
            with torch.no_grad():
                distance[name] = float((module(x_new).softmax(dim=1) - posterior).square().sum(dim=1).mean())
        assert distance["mse"] < 0.98 * distance["ce"]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"mix": -1.0}, "`mix`"), ({"ce_epochs": -1}, "`ce_epochs`"), ({"reduction": "sum"}, "`reduction` must be")],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SquaredErrorTeacher(**options)
