from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from groundwire.callbacks.adversarial import FGSM, MART, PGD, TRADES, ConfinedPolytopes, ThreatModel
from groundwire.plugins.random import stream
from helpers.callbacks import check_step_callback
from helpers.edge import CLASSES, Classifier, fit, loader, mlp, weights

EPS, BOX = 0.3, 6.0
THREAT = ThreatModel(eps=EPS, lo=-BOX, hi=BOX)
EXACT: dict[str, Any] = {"precision": "64-true", "steps": 4}


def within(u: Tensor, x: Tensor) -> Tensor:
    return torch.maximum(torch.minimum(u, x + EPS), x - EPS).clamp(-BOX, BOX)


def mart_loss(clean: Tensor, adversarial: Tensor, y: Tensor, lam: float) -> Tensor:
    """Sample by sample, from probabilities."""
    p, q = clean.softmax(dim=1), adversarial.softmax(dim=1)
    terms = []
    for i, label in enumerate(y.tolist()):
        wrong = max((q[i, k] for k in range(CLASSES) if k != label), key=float)
        boosted = -torch.log(q[i, label]) - torch.log(1.0001 - wrong + 1e-12)
        kl = sum(p[i, k] * torch.log(p[i, k] / q[i, k]) for k in range(CLASSES))
        terms.append(boosted + lam * kl * (1 - p[i, label]))
    return torch.stack(terms).mean()


def mart_by_hand(lam: float, network: nn.Module, size: float, steps: int, every: int = 1) -> Tensor:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for i, (x, y) in enumerate(loader()):
        x = x.double()
        clean = network(x)  # first: the attack then sees the statistics that this forward left
        g = stream(0, purpose="adversarial/mart", round=i, device_id=0)
        u = within(x + 0.001 * torch.special.ndtri(torch.rand(x.shape, generator=g, dtype=x.dtype)), x)
        network.eval()
        for _ in range(steps):
            u = u.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(network(u), y), u)
            u = within(u + size * gradient.sign(), x)
        network.train()
        loss = mart_loss(clean, network(u.detach()), y, lam)
        (loss / every).backward()
        if (i + 1) % every == 0:
            optimizer.step()
            optimizer.zero_grad()
    return weights(network)


def with_batchnorm() -> nn.Module:
    return mlp(nn.BatchNorm1d(16))


def test_it_is_a_step_callback() -> None:
    check_step_callback(lambda: MART(THREAT, attack=PGD(2, start="gaussian", track="last")))


@pytest.mark.parametrize("network", [mlp, with_batchnorm], ids=["plain", "batchnorm"])
@pytest.mark.parametrize("lam", [0.0, 5.0])
def test_trains_as_mart_written_by_hand(network: Any, lam: float) -> None:
    callback = MART(THREAT, lam, PGD(3, 0.12, start="gaussian", track="last"))
    found, _, _ = fit("auto", Classifier(network(), "SGD", lr=0.1), callbacks=[callback], **EXACT)
    torch.testing.assert_close(found, mart_by_hand(lam, network().double(), 0.12, 3), rtol=0, atol=1e-10)


def test_accumulated_gradients_are_those_written_by_hand() -> None:
    found, _, _ = fit(
        "auto",
        Classifier(mlp(), "SGD", lr=0.1),
        callbacks=[MART(THREAT, 5.0, PGD(2, 0.12, start="gaussian", track="last"))],
        accumulate_grad_batches=2,
        **(EXACT | {"steps": 2}),
    )
    torch.testing.assert_close(found, mart_by_hand(5.0, mlp().double(), 0.12, 2, every=2), rtol=0, atol=1e-10)


def test_the_modules_own_loss_has_no_part_in_it() -> None:
    class Squares(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return 1000 * self(batch[0]).square().sum()

    one, _, losses = fit("auto", Classifier(mlp()), callbacks=[MART(THREAT, attack=FGSM())], steps=4)
    other, _, other_losses = fit("auto", Squares(mlp()), callbacks=[MART(THREAT, attack=FGSM())], steps=4)
    assert torch.equal(one, other)
    assert losses == other_losses


def test_logs_unweighted_terms() -> None:
    _, t, losses = fit("auto", callbacks=[MART(THREAT, 2.0, FGSM())], steps=1)
    logged = {name: float(value) for name, value in t.callback_metrics.items()}
    assert set(logged) == {"train/loss", "mart/boosted_ce", "mart/weighted_kl", "mart/robust_acc"}
    assert losses[0] == pytest.approx(logged["mart/boosted_ce"] + 2.0 * logged["mart/weighted_kl"], rel=1e-5)
    x, y = next(iter(loader()))
    network, x = mlp(), x.requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(network(x), y), x)
    with torch.no_grad():
        predicted = network(within(x + EPS * gradient.sign(), x)).argmax(dim=1)
    assert logged["mart/robust_acc"] == pytest.approx(float(np.mean((predicted == y).numpy())))


def test_it_must_come_after_what_it_would_replace() -> None:
    message = "MART replaces the loss of the step inside of it, and so the terms of {}"
    for other, name in (
        (TRADES(THREAT, attack=FGSM()), "TRADES"),
        (ConfinedPolytopes(THREAT), "ConfinedPolytopes"),
    ):
        with pytest.raises(MisconfigurationException, match=message.format(name)):
            fit("auto", callbacks=[MART(THREAT, attack=FGSM()), other])
    both, _, _ = fit("auto", callbacks=[TRADES(THREAT, attack=FGSM()), MART(THREAT, attack=FGSM())])
    alone, _, _ = fit("auto", callbacks=[MART(THREAT, attack=FGSM())])
    assert not torch.equal(both, alone)


def test_a_negative_weight_is_refused() -> None:
    for lam in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="`lam` must be at least 0, got"):
            MART(THREAT, lam=lam)
