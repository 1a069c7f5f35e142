from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundwire.callbacks.adversarial import FGSM, PGD, TRADES, ThreatModel
from groundwire.plugins.random import stream
from helpers.callbacks import check_step_callback
from helpers.edge import CLASSES, FEATURES, Classifier, fit, loader, mlp, weights

EPS, BOX = 0.3, 6.0
THREAT = ThreatModel(eps=EPS, lo=-BOX, hi=BOX)
EXACT: dict[str, Any] = {"precision": "64-true", "steps": 4}


def within(u: Tensor, x: Tensor) -> Tensor:
    return torch.maximum(torch.minimum(u, x + EPS), x - EPS).clamp(-BOX, BOX)


def trades_kl(f: Tensor, g: Tensor) -> Tensor:
    """Sum over the batch, as in the authors' code: ``KLDivLoss(log_softmax(adv), softmax(clean))``."""
    return F.kl_div(F.log_softmax(g, dim=1), F.softmax(f, dim=1), reduction="sum")


def found_by_hand(network: nn.Module, x: Tensor, step: int, size: float, steps: int) -> Tensor:
    """The inner maximisation of TRADES, in evaluation mode."""
    network.eval()
    g = stream(0, purpose="adversarial/trades", round=step, device_id=0)
    normal = torch.special.ndtri(torch.rand(x.shape, generator=g, dtype=x.dtype).clamp_min(1e-7))
    u, clean = within(x + 0.001 * normal, x), network(x).detach()
    for _ in range(steps):
        u = u.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(trades_kl(clean, network(u)), u)
        u = within(u + size * gradient.sign(), x)
    network.train()
    return u.detach()


def trades_by_hand(beta: float, network: nn.Module, size: float, steps: int, every: int = 1) -> Tensor:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for i, (x, y) in enumerate(loader()):
        x = x.double()
        clean = network(x)  # first: the attack then sees the statistics that this forward left
        adversarial = found_by_hand(network, x, i, size, steps)
        loss = F.cross_entropy(clean, y) + beta / len(y) * trades_kl(clean, network(adversarial))
        (loss / every).backward()
        if (i + 1) % every == 0:
            optimizer.step()
            optimizer.zero_grad()
    return weights(network)


def with_batchnorm() -> nn.Module:
    return mlp(nn.BatchNorm1d(16))


def test_it_is_a_step_callback() -> None:
    check_step_callback(
        lambda: TRADES(THREAT, 3.0, PGD(2, loss="kl", start="gaussian", track="last"), warmup_epochs=0.5),
        off=lambda: TRADES(THREAT, 0.0),
    )


@pytest.mark.parametrize("network", [mlp, with_batchnorm], ids=["plain", "batchnorm"])
def test_trains_as_trades_written_by_hand(network: Any) -> None:
    callback = TRADES(THREAT, beta=6.0, attack=PGD(3, 0.12, loss="kl", start="gaussian", track="last"))
    found, _, _ = fit("auto", Classifier(network(), "SGD", lr=0.1), callbacks=[callback], **EXACT)
    by_hand = trades_by_hand(6.0, network().double(), 0.12, 3)
    torch.testing.assert_close(found, by_hand, rtol=0, atol=1e-10)
    plain, _, _ = fit("auto", Classifier(network(), "SGD", lr=0.1), **EXACT)
    assert (found - plain).abs().max() > 1e-3


def test_the_default_attack_is_that_of_the_paper() -> None:
    found, _, _ = fit("auto", Classifier(mlp(), "SGD", lr=0.1), callbacks=[TRADES(THREAT)], **EXACT)
    torch.testing.assert_close(found, trades_by_hand(6.0, mlp().double(), EPS / 4, 10), rtol=0, atol=1e-10)


def test_accumulated_gradients_are_those_written_by_hand() -> None:
    callback = TRADES(THREAT, beta=2.0, attack=PGD(2, 0.12, loss="kl", start="gaussian", track="last"))
    found, _, _ = fit(
        "auto",
        Classifier(mlp(), "SGD", lr=0.1),
        callbacks=[callback],
        accumulate_grad_batches=2,
        **(EXACT | {"steps": 2}),
    )
    torch.testing.assert_close(found, trades_by_hand(2.0, mlp().double(), 0.12, 2, every=2), rtol=0, atol=1e-10)


def test_the_gradient_of_a_step_from_a_clean_start_with_the_formula_in_numpy() -> None:
    """FGSM needs no random start; the loss alone, sample by sample."""
    callback = TRADES(THREAT, beta=4.0, attack=FGSM())
    _, t, losses = fit(
        "auto", Classifier(mlp(), "SGD", lr=0.1), callbacks=[callback], **(EXACT | {"steps": 1, "log_every_n_steps": 1})
    )
    x, y = next(iter(loader()))
    network, x = mlp().double(), x.double().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(network(x), y), x)
    with torch.no_grad():
        clean, adversarial = network(x).numpy(), network(within(x + EPS * gradient.sign(), x)).numpy()
    p, q = (np.exp(f) / np.exp(f).sum(axis=1, keepdims=True) for f in (clean, adversarial))
    ce = -np.mean([np.log(p[i, y[i]]) for i in range(len(y))])
    kl = np.mean([sum(p[i, c] * np.log(p[i, c] / q[i, c]) for c in range(CLASSES)) for i in range(len(y))])
    assert losses[0] == pytest.approx(ce + 4.0 * kl, abs=1e-12)
    logged = {name: float(value) for name, value in t.callback_metrics.items()}
    assert set(logged) == {"train/loss", "trades/kl", "trades/robust_acc"}
    assert logged["train/loss"] == pytest.approx(ce, rel=1e-6)
    assert logged["trades/kl"] == pytest.approx(kl, rel=1e-6)
    assert logged["trades/robust_acc"] == pytest.approx(np.mean(adversarial.argmax(axis=1) == y.numpy()))


def test_the_gradient_flows_through_both_outputs() -> None:
    """Through one of them alone the step would be another one."""

    def step(detached: str) -> Tensor:
        network = mlp().double()
        x, y = next(iter(loader()))
        adversarial = found_by_hand(network, x.double(), 0, 0.12, 3)
        clean, attacked = network(x.double()), network(adversarial)
        f, g = (clean.detach(), attacked) if detached == "clean" else (clean, attacked.detach())
        (F.cross_entropy(clean, y) + 6.0 / len(y) * trades_kl(f, g)).backward()
        torch.optim.SGD(network.parameters(), lr=0.1).step()
        return weights(network)

    callback = TRADES(THREAT, beta=6.0, attack=PGD(3, 0.12, loss="kl", start="gaussian", track="last"))
    found, _, _ = fit("auto", Classifier(mlp(), "SGD", lr=0.1), callbacks=[callback], **(EXACT | {"steps": 1}))
    for detached in ("clean", "adversarial"):
        assert (found - step(detached)).abs().max() > 1e-5


def test_the_own_loss_of_the_module_stays_whatever_it_is() -> None:
    class Squares(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch[0]).square().sum()

    _, t, losses = fit("auto", Squares(mlp()), callbacks=[TRADES(THREAT, 2.0, FGSM())], steps=1)
    own = float(mlp()(next(iter(loader()))[0]).square().sum())
    assert losses[0] == pytest.approx(own + 2.0 * float(t.callback_metrics["trades/kl"]), rel=1e-5)


def test_a_large_beta_makes_the_output_hardly_move_under_attack() -> None:
    def moved(beta: float) -> float:
        _, t, _ = fit(
            "auto",
            Classifier(nn.Linear(FEATURES, CLASSES)),
            callbacks=[TRADES(THREAT, beta, FGSM())],
            steps=40,
            log_every_n_steps=1,
        )
        return float(t.callback_metrics["trades/kl"])

    assert moved(0.1) > moved(2.0) > moved(20.0)


def test_a_negative_beta_is_refused() -> None:
    for beta in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="`beta` must be at least 0, got"):
            TRADES(THREAT, beta=beta)
