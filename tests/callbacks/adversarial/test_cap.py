from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundwire.callbacks.adversarial import (
    TRADES,
    ConfinedPolytopes,
    CornerSearch,
    ThreatModel,
)
from groundwire.plugins.random import stream
from helpers.callbacks import check_step_callback
from helpers.edge import CLASSES, FEATURES, Classifier, fit, loader, mlp, weights

EPS, BOX = 0.3, 6.0
THREAT = ThreatModel(eps=EPS, lo=-BOX, hi=BOX)
EXACT: dict[str, Any] = {"precision": "64-true", "steps": 4}


def within(u: Tensor, x: Tensor) -> Tensor:
    return torch.maximum(torch.minimum(u, x + EPS), x - EPS).clamp(-BOX, BOX)


def distance_of(corner: Tensor, center: Tensor, distance: str, outputs: str) -> Tensor:
    """Of one sample's outputs."""
    if distance == "kl":
        p, q = center.softmax(dim=0), corner.softmax(dim=0)
        return (p * (p / q).log()).sum()
    maps = {"logits": lambda f: f, "probs": lambda f: f.softmax(dim=0), "log_probs": lambda f: f.log_softmax(dim=0)}
    difference = maps[outputs](corner) - maps[outputs](center)
    if distance == "linf":
        return difference.abs().max()
    squared = difference.square().sum()
    return squared if distance == "l2sq" else (squared + 1e-12).sqrt()


def total(corners: list[Tensor], centers: Tensor, distance: str, outputs: str) -> Tensor:
    found = [distance_of(f[i], centers[i], distance, outputs) for f in corners for i in range(len(centers))]
    return torch.stack(found).sum()


def cap_by_hand(
    number: int, center: str, distance: str, outputs: str = "logits", detach: bool = False, lam: float = 0.5
) -> Tensor:
    """Four steps of SGD; particle after particle, sample after sample."""
    network = mlp().double()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for step, (x, y) in enumerate(loader()):
        x = x.double()
        g = stream(0, purpose="adversarial/cap", round=step, device_id=0)
        particles = [
            within(x + EPS * (2 * torch.rand(x.shape, generator=g, dtype=x.dtype) - 1), x) for _ in range(number)
        ]
        for _ in range(2):
            with torch.no_grad():
                middle = network(x) if center == "clean" else sum(network(u) for u in particles) / number
            moved = []
            for u in particles:
                u = u.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(total([network(u)], middle, distance, outputs), u)
                moved.append(within(u + 0.12 * gradient.sign(), x).detach())
            particles = moved
        clean, corners = network(x), [network(u) for u in particles]
        middle = clean if center == "clean" else sum(corners) / number
        middle = middle.detach() if detach else middle
        loss = F.cross_entropy(clean, y) + lam * total(corners, middle, distance, outputs) / (number * len(y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return weights(network)


@pytest.mark.parametrize("center", ["clean", "mean"])
def test_it_is_a_step_callback(center: Any) -> None:
    check_step_callback(
        lambda: ConfinedPolytopes(
            THREAT, search=CornerSearch(2, 2, center=center, repulsion=0.5 if center == "mean" else None)
        ),
        off=lambda: ConfinedPolytopes(THREAT, lam=0.0),
    )


@pytest.mark.parametrize(
    ("search", "detach"),
    [
        ({"number": 2, "center": "mean", "distance": "l2sq"}, False),
        ({"number": 3, "center": "mean", "distance": "kl"}, False),
        ({"number": 2, "center": "mean", "distance": "l2", "outputs": "log_probs"}, True),
        ({"number": 2, "center": "clean", "distance": "l2sq"}, False),
        ({"number": 2, "center": "clean", "distance": "linf", "outputs": "probs"}, False),
        ({"number": 1, "center": "clean", "distance": "kl"}, True),
    ],
    ids=str,
)
def test_trains_as_written_by_hand(search: dict[str, Any], detach: bool) -> None:
    options = {key: value for key, value in search.items() if key != "number"}
    callback = ConfinedPolytopes(
        THREAT, lam=0.5, search=CornerSearch(search["number"], 2, 0.12, **options), detach_center=detach
    )
    found, _, _ = fit("auto", Classifier(mlp(), "SGD", lr=0.1), callbacks=[callback], **EXACT)
    torch.testing.assert_close(found, cap_by_hand(**search, detach=detach), rtol=0, atol=1e-10)


def test_detaching_the_center_makes_a_difference() -> None:
    for center in ("clean", "mean"):
        found = [cap_by_hand(2, center, "l2sq", detach=detach) for detach in (False, True)]
        # around the mean, the gradient of squared distances through it is zero
        assert bool((found[0] - found[1]).abs().max() > 1e-4) == (center == "clean")


@pytest.mark.parametrize("module", [Classifier(mlp()), Classifier(mlp(nn.BatchNorm1d(16)))], ids=["plain", "batchnorm"])
def test_one_particle_around_the_clean_output_is_trades(module: Classifier) -> None:
    beta = 3.0
    cap = ConfinedPolytopes(
        THREAT, lam=beta, search=CornerSearch(1, 10, center="clean", distance="kl", start="gaussian"), name="same"
    )
    found, _, losses = fit("auto", module, callbacks=[cap], steps=6)
    expected, _, expected_losses = fit("auto", module, callbacks=[TRADES(THREAT, beta=beta, name="same")], steps=6)
    assert torch.equal(found, expected)
    assert losses == expected_losses


def test_one_particle_and_squared_distances_is_adversarial_logit_pairing() -> None:
    """Cross entropy plus the mean squared distance of the logits of pairs, whatever finds the pairs."""

    class Pairs(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            step = self.trainer.global_step
            g = stream(0, purpose="adversarial/cap", round=step, device_id=0)
            u = within(x + EPS * (2 * torch.rand(x.shape, generator=g, dtype=x.dtype) - 1), x)
            for _ in range(3):
                u = u.detach().requires_grad_()
                (gradient,) = torch.autograd.grad((self(u) - self(x).detach()).square().sum(), u)
                u = within(u + 0.12 * gradient.sign(), x)
            clean = self(x)
            return F.cross_entropy(clean, y) + 0.5 * (self(u.detach()) - clean).square().sum() / len(y)

    cap = ConfinedPolytopes(THREAT, lam=0.5, search=CornerSearch(1, 3, 0.12, center="clean", distance="l2sq"))
    found, _, _ = fit("auto", Classifier(mlp()), callbacks=[cap], **EXACT)
    expected, _, _ = fit("auto", Pairs(mlp()), **EXACT)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


class Given(CornerSearch):
    """Corners that were found elsewhere."""

    def __init__(self, corners: Tensor, **options: Any) -> None:
        super().__init__(len(corners), **options)
        self.corners = corners

    def particles(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.corners


def losses_with(corners: Tensor, **options: Any) -> float:
    cap = ConfinedPolytopes(THREAT, lam=0.7, search=Given(corners, **options))
    return fit("auto", Classifier(mlp()), callbacks=[cap], precision="64-true", steps=1)[2][0]


def some_corners(number: int) -> Tensor:
    x = next(iter(loader()))[0].double()
    g = torch.Generator().manual_seed(5)
    return x + EPS * (2 * torch.rand(number, *x.shape, generator=g, dtype=x.dtype) - 1)


@pytest.mark.parametrize("distance", ["l2sq", "l2", "linf", "kl"])
def test_identical_and_permuted_particles(distance: Any) -> None:
    plain = fit("auto", Classifier(mlp()), precision="64-true", steps=1)[2][0]
    one, three = some_corners(1), some_corners(3)
    same = one.repeat(3, 1, 1)
    rounding = 1e-6 if distance == "l2" else 1e-12  # sqrt(1e-12)
    assert losses_with(same, distance=distance, center="mean") == pytest.approx(plain, abs=rounding)
    alone = losses_with(one, distance=distance, center="clean")
    assert losses_with(same, distance=distance, center="clean") == pytest.approx(alone, abs=1e-12)
    assert alone > plain + 1e-4
    for center in ("clean", "mean"):
        expected = losses_with(three, distance=distance, center=center)
        assert losses_with(three[[2, 0, 1]], distance=distance, center=center) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_on_a_linear_model_no_corner_is_farther_than_the_ball_allows_and_the_best_is_as_far(seed: int) -> None:
    """``|f(x') - f(x)|_inf <= eps max_k |w_k|_1``, reached by a particle whose leading coordinate was always the best."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Linear(FEATURES, CLASSES).double()
    x, y = next(iter(loader()))
    x = x.double()
    wide = ThreatModel(eps=EPS, lo=-100, hi=100)
    bound = EPS * network.weight.abs().sum(dim=1).max()
    best = int(network.weight.abs().sum(dim=1).argmax())
    for distance in ("linf", "l2sq", "l2", "kl"):

        def after(steps: int, size: float, distance: Any = distance) -> Tensor:
            search = CornerSearch(8, steps, size, center="clean", distance=distance)
            points = search.particles(network, x, y, wide, generator=torch.Generator().manual_seed(0))
            found: Tensor = (network(points) - network(x)).abs()
            return found

        size = 2.5 * EPS / 6
        moved = after(6, size).amax(dim=-1)
        assert float((moved - bound).max()) <= 1e-12
        if distance == "linf":
            ways = [after(1, 1e-9), *(after(steps, size) for steps in range(1, 7))]
            leading = torch.stack([way.argmax(dim=-1) == best for way in ways]).all(dim=0)
            assert leading.float().mean() > 0.1, "some particles must have started there"
            torch.testing.assert_close(moved[leading], bound.expand(int(leading.sum())), rtol=0, atol=1e-12)


def test_logs_its_terms() -> None:
    cap = ConfinedPolytopes(THREAT, lam=0.4, search=CornerSearch(3, 2))
    _, t, losses = fit("auto", callbacks=[cap], steps=1)
    logged = {name: float(value) for name, value in t.callback_metrics.items()}
    assert set(logged) == {"train/loss", "cap/distance", "cap/radius", "cap/robust_acc"}
    assert losses[0] == pytest.approx(logged["train/loss"] + 0.4 * logged["cap/distance"], rel=1e-5)
    assert logged["cap/radius"] > logged["cap/distance"] > 0


def test_logged_radius_and_accuracy_are_those_of_the_worst_corner() -> None:
    corners = some_corners(3)
    cap = ConfinedPolytopes(THREAT, search=Given(corners, center="clean", distance="linf"))
    _, t, _ = fit("auto", Classifier(mlp()), callbacks=[cap], precision="64-true", steps=1)
    x, y = next(iter(loader()))
    network = mlp().double()
    with torch.no_grad():
        outputs, clean = [network(u) for u in corners], network(x.double())
    radii = [max(float((f[i] - clean[i]).abs().max()) for f in outputs) for i in range(len(y))]
    right = [all(int(f[i].argmax()) == int(y[i]) for f in outputs) for i in range(len(y))]
    assert float(t.callback_metrics["cap/radius"]) == pytest.approx(sum(radii) / len(radii), rel=1e-5)
    assert float(t.callback_metrics["cap/robust_acc"]) == pytest.approx(sum(right) / len(right), rel=1e-5)


def test_the_polytopes_shrink_during_training() -> None:
    def radius(lam: float) -> float:
        cap = ConfinedPolytopes(THREAT, lam=lam, search=CornerSearch(2, 3))
        _, t, _ = fit("auto", callbacks=[cap], steps=60, log_every_n_steps=1)
        return float(t.callback_metrics["cap/radius"])

    assert radius(3.0) < 0.5 * radius(0.01)


def test_repulsion_keeps_corners_apart() -> None:
    x, y = next(iter(loader()))

    def spread(repulsion: float | None) -> float:
        search = CornerSearch(2, 5, distance="l2sq", center="clean", repulsion=repulsion)
        points = search.particles(mlp(), x, y, THREAT, generator=torch.Generator().manual_seed(0))
        return float((points[0] - points[1]).norm(dim=1).mean())

    assert spread(5.0) > spread(0.5) > spread(0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "clean"}, "`start` must be 'uniform' or 'gaussian'"),
        ({"center": "middle"}, "`center` must be 'clean' or 'mean', got 'middle'"),
        ({"distance": "cosine"}, "`distance` must be 'l2sq', 'l2', 'linf' or 'kl', got 'cosine'"),
        ({"outputs": "features"}, "`outputs` must be 'logits', 'log_probs' or 'probs', got 'features'"),
        ({"num_particles": 1, "center": "mean"}, "center='mean' needs at least 2 particles"),
        ({"num_particles": 0, "center": "clean"}, "must be at least 1"),
        ({"repulsion": -1.0}, "`repulsion` must be at least 0, or None, got -1.0"),
    ],
)
def test_impossible_searches_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CornerSearch(**options)


def test_a_negative_weight_is_refused() -> None:
    for lam in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="`lam` must be at least 0, got"):
            ConfinedPolytopes(THREAT, lam=lam)
