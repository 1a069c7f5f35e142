"""Attacks, against closed forms, loops, foolbox and AutoAttack; and that they leave no trace."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize
from torch import Tensor, nn

from groundwire.callbacks import LogitsSource, Tap
from groundwire.callbacks.adversarial import FGSM, PGD, SVGD, Attack, RandomFGSM, ThreatModel, ThunderNNA
from groundwire.callbacks.adversarial.functional import attack_loss, linear_worst_case_margin
from groundwire.callbacks.adversarial.threat import Norm
from groundwire.callbacks.checks import as_target
from groundwire.plugins.random import stream
from helpers.edge import generator

NORMS: tuple[Norm, ...] = ("linf", "l2")
MEAN, STD = (0.485, 0.3, 0.1), (0.229, 0.5, 0.05)


def labels(n: int, classes: int = 3, seed: int = 5) -> Tensor:
    return torch.randint(0, classes, (n,), generator=generator(seed))


def images(n: int = 10, seed: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(n, 3, 4, 4, generator=generator(seed), dtype=dtype)


def seeded_network(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def network(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """Images (3, 4, 4) to three classes, smooth."""
    return seeded_network(lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 24), nn.Tanh(), nn.Linear(24, 3)), seed).to(
        dtype
    )


def loss_at(model: nn.Module, x: Tensor, y: Tensor, kind: Any = "ce") -> Tensor:
    with torch.no_grad():
        return attack_loss(kind, model(x), y, None)


def fooled(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1) != y


def size(delta: Tensor, norm: Norm) -> Tensor:
    flat = delta.double().flatten(1)
    return flat.abs().amax(1) if norm == "linf" else flat.norm(dim=1)


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    point = x.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(point), y, reduction="sum"), point)[0]


@contextmanager
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# every attack, for the tests of what all must keep to
ATTACKS: dict[str, Callable[[], Attack]] = {
    "fgsm": FGSM,
    "random_fgsm": RandomFGSM,
    "pgd": lambda: PGD(num_steps=4),
    "pgd_last": lambda: PGD(num_steps=4, track="last", loss="margin"),
    "restarts": lambda: PGD(num_steps=3, num_restarts=3, loss="dlr"),
    "last_of_restarts": lambda: PGD(num_steps=3, num_restarts=3, track="last"),
    "kl": lambda: PGD(num_steps=3, loss="kl", start="gaussian", track="last"),
    "early_stop": lambda: PGD(num_steps=4, early_stop=True, num_restarts=2),
    "train": lambda: PGD(num_steps=3, mode="train"),
    "huge_steps": lambda: PGD(num_steps=1, step_size=1e4),
    "svgd": lambda: SVGD(num_particles=3, num_steps=3),
    "thundernna": ThunderNNA,
    "thundernna_quantile": lambda: ThunderNNA(quantile=0.5, loss="ce", zero_grad="eps"),
}
ONLY_LINF = {"thundernna", "thundernna_quantile"}
every_attack = pytest.mark.parametrize("name", ATTACKS)


# ---------------------------------------------------------------- linear models


def linear_problem(norm: Norm, n: int = 40, box: bool = False) -> Any:
    """A linear network, inputs, labels, and a threat for which about half of the right samples can be fooled."""
    rng = np.random.default_rng(0)
    layer = nn.Linear(20, 5).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(rng.standard_normal((5, 20))))
        layer.bias.zero_()
    x = torch.tensor(rng.random((n, 20)))
    with torch.no_grad():
        y = layer(x).argmax(1)
    eps = 0.1 if norm == "linf" else 0.4
    threat = ThreatModel(eps, norm) if box else ThreatModel(eps, norm, lo=-5, hi=5)
    worst = linear_worst_case_margin(layer.weight.detach(), layer.bias.detach(), x, y, threat)
    return SimpleNamespace(model=layer, x=x, y=y, threat=threat, worst=worst)


@pytest.mark.parametrize("norm", NORMS)
def test_margin_pgd_reaches_the_closed_form(norm: Norm) -> None:
    p = linear_problem(norm)
    attack = PGD(num_steps=60, step_size=p.threat.eps / 2, loss="margin", num_restarts=20, track="last")
    x_adv = attack(p.model, p.x, p.y, p.threat, generator=generator())
    reached = -loss_at(p.model, x_adv, p.y, "margin")
    assert bool((reached >= p.worst - 1e-9).all())  # nobody can do better
    np.testing.assert_allclose(reached, p.worst, atol=1e-9)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("early_stop", [False, True])
def test_robust_accuracy_of_a_linear_model_is_that_of_the_closed_form(norm: Norm, early_stop: bool) -> None:
    p = linear_problem(norm, 200)
    attack = PGD(num_steps=30, loss="margin", num_restarts=10, early_stop=early_stop)
    found = fooled(p.model, attack(p.model, p.x, p.y, p.threat, generator=generator()), p.y)
    assert torch.equal(found, p.worst < 0)
    assert 0.1 < float(found.double().mean()) < 0.9


def test_margin_pgd_reaches_the_linear_program_in_the_box() -> None:
    p = linear_problem("linf", 12, box=True)
    w = p.model.weight.detach().numpy()
    expected = []
    for point, label in zip(p.x.numpy(), p.y.tolist(), strict=True):
        bounds = list(zip(np.maximum(point - 0.1, 0), np.minimum(point + 0.1, 1), strict=True))
        expected.append(min(optimize.linprog(w[label] - w[k], bounds=bounds).fun for k in range(5) if k != label))
    attack = PGD(num_steps=60, step_size=0.05, loss="margin", num_restarts=20, track="last")
    reached = -loss_at(p.model, attack(p.model, p.x, p.y, p.threat, generator=generator()), p.y, "margin")
    np.testing.assert_allclose(reached, expected, atol=1e-9)


@pytest.mark.parametrize("norm", NORMS)
def test_one_step_is_enough_for_two_classes(norm: Norm) -> None:
    layer = nn.Linear(9, 2).double()
    x, y = torch.rand(30, 9, dtype=torch.float64), labels(30, 2)
    threat = ThreatModel(0.2, norm, lo=-2, hi=2)
    worst = linear_worst_case_margin(layer.weight.detach(), layer.bias.detach(), x, y, threat)
    for attack in (FGSM(), FGSM(loss="margin")):
        np.testing.assert_allclose(-loss_at(layer, attack(layer, x, y, threat), y, "margin"), worst, atol=1e-9)


# ---------------------------------------------------------------- what all attacks keep to


@pytest.mark.filterwarnings("ignore:.*zero input gradient")  # at corners, of huge balls
@settings(max_examples=60)
@given(
    st.sampled_from(sorted(ATTACKS)),
    st.sampled_from(NORMS),
    st.sampled_from([1e-5, 0.05, 0.6, 5.0]),
    st.sampled_from([(None, None), (0.5, 0.25), (MEAN, STD)]),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 1000),
)
def test_attacks_stay_in_ball_and_box_of_pixels(
    name: str, norm: Norm, eps: float, statistics: Any, dtype: torch.dtype, seed: int
) -> None:
    if name in ONLY_LINF:
        norm = "linf"
    threat = ThreatModel(eps, norm, mean=statistics[0], std=statistics[1])
    raw = images(6, seed, dtype)
    raw[:2] = raw[:2].round()  # corners of the box
    x = threat.network_input(raw)
    before = x.clone()
    model, y = network(dtype, seed), labels(6, seed=seed)
    x_adv = ATTACKS[name]()(model, x, y, threat, generator=generator(seed))
    assert torch.equal(x, before)
    assert x_adv.dtype == dtype
    assert x_adv.shape == x.shape
    assert not x_adv.requires_grad
    mean, std = (
        torch.tensor(v if v is not None else d, dtype=torch.float64).reshape(-1, 1, 1)
        for v, d in zip(statistics, (0.0, 1.0), strict=True)
    )
    found = x_adv.double() * std + mean
    assert float(size(found - raw, norm).max()) <= eps * (1 + 1e-6) + 2e-6
    assert float(found.min()) >= -1e-6
    assert float(found.max()) <= 1 + 1e-6


@every_attack
@pytest.mark.parametrize("norm", NORMS)
def test_normalisation_within_the_network_or_before_it_is_the_same(name: str, norm: Norm) -> None:
    """The ball is that of the pixels, exactly and for each channel."""
    if name in ONLY_LINF and norm == "l2":
        return

    class Normalised(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, raw: Tensor) -> Tensor:
            m, s = (torch.tensor(v, dtype=raw.dtype).reshape(-1, 1, 1) for v in (MEAN, STD))
            return self.inner((raw - m) / s)

    bare, raw, y = network(torch.float64), images(dtype=torch.float64), labels(10)
    m, s = (torch.tensor(v, dtype=torch.float64).reshape(-1, 1, 1) for v in (MEAN, STD))
    eps = 0.05 if norm == "linf" else 0.3
    inside = ATTACKS[name]()(Normalised(bare), raw, y, ThreatModel(eps, norm), generator=generator())
    outside = ATTACKS[name]()(bare, (raw - m) / s, y, ThreatModel(eps, norm, mean=MEAN, std=STD), generator=generator())
    np.testing.assert_allclose(outside * s + m, inside.numpy(), atol=1e-6)
    assert float((inside - raw).abs().max()) > 0.01


@every_attack
def test_batches_of_one_and_of_none(name: str) -> None:
    model = network()
    for n in (1, 0):
        found = ATTACKS[name]()(model, images(n), labels(n), ThreatModel(0.1))
        assert found.shape == (n, 3, 4, 4)


@pytest.mark.parametrize("name", sorted(set(ATTACKS) - {"random_fgsm", "train"}))
def test_samples_do_not_see_each_other(name: str) -> None:
    """Restarts draw side by side, so that they are all started from given points here."""
    model, x, y, threat = network(torch.float64), images(dtype=torch.float64), labels(10), ThreatModel(0.1)
    options = {} if name.startswith("thundernna") else {"start": threat.uniform(x, generator())}
    together = ATTACKS[name]()(model, x, y, threat, **options)
    for i in range(10):
        one = slice(i, i + 1)
        alone = ATTACKS[name]()(model, x[one], y[one], threat, **{k: v[one] for k, v in options.items()})
        np.testing.assert_allclose(together[one], alone, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*zero input gradient")  # of the divergence, so near the input
@every_attack
def test_a_tiny_ball_gives_the_input(name: str) -> None:
    x = images()
    found = ATTACKS[name]()(network(), x, labels(10), ThreatModel(1e-12))
    assert float((found - x).abs().max()) <= 1e-7


@every_attack
def test_attacks_do_harm(name: str) -> None:
    model, x, y = network(), images(60), labels(60)
    with torch.no_grad():
        y = torch.where(torch.arange(60) < 55, model(x).argmax(1), y)
    found = ATTACKS[name]()(model, x, y, ThreatModel(0.2), generator=generator())
    if name != "kl":
        assert float(loss_at(model, found, y, "margin").mean()) > float(loss_at(model, x, y, "margin").mean()) + 0.05
    assert int(fooled(model, found, y).sum()) > int(fooled(model, x, y).sum())


@every_attack
def test_without_a_generator_attacks_draw_from_a_stream_of_the_seed_and_their_calls(name: str) -> None:
    model, x, y, threat = network(), images(), labels(10), ThreatModel(0.1)
    attack, state = ATTACKS[name](), torch.get_rng_state()
    first, second = (attack(model, x, y, threat) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state), "the global stream stays where it was"
    assert torch.equal(ATTACKS[name]()(model, x, y, threat), first)
    for number, found in enumerate((first, second)):
        g = stream(torch.initial_seed(), purpose="attack", round=number)
        assert torch.equal(ATTACKS[name]()(model, x, y, threat, generator=g), found)
    starts_at_random = name in {"random_fgsm", "pgd_last", "last_of_restarts", "kl", "train", "svgd"}
    assert not starts_at_random or not torch.equal(first, second), "restarts are worth something"
    with torch.random.fork_rng():
        torch.rand(7)
        assert torch.equal(ATTACKS[name]()(model, x, y, threat), first), "however much was drawn before"
        torch.manual_seed(5)
        other = ATTACKS[name]()(model, x, y, threat)
    assert not starts_at_random or not torch.equal(other, first)


# ---------------------------------------------------------------- one step


@pytest.mark.parametrize("norm", NORMS)
def test_fgsm_is_one_step_to_the_edge(norm: Norm) -> None:
    model, x, y = network(), images(), labels(10)
    g = gradient(model, x, y)
    unit = g.sign() if norm == "linf" else g / g.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    threat = ThreatModel(0.1, norm)
    expected = (x + 0.1 * unit).clamp(0, 1)
    np.testing.assert_allclose(FGSM()(model, x, y, threat), expected.numpy(), atol=1e-7)
    one = PGD(num_steps=1, step_size=0.1, start="clean", track="last")
    np.testing.assert_allclose(one(model, x, y, threat), expected.numpy(), atol=1e-7)
    np.testing.assert_allclose(
        FGSM(targeted=True)(model, x, y, threat), (x - 0.1 * unit).clamp(0, 1).numpy(), atol=1e-7
    )


def test_random_fgsm_is_a_step_of_five_quarters_from_a_uniform_start() -> None:
    model, x, y = network(), images(), labels(10)
    start = (x + 0.1 * (2 * torch.rand(x.shape, generator=generator(1)) - 1)).clamp(0, 1)
    moved = start + 0.125 * gradient(model, start, y).sign()
    expected = (x + (moved - x).clamp(-0.1, 0.1)).clamp(0, 1)
    found = RandomFGSM()(model, x, y, ThreatModel(0.1), generator=generator(1))
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("loss", ["ce", "nll_logit"])
def test_thundernna_is_fgsm_where_gradients_are_small(loss: Any) -> None:
    model, x, y = network(), images(), labels(10)
    point = x.clone().requires_grad_()
    logits = model(point)
    value = F.cross_entropy(logits, y, reduction="sum") if loss == "ce" else -logits[range(10), y].sum()
    (g,) = torch.autograd.grad(value, point)
    assert 0 < float(g.abs().min()) <= float(g.abs().max()) < 1 / 0.1
    found = ThunderNNA(loss=loss)(model, x, y, ThreatModel(0.1))
    assert torch.equal(found, (x + 0.1 * g.sign()).clamp(0, 1))
    if loss == "ce":
        assert torch.equal(found, FGSM()(model, x, y, ThreatModel(0.1)))


def test_thundernna_with_a_quantile_moves_large_gradients_less() -> None:
    weight = torch.linspace(-2, 2, 12)[:, None] * torch.tensor([1.0, 0.0])  # minus the gradient of -logit of class 0
    model = nn.Linear(12, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(weight.T)
    x, y, eps = torch.full((1, 12), 0.5), torch.tensor([0]), 0.1
    found = (ThunderNNA(quantile=0.5)(model, x, y, ThreatModel(eps)) - x)[0]
    g = -weight[:, 0]
    middle = float(np.quantile(g.abs().numpy(), 0.5, method="nearest"))
    expected = [math.copysign(min(eps * middle / abs(v), eps), v) for v in g.tolist()]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    order = g.abs().argsort()
    assert bool((found.abs()[order].diff() <= 1e-7).all())
    assert float((g * found).sum()) < eps * float(g.abs().sum())


@pytest.mark.parametrize("quantile", [0.01, 0.5, 0.99])
def test_thundernna_with_a_quantile_moves_where_most_gradients_are_zero(quantile: float) -> None:
    """The quantile is that of the others, as if the pixels without a gradient were not there."""
    model, few = nn.Linear(40, 2, bias=False), nn.Linear(5, 2, bias=False)
    with torch.no_grad():
        few.weight.copy_(torch.linspace(-2, 3, 10).reshape(2, 5))
        model.weight.zero_()
        model.weight[:, 3:8] = few.weight
    x, y = torch.full((3, 40), 0.5), torch.tensor([0, 1, 0])
    delta = ThunderNNA(quantile=quantile)(model, x, y, ThreatModel(0.1)) - x
    expected = ThunderNNA(quantile=quantile)(few, x[:, :5], y, ThreatModel(0.1)) - x[:, :5]
    torch.testing.assert_close(delta[:, 3:8], expected)
    assert float(delta[:, 3:8].abs().amax(dim=1).min()) == pytest.approx(0.1, abs=1e-6), "it reaches the edge"
    assert not delta[:, :3].any()
    assert not delta[:, 8:].any()
    nothing = nn.Linear(40, 2, bias=False)
    with torch.no_grad():
        nothing.weight.zero_()
    with pytest.warns(UserWarning, match="zero input gradient"):
        assert torch.equal(ThunderNNA(quantile=quantile)(nothing, x, y, ThreatModel(0.1)), x)


@pytest.mark.parametrize(("zero_grad", "moved"), [("zero", 0.0), ("eps", 0.1)])
def test_thundernna_where_the_gradient_is_zero(zero_grad: Any, moved: float) -> None:
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight[:, 1] = 0
    x = torch.full((2, 4), 0.5)
    delta = ThunderNNA(zero_grad=zero_grad)(model, x, torch.tensor([0, 1]), ThreatModel(0.1)) - x
    assert delta[:, 1].tolist() == pytest.approx([moved] * 2, abs=1e-6)
    assert delta[:, 0].abs().tolist() == pytest.approx([0.1] * 2, abs=1e-6)


# ---------------------------------------------------------------- PGD


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["ce", "margin", "dlr", "kl"])
@pytest.mark.parametrize("targeted", [False, True])
def test_pgd_is_that_of_a_loop(norm: Norm, loss: Any, targeted: bool) -> None:
    if loss in ("dlr", "kl") and targeted:
        return
    model, x, y = network(torch.float64), images(dtype=torch.float64), labels(10)
    eps, step = (0.1, 0.03) if norm == "linf" else (0.5, 0.15)
    point = ThreatModel(eps, norm).uniform(x, generator(2))
    clean = model(x).detach()
    seen = []
    for k in range(6):
        point = point.detach().requires_grad_()
        logits = model(point)
        each = attack_loss(loss, logits, y, clean) * (-1 if targeted else 1)
        hit = (logits.argmax(1) == y) == targeted
        seen.append((point.detach(), each.detach(), hit))
        if k == 5:
            break
        (g,) = torch.autograd.grad(each.sum(), point)
        for i in range(10):  # sample by sample
            u = g[i].sign() if norm == "linf" else g[i] / g[i].norm()
            delta = (point[i] + step * u - x[i]).detach()
            delta = delta.clamp(-eps, eps) if norm == "linf" else delta * min(1.0, eps / float(delta.norm()))
            point = point.detach().clone()
            point[i] = (x[i] + delta).clamp(0, 1)
    expected = []
    for i in range(10):
        first = next((p[i] for p, _, hit in seen if hit[i]), None)
        expected.append(first if first is not None else max(seen, key=lambda s: float(s[1][i]))[0][i])
    options: Any = {"num_steps": 5, "step_size": step, "loss": loss, "targeted": targeted}
    threat = ThreatModel(eps, norm)
    for early_stop in (False, True):
        attack = PGD(**options, early_stop=early_stop)
        found = attack(model, x, y, threat, generator=generator(2))
        np.testing.assert_allclose(found, torch.stack(expected), atol=1e-10)
    last = PGD(**options, track="last")(model, x, y, threat, generator=generator(2))
    np.testing.assert_allclose(last, seen[-1][0], atol=1e-10)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_more_steps_never_do_less(norm: Norm, loss: Any) -> None:
    model, x, y = network(), images(80), labels(80)
    threat = ThreatModel(0.08 if norm == "linf" else 0.3, norm)
    before_fooled, before_loss = torch.zeros(80, dtype=torch.bool), torch.full((80,), -math.inf)
    for steps in (1, 2, 3, 5, 8, 13):
        attack = PGD(num_steps=steps, step_size=threat.eps / 3, loss=loss)
        found = attack(model, x, y, threat, generator=generator(1))
        now_fooled, now_loss = fooled(model, found, y), loss_at(model, found, y, loss)
        assert not bool((before_fooled & ~now_fooled).any())
        assert bool((now_loss >= before_loss - 1e-6)[~now_fooled].all())
        before_fooled, before_loss = now_fooled, now_loss
    assert 0 < int(before_fooled.sum()) < 80


@pytest.mark.parametrize("norm", NORMS)
def test_early_stop_fools_the_same_samples(norm: Norm) -> None:
    model, x, y = network(torch.float64), images(80, dtype=torch.float64), labels(80)
    threat = ThreatModel(0.08 if norm == "linf" else 0.4, norm)
    seen: list[int] = []
    for restarts in (1, 4):
        found = []
        for early_stop in (False, True):
            attack = PGD(num_steps=10, num_restarts=restarts, early_stop=early_stop)
            count = lambda u: seen.append(len(u)) or model(u)
            found.append(attack(model, x, y, threat, generator=generator(1), logits_of=count))
        same = ~fooled(model, found[0], y) if restarts > 1 else torch.ones(80, dtype=torch.bool)
        np.testing.assert_allclose(found[0][same], found[1][same].numpy(), atol=1e-12)
        assert torch.equal(fooled(model, found[0], y), fooled(model, found[1], y))  # maybe from another restart
        assert seen[:11] == [80 * restarts] * 11
        assert seen[12] < 80 * restarts
        assert seen[11:] == sorted(seen[11:], reverse=True)
        assert 0 < int(fooled(model, found[0], y).sum()) < 80
        seen.clear()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("start", ["uniform", "gaussian"])
def test_restarts_are_independent_runs_one_after_the_other(norm: Norm, start: Any) -> None:
    model, x, y, threat = network(torch.float64), images(dtype=torch.float64), labels(10), ThreatModel(0.1, norm)
    together = PGD(num_steps=4, num_restarts=3, start=start, track="last").particles(
        model, x, y, threat, generator=generator(3)
    )
    one = generator(3)
    alone = [PGD(num_steps=4, start=start, track="last")(model, x, y, threat, generator=one) for _ in range(3)]
    np.testing.assert_allclose(together, torch.stack(alone), atol=1e-12)
    if start == "uniform":
        assert float((alone[0] - alone[1]).abs().max()) > 1e-3
    losses = torch.stack([loss_at(model, point, y) for point in alone])
    last = PGD(num_steps=4, num_restarts=3, start=start, track="last")(model, x, y, threat, generator=generator(3))
    np.testing.assert_allclose(loss_at(model, last, y), losses.amax(0), atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_more_restarts_fool_a_superset(norm: Norm) -> None:
    model, x, y = network(), images(80), labels(80)
    threat = ThreatModel(0.08 if norm == "linf" else 0.3, norm)
    before = torch.zeros(80, dtype=torch.bool)
    for restarts in (1, 2, 5):
        attack = PGD(num_steps=3, num_restarts=restarts)
        now = fooled(model, attack(model, x, y, threat, generator=generator(1)), y)
        assert not bool((before & ~now).any())
        before = now


@pytest.mark.parametrize("norm", NORMS)
def test_a_larger_ball_started_from_the_smaller_ones_points_fools_a_superset(norm: Norm) -> None:
    model, x, y = network(), images(80), labels(80)
    attack = PGD(num_steps=5, early_stop=True)
    threat = ThreatModel(0.04 if norm == "linf" else 0.1, norm)
    point = attack(model, x, y, threat, generator=generator())
    hit = fooled(model, point, y)
    for factor in (1.5, 2, 4):
        found = attack(model, x, y, threat.scaled(factor), start=point)
        assert torch.equal(found[hit], point[hit])  # already there
        now = fooled(model, found, y)
        assert not bool((hit & ~now).any())
        assert int(now.sum()) >= int(hit.sum())
        point, hit = found, now
    assert int(hit.sum()) > 30


@pytest.mark.parametrize("norm", NORMS)
def test_a_start_is_normalised_projected_and_not_changed(norm: Norm) -> None:
    threat = ThreatModel(0.1, norm, mean=MEAN, std=STD)
    x, far = threat.network_input(images()), threat.network_input(images(seed=9))
    before = far.clone()
    attack = PGD(num_steps=1, step_size=1e-9, track="last")
    found = attack(network(), x, labels(10), threat, start=far)
    assert torch.equal(far, before)
    expected = threat.project(images(seed=9), images())
    np.testing.assert_allclose(threat.pixels(found), expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_a_successful_start_is_kept_only_within_the_ball(norm: Norm) -> None:
    model, x = network(), images()
    far = images(seed=9)
    with torch.no_grad():
        y = model(x).argmax(1)
    for early_stop in (False, True):
        found = PGD(num_steps=1, early_stop=early_stop)(model, x, y, ThreatModel(1e-3, norm), start=far)
        assert float(size(found - x, norm).max()) <= 1e-3 + 1e-6
    wrong = (y + 1) % 3  # fooled from the start, so the start comes back
    found = PGD(num_steps=1, start="gaussian")(model, x, wrong, ThreatModel(1e-4, norm), generator=generator())
    assert float(size(found - x, norm).max()) <= 1e-4 + 1e-6


def test_gaussian_starts_are_a_thousandth_away() -> None:
    model, x = network(), 0.1 + 0.8 * images(100)
    with torch.no_grad():
        wrong = (model(x).argmax(1) + 1) % 3
    found = PGD(num_steps=1, start="gaussian")(model, x, wrong, ThreatModel(0.1), generator=generator())
    assert float((found - x).std()) == pytest.approx(1e-3, rel=0.05)


def test_fgsm_and_thundernna_from_another_start() -> None:
    model, x, y, threat = network(), images(), labels(10), ThreatModel(0.1)
    start = threat.uniform(x, generator())
    expected = (start + 0.25 * gradient(model, start, y).sign()).minimum(x + 0.1).maximum(x - 0.1).clamp(0, 1)
    np.testing.assert_allclose(FGSM()(model, x, y, threat, start=start), expected.numpy(), atol=1e-7)
    with pytest.raises(TypeError, match="start"):
        ThunderNNA()(model, x, y, threat, start=start)


def test_targeted_attacks_reach_their_label_and_leave_what_is_there() -> None:
    model, x = network(), images(60)
    with torch.no_grad():
        now = model(x).argmax(1)
    for loss in ("ce", "margin"):
        attack = PGD(num_steps=10, loss=loss, targeted=True)
        stay = attack(model, x, now, ThreatModel(0.05), generator=generator())
        assert not bool(fooled(model, stay, now).any())
        away = (now + 1) % 3
        reached = ~fooled(model, attack(model, x, away, ThreatModel(0.3), generator=generator()), away)
        assert float(reached.float().mean()) > 0.5
        untargeted = PGD(num_steps=10, loss=loss)(model, x, away, ThreatModel(0.3), generator=generator())
        assert not bool((~fooled(model, untargeted, away)).any())


def test_soft_labels_work_with_cross_entropy_as_hard_ones_do() -> None:
    model, x, y, threat = network(torch.float64), images(dtype=torch.float64), labels(10), ThreatModel(0.1)
    soft = F.one_hot(y, 3).double()
    for options in ({}, {"early_stop": True}, {"track": "last"}, {"targeted": True}):
        attack = PGD(num_steps=4, **options)
        hard = attack(model, x, y, threat, generator=generator())
        np.testing.assert_allclose(attack(model, x, soft, threat, generator=generator()), hard.numpy(), atol=1e-12)
    for loss in ("margin", "dlr"):
        with pytest.raises(ValueError, match=rf"loss='{loss}' needs class indices \[B\], got labels \(10, 3\)"):
            PGD(loss=loss)(model, x, soft, threat)
    with pytest.raises(ValueError, match=r"loss='nll_logit' needs class indices \[B\], got labels \(10, 3\)"):
        ThunderNNA()(model, x, soft, threat)
    assert torch.equal(ThunderNNA(loss="ce")(model, x, soft, threat), ThunderNNA(loss="ce")(model, x, y, threat))


@pytest.mark.parametrize("norm", NORMS)
def test_a_saturated_network_does_not_stop_the_step(norm: Norm) -> None:
    """Gradients of 1e-13 keep their direction."""
    model = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[20.0, 20.0, 20.0, 20.0], [-20.0, -20.0, -20.0, -20.0]]))
    x, y = torch.full((1, 4), 0.2), torch.tensor([0])
    g = gradient(model, x, y)
    assert 0 < float(g.abs().max()) < 1e-11
    with no_warnings():
        delta = FGSM()(model, x, y, ThreatModel(0.1, norm)) - x
    assert float(size(delta, norm)) == pytest.approx(0.1, abs=1e-6)
    assert bool((delta < 0).all())


def test_counts_of_gradients_and_forwards() -> None:
    model, x, y, threat = network(), images(), labels(10), ThreatModel(0.1)
    seen: list[int] = []
    count = lambda u: seen.append(len(u)) or model(u)
    for attack, expected in (
        (PGD(num_steps=3, num_restarts=2), [20] * 4),
        (PGD(num_steps=3, track="last"), [10] * 3),
        (PGD(num_steps=3, track="last", num_restarts=2), [20] * 4),
        (PGD(num_steps=3, track="last", loss="kl"), [10] * 4),
        (FGSM(), [10]),
        (ThunderNNA(), [10]),
    ):
        seen.clear()
        attack(model, x, y, threat, logits_of=count)
        assert seen == expected
    assert PGD(num_steps=3, num_restarts=2).gradients == 6


# ---------------------------------------------------------------- SVGD


@pytest.mark.parametrize("norm", NORMS)
def test_svgd_of_one_particle_is_pgd(norm: Norm) -> None:
    model, x, y, threat = network(), images(), labels(10), ThreatModel(0.1, norm)
    found = SVGD(num_particles=1, num_steps=5)(model, x, y, threat, generator=generator())
    expected = PGD(num_steps=5, track="last")(model, x, y, threat, generator=generator())
    if norm == "linf":
        assert torch.equal(found, expected)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


def test_repulsion_keeps_particles_apart() -> None:
    model, x, y, threat = network(), images(20), labels(20), ThreatModel(0.1)

    def spread(attack: PGD) -> float:
        points = attack.particles(model, x, y, threat, generator=generator())
        pairs = itertools.combinations(points.flatten(2), 2)
        return float(torch.stack([(a - b).norm(dim=1) for a, b in pairs]).mean())

    at = {rho: spread(SVGD(num_particles=4, num_steps=7, repulsion=rho)) for rho in (0.0, 0.5, 2.0)}
    independent = spread(PGD(num_steps=7, num_restarts=4, track="last"))
    assert at[0.0] < independent
    assert at[0.0] < 0.9 * at[0.5] < 0.9 * at[2.0]


def test_particles_are_those_of_the_attack_in_network_inputs() -> None:
    threat = ThreatModel(0.1, mean=MEAN, std=STD)
    model, x, y = network(), threat.network_input(images()), labels(10)
    attack = SVGD(num_particles=3, num_steps=3, loss="margin")
    points = attack.particles(model, x, y, threat, generator=generator())
    assert points.shape == (3, *x.shape)
    assert not points.requires_grad
    best = torch.stack([loss_at(model, point, y, "margin") for point in points]).amax(0)
    chosen = attack(model, x, y, threat, generator=generator())
    np.testing.assert_allclose(loss_at(model, chosen, y, "margin"), best, atol=1e-6)
    delta = torch.stack([threat.pixels(point) - threat.pixels(x) for point in points])
    assert float(delta.abs().max()) <= 0.1 + 1e-6


# ---------------------------------------------------------------- no trace


class Residual(nn.Module):
    """BatchNorm, Dropout, a frozen layer, a parameter used twice, and flags of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3))
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(64, 3)
        self.tied = self.head.weight
        self.fail_after = math.inf
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > self.fail_after:
            raise KeyboardInterrupt
        return self.head(self.norm(self.body(x)).flatten(1))


def residual(training: bool) -> Residual:
    model = seeded_network(Residual)
    assert isinstance(model, Residual)
    model.train(training)
    model.norm.eval()  # as users freeze one
    model.body[3].train()
    model.body[0].weight.requires_grad_(False)
    model.head.bias.grad = torch.tensor([1.0, 2.0, 3.0])
    model.norm.running_mean += 0.3
    return model


def trace(model: nn.Module) -> Any:
    """All that an attack might change."""
    hooks = [
        len(getattr(sub, name))
        for sub in model.modules()
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    ]
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        [p.requires_grad for p in model.parameters()],
        [sub.training for sub in model.modules()],
        [id(value) for value in (*model.parameters(), *model.buffers())],
        [value.data_ptr() for value in (*model.parameters(), *model.buffers())],
        [value._version for value in (*model.parameters(), *model.buffers())],
        hooks,
        torch.get_rng_state(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )


def check_same(before: Any, after: Any) -> None:
    if isinstance(before, Tensor):
        assert torch.equal(before, after)
    elif isinstance(before, dict):
        assert before.keys() == after.keys()
        for key in before:
            check_same(before[key], after[key])
    elif isinstance(before, tuple):
        for one, other in zip(before, after, strict=True):
            check_same(one, other)
    else:
        assert before == after


@every_attack
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_attacks_leave_no_trace(name: str, mode: Any, training: bool, context: Callable[[], Any]) -> None:
    model, attack = residual(training), ATTACKS[name]()
    attack.mode = mode
    with context():
        x, y = images(), labels(10)
        before = trace(model)
        found = attack(model, x, y, ThreatModel(0.1), generator=generator())
        check_same(before, trace(model))
    assert torch.isfinite(found).all()
    assert float((found - x).abs().max()) > 0.05
    assert torch.equal(x, images())
    normal = attack(model, images(), labels(10), ThreatModel(0.1), generator=generator())
    if mode == "eval":
        assert torch.equal(found, normal)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("fail_after", [0, 2])
def test_attacks_leave_no_trace_when_the_network_raises(mode: Any, fail_after: int) -> None:
    model = residual(training=True)
    model.fail_after = fail_after
    before = trace(model)
    with pytest.raises(KeyboardInterrupt):
        PGD(mode=mode)(model, images(), labels(10), ThreatModel(0.1))
    check_same(before, trace(model))
    tap = Tap("head")
    model.fail_after = math.inf
    with tap.open(model) as calls:  # taps look again
        model(images())
        assert len(calls) == 1


def test_the_mode_of_the_network_is_the_one_asked_for() -> None:
    model = residual(training=True)
    seen: list[list[bool]] = []
    look = lambda u: seen.append([sub.training for sub in model.modules()]) or model(u)
    for mode, expected in (("eval", False), ("train", True)):
        for training in (True, False):
            model = residual(training)
            own = [sub.training for sub in model.modules()]
            assert set(own) == {True, False}
            seen.clear()
            PGD(num_steps=2, mode=mode)(model, images(), labels(10), ThreatModel(0.1), logits_of=look)
            assert seen
            if mode == "train" and training:  # frozen parts of a module that is in training stay frozen
                assert all(flags == own for flags in seen)
            else:
                assert all(flag is expected for flags in seen for flag in flags)


def test_a_frozen_batchnorm_is_attacked_with_the_statistics_it_has() -> None:
    model, x, y = residual(training=True), images(), labels(10)
    model.body[1].eval()
    model.body[3].p = 0.0
    frozen = PGD(num_steps=2, mode="train")(model, x, y, ThreatModel(0.1), generator=generator())
    assert torch.equal(frozen, PGD(num_steps=2)(model, x, y, ThreatModel(0.1), generator=generator()))
    model.eval()
    assert not torch.equal(frozen, PGD(num_steps=2, mode="train")(model, x, y, ThreatModel(0.1), generator=generator()))


class Counts(nn.Module):
    """Counts its calls in a buffer, in place or by another tensor."""

    calls: Tensor

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.network, self.in_place = network(), in_place
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.in_place:
            self.calls += 1
        else:
            self.calls = self.calls + 1
        found: Tensor = self.network(x)
        return found


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("training", [True, False])
def test_buffers_are_put_back_in_either_mode(in_place: bool, mode: Any, training: bool) -> None:
    model = Counts(in_place).train(training)
    model.calls += 4
    before = model.calls
    counted: list[int] = []

    def look(u: Tensor) -> Tensor:
        found: Tensor = model(u)
        counted.append(int(model.calls))
        return found

    PGD(num_steps=3, mode=mode)(model, images(), labels(10), ThreatModel(0.1), logits_of=look)
    assert len(counted) >= 3
    assert counted == list(range(5, 5 + len(counted))), "within the attack it counts"
    assert model.calls is before
    assert int(model.calls) == 4


def test_dropout_draws_other_masks_in_an_attack_than_the_step_will() -> None:
    """And others with every batch; the module's own stream is not moved."""
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(48, 3)).train()
    masks: list[Tensor] = []
    handle = model[1].register_forward_hook(lambda _, __, out: masks.append(out.detach() != 0))
    attack = PGD(num_steps=1, mode="train", start="clean", track="last")
    x, y, state = images().clamp_min(0.1), labels(10), torch.get_rng_state()
    for seed in (2, 5):
        attack(model, x, y, ThreatModel(0.1), generator=generator(seed))
    assert torch.equal(torch.get_rng_state(), state)
    model(x)
    torch.set_rng_state(state)
    handle.remove()
    assert len({tuple(mask.flatten().tolist()) for mask in (masks[0], masks[-2], masks[-1])}) == 3


def test_a_network_that_begins_in_place_is_attacked_as_another() -> None:
    model, x, y = network(), 0.2 + 0.6 * images(), labels(10)
    in_place = nn.Sequential(nn.ReLU(inplace=True), model)  # which changes nothing above 0
    found = PGD(num_steps=3)(in_place, x, y, ThreatModel(0.1), generator=generator())
    assert torch.equal(x, 0.2 + 0.6 * images())
    assert torch.equal(found, PGD(num_steps=3)(model, x, y, ThreatModel(0.1), generator=generator()))


def test_buffers_move_within_an_attack_in_training_mode() -> None:
    model = residual(training=False)
    means: list[Tensor] = []
    look = lambda u: means.append(model.norm.running_mean.clone()) or model(u)
    PGD(num_steps=2, mode="train")(model, images(), labels(10), ThreatModel(0.1), logits_of=look)
    assert not torch.equal(means[0], means[1])
    assert torch.equal(means[0], model.norm.running_mean)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_graph_from_before_the_attack_gives_the_same_gradients_after_it(mode: Any) -> None:
    model, x, y = residual(training=True), images(), labels(10)
    model.body[3].p = 0.0
    wanted = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(F.cross_entropy(model(x), y), wanted)
    model = residual(training=True)
    model.body[3].p = 0.0
    wanted = [p for p in model.parameters() if p.requires_grad]
    loss = F.cross_entropy(model(x), y)
    PGD(num_steps=2, mode=mode)(model, x, y, ThreatModel(0.1))
    for p in model.parameters():
        p.grad = None
    loss.backward()
    for p, g in zip(wanted, expected, strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, g)


def test_gradients_of_the_inputs_stay() -> None:
    x = images().requires_grad_()
    x.grad = torch.ones_like(x)
    found = PGD(num_steps=2)(network(), x, labels(10), ThreatModel(0.1))
    assert torch.equal(x.grad, torch.ones_like(x))
    assert x.requires_grad
    assert not found.requires_grad
    assert found.data_ptr() != x.data_ptr()


@every_attack
def test_results_share_no_memory_with_inputs(name: str) -> None:
    x = images()
    found = ATTACKS[name]()(network(), x, labels(10), ThreatModel(0.1))
    found.zero_()
    assert torch.equal(x, images())


def test_attacks_run_without_autocast() -> None:
    model, seen = network(), []
    look = lambda u: seen.append(torch.is_autocast_enabled("cpu")) or model(u)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = PGD(num_steps=2)(model, images(), labels(10), ThreatModel(0.1), generator=generator(), logits_of=look)
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False] * 3
    assert torch.equal(found, PGD(num_steps=2)(model, images(), labels(10), ThreatModel(0.1), generator=generator()))


def test_taps_do_not_see_attacks() -> None:
    model, tap, other = residual(training=True), Tap("head"), []
    handle = model.head.register_forward_hook(lambda *_: other.append(1))
    with tap.open(model) as calls:
        clean = model(images())
        PGD(num_steps=2)(model, images(), labels(10), ThreatModel(0.1))
        assert len(calls) == 1
        assert calls[0].output is clean
        assert len(other) == 4  # hooks of the user run
        model(images())
        assert len(calls) == 2
    handle.remove()


def test_half_precision_inputs_come_back_in_half_precision() -> None:
    threat = ThreatModel(0.1, mean=0.1307, std=0.3081)
    raw = images()
    raw[0] = 1  # rounded past the box
    x = threat.network_input(raw).half()
    model = network()
    found = FGSM()(model, x, labels(10), threat, logits_of=lambda u: model(u.float()).half())
    assert found.dtype == torch.float16
    assert float((threat.pixels(found) - threat.pixels(x)).abs().max()) <= 0.1 + 2e-3


# ---------------------------------------------------------------- inside of function transforms


@pytest.mark.parametrize("name", sorted(set(ATTACKS) - {"early_stop"}))
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_attacks_inside_of_vmap_and_grad_are_those_of_a_loop(name: str, norm: Norm, mode: Any) -> None:
    if name in ONLY_LINF and norm == "l2":
        return
    model, threat = network(torch.float64), ThreatModel(0.1, norm, mean=MEAN, std=STD)
    x = threat.network_input(images(12, dtype=torch.float64)).reshape(3, 4, 3, 4, 4)
    y = labels(12).reshape(3, 4)
    params = {k: v.detach() for k, v in model.named_parameters()}
    attack = ATTACKS[name]()
    attack.mode = mode

    def step(weights: dict[str, Tensor], u: Tensor, target: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
        logits_of = lambda v: torch.func.functional_call(model, weights, (v,))
        found = attack(model, u, target, threat, logits_of=logits_of, generator=g)
        return F.cross_entropy(logits_of(found), target), found

    flags = [p.requires_grad for p in model.parameters()]
    g = generator(6)
    gradients, points = torch.func.vmap(
        torch.func.grad(lambda w, u, t: step(w, u, t, g), has_aux=True), in_dims=(None, 0, 0), randomness="different"
    )(params, x, y)
    assert [p.requires_grad for p in model.parameters()] == flags
    one = generator(6)
    for d in range(3):
        leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
        found = attack(model, x[d], y[d], threat, generator=one)
        np.testing.assert_allclose(points[d], found.numpy(), atol=1e-9)
        loss = F.cross_entropy(torch.func.functional_call(model, leaves, (found,)), y[d])
        for k, expected in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            np.testing.assert_allclose(gradients[k][d], expected.numpy(), atol=1e-9)


# ---------------------------------------------------------------- outputs of the network


class Shaped(nn.Module):
    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.change = network(), change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.inner(x))


@pytest.mark.parametrize("wrap", [lambda z: {"logits": z}, lambda z: SimpleNamespace(logits=z, loss=None)])
def test_logits_are_found_in_mappings_and_objects(wrap: Any) -> None:
    expected = FGSM()(network(), images(), labels(10), ThreatModel(0.1))
    assert torch.equal(FGSM()(Shaped(wrap), images(), labels(10), ThreatModel(0.1)), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda z: z[..., None],
            r"needs logits \[10, classes\] for a batch of 10 inputs, but the module gives shape \(10, 3, 1\)",
        ),
        (lambda z: z[:, 0], r"gives shape \(10,\)\. Say where the logits are: logits_of= .* source=LogitsSource"),
        (lambda z: z[:4], r"gives shape \(4, 3\)"),
        (lambda z: (z, z), "gives a tuple"),
        (lambda z: {"out": z}, "gives a dict"),
    ],
)
def test_outputs_that_are_no_logits_are_refused(change: Any, message: str) -> None:
    for attack in (PGD(), FGSM(), ThunderNNA(), SVGD()):
        given = message if attack.__class__ is not SVGD else "needs logits"
        with pytest.raises(ValueError, match=given):
            attack(Shaped(change), images(), labels(10), ThreatModel(0.1))


def test_probabilities_are_warned_of_once() -> None:
    attack = PGD(num_steps=2)
    with pytest.warns(UserWarning, match="probabilities. Attacks need logits") as caught:
        attack(Shaped(lambda z: z.softmax(1)), images(), labels(10), ThreatModel(0.1))
    assert len(caught) == 1
    with no_warnings():
        attack(Shaped(lambda z: z.softmax(1)), images(), labels(10), ThreatModel(0.1))
        PGD(num_steps=2)(network(), images(), labels(10), ThreatModel(0.1))


def test_probabilities_made_logits_give_the_attack_on_logits() -> None:
    source, model, x, y = LogitsSource(from_probs=True), Shaped(lambda z: z.softmax(1)), images(), labels(10)
    with no_warnings():
        found = FGSM()(model, x, y, ThreatModel(0.1), logits_of=lambda u: source.as_logits(model(u)))
    expected = FGSM()(network(), x, y, ThreatModel(0.1))
    assert float((found - expected).abs().max()) < 1e-6


@pytest.mark.parametrize("shape", [(10,), (10, 1)])
def test_one_logit_for_two_classes_gives_the_attack_on_both(shape: tuple[int, ...]) -> None:
    source, x, y = LogitsSource(binary=True), images(), labels(10, 2)
    one = Shaped(lambda z: (z[:, 1] - z[:, 0]).reshape(shape))
    two = Shaped(lambda z: z[:, :2])
    found = PGD(num_steps=3)(
        one, x, y, ThreatModel(0.1), logits_of=lambda u: source.as_logits(one(u)), generator=generator()
    )
    expected = PGD(num_steps=3)(two, x, y, ThreatModel(0.1), generator=generator())
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


def test_as_logits() -> None:
    z = torch.tensor([[2.0], [-4.0]])
    assert LogitsSource().as_logits(z) is z
    assert LogitsSource(binary=True).as_logits(z).tolist() == [[-1, 1], [2, -2]]
    p = torch.tensor([[0.25, 0.75], [0.0, 1.0]])
    found = LogitsSource(from_probs=True).as_logits(p)
    assert torch.allclose(found.softmax(1), p)
    assert torch.isfinite(found).all()
    both = LogitsSource(from_probs=True, binary=True).as_logits(torch.tensor([0.25, 0.9]))
    assert both.softmax(1)[:, 1].tolist() == pytest.approx([0.25, 0.9])
    with pytest.raises(ValueError, match="expected logits"):
        LogitsSource(from_probs=True).as_logits(torch.full((2, 3, 4), 0.5))


# ---------------------------------------------------------------- errors and warnings


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PGD(num_steps=0), "`num_steps` must be at least 1, got 0"),
        (lambda: PGD(step_size=0), "`step_size` must be positive, got 0"),
        (lambda: PGD(step_size=-0.1), "`step_size` must be positive, got -0.1"),
        (lambda: PGD(loss="nll"), "`loss` must be 'ce', 'margin', 'dlr' or 'kl', got 'nll'"),
        (lambda: PGD(start="zero"), "`start` must be 'uniform', 'gaussian' or 'clean', got 'zero'"),
        (lambda: PGD(start="clean", num_restarts=2), "start='clean' finds the same point every time"),
        (lambda: PGD(start="clean", loss="kl"), "where loss='kl' has no gradient"),
        (lambda: FGSM(loss="kl"), "where loss='kl' has no gradient"),
        (lambda: PGD(loss="kl", targeted=True), "loss='kl' looks at no labels, so it cannot be targeted"),
        (lambda: PGD(loss="dlr", targeted=True), "loss='dlr' has no gradient where the label to reach ranks third"),
        (lambda: FGSM(loss="dlr", targeted=True), "has no gradient where the label to reach ranks third"),
        (lambda: PGD(num_restarts=0), "`num_restarts` must be at least 1, got 0"),
        (lambda: PGD(track="first"), "`track` must be 'best' or 'last', got 'first'"),
        (lambda: PGD(track="last", early_stop=True), "it needs track='best'"),
        (lambda: PGD(mode="test"), "`mode` must be 'eval' or 'train', got 'test'"),
        (lambda: SVGD(repulsion=-1), "`repulsion` must be at least 0, got -1"),
        (lambda: SVGD(num_particles=0), "must be at least 1, got 0"),
        (lambda: ThunderNNA(quantile=1.0), r"`quantile` must be in \(0, 1\), or None for the published scale, got 1.0"),
        (lambda: ThunderNNA(loss="margin"), "`loss` must be 'nll_logit' or 'ce', got 'margin'"),
        (lambda: ThunderNNA(zero_grad="no"), "`zero_grad` must be 'zero' or 'eps', got 'no'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_thundernna_refuses_the_l2_ball() -> None:
    with pytest.raises(ValueError, match="needs norm='linf', got 'l2'"):
        ThunderNNA()(network(), images(), labels(10), ThreatModel(0.1, "l2"))


@every_attack
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ((images() * 255).to(torch.uint8), TypeError, "inputs are uint8; attack needs floating inputs"),
        ([images()], TypeError, "inputs are a list; an attack needs one tensor"),
        (images() * 4 - 2, ValueError, r"inputs range \[-[\d.]+, [\d.]+\], outside \[0, 1\]; pass mean= and std="),
    ],
)
def test_inputs_that_do_not_fit_are_refused_and_leave_no_trace(name: str, x: Any, error: Any, message: str) -> None:
    model = residual(training=True)
    before = trace(model)
    with pytest.raises(error, match=message):
        ATTACKS[name]()(model, x, labels(10), ThreatModel(0.1))
    check_same(before, trace(model))


def test_a_wrong_number_of_channels_of_the_threat_is_said() -> None:
    with pytest.raises(ValueError, match="mean and std have 2 channels, but the inputs have shape"):
        FGSM()(network(), images(), labels(10), ThreatModel(0.1, mean=[0.5, 0.5], std=[0.5, 0.5]))


def test_large_steps_are_warned_of() -> None:
    model, x, y = network(), images(), labels(10)
    with pytest.warns(UserWarning, match="step_size=0.3 is more than twice eps=0.1: 2 steps jump"):
        PGD(num_steps=2, step_size=0.3)(model, x, y, ThreatModel(0.1))
    with no_warnings():
        PGD(num_steps=1, step_size=0.3)(model, x, y, ThreatModel(0.1))
        PGD(num_steps=2, step_size=0.2)(model, x, y, ThreatModel(0.1))
        PGD(num_steps=2)(model, x, y, ThreatModel(0.1))


@pytest.mark.parametrize("factor", [1e-3, 0.25, 1.0, 4.0])
@pytest.mark.parametrize("norm", NORMS)
def test_a_step_size_scales_with_the_radius(factor: float, norm: Norm) -> None:
    """As while the radius grows: no warning, and the step is ``factor`` times as long."""
    model, x, y = network().double(), 0.4 + 0.2 * images().double(), labels(10)
    threat = ThreatModel(0.05, norm, lo=-9, hi=9).scaled(factor)
    attack = PGD(num_steps=2, step_size=0.02, start="clean", track="last")
    with no_warnings():
        found = attack(model, x, y, threat)
    by_hand = x.clone()
    for _ in range(2):
        g = gradient(model, by_hand, y)
        unit = g.sign() if norm == "linf" else g / g.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        by_hand = by_hand + factor * 0.02 * unit
    np.testing.assert_allclose(found, by_hand.numpy(), rtol=0, atol=1e-10)
    with pytest.warns(UserWarning, match=f"step_size={0.2 * factor:g} is more than twice eps={0.05 * factor:g}"):
        PGD(num_steps=2, step_size=0.2)(model, x, y, threat)


# ---------------------------------------------------------------- labels


def test_labels_are_brought_into_the_form_that_losses_take() -> None:
    y = torch.tensor([2, 0, 1])
    one_hot = F.one_hot(y, 3)
    for form in (y, y.int(), y[:, None], y.to(torch.uint8), y.float(), y.float()[:, None]):
        found = as_target(form, 3)
        assert found.dtype == torch.int64
        assert torch.equal(found, y)
    for dtype in (torch.int64, torch.uint8, torch.bool):
        found = as_target(one_hot.to(dtype), 3)
        assert found.dtype == torch.float32
        assert torch.equal(found, one_hot.float())
    soft = (0.7 * one_hot + 0.1).double()
    assert as_target(soft, 3) is soft


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1]), r"there are 3 inputs and labels of shape \(2,\).*LogitsSource\(unpack"),
        (torch.zeros(4, 1, dtype=torch.int64), r"labels of shape \(4, 1\): expected class indices \[3\]"),
        (torch.eye(4), r"there are 3 inputs and labels of shape \(4, 4\)"),
        (torch.eye(3)[:, :, None].long(), r"labels of shape \(3, 3, 1\)"),
        (torch.rand(3, 4) + 0.5, "are no distributions over classes"),
        (torch.tensor([[1.5, -0.5]] * 3), "are no distributions over classes"),
        (torch.tensor([[1, 1, 0]] * 3), "are no distributions over classes"),  # several labels a sample
        (torch.tensor([0.5, 1.0, 2.0]), "labels are fractions, not class indices"),
    ],
)
def test_labels_that_fit_no_batch_are_refused(labels: Tensor, message: str) -> None:
    for attempt in (
        lambda: as_target(labels, 3),
        lambda: FGSM()(nn.Linear(6, 3), torch.rand(3, 6), labels, ThreatModel(0.1)),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()


@pytest.mark.parametrize("name", ["fgsm", "pgd", "restarts", "train", "svgd", "thundernna_quantile"])
def test_attacks_take_labels_in_every_form(name: str) -> None:
    model, x, y, threat = network(), images(), labels(10), ThreatModel(0.1)
    found = [
        ATTACKS[name]()(model, x, given, threat, generator=generator()) for given in (y, y.int()[:, None], y.float())
    ]
    assert all(torch.equal(one, found[0]) for one in found)
    if name in ("fgsm", "pgd", "thundernna_quantile"):  # on the cross entropy of distributions
        one_hot = F.one_hot(y, 3)
        hard, soft = (ATTACKS[name]()(model, x, o, threat, generator=generator()) for o in (one_hot, one_hot.float()))
        assert torch.equal(hard, soft)
        np.testing.assert_allclose(hard, found[0].numpy(), atol=1e-6)


@pytest.mark.parametrize("attack", [PGD(), PGD(num_restarts=3), FGSM(), ThunderNNA(), SVGD()])
def test_gradients_that_are_not_finite_are_refused(attack: Attack) -> None:
    def broken(x: Tensor) -> Tensor:
        z = network()(x)
        bad = torch.zeros_like(z)
        bad[:: len(x) // 2 or 1] = float("nan")
        return z * (1 + bad)

    model = residual(training=True)
    before = trace(model)
    with pytest.raises(
        RuntimeError, match=r"non-finite input gradient in \d+/10 samples \(module in fp16\? loss inf\?"
    ):
        attack(model, images(), labels(10), ThreatModel(0.1), logits_of=broken)
    check_same(before, trace(model))
    if attack.__class__ in (FGSM, ThunderNNA):
        with pytest.raises(RuntimeError, match="in 2/10 samples"):
            attack(model, images(), labels(10), ThreatModel(0.1), logits_of=broken)


@pytest.mark.parametrize("attack", [PGD(num_steps=2), FGSM(), ThunderNNA(), SVGD(num_steps=2)])
def test_gradients_that_are_zero_are_warned_of_once(attack: Attack) -> None:
    model, x, y = network(), images(), labels(10)
    model[1].register_forward_pre_hook(lambda _, inputs: (inputs[0].round(),))  # a quantised input
    with pytest.warns(
        UserWarning, match="100 % of the samples have a zero input gradient: possible gradient masking"
    ) as w:
        attack(model, x, y, ThreatModel(0.1))
    assert len(w) == 1
    with no_warnings():
        attack(model, x, y, ThreatModel(0.1))


@pytest.mark.parametrize(("samples", "warned"), [(50, True), (200, False)])
def test_one_sample_in_fifty_without_a_gradient_is_warned_of(samples: int, warned: bool) -> None:
    x, model = images(samples), network()

    def one_masked(u: Tensor) -> Tensor:
        keep = (torch.arange(len(u)) > 0).reshape(-1, 1, 1, 1)
        return model(u * keep)

    with torch.no_grad():
        y = one_masked(x).argmax(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        FGSM()(model, x, y, ThreatModel(0.1), logits_of=one_masked)
    assert [" 2 %" in f" {w.message}" for w in caught] == [True] * warned


def test_flat_losses_of_samples_that_are_fooled_already_are_no_masking() -> None:
    model, x = network(), images()
    with torch.no_grad():
        y = model(x).argsort(dim=1)[:, 0]  # ranks third: the DLR loss is 1 whatever the logits
    with no_warnings():
        found = PGD(num_steps=2, loss="dlr")(model, x, y, ThreatModel(0.01))
    assert bool(fooled(model, found, y).all())


# ---------------------------------------------------------------- other libraries


@pytest.fixture(scope="module")
def digits() -> Any:
    """A small network trained on the digits in [0, 1], and what it was not trained on."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    x = torch.tensor(data.images[order] / 16, dtype=torch.float32)[:, None]
    y = torch.tensor(data.target[order])
    model = seeded_network(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(80):
        optimizer.zero_grad()
        F.cross_entropy(model(x[:1500]), y[:1500]).backward()
        optimizer.step()
    model.eval().requires_grad_(False)
    x, y = x[1500:1700], y[1500:1700]
    assert float((~fooled(model, x, y)).float().mean()) > 0.93
    return SimpleNamespace(model=model, x=x, y=y)


EPS = {"linf": 0.08, "l2": 0.45}


def success(digits: Any, x_adv: Tensor) -> float:
    return float(fooled(digits.model, x_adv, digits.y).float().mean())


@contextmanager
def streams_kept() -> Iterator[None]:
    """Other libraries seed what is global."""
    state = np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        yield
    np.random.set_state(state)  # noqa: NPY002


@pytest.mark.parametrize("norm", NORMS)
def test_fgsm_is_that_of_foolbox(digits: Any, norm: Norm) -> None:
    foolbox = pytest.importorskip("foolbox")
    theirs = foolbox.attacks.LinfFastGradientAttack() if norm == "linf" else foolbox.attacks.L2FastGradientAttack()
    victim = foolbox.PyTorchModel(digits.model, bounds=(0, 1))
    _, expected, hits = theirs(victim, digits.x, digits.y, epsilons=EPS[norm])
    found = FGSM()(digits.model, digits.x, digits.y, ThreatModel(EPS[norm], norm))
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-6)
    assert torch.equal(fooled(digits.model, found, digits.y), hits)
    assert 0.1 < success(digits, found) < 0.99


@pytest.mark.parametrize("norm", NORMS)
def test_pgd_is_as_strong_as_that_of_foolbox(digits: Any, norm: Norm) -> None:
    foolbox = pytest.importorskip("foolbox")
    kind = foolbox.attacks.LinfPGD if norm == "linf" else foolbox.attacks.L2PGD
    victim = foolbox.PyTorchModel(digits.model, bounds=(0, 1))
    threat = ThreatModel(EPS[norm], norm)
    clean = kind(steps=20, rel_stepsize=0.125, random_start=False)
    _, expected, _ = clean(victim, digits.x, digits.y, epsilons=threat.eps)
    ours = PGD(num_steps=20, start="clean", track="last")(digits.model, digits.x, digits.y, threat)
    same = ((ours - expected).flatten(1).abs().amax(1) < 1e-4).float().mean()
    assert float(same) > 0.95  # without a random start, point by point; rounding may send a few elsewhere
    with streams_kept():
        torch.manual_seed(0)
        _, _, hits = kind(steps=20, rel_stepsize=0.125)(victim, digits.x, digits.y, epsilons=threat.eps)
    theirs = float(hits.float().mean())
    for attack in (PGD(num_steps=20), PGD(num_steps=20, loss="margin", num_restarts=5)):
        found = success(digits, attack(digits.model, digits.x, digits.y, threat, generator=generator()))
        assert found == pytest.approx(theirs, abs=0.03)
    assert 0.1 < theirs < 0.99


@pytest.mark.parametrize("norm", NORMS)
def test_pgd_is_about_as_strong_as_autoattack(digits: Any, norm: Norm) -> None:
    pyautoattack = pytest.importorskip("pyautoattack")
    threat, n = ThreatModel(EPS[norm], norm), 100
    x, y = digits.x[:n], digits.y[:n]
    with streams_kept():
        attacker = pyautoattack.AutoAttack(
            digits.model,
            attacks=["apgd-ce", "apgd-dlr"],
            eps=threat.eps,
            norm={"linf": "Linf", "l2": "L2"}[norm],
            version="custom",
            seed=0,
        )
        x_theirs = attacker.run_standard_evaluation(x, y)[0]
    assert float(size(x_theirs - x, norm).max()) <= threat.eps * (1 + 1e-5)
    theirs = fooled(digits.model, x_theirs, y)
    for loss in ("ce", "margin"):
        attack = PGD(num_steps=50, loss=loss, num_restarts=5, early_stop=True)
        ours = fooled(digits.model, attack(digits.model, x, y, threat, generator=generator()), y)
        assert float(ours.float().mean()) == pytest.approx(float(theirs.float().mean()), abs=0.02)
        assert int((theirs ^ ours).sum()) <= 3
    assert 0.1 < float(theirs.float().mean()) < 0.99
