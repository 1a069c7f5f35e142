from __future__ import annotations

import contextlib
import copy
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchmetrics import CatMetric
from torchmetrics.classification import MulticlassAccuracy

from groundwire.callbacks.logits import LogitsSource
from groundwire.callbacks.reporting import ResumableCheckpoint
from groundwire.callbacks.unlearning.ofmu import OFMU
from groundwire.callbacks.unlearning.ofmu_functional import grad_phi, hessian_vector, smoothed_cosine
from groundwire.datamodules import Digits
from groundwire.datamodules.forget_retain import ForgetRetain
from groundwire.plugins.edge import EdgeStrategy
from helpers.callbacks import state_of
from helpers.channels import build_from_yaml
from helpers.edge import CLASSES, FEATURES, Classifier, Killed, Losses, generator, trainer, weights

Batch = tuple[Tensor, Tensor]


class Small(pl.LightningDataModule):
    """40 samples in float64, of which the tests forget 8 to 16."""

    def __init__(
        self, shape: tuple[int, ...] = (FEATURES,), labels: tuple[int, ...] = (), floats: bool = False
    ) -> None:
        super().__init__()
        g = generator(7)
        x = torch.randn(40, *shape, generator=g).double()
        y = torch.randint(0, CLASSES, (40, *labels), generator=g)
        self.train_data = (x, y.double() if floats else y)


def data(source: pl.LightningDataModule | None = None, forget: int = 8, batch_size: int = 8) -> ForgetRetain:
    return ForgetRetain(
        source if source is not None else Small(),
        forget="indices",
        indices=list(range(forget)),
        batch_size=batch_size,
        seed=0,
    )


def network(*extra: nn.Module) -> nn.Module:
    """Smooth, so that all derivatives exist."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), *extra, nn.Linear(6, CLASSES)).double()


def module(*extra: nn.Module, lr: float = 0.2, optimizer: str = "SGD") -> Classifier:
    return Classifier(network(*extra), optimizer, lr)


def unlearn(
    callback: OFMU | None,
    of: pl.LightningModule | None = None,
    steps: int = 3,
    source: ForgetRetain | None = None,
    callbacks: list[pl.Callback] | None = None,
    **options: Any,
) -> tuple[pl.LightningModule, pl.Trainer]:
    of = of if of is not None else module()
    t = trainer(steps=steps, callbacks=[*([callback] if callback else []), *(callbacks or [])], **options)
    t.fit(of, datamodule=source if source is not None else data())
    return of, t


def batches(steps: int, source: ForgetRetain | None = None) -> list[dict[str, Batch]]:
    """Those that the first steps of a fit see."""
    source = source if source is not None else data()
    source.setup("fit")
    loader = source.make_train_loader()
    return [loader.batch(*divmod(i, len(loader))) for i in range(steps)]


class Flat:
    """A network as a function of one vector: what ``torch.func`` differentiates, independently of the code under test."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.named = dict(net.named_parameters())

    @property
    def theta(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.named.values()])

    def loss(self, theta: Tensor, batch: Batch) -> Tensor:
        parts = theta.split([p.numel() for p in self.named.values()])
        values = {name: part.view_as(p) for (name, p), part in zip(self.named.items(), parts, strict=True)}
        return F.cross_entropy(functional_call(self.net, values, (batch[0],)), batch[1])

    def phi(self, theta: Tensor, batch: dict[str, Batch], beta: float, eps: float) -> Tensor:
        g_f = grad(self.loss)(theta, batch["forget"])
        g_r = grad(self.loss)(theta, batch["retain"])
        cosine = g_f @ g_r / ((g_f.norm() + eps) * (g_r.norm() + eps))
        return self.loss(theta, batch["forget"]) - beta * cosine

    def gradient(self, net: nn.Module, batch: dict[str, Batch], beta: float, eps: float) -> Any:
        """What the code under test finds for the same network."""
        return grad_phi(
            lambda: F.cross_entropy(net(batch["forget"][0]), batch["forget"][1]),
            lambda: F.cross_entropy(net(batch["retain"][0]), batch["retain"][1]),
            list(net.parameters()),
            beta,
            eps,
        )


# ---------------------------------------------------------------- derivatives


def test_the_gradient_of_the_cosine_is_that_of_the_closed_formula() -> None:
    net = network()
    flat, (batch,) = Flat(net), batches(1)
    theta, of = flat.theta, lambda part: lambda t: flat.loss(t, batch[part])
    g_f, g_r = (torch.autograd.functional.jacobian(of(part), theta) for part in ("forget", "retain"))
    h_f, h_r = (torch.autograd.functional.hessian(of(part), theta) for part in ("forget", "retain"))
    s = g_f @ g_r / (g_f.norm() * g_r.norm())
    u_f = (g_r / g_r.norm() - s * g_f / g_f.norm()) / g_f.norm()
    u_r = (g_f / g_f.norm() - s * g_r / g_r.norm()) / g_r.norm()
    found = flat.gradient(net, batch, beta=1.0, eps=0.0)
    torch.testing.assert_close(found.vector, g_f - (h_f @ u_f + h_r @ u_r), rtol=0, atol=1e-10)
    torch.testing.assert_close(torch.tensor(found.cosine, dtype=torch.float64), s, rtol=0, atol=1e-12)
    assert found.norm == pytest.approx(float(found.vector.norm()), rel=1e-12)
    assert found.forget_loss == pytest.approx(float(flat.loss(theta, batch["forget"])), rel=1e-12)
    without_h_r = g_f - h_f @ u_f  # the usual mistake: the retain loss has a Hessian, too
    assert (found.vector - without_h_r).abs().max() > 1e-4
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("eps", [0.0, 1e-2, 1.0])
def test_the_smoothed_cosine_and_its_derivatives_are_those_of_autograd(eps: float) -> None:
    g = generator(1)
    a, b = (torch.randn(7, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    s = (a * b).sum() / ((a.square().sum().sqrt() + eps) * (b.square().sum().sqrt() + eps))
    expected = torch.autograd.grad(s, (a, b))
    found, by_a, by_b = smoothed_cosine(a.detach(), b.detach(), eps)
    torch.testing.assert_close((found, by_a, by_b), (s.detach(), *expected), rtol=1e-12, atol=1e-14)


def test_where_a_gradient_vanishes_the_smoothed_cosine_stays_tame() -> None:
    a, zero = torch.tensor([3.0, 4.0]), torch.zeros(2)
    for one, other in ((a, zero), (zero, a), (zero, zero)):
        s, by_one, by_other = smoothed_cosine(one, other, eps=1e-2)
        assert s == 0
        assert max(float(by_one.norm()), float(by_other.norm())) <= 2 / 1e-2
    almost = 1e-9 * torch.tensor([1.0, 0.0])
    _, by_almost, _ = smoothed_cosine(almost, a, eps=1e-2)
    assert float(by_almost.norm()) < 2 / 1e-2
    _, wild, _ = smoothed_cosine(almost, a, eps=0.0)
    assert float(wild.norm()) > 1e6


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_central_difference_is_the_exact_product_of_third_derivatives(beta: float) -> None:
    net = network()
    flat, (batch,) = Flat(net), batches(1)
    theta = flat.theta
    first = grad(flat.phi)
    v = first(theta, batch, beta, 0.1)
    _, exact = jvp(lambda t: first(t, batch, beta, 0.1), (theta,), (v,))
    errors = []
    for length in (1e-2, 1e-3):
        gradient = lambda: flat.gradient(net, batch, beta, 0.1).vector
        found = hessian_vector(gradient, list(net.parameters()), v, length)
        errors.append(float((found - exact).norm() / exact.norm()))
        assert torch.equal(flat.theta, theta), "the parameters must be put back exactly"
    assert errors[1] < 1e-5
    assert 90 < errors[0] / errors[1] < 110, "it is of second order"


def test_after_an_error_the_parameters_are_put_back() -> None:
    theta = torch.tensor([0.1, 0.2])
    before = theta.clone()

    def fails() -> Tensor:
        assert not torch.equal(theta, before)
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        hessian_vector(fails, [theta], torch.ones(2), length=0.1)
    assert torch.equal(theta, before)
    assert torch.equal(hessian_vector(fails, [theta], torch.zeros(2), length=0.1), torch.zeros(2))


def test_parameters_that_a_loss_does_not_use_and_losses_without_curvature() -> None:
    a, b = (torch.tensor([1.0, 2.0], requires_grad=True) for _ in range(2))
    found = grad_phi(lambda: a.sum(), lambda: b.sum(), [a, b], beta=1.0)  # constant gradients: no second derivatives
    torch.testing.assert_close(found.vector, torch.tensor([1.0, 1.0, 0.0, 0.0]))
    curved = grad_phi(lambda: a.square().sum(), lambda: b.sum() + a.sum(), [a, b], beta=0.0)
    torch.testing.assert_close(curved.vector, torch.tensor([2.0, 4.0, 0.0, 0.0]))


# ---------------------------------------------------------------- whole steps


def test_without_penalty_and_similarity_it_is_an_alternation() -> None:
    found, _ = unlearn(OFMU(inner_steps=2, inner_lr=0.3, beta=0.0, rho=0.0, max_forget_loss=None), steps=4)
    net = network()
    descent = torch.optim.SGD(net.parameters(), lr=0.2)
    for batch in batches(4):
        for _ in range(2):
            net.zero_grad()
            (-F.cross_entropy(net(batch["forget"][0]), batch["forget"][1])).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            torch.optim.SGD(net.parameters(), lr=0.3).step()
        descent.zero_grad()
        F.cross_entropy(net(batch["retain"][0]), batch["retain"][1]).backward()
        descent.step()
    torch.testing.assert_close(weights(found), weights(net), rtol=1e-5, atol=1e-6)  # torch's clipping adds 1e-6


def test_steps_are_those_of_a_computation_by_hand() -> None:
    """Three steps with two ascents each, against torch.func with exact third derivatives."""
    settings: dict[str, Any] = {"inner_lr": 0.3, "beta": 0.4, "rho": 0.05, "gamma": 1.5, "eps_cos": 0.1}
    found, _ = unlearn(OFMU(inner_steps=2, max_forget_loss=None, fd_step=1e-3, **settings))
    expected, plain, doubled = (
        _by_hand(*batches(3), **(settings | change)) for change in ({}, {"rho": 0.0}, {"rho": 0.1})
    )
    moved = float((expected - Flat(network()).theta).norm())
    assert float((weights(found) - expected).norm()) < 1e-7 * moved
    for wrong in (plain, doubled):
        assert float((weights(found) - wrong).norm()) > 1e-3 * moved, "a forgotten factor 2 would be seen"


def _by_hand(
    *steps: dict[str, Batch], inner_lr: float, beta: float, rho: float, gamma: float, eps_cos: float
) -> Tensor:
    flat = Flat(network())
    theta = flat.theta
    for batch in steps:
        ascent = lambda t, batch=batch: grad(flat.phi)(t, batch, beta, eps_cos)
        for _ in range(2):
            g = ascent(theta)
            theta = theta + inner_lr * g / max(1.0, float(g.norm()))
        _, product = jvp(ascent, (theta,), (ascent(theta),))
        theta = theta - 0.2 * (grad(flat.loss)(theta, batch["retain"]) + 2 * rho * product)
        rho = gamma * rho
    return theta


def test_large_rho_pulls_back_to_the_trained_weights() -> None:
    """And what is forgotten is forgotten by the ascent: the paper's penalty does not tell a maximum from a minimum."""
    trained = module(lr=0.1)
    source = lambda: data(forget=16, batch_size=24)  # all samples in each batch
    x, y = Small().train_data
    descent = torch.optim.SGD(trained.parameters(), lr=0.5, momentum=0.9)
    for _ in range(40):
        descent.zero_grad()
        F.cross_entropy(trained(x), y).backward()
        descent.step()
    trained.zero_grad()
    losses = {}
    for rho in (0.0, 1.0):
        left = copy.deepcopy(trained)
        unlearn(OFMU(inner_lr=0.1, beta=0.0, rho=rho, gamma=1.0, max_forget_loss=None), left, 60, source())
        (batch,) = batches(1, source())
        with torch.no_grad():
            losses[rho] = float(F.cross_entropy(left(batch["forget"][0]), batch["forget"][1]))
    assert losses[0.0] > 1.5
    assert losses[1.0] < 0.06, "it was 0.04"


@pytest.mark.parametrize(("limit", "level"), [("chance", math.log(CLASSES)), (1.7, 1.7)])
def test_the_ascent_stops_at_the_limit(limit: Any, level: float) -> None:
    """Long before the end of a long ascent, and no step begins one above the limit."""
    logged = _Logged()
    stopped = OFMU(inner_steps=30, inner_lr=0.1, beta=0.0, rho=0.0, max_forget_loss=limit)
    unlearn(stopped, module(lr=1e-9), steps=3, callbacks=[logged])
    assert logged.values["train/forget_loss"][1] >= level
    assert (
        logged.values["train/forget_loss"][1] < level + 0.1 * 1.0
    )  # one ascent changes it by at most its length times 1
    assert logged.values["train/forget_loss"][1] == logged.values["train/forget_loss"][2], "no ascent from above"
    unlimited = _Logged()
    on = OFMU(inner_steps=30, inner_lr=0.1, beta=0.0, rho=0.0, max_forget_loss=None)
    unlearn(on, module(lr=1e-9), steps=3, callbacks=[unlimited])
    assert unlimited.values["train/forget_loss"][2] > 2 * level


class _Logged(pl.Callback):
    """What is logged in each step."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        for name, value in trainer.callback_metrics.items():
            self.values.setdefault(name, []).append(float(value))


def test_what_is_logged_counted_and_reported() -> None:
    logged = _Logged()
    callback = OFMU(inner_steps=2, beta=0.1, rho=1e-3, gamma=2.0, max_forget_loss=None)
    _, t = unlearn(callback, steps=3, callbacks=[logged])
    assert set(logged.values) == {
        "train/loss",
        *(f"train/{name}" for name in ("forget_loss", "retain_loss", "cosine", "grad_phi_norm", "rho")),
    }
    assert logged.values["train/rho"] == pytest.approx([1e-3, 2e-3, 4e-3])
    assert logged.values["train/retain_loss"] == logged.values["train/loss"], "that of the last evaluation"
    flat, (batch, *_) = Flat(network()), batches(3)
    theta = flat.theta
    assert logged.values["train/forget_loss"][0] == pytest.approx(float(flat.loss(theta, batch["forget"])))
    assert logged.values["train/grad_phi_norm"][0] == pytest.approx(
        float(grad(flat.phi)(theta, batch, 0.1, 1e-2).norm())
    )
    assert (callback.steps, callback.current_rho) == (3, pytest.approx(8e-3))
    assert callback.records_read == {
        "forget": 3 * 5 * 8,
        "retain": 3 * 6 * 8,
    }  # 2 ascents, at theta', +, -; and the step
    certificate = callback.certificate()
    assert json.loads(json.dumps(certificate))["settings"] == {
        "inner_steps": 2,
        "inner_lr": 0.1,
        "beta": 0.1,
        "rho": 1e-3,
        "gamma": 2.0,
        "eps_cos": 1e-2,
        "max_forget_loss": None,
        "fd_step": 1e-2,
    }
    ablation = OFMU(beta=0.0, rho=0.0)
    unlearn(ablation, steps=3)
    assert ablation.records_read == {"forget": 3 * 8, "retain": 3 * 8}, "as cheap as a step on both parts"
    assert t.global_step == 3


def test_it_forgets_a_class_of_the_digits() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    trained = Classifier(net, "AdamW", 1e-2)
    trainer(steps=250, limit_val_batches=0).fit(trained, datamodule=Digits(batch_size=64, seed=0, flatten=True))
    source = ForgetRetain(Digits(seed=0, flatten=True), forget="class", label=3, seed=0)
    before = _accuracies(trained, source)
    trained.optimizer_name, trained.lr = "SGD", 0.1
    unlearn(OFMU(inner_lr=0.3), trained, 60, source, limit_val_batches=0)
    after = _accuracies(trained, source)
    assert min(before) > 0.98
    assert after[0] < 0.2
    assert after[1] > 0.97


def _accuracies(of: pl.LightningModule, source: ForgetRetain) -> tuple[float, float]:
    source.setup("fit")
    found = []
    for part in ("forget", "retain"):
        ((x, y),) = source.batches(part, batch_size=10_000)  # type: ignore[arg-type]
        with torch.no_grad():
            found.append(float((of(x).argmax(-1) == y).double().mean()))
    return found[0], found[1]


# ---------------------------------------------------------------- several evaluations of one batch


def test_batchnorm_statistics_move_as_in_one_step_on_the_retain_batch() -> None:
    found, _ = unlearn(OFMU(inner_steps=2, rho=1e-3), module(nn.BatchNorm1d(6)), steps=1)
    norm = found.network[2]
    assert norm.num_batches_tracked == 1
    features = []
    by_hand = network(nn.BatchNorm1d(6))
    unlearn(OFMU(inner_steps=2, rho=1e-3), only := module(nn.BatchNorm1d(6), lr=0.0), steps=1)  # the ascent alone
    by_hand.load_state_dict({**only.network.state_dict(), **dict(by_hand.named_buffers())})
    (batch,) = batches(1)
    by_hand[2].register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    by_hand(batch["retain"][0])
    torch.testing.assert_close(norm.running_mean, 0.1 * features[0].mean(0), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * features[0].var(0), rtol=1e-10, atol=1e-12)


class Noting(Classifier):
    """Notes a random number in each evaluation, beside dropout; logs, and counts with a metric."""

    def __init__(self) -> None:
        super().__init__(network(nn.Dropout(0.3)), "SGD", 0.1)
        self.accuracy, self.losses = MulticlassAccuracy(CLASSES, average="micro"), CatMetric()
        self.draws: list[tuple[float, float]] = []  # and the sum of the batch, which tells it
        self.register_buffer("evaluations", torch.zeros(()))
        self.register_buffer("twin", self.evaluations)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.draws.append((float(torch.rand(())), float(x.sum())))
        self.evaluations += 1
        assert self.twin is self.evaluations
        logits = self(x)
        self.accuracy.update(logits, y)
        self.losses.update(F.cross_entropy(logits, y).detach())
        self.log("train/acc", self.accuracy, on_step=False, on_epoch=True)
        self.log("train/number", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
        self.log_dict({"train/dict": 1.0}, on_step=False, on_epoch=True, reduce_fx="sum")
        return F.cross_entropy(logits, y)


def test_one_step_has_one_dropout_mask_and_logs_once(seeded: Callable[[int], None]) -> None:
    seeded(5)
    of, t = unlearn(OFMU(inner_steps=2, rho=1e-3, max_forget_loss=None), Noting(), steps=4)
    assert isinstance(of, Noting)
    evaluations = 5 * 2 + 1
    by_step = [of.draws[i : i + evaluations] for i in range(0, len(of.draws), evaluations)]
    assert len(by_step) == 4
    for draws in by_step:
        assert len(set(draws[0:-1:2])) == len(set(draws[1:-1:2])) == 1, "each batch has one stream of random numbers"
        assert draws[-1][0] == draws[0][0]
    assert len({draws[0][0] for draws in by_step}) == 4, "each step has its own"
    after = torch.rand(3)
    seeded(5)
    one, _ = unlearn(None, _OnRetain(), steps=4)
    assert torch.equal(after, torch.rand(3)), "random numbers move on as in ordinary steps"
    assert of.evaluations == one.evaluations == 4
    assert of.evaluations is of.twin
    assert t.callback_metrics["train/number"] == t.callback_metrics["train/dict"] == 4


class _OnRetain(Noting):
    """Takes ordinary steps on the retain batches."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch["retain"], batch_idx)


def test_a_metric_counts_the_retain_batches_once() -> None:
    counts: list[int] = []

    class Counts(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
            counts.append(int(pl_module.accuracy.tp.sum() + pl_module.accuracy.fn.sum()))

    of, _ = unlearn(OFMU(rho=1e-3), Noting(), steps=4, callbacks=[Counts(), losses := Losses()])
    assert counts == [8, 16, 24, 32]
    assert of.losses.compute().tolist() == pytest.approx(losses.values), "those of the steps, and no others"


def test_with_dropout_the_step_is_that_of_a_fixed_mask(seeded: Callable[[int], None]) -> None:
    """The difference of two gradients with different masks would be a thousand times the product."""
    seeded(11)
    found, _ = unlearn(OFMU(beta=0.0, rho=0.05, max_forget_loss=None, fd_step=1e-3), module(nn.Dropout(0.5)), steps=1)
    flat, (batch,) = Flat(network(nn.Dropout(0.5))), batches(1)

    def loss(theta: Tensor, part: str) -> Tensor:
        seeded(11)
        return flat.loss(theta, batch[part])

    theta = flat.theta
    ascent = lambda t: torch.autograd.functional.jacobian(lambda s: loss(s, "forget"), t)
    g = ascent(theta)
    theta = theta + 0.1 * g / max(1.0, float(g.norm()))
    hessian = torch.autograd.functional.hessian(lambda s: loss(s, "forget"), theta)
    outer = torch.autograd.functional.jacobian(lambda s: loss(s, "retain"), theta)
    theta = theta - 0.2 * (outer + 2 * 0.05 * hessian @ ascent(theta))
    assert float((weights(found) - theta).norm()) < 1e-4 * float((theta - flat.theta).norm())


class Slopes(Classifier):
    """Has its weight in an operation that autocast casts, and that is no matrix product."""

    def __init__(self) -> None:
        super().__init__(nn.PReLU(FEATURES), "SGD", 0.1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        outputs = self(-batch[0].abs().float()).float()
        return F.cross_entropy(outputs[:, :CLASSES], batch[1])


@pytest.mark.filterwarnings("ignore")
def test_under_autocast_the_derivatives_are_those_of_full_precision() -> None:
    """Only the outer loss is computed in bfloat16: a difference of two gradients would be its rounding."""
    moved = {}
    for precision in ("32-true", "bf16-mixed"):
        without, with_penalty = (
            unlearn(
                OFMU(inner_lr=2.0, beta=0.0, rho=rho, max_forget_loss=None), Slopes(), steps=1, precision=precision
            )[0]
            for rho in (0.0, 1.0)
        )
        moved[precision] = weights(with_penalty) - weights(without)
    full, mixed = moved["32-true"], moved["bf16-mixed"]
    assert float((mixed - full).norm()) < 1e-3 * float(full.norm())


# ---------------------------------------------------------------- sequences


class Attentive(pl.LightningModule):
    """One head of attention over ``(B, T, d)``, with a softmax or with the fused kernel; logits ``(B, T, V)``."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.qkv, self.head = nn.Linear(FEATURES, 3 * 8).double(), nn.Linear(8, CLASSES).double()
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)
        fused, written_out = F.scaled_dot_product_attention, lambda q, k, v: (q @ k.mT / math.sqrt(8)).softmax(-1) @ v
        return self.head((fused if self.fused else written_out)(q, k, v).squeeze(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]).flatten(0, -2), batch[1].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def sequences() -> ForgetRetain:
    return data(Small(shape=(5, FEATURES), labels=(5,)))


def test_sequences_and_fused_attention() -> None:
    written_out, _ = unlearn(OFMU(rho=1e-3), Attentive(), source=sequences())
    with pytest.raises(RuntimeError, match=r"SDPBackend\.MATH"):
        unlearn(OFMU(), fails := Attentive(fused=True), source=sequences())
    assert torch.equal(weights(fails), weights(Attentive())), "the weights are put back"
    with sdpa_kernel(SDPBackend.MATH):
        by_kernel, _ = unlearn(OFMU(rho=1e-3), Attentive(fused=True), source=sequences())
    torch.testing.assert_close(weights(written_out), weights(by_kernel), rtol=1e-8, atol=1e-10)
    unlearn(OFMU(beta=0.0, rho=1e-3), Attentive(fused=True), source=sequences())  # first derivatives are enough


# ---------------------------------------------------------------- resume, and what is left


class _KeepAll(ResumableCheckpoint):
    def _save(self, trainer: pl.Trainer) -> None:
        super()._save(trainer)
        shutil.copy(self.path(trainer), self.path(trainer).with_name(f"step{trainer.global_step}.ckpt"))


class Scheduled(Classifier):
    """Everything that has to come back: dropout, BatchNorm, Adam, a schedule."""

    def __init__(self) -> None:
        super().__init__(network(nn.BatchNorm1d(6), nn.Dropout(0.3)))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}]


def test_resumed_within_an_epoch_it_is_as_if_never_stopped(tmp_path: Path, seeded: Callable[[int], None]) -> None:
    build = lambda: OFMU(rho=1e-2, gamma=1.3)
    options: dict[str, Any] = {"enable_checkpointing": True}
    run = lambda callbacks, callback, **o: unlearn(callback, Scheduled(), 7, callbacks=callbacks, **options, **o)
    seeded(2)
    whole, _ = run([ResumableCheckpoint(tmp_path / "whole")], uninterrupted := build())
    seeded(2)
    with contextlib.suppress(Killed.Error):
        run([_KeepAll(tmp_path, every_n_steps=1), Killed(6)], build())
    for step in (2, 4, 5):  # an epoch has 4 batches
        seeded(9)
        resumed, callback = Scheduled(), build()
        t = trainer(steps=7, callbacks=[callback, ResumableCheckpoint(tmp_path / "resumed")], **options)
        t.fit(resumed, datamodule=data(), ckpt_path=str(tmp_path / f"step{step}.ckpt"), weights_only=True)
        assert torch.equal(weights(resumed), weights(whole)), step
        assert callback.steps == 7
        assert callback.current_rho == pytest.approx(1e-2 * 1.3**7)
        assert callback.records_read == uninterrupted.records_read


@pytest.mark.parametrize("error", [None, ValueError("stop here")])
def test_module_and_callback_are_clean_after_a_fit_and_after_an_error(error: Exception | None) -> None:
    class Fails(pl.Callback):
        def on_before_backward(self, trainer: pl.Trainer, *_: Any) -> None:
            if error is not None and trainer.global_step == 1:
                raise error

    of, callback = module(nn.BatchNorm1d(6)), OFMU(rho=1e-2)
    untouched, _ = unlearn(None, _Retaining(network(nn.BatchNorm1d(6))), steps=2)
    with contextlib.nullcontext() if error is None else pytest.raises(ValueError, match="stop here"):
        unlearn(callback, of, steps=2, callbacks=[Fails()])
    assert state_of(of) == state_of(untouched)
    assert torch.isfinite(weights(of)).all()
    assert callback._penalty is None
    assert callback._parameters == []
    again, fresh = module(), module()
    unlearn(callback, again)
    unlearn(OFMU(rho=1e-2), fresh)
    assert torch.equal(weights(again), weights(fresh)), "a second run starts anew"


class _Retaining(Classifier):
    """Takes ordinary steps on the retain batches."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch["retain"], batch_idx)


class Diverging(Classifier):
    """Its loss is not finite from one evaluation on."""

    def __init__(self, at: int) -> None:
        super().__init__(network(), "SGD", 0.1)
        self.at, self.calls = at, 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.calls += 1
        return super().training_step(batch, batch_idx) * (math.nan if self.calls >= self.at else 1.0)


@pytest.mark.parametrize(
    ("at", "what"),
    [(1, "Lower `inner_lr`"), (4, "Lower `inner_lr`"), (6, "Lower `inner_lr`"), (9, "the loss is not finite")],
)
def test_what_is_not_finite_leaves_the_weights_of_before_the_step(at: int, what: str) -> None:
    """At the start, after the ascent, in the difference, in the outer loss."""
    of = Diverging(at)
    with pytest.raises(RuntimeError, match=re.escape(what)):
        unlearn(OFMU(rho=1e-3), of)
    assert torch.equal(weights(of), weights(Diverging(0)))
    assert of.calls in (at, at + 1)


def test_a_penalty_that_is_not_finite_says_so() -> None:
    of = module()
    with pytest.raises(RuntimeError, match="Lower `rho` or `gamma`"):
        unlearn(OFMU(rho=1e308, gamma=1e10, max_forget_loss=None), of, steps=2)


def test_only_what_the_optimizer_trains_changes() -> None:
    class Part(Classifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.network[2:].parameters(), lr=0.1)

    frozen, part, start = module(nn.Linear(6, 6).double()), Part(network(nn.Linear(6, 6).double())), network()
    frozen.network[0].requires_grad_(False)
    for of in (frozen, part):
        last = weights(of.network[-1])
        unlearn(OFMU(rho=1e-3), of)
        assert torch.equal(weights(of.network[0]), weights(start[0]))
        assert not torch.equal(weights(of.network[-1]), last)


def test_extras_of_the_step_reach_other_callbacks() -> None:
    class Extra(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": super().training_step(batch, batch_idx), "sum": batch[0].sum()}

    seen: list[dict[str, Any]] = []

    class Sees(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
            seen.append(outputs)

    of, _ = unlearn(OFMU(rho=1e-3), Extra(network(), "SGD", 0.2), callbacks=[Sees()])
    plain, _ = unlearn(OFMU(rho=1e-3))
    assert torch.equal(weights(of), weights(plain))
    assert [float(out["sum"]) for out in seen] == [float(batch["retain"][0].sum()) for batch in batches(3)]


def test_it_is_built_from_yaml() -> None:
    yaml = """
    class_path: groundwire.callbacks.unlearning.ofmu.OFMU
    init_args: {checkpoint: runs/trained, inner_steps: 2, rho: 1e-5, max_forget_loss: 2}
    """
    lines = [line.strip() for line in yaml.strip().splitlines()]
    built = build_from_yaml(pl.Callback, "\n".join(lines))
    assert (built.inner_steps, built.rho, built.max_forget_loss, built.checkpoint) == (2, 1e-5, 2, "runs/trained")
    assert build_from_yaml(pl.Callback, lines[0]).max_forget_loss == "chance"


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_steps": 0}, "`inner_steps` must be at least 1"),
        ({"inner_lr": 0.0}, "`inner_lr` must be positive"),
        ({"inner_lr": math.nan}, "`inner_lr` must be positive"),
        ({"eps_cos": 0.0}, "`eps_cos` must be positive"),
        ({"fd_step": -1.0}, "`fd_step` must be positive"),
        ({"beta": -0.1}, "`beta` must be at least 0"),
        ({"rho": math.inf}, "`rho` must be at least 0"),
        ({"gamma": 0.9}, "`gamma` must be at least 1"),
        ({"max_forget_loss": "high"}, "'chance', a number or None"),
        ({"max_forget_loss": 0.0}, "`max_forget_loss` must be positive"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OFMU(**options)


def test_vectors_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="one length"):
        smoothed_cosine(torch.ones(2), torch.ones(3), 0.0)
    with pytest.raises(ValueError, match="`eps` must be at least 0"):
        smoothed_cosine(torch.ones(2), torch.ones(2), -1.0)
    with pytest.raises(ValueError, match="`length` must be positive"):
        hessian_vector(lambda: torch.ones(2), [torch.ones(2)], torch.ones(2), 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": EdgeStrategy(num_devices=2)}, "plain Trainer"),
        ({"strategy": FSDPStrategy()}, "sharded"),
        ({"precision": "bf16-true"}, "half precision"),
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches=1"),
        ({"callbacks": [GradientAccumulationScheduler({0: 1, 1: 2})]}, "accumulate_grad_batches=1"),
        ({"scaler": True}, "'bf16-mixed' or '32-true'"),
    ],
)
def test_trainers_that_do_not_fit(options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"strategy": "auto", "callbacks": []} | options
    strategy, callbacks, scaled = options.pop("strategy"), options.pop("callbacks"), options.pop("scaler", False)
    t = trainer("auto" if isinstance(strategy, FSDPStrategy) else strategy, callbacks=[OFMU(), *callbacks], **options)
    if isinstance(strategy, FSDPStrategy):  # needs an accelerator
        monkeypatch.setattr(pl.Trainer, "strategy", strategy)
    if scaled:  # 16-mixed needs one, too
        monkeypatch.setattr(t.precision_plugin, "scaler", object(), raising=False)
    with pytest.raises(MisconfigurationException, match=message):
        OFMU().setup(t, module(), "fit") if isinstance(strategy, FSDPStrategy) else t.fit(module(), datamodule=data())


class _Manual(Classifier):
    def __init__(self) -> None:
        super().__init__(network())
        self.automatic_optimization = False


class _Elsewhere(Classifier):
    """Its optimizer trains nothing of it."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)


class _Aside(Classifier):
    """Its step goes past its forward."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.network(batch[0]), batch[1])


class _Squared(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.mse_loss(self(batch[0]).sum(dim=-1), batch[1])


class _Single(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return self.network(x).sum(dim=-1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.binary_cross_entropy_with_logits(self(batch[0]), (batch[1] > 0).double())


@pytest.mark.parametrize(
    ("of", "source", "message"),
    [
        (lambda: module().requires_grad_(False), data, "are frozen"),
        (lambda: module().half(), data, "half precision"),
        (lambda: _Manual(), data, "automatic_optimization = False"),
        (lambda: module(optimizer="LBFGS"), data, "LBFGS evaluates the loss several times"),
        (lambda: _Elsewhere(network()), data, "no trainable parameter of the module"),
        (lambda: _Aside(network(), "SGD"), data, "was not called during the step"),
        (
            lambda: _Squared(network(), "SGD"),
            lambda: data(Small(floats=True)),
            r"torch.float64 labels \[8\] do not tell",
        ),
        (lambda: _Single(network(), "SGD"), data, r"outputs \[8\] with torch.int64 labels \[8\] do not tell"),
        (lambda: maps(), lambda: data(Small((2, 4, 4), (4, 4))), r"outputs \[8, 3, 4, 4\]"),
        (module, lambda: Small(), "ForgetRetain"),
        (module, lambda: _gone(), "retain_access=False"),
    ],
)
def test_modules_and_data_that_do_not_fit(
    of: Callable[[], pl.LightningModule], source: Callable[[], Any], message: str
) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        unlearn(OFMU(), of(), source=source())


def _gone() -> ForgetRetain:
    return ForgetRetain(Small(), forget="indices", indices=[0, 1], retain_access=False, seed=0)


class _Maps(Classifier):
    """A label for each pixel: logits ``(B, C, H, W)``."""


def maps() -> _Maps:
    return _Maps(nn.Conv2d(2, CLASSES, 1).double(), "SGD")


def test_chance_is_told_by_the_source_or_given() -> None:
    for of, source in ((_Aside(network(), "SGD"), data()), (_Squared(network(), "SGD"), data(Small(floats=True)))):
        unlearn(OFMU(max_forget_loss=1.0), of, source=source)
    for of, source, found, number in (
        (_Aside(network(), "SGD"), data(), LogitsSource("network"), CLASSES),
        (maps(), data(Small((2, 4, 4), (4, 4))), LogitsSource(flatten=True), CLASSES),
        (_Single(network(), "SGD"), data(), LogitsSource(binary=True), 2),
    ):
        callback = OFMU(source=found)
        unlearn(callback, of, source=source)
        assert callback._limit == pytest.approx(math.log(number))
