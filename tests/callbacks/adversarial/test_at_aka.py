from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from groundwire.callbacks.adversarial import (
    MART,
    SVGD,
    TRADES,
    AdaptiveKnowledgeAmalgamation,
    ThreatModel,
)
from groundwire.plugins.edge import EdgeStrategy
from groundwire.plugins.random import stream
from helpers.callbacks import check_step_callback
from helpers.edge import CLASSES, FEATURES, Classifier, Killed, fit, loader, mlp, trainer, weights

EPS, BOX = 0.3, 6.0
THREAT = ThreatModel(eps=EPS, lo=-BOX, hi=BOX)
EXACT: dict[str, Any] = {"precision": "64-true", "steps": 4}


def teacher(seed: int, classes: int = CLASSES) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(FEATURES, 24), nn.BatchNorm1d(24), nn.Dropout(0.1), nn.ReLU(), nn.Linear(24, classes)
        )


def teachers(number: int = 2) -> list[nn.Module]:
    return [teacher(seed) for seed in range(number)]


def build(number: int = 2, **options: Any) -> AdaptiveKnowledgeAmalgamation:
    options = {"attack": SVGD(number, num_steps=2)} | options
    return AdaptiveKnowledgeAmalgamation(THREAT, teachers(number), **options)


# ---------------------------------------------------------------- the step written by hand


def within(u: Tensor, x: Tensor) -> Tensor:
    return torch.maximum(torch.minimum(u, x + EPS), x - EPS).clamp(-BOX, BOX)


def stein(points: list[Tensor], gradients: list[Tensor], repulsion: float) -> list[Tensor]:
    """Directions of one sample's particles; the kernel's gradient by autograd."""
    distances = [float((a - b).square().sum()) for a in points for b in points]
    width = max(float(np.median(distances)) / np.log(len(points) + 1), 1e-8)
    found = []
    for u in points:
        phi = torch.zeros_like(u)
        for v, g in zip(points, gradients, strict=True):
            v = v.clone().requires_grad_()
            kernel = torch.exp(-(v - u).square().sum() / width)
            (push,) = torch.autograd.grad(kernel, v)
            phi += kernel.detach() * g / g.norm() + repulsion * push
        found.append(phi / len(points))
    return found


def particles_by_hand(network: nn.Module, x: Tensor, y: Tensor, step: int, number: int, steps: int) -> list[Tensor]:
    g = stream(0, purpose="adversarial/at_aka", round=step, device_id=0)
    points = [within(x + EPS * (2 * torch.rand(x.shape, generator=g, dtype=x.dtype) - 1), x) for _ in range(number)]
    for _ in range(steps):
        gradients = []
        for u in points:
            u = u.detach().requires_grad_()
            gradients += torch.autograd.grad(F.cross_entropy(network(u), y, reduction="sum"), u)
        moved = [torch.empty_like(x) for _ in range(number)]
        for i in range(len(x)):
            directions = stein([u[i] for u in points], [g[i] for g in gradients], 0.5)
            for m, direction in enumerate(directions):
                moved[m][i] = points[m][i] + 2.5 * EPS / steps * direction.sign()
        points = [within(u, x) for u in moved]
    return [u.detach() for u in points]


def shares(outputs: list[Tensor], label: int, kind: str, tau: float) -> np.ndarray[Any, Any]:
    """Of the teachers, on one sample."""
    scores = []
    for f in outputs:
        p = np.exp(f.numpy()) / np.exp(f.numpy()).sum()
        wrong = max(float(f[k]) for k in range(CLASSES) if k != label)
        scores.append(
            {
                "loss": np.log(p[label]),
                "margin": float(f[label]) - wrong,
                "entropy": float((p * np.log(p)).sum()),
                "uniform": 0.0,
            }[kind]
        )
    share: np.ndarray[Any, Any] = np.exp(np.array(scores) / tau) / np.exp(np.array(scores) / tau).sum()
    return share


def by_hand(
    number: int = 2,
    kappa: float = 0.7,
    temperature: float = 4.0,
    eta: float = 0.2,
    weights_kind: str = "loss",
    tau: float = 1.0,
    standardize: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """Four steps of SGD, and the first step's logits of each teacher on its particle."""
    network, known = mlp().double(), [t.double().eval() for t in teachers(number)]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    first: list[Tensor] = []
    for step, (x, y) in enumerate(loader()):
        x = x.double()
        points = particles_by_hand(network, x, y, step, number, 2)
        with torch.no_grad():
            taught = [t(u) for t, u in zip(known, points, strict=True)]
        first = first or taught
        student = [network(u) for u in points]
        ce = sum(F.cross_entropy(f, y) for f in student) / number
        kl: Any = 0.0
        for i, label in enumerate(y.tolist()):
            share = shares([t[i] for t in taught], label, weights_kind, tau)
            rows = [(t[i] - t[i].mean()) / t[i].std(correction=0) if standardize else t[i] for t in taught]
            amalgam = sum(float(s) * row for s, row in zip(share, rows, strict=True))
            p = (amalgam / temperature).softmax(dim=0)
            for f in student:
                q = (f[i] / temperature).softmax(dim=0)
                kl = kl + (p * (p / q).log()).sum() / (number * len(y))
        loss = (1 - kappa) * ce + kappa * temperature**2 * kl + eta * F.cross_entropy(network(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return weights(network), first


def test_it_is_a_step_callback() -> None:
    check_step_callback(build)


@pytest.mark.parametrize(
    ("number", "options"),
    [
        (2, {}),
        (3, {"kappa": 0.4, "temperature": 2.0, "eta": 1.0}),
        (2, {"weights": "margin", "weight_temperature": 0.5}),
        (2, {"weights": "entropy", "standardize": True, "eta": 0.0}),
        (2, {"weights": "uniform", "kappa": 1.0}),
        (1, {}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*one teacher")
def test_trains_as_written_by_hand(number: int, options: dict[str, Any]) -> None:
    callback = build(number, **options)
    found, _, _ = fit("auto", Classifier(mlp(), "SGD", lr=0.1), callbacks=[_doubled(callback)], **EXACT)
    renamed = {{"weights": "weights_kind", "weight_temperature": "tau"}.get(k, k): v for k, v in options.items()}
    expected, _ = by_hand(number, **renamed)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def _doubled(callback: AdaptiveKnowledgeAmalgamation) -> AdaptiveKnowledgeAmalgamation:
    for known in callback.teachers:
        assert known.module is not None
        known.module.double()
    return callback


def test_without_teachers_and_own_loss_it_is_adversarial_training_on_the_particles() -> None:
    """Also as the parts of this project tell it: a module whose own step takes the mean over SVGD's particles."""

    class OnParticles(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            g = stream(0, purpose="adversarial/at_aka", round=self.trainer.global_step, device_id=0)
            points = SVGD(2, num_steps=2).particles(self, x, y, THREAT, generator=g)
            return F.cross_entropy(self(points.flatten(0, 1)), y.repeat(2))

    found, _, _ = fit("auto", Classifier(mlp()), callbacks=[build(kappa=0.0, eta=0.0)], **EXACT)
    expected, _, _ = fit("auto", OnParticles(mlp()), **EXACT)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


# ---------------------------------------------------------------- the amalgam


class Probe(AdaptiveKnowledgeAmalgamation):
    """Keeps its particles equal and remembers what the teachers say of them."""

    def run_search(self, *args: Any) -> Tensor:
        points = super().run_search(*args)
        return points[:1].expand(points.shape)


@pytest.mark.parametrize("kind", ["loss", "margin", "entropy", "uniform"])
def test_identical_teachers_on_identical_particles_are_one_teacher(kind: Any) -> None:
    def trained(known: list[nn.Module], weights_kind: Any) -> Tensor:
        callback = Probe(THREAT, known, attack=SVGD(3, num_steps=1), weights=weights_kind, name="same")
        return fit("auto", callbacks=[callback], **EXACT)[0]

    one = trained([teacher(1) for _ in range(3)], kind)
    uniform = trained([teacher(1) for _ in range(3)], "uniform")
    torch.testing.assert_close(one, uniform, rtol=0, atol=1e-10)
    different = trained([teacher(m) for m in range(3)], kind)
    assert (one - different).abs().max() > 1e-5


def test_one_network_may_be_several_teachers_and_gets_its_flags_back() -> None:
    known = teacher(1)
    callback = AdaptiveKnowledgeAmalgamation(THREAT, [known, known], attack=SVGD(2, num_steps=1))
    found, _, _ = fit("auto", callbacks=[callback])
    copies = AdaptiveKnowledgeAmalgamation(THREAT, [teacher(1), teacher(1)], attack=SVGD(2, num_steps=1))
    assert torch.equal(found, fit("auto", callbacks=[copies])[0])
    assert all(p.requires_grad for p in known.parameters())
    assert all(sub.training for sub in known.modules())


class Constant(nn.Module):
    """Says one class, however large it is wrong."""

    def __init__(self, right: bool, size: float = 20.0) -> None:
        super().__init__()
        self.right, self.size = right, size
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        labels = next(iter(loader()))[1]
        said = labels if self.right else (labels + 1) % CLASSES
        return self.scale * self.size * F.one_hot(said, CLASSES).to(x.dtype)


@pytest.mark.parametrize("kind", ["loss", "margin"])
def test_a_teacher_that_is_utterly_wrong_counts_for_nothing(kind: Any) -> None:
    callback = AdaptiveKnowledgeAmalgamation(THREAT, [Constant(True), Constant(False)], weights=kind)
    _, t, _ = fit("auto", callbacks=[callback], steps=1)
    logged = {name: float(value) for name, value in t.callback_metrics.items()}
    assert logged["at_aka/weight_1"] < 1e-6
    assert logged["at_aka/weight_0"] == pytest.approx(1.0, abs=1e-6)
    assert logged["at_aka/teacher_acc"] == 1.0


@pytest.mark.parametrize("kind", ["loss", "margin", "entropy", "uniform"])
def test_logged_weights_are_those_of_the_samples_and_sum_to_one(kind: Any) -> None:
    callback = _doubled(build(3, weights=kind))
    _, t, losses = fit("auto", callbacks=[callback], precision="64-true", steps=1)
    logged = {name: float(value) for name, value in t.callback_metrics.items()}
    names = {f"at_aka/{n}" for n in ("ce", "kl", "robust_acc", "teacher_acc", "weight_0", "weight_1", "weight_2")}
    assert set(logged) == names | {"train/loss"}
    _, first = by_hand(3)
    y = next(iter(loader()))[1]
    means = np.mean([shares([f[i] for f in first], int(y[i]), kind, 1.0) for i in range(len(y))], axis=0)
    assert [logged[f"at_aka/weight_{m}"] for m in range(3)] == pytest.approx(means.tolist(), rel=1e-5)
    assert sum(logged[f"at_aka/weight_{m}"] for m in range(3)) == pytest.approx(1.0, abs=1e-6)
    total = 0.3 * logged["at_aka/ce"] + 0.7 * 16 * logged["at_aka/kl"] + 0.2 * logged["train/loss"]
    assert losses[0] == pytest.approx(total, rel=1e-5)


def test_the_order_of_teachers_changes_nothing_but_their_names() -> None:
    """On equal particles; else each teacher would see another one."""

    def run(order: list[int]) -> tuple[Tensor, list[float]]:
        known = [teacher(m).double() for m in order]
        callback = Probe(THREAT, known, attack=SVGD(3, num_steps=1))
        found, t, _ = fit("auto", callbacks=[callback], log_every_n_steps=1, **EXACT)
        return found, [float(t.callback_metrics[f"at_aka/weight_{m}"]) for m in range(3)]

    found, weights_found = run([0, 1, 2])
    permuted, weights_permuted = run([2, 0, 1])
    torch.testing.assert_close(permuted, found, rtol=0, atol=1e-10)
    assert weights_permuted == pytest.approx([weights_found[m] for m in (2, 0, 1)], rel=1e-6)


# ---------------------------------------------------------------- teachers are not touched


class Watched(nn.Module):
    """A teacher that watches how it is used."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.inner = teacher(seed)
        self.modes: set[bool] = set()
        self.graphs = 0
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes |= {sub.training for sub in self.modules()}
        self.graphs += torch.is_grad_enabled() or any(p.requires_grad for p in self.parameters())
        self.seen.append(x)
        found: Tensor = self.inner(x)
        return found


def _flags(module: nn.Module) -> tuple[list[bool], list[bool]]:
    return [p.requires_grad for p in module.parameters()], [sub.training for sub in module.modules()]


@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("edge", [False, True])
def test_the_gradient_reaches_the_student_only(error: bool, edge: bool) -> None:
    known = [Watched(seed).train() for seed in range(2)]
    known[0].inner[0].bias.requires_grad_(False)  # type: ignore[index, union-attr]
    known[1].inner[1].eval()  # type: ignore[index, union-attr]
    flags, before = [_flags(k) for k in known], [weights(k) for k in known]
    callback = AdaptiveKnowledgeAmalgamation(THREAT, known, attack=SVGD(2, num_steps=1))
    strategy = EdgeStrategy(num_devices=2, vectorize=False) if edge else "auto"
    with contextlib.suppress(Killed.Error):
        fit(strategy, callbacks=[callback, *([Killed(2)] if error else [])], steps=4)
    for k, flag, vector in zip(known, flags, before, strict=True):
        assert _flags(k) == flag
        assert torch.equal(weights(k), vector)
        assert all(p.grad is None for p in k.parameters())
        assert k.modes == {False}
        assert k.graphs == 0
    assert not torch.equal(known[0].seen[0], known[1].seen[0]), "each sees a particle of its own"


def test_flags_are_put_back_after_an_error_in_setup() -> None:
    module = Classifier(mlp())
    known = [teacher(0), module.network]
    callback = AdaptiveKnowledgeAmalgamation(THREAT, known, attack=SVGD(2, num_steps=1))
    with pytest.raises(MisconfigurationException, match="share parameters"):
        trainer(callbacks=[callback]).fit(module, loader())
    assert all(p.requires_grad for k in known for p in k.parameters())
    assert all(k.training for k in known)


def test_teachers_are_in_no_checkpoint_but_by_their_fingerprints(tmp_path: Path) -> None:
    module, callback = Classifier(mlp()), build()
    t = trainer(steps=2, callbacks=[callback])
    t.fit(module, loader())
    t.save_checkpoint(tmp_path / "student.ckpt")
    checkpoint = torch.load(tmp_path / "student.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == set(Classifier(mlp()).state_dict())
    fingerprints = checkpoint["callbacks"]["AdaptiveKnowledgeAmalgamation[at_aka]"]["teachers"]
    assert [len(f) for f in fingerprints] == [64, 64]
    held = {id(p) for group in t.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}
    others = {
        "other weights": [teacher(0), teacher(7)],
        "another order": teachers(2)[::-1],
        "more": teachers(3),
    }
    for known in others.values():
        refused = AdaptiveKnowledgeAmalgamation(THREAT, known)
        with pytest.raises(MisconfigurationException, match="written with other teachers"):
            trainer(steps=4, callbacks=[refused]).fit(
                Classifier(mlp()), loader(), ckpt_path=str(tmp_path / "student.ckpt")
            )
        assert all(p.requires_grad for k in known for p in k.parameters())
    trainer(steps=4, callbacks=[build()]).fit(Classifier(mlp()), loader(), ckpt_path=str(tmp_path / "student.ckpt"))


def test_weights_of_teachers_come_from_checkpoints(tmp_path: Path) -> None:
    for m, known in enumerate(teachers(2)):
        torch.save({"state_dict": {f"network.{k}": v for k, v in known.state_dict().items()}}, tmp_path / f"{m}.ckpt")
    files = [tmp_path / "0.ckpt", tmp_path / "1.ckpt"]
    untrained = [Classifier(teacher(8)), Classifier(teacher(9))]
    given = AdaptiveKnowledgeAmalgamation(THREAT, untrained, files, attack=SVGD(2, num_steps=2))
    found, _, _ = fit("auto", callbacks=[given])
    assert torch.equal(found, fit("auto", callbacks=[build()])[0])
    missing = AdaptiveKnowledgeAmalgamation(THREAT, untrained, [tmp_path / "0.ckpt", tmp_path / "none.ckpt"])
    with pytest.raises(FileNotFoundError):
        fit("auto", callbacks=[missing])


def test_inputs_of_teachers_may_be_normalised_otherwise() -> None:
    known = [Watched(seed) for seed in range(2)]
    maps = [lambda x: 2 * x, lambda x: -x]
    callback = AdaptiveKnowledgeAmalgamation(THREAT, known, attack=SVGD(2, num_steps=1), teacher_inputs=maps)
    fit("auto", callbacks=[callback], steps=1)
    plain = [Watched(seed) for seed in range(2)]
    fit("auto", callbacks=[AdaptiveKnowledgeAmalgamation(THREAT, plain, attack=SVGD(2, num_steps=1))], steps=1)
    assert torch.equal(known[0].seen[0], 2 * plain[0].seen[0])
    assert torch.equal(known[1].seen[0], -plain[1].seen[0])
    both = AdaptiveKnowledgeAmalgamation(THREAT, teachers(2), teacher_inputs=lambda x: 2 * x)
    assert [t.inputs is both.teachers[0].inputs for t in both.teachers] == [True, True]


# ---------------------------------------------------------------- refused


def test_teachers_of_other_classes_are_refused() -> None:
    wider = AdaptiveKnowledgeAmalgamation(THREAT, [teacher(0), teacher(1, classes=4)], attack=SVGD(2, num_steps=1))
    with pytest.raises(MisconfigurationException, match=r"Teacher 1 gives \(24, 4\) for 24 inputs .* 3 classes"):
        fit("auto", callbacks=[wider])


def test_a_single_teacher_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="one teacher: this is plain robust distillation"):
        AdaptiveKnowledgeAmalgamation(THREAT, [teacher(0)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdaptiveKnowledgeAmalgamation(THREAT, teachers(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kappa": 1.1}, r"`kappa` must be in \[0, 1\], got 1.1"),
        ({"temperature": 0.0}, "`temperature` must be positive, got 0.0"),
        ({"eta": -0.1}, "`eta` must be at least 0, got -0.1"),
        ({"weights": "loud"}, "`weights` must be .*, got 'loud'"),
        ({"weight_temperature": -1.0}, "`weight_temperature` must be positive, got -1.0"),
        ({"attack": SVGD(3)}, "there are 2 teachers and 3 particles"),
        ({"checkpoints": ["a.ckpt"]}, "There are 2 teachers and 1 checkpoints"),
        ({"teacher_inputs": [lambda x: x]}, "There are 2 teachers and 1 `teacher_inputs`"),
    ],
)
def test_impossible_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveKnowledgeAmalgamation(THREAT, teachers(2), **options)
    with pytest.raises(MisconfigurationException, match="Teachers are needed"):
        AdaptiveKnowledgeAmalgamation(THREAT, [])


def test_it_must_come_after_terms_that_it_would_weigh() -> None:
    trades = TRADES(THREAT)
    with pytest.raises(MisconfigurationException, match=r"weighs by 0.2 the loss .* terms of TRADES"):
        fit("auto", callbacks=[build(), trades])
    with pytest.raises(MisconfigurationException, match="replaces the loss of the step inside of it"):
        fit("auto", callbacks=[build(eta=0.0), trades])
    fit("auto", callbacks=[build(eta=1.0), trades], steps=1)
    fit("auto", callbacks=[trades, build()], steps=1)
    fit("auto", callbacks=[build(), MART(THREAT)], steps=1)  # which replaces the module's own loss
