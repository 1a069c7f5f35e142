"""WIN-U equals retraining where it should, says no where it must, and leaves the retained data alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from groundwire.callbacks import LogitsSource
from groundwire.callbacks.reporting import ResumableCheckpoint
from groundwire.callbacks.unlearning import (
    WINU,
    CurvatureRecorder,
    Records,
    Retrain,
    SingularCurvatureError,
    record_curvature,
)
from groundwire.datamodules import Digits, Federated, ForgetRetain
from groundwire.plugins.edge import EdgeStrategy
from groundwire.recipes import SoftmaxRegression
from helpers.ddp import run_ddp
from helpers.edge import generator

LB, N, D, C = 0.05, 200, 7, 3


class Ridge(pl.LightningModule):
    """Linear regression with the mean squared error, and weight decay on the weight alone."""

    def __init__(self, decay: float = LB) -> None:
        super().__init__()
        self.linear, self.decay = nn.Linear(D, C), decay
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.mse_loss(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = [
            {"params": [self.linear.weight], "weight_decay": self.decay},
            {"params": [self.linear.bias], "weight_decay": 0.0},
        ]
        return torch.optim.SGD(groups, lr=0.0)  # the weights are put there; nothing moves them

    @torch.no_grad()
    def fit_exactly(self, x: Tensor, y: Tensor) -> Ridge:
        """The minimiser, from the normal equations."""
        inputs = torch.cat([x, torch.ones(len(x), 1).double()], dim=1)
        scale = 2 / (len(x) * C)
        penalty = self.decay * torch.eye(D + 1).double()
        penalty[D, D] = 0
        solution = torch.linalg.solve(scale * inputs.T @ inputs + penalty, scale * inputs.T @ y)
        self.linear.weight.copy_(solution[:D].T)
        self.linear.bias.copy_(solution[D])
        return self

    def vector(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.parameters()])


class Regression(pl.LightningDataModule):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        g = generator(seed)
        x = torch.randn(N, D, generator=g, dtype=torch.float64)
        self.train_data = x, x[:, :C] + torch.randn(N, C, generator=g, dtype=torch.float64)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(*self.train_data), batch_size=50)


def trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "callbacks": [ResumableCheckpoint(), *callbacks],
    } | options
    return pl.Trainer(**settings)


def last(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


def record(folder: Path, recorder: CurvatureRecorder | None = None, data: Any = None, decay: float = LB) -> Ridge:
    data = data or Regression()
    module = Ridge(decay).fit_exactly(*data.train_data)
    trainer(folder, recorder or CurvatureRecorder(), precision="64-true").fit(module, datamodule=data)
    return module


def unlearn(folder: Path, out: Path, indices: list[int], method: WINU | None = None, decay: float = LB) -> Ridge:
    module = Ridge(decay)
    data = ForgetRetain(Regression(), forget="indices", indices=indices, retain_access=False)
    trainer(out, method or WINU(last(folder)), precision="64-true").fit(module, datamodule=data)
    return module


def retrained(gone: list[int], decay: float = LB) -> Ridge:
    x, y = Regression().train_data
    keep = torch.tensor([i for i in range(N) if i not in gone])
    return Ridge(decay).fit_exactly(x[keep], y[keep])


def distance(a: Ridge, b: Ridge) -> float:
    return float((a.vector() - b.vector()).norm())


@pytest.mark.parametrize("kind", ["full", "lowrank"])
def test_on_ridge_regression_it_is_retraining_without_touching_what_is_retained(tmp_path: Path, kind: Any) -> None:
    gone = list(range(0, 60, 2))
    original = record(tmp_path / "a", CurvatureRecorder(kind=kind))
    forgotten = unlearn(tmp_path / "a", tmp_path / "b", gone)
    assert distance(original, retrained(gone)) > 1e-2
    assert distance(forgotten, retrained(gone)) < 1e-8


def test_requests_follow_each_other_from_the_checkpoints_alone(tmp_path: Path) -> None:
    requests, gone = [list(range(20)), list(range(50, 70)), [100, 103, 199]], []
    record(tmp_path / "0")
    for number, request in enumerate(requests):
        forgotten = unlearn(tmp_path / str(number), tmp_path / str(number + 1), request)
        gone += request
        assert distance(forgotten, retrained(gone)) < 1e-8
    with pytest.raises(ValueError, match="forgotten by an earlier request"):
        unlearn(tmp_path / "3", tmp_path / "4", [5])


def test_after_the_step_the_record_is_that_of_the_retained_data(tmp_path: Path) -> None:
    """Exact for a linear model, whose curvature does not depend on the weights."""
    gone = list(range(30))
    record(tmp_path / "a")
    method = WINU(last(tmp_path / "a"))
    unlearn(tmp_path / "a", tmp_path / "b", gone, method)
    x, y = Regression().train_data
    fresh = Regression()
    fresh.train_data = x[30:], y[30:]
    record(tmp_path / "c", data=fresh)
    there = torch.load(last(tmp_path / "c"), weights_only=True)["curvature"]
    here = torch.load(last(tmp_path / "b"), weights_only=True)["curvature"]
    torch.testing.assert_close(here["curvature"]["matrix"], there["curvature"]["matrix"])
    torch.testing.assert_close(here["gradient"], there["gradient"], rtol=0, atol=1e-9)
    assert here["num_records"] == there["num_records"] == N - 30


def test_one_record_is_leave_one_out(tmp_path: Path) -> None:
    record(tmp_path / "a")
    assert distance(unlearn(tmp_path / "a", tmp_path / "b", [17]), retrained([17])) < 1e-10


def newton(
    original: Ridge, gone: list[int], *, sign: float = 1, woodbury: bool = True, owns_decay: bool = True
) -> Ridge:
    """The step written out with dense matrices, right or wrong in one way."""
    x, y = Regression().train_data
    inputs = torch.cat([x, torch.ones(N, 1).double()], dim=1)
    weights = torch.cat([original.linear.weight.T, original.linear.bias.unsqueeze(0)]).detach()
    decay = LB * torch.eye(D + 1).double()
    decay[D, D] = 0
    hessian = lambda rows: 2 / C * rows.T @ rows
    kept = hessian(inputs) - (hessian(inputs[gone]) if woodbury else 0)
    pull = 2 / C * inputs[gone].T @ (inputs[gone] @ weights - y[gone])
    if owns_decay:
        pull = pull + len(gone) * decay @ weights
    weights = weights + sign * torch.linalg.solve(kept + (N - len(gone)) * decay, pull)
    result = Ridge()
    with torch.no_grad():
        result.linear.weight.copy_(weights[:D].T)
        result.linear.bias.copy_(weights[D])
    return result


def test_each_wrong_version_of_the_step_would_be_seen(tmp_path: Path) -> None:
    gone = list(range(0, 60, 2))
    original, target = record(tmp_path / "a"), retrained(gone)
    assert distance(newton(original, gone), target) < 1e-10
    for wrong in ({"sign": -1}, {"woodbury": False}, {"owns_decay": False}):
        assert distance(newton(original, gone, **wrong), target) > 1e-4, wrong  # type: ignore[arg-type]


def test_at_the_optimum_kappa_does_not_matter(tmp_path: Path) -> None:
    gone = list(range(25))
    record(tmp_path / "a")
    half = unlearn(tmp_path / "a", tmp_path / "b", gone, WINU(last(tmp_path / "a"), kappa=1.0))
    assert distance(half, retrained(gone)) < 1e-8


def test_away_from_the_optimum_kappa_says_where_the_step_leads(tmp_path: Path) -> None:
    """1 to the retained optimum, exactly for a quadratic; 0 takes only the forget set's pull away."""
    gone = list(range(25))
    data = Regression()
    module = Ridge().fit_exactly(*data.train_data)
    with torch.no_grad():
        module.linear.weight += 0.3
    trainer(tmp_path / "a", CurvatureRecorder(), precision="64-true").fit(module, datamodule=data)
    for kappa in (1.0, 0.0):
        method = WINU(last(tmp_path / "a"), damping=0.0, kappa=kappa)
        found = unlearn(tmp_path / "a", tmp_path / f"{kappa}", gone, method)
        assert (distance(found, retrained(gone)) < 1e-8) == (kappa == 1.0)


@pytest.mark.parametrize("options", [{"alpha": 0.5}, {"radius": 1e-2}, {}])
def test_the_gradient_that_goes_on_is_that_of_the_retained_objective(tmp_path: Path, options: dict[str, float]) -> None:
    gone = list(range(25))
    record(tmp_path / "a")
    method = WINU(last(tmp_path / "a"), **options)  # type: ignore[arg-type]
    module = unlearn(tmp_path / "a", tmp_path / "b", gone, method)
    x, y = Regression().train_data
    loss = F.mse_loss(module(x[25:]), y[25:]) + LB / 2 * module.linear.weight.square().sum()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad((N - 25) * loss, list(module.parameters()))])
    assert method.record is not None
    torch.testing.assert_close(method.record.gradient, expected, rtol=0, atol=1e-9)


def small_net() -> SoftmaxRegression:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        module = SoftmaxRegression(input_shape=(1, 8, 8))
        module.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10))
    return module.double()


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A network on the digits near its optimum, recorded as asked."""
    module = small_net()
    x, y = digits().train_data
    optimizer = torch.optim.LBFGS(module.parameters(), max_iter=300, tolerance_grad=1e-8, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = sum(p.square().sum() for p in module.parameters())
        loss = F.cross_entropy(module(x.double()), y) + 5e-4 * penalty
        loss.backward()
        return loss

    optimizer.step(closure)

    def recorded(**options: Any) -> Path:
        folder = tmp_path_factory.mktemp("network")
        recorder = CurvatureRecorder(weight_decay=1e-3, seed=0, **options)
        t = trainer(folder, recorder, precision="64-true", limit_train_batches=0)
        t.fit(copy.deepcopy(module), datamodule=Digits(seed=0))
        return last(folder)

    return recorded


@pytest.mark.parametrize(
    "options", [{"kind": "full"}, {"kind": "lowrank", "rank": 150}, {"kind": "ekfac"}, {"kind": "full", "draws": 16}]
)
def test_a_network_forgets_one_request_after_the_other(
    tmp_path: Path, network: Callable[..., Path], options: dict[str, Any]
) -> None:
    """Columns are taken where the curvature was recorded, so what is removed is always part of the sum."""
    checkpoint = network(**options)
    for number in range(4):
        data = ForgetRetain(Digits(seed=0), fraction=0.08, seed=number)
        method = WINU(checkpoint)
        module = small_net()
        trainer(tmp_path / str(number), method, precision="64-true").fit(module, datamodule=data)
        assert method.details["max_leverage"] < 1
        x, y = digits().test_data
        right = (module(x.double()).argmax(dim=1) == y).double().mean()
        assert right > (0.7 if "draws" in options else 0.9)
        checkpoint = last(tmp_path / str(number))
    left = torch.load(checkpoint, weights_only=True)["curvature"]
    x, y = digits().train_data
    kept = data.retain_indices
    at = small_net()
    at.load_state_dict(torch.load(network(**options), weights_only=True)["state_dict"])
    records = Records(at, dtype=torch.float64, draws=options.get("draws"), seed=0)
    fresh = record_curvature(
        records, (x[kept], y[kept]), ids=kept, **{k: v for k, v in options.items() if k != "draws"}
    )
    assert left["num_records"] == len(kept)
    assert left["squared_gradients"] is None, "a mean over what is forgotten must not stay"
    if options["kind"] == "full":
        torch.testing.assert_close(left["curvature"]["matrix"], fresh.curvature.state_dict()["matrix"])


def test_network_and_class(tmp_path: Path, network: Callable[..., Path]) -> None:
    """A whole class: forgotten, and the others are kept."""
    data = ForgetRetain(Digits(seed=0), forget="class", label=3, seed=0)
    module = small_net()
    trainer(tmp_path, WINU(network(kind="full")), precision="64-true").fit(module, datamodule=data)
    right = {
        part: [module(x.double()).argmax(dim=1) == y for x, y in data.batches(part)] for part in ("forget", "retain")
    }  # type: ignore[arg-type]
    assert torch.cat(right["forget"]).double().mean() < 0.1
    assert torch.cat(right["retain"]).double().mean() > 0.95


def test_clipping_of_leverages_is_what_it_says(tmp_path: Path) -> None:
    record(tmp_path / "a", decay=0.0)
    gone = list(range(N - 5))
    method = WINU(last(tmp_path / "a"), clip_leverage=True)
    bounded = unlearn(tmp_path / "a", tmp_path / "b", gone, method, decay=0.0)
    assert torch.isfinite(bounded.vector()).all()
    assert method.details["max_leverage"] > 0.95


def test_a_one_shot_run_that_is_over_is_not_repeated(tmp_path: Path) -> None:
    """Its record belongs to the original's weights, and would be removed from twice."""
    record(tmp_path / "a")
    unlearn(tmp_path / "a", tmp_path / "b", [1, 2, 3])
    before = last(tmp_path / "b").read_bytes()
    data = ForgetRetain(Regression(), forget="indices", indices=[1, 2, 3])
    t = trainer(tmp_path / "b", WINU(last(tmp_path / "a")), precision="64-true")
    with pytest.raises(MisconfigurationException, match="nothing to resume"):
        t.fit(Ridge(), datamodule=data, ckpt_path=last(tmp_path / "b"))
    assert last(tmp_path / "b").read_bytes() == before


def test_weights_in_double_precision_are_not_rounded_on_their_way(tmp_path: Path) -> None:
    record(tmp_path / "a")
    module = Ridge().float()
    data = ForgetRetain(Regression(), forget="indices", indices=[1, 2, 3])
    trainer(tmp_path / "b", WINU(last(tmp_path / "a")), precision="64-true").fit(module, datamodule=data)
    assert float((module.vector() - retrained([1, 2, 3]).vector()).norm()) < 1e-12


def test_a_shorter_step_goes_the_same_way(tmp_path: Path) -> None:
    gone = list(range(25))
    original = record(tmp_path / "a")
    whole = unlearn(tmp_path / "a", tmp_path / "b", gone).vector() - original.vector()
    half = unlearn(tmp_path / "a", tmp_path / "c", gone, WINU(last(tmp_path / "a"), alpha=0.5))
    torch.testing.assert_close(half.vector() - original.vector(), whole / 2)
    near = unlearn(tmp_path / "a", tmp_path / "d", gone, WINU(last(tmp_path / "a"), radius=1e-3))
    assert distance(near, original) == pytest.approx(1e-3)
    damped = unlearn(tmp_path / "a", tmp_path / "e", gone, WINU(last(tmp_path / "a"), damping=1e9))
    assert distance(damped, original) < 1e-6


@pytest.fixture(scope="module")
def logistic(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], tuple[Path, pl.LightningModule]]:
    """Softmax regression on the digits, trained to its optimum by LBFGS, with its curvature."""
    folder = tmp_path_factory.mktemp("logistic")
    module = to_optimum(digits().train_data)
    t = trainer(folder, CurvatureRecorder(weight_decay=1e-3, seed=0), precision="64-true", limit_train_batches=0)
    t.fit(module, datamodule=Digits(seed=0))
    return lambda: (last(folder), copy.deepcopy(module))


def digits() -> Digits:
    data = Digits(seed=0)
    data.setup("fit")
    return data


def to_optimum(split: tuple[Tensor, Tensor], lb: float = 1e-3) -> SoftmaxRegression:
    module = SoftmaxRegression(input_shape=(1, 8, 8)).double()
    x, y = split[0].double(), split[1]
    optimizer = torch.optim.LBFGS(
        module.parameters(), max_iter=400, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = sum(p.square().sum() for p in module.parameters())
        loss = F.cross_entropy(module(x), y) + lb / 2 * penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    return module


@torch.no_grad()
def kl(reference: nn.Module, module: nn.Module, x: Tensor) -> float:
    a, b = (F.log_softmax(net(x.double()), dim=-1) for net in (reference, module))
    return float((a.exp() * (a - b)).sum(dim=-1).mean())


def test_on_logistic_regression_it_is_far_closer_to_retraining_than_the_influence_step(
    tmp_path: Path, logistic: Callable[[], tuple[Path, pl.LightningModule]]
) -> None:
    """Against retraining, the original and the classic step, which leaves the forget set in the curvature."""
    checkpoint, original = logistic()
    data = ForgetRetain(Digits(seed=0), retain_access=False, seed=0)
    module = SoftmaxRegression(input_shape=(1, 8, 8)).double()
    method = WINU(checkpoint)
    trainer(tmp_path, method, precision="64-true").fit(module, datamodule=data)
    data.retain_access = True
    x, y = digits().train_data
    target = to_optimum((x[data.retain_indices], y[data.retain_indices]))
    forget = x[data.forget_indices]
    influence = copy.deepcopy(original)
    influence_step(influence, (x, y), data.forget_indices)
    before, after, classic = (kl(target, net, forget) for net in (original, module, influence))
    assert before > 1e-4
    assert after < before / 20
    assert after < classic / 5
    assert 0 < method.details["max_leverage"] < 1


def influence_step(module: nn.Module, split: tuple[Tensor, Tensor], gone: Tensor, lb: float = 1e-3) -> None:
    """theta + (H + n lb)^{-1} g_F with the dense Hessian of all records."""
    x, y = split[0].double(), split[1]
    names, params = zip(*module.named_parameters(), strict=True)
    vector = torch.cat([p.detach().flatten() for p in params])

    def loss(v: Tensor, rows: Tensor) -> Tensor:
        parts = [part.view_as(p) for part, p in zip(v.split([p.numel() for p in params]), params, strict=True)]
        outputs = torch.func.functional_call(module, dict(zip(names, parts, strict=True)), (x[rows],))
        return F.cross_entropy(outputs, y[rows], reduction="sum")

    hessian = torch.autograd.functional.hessian(lambda v: loss(v, torch.arange(len(y))), vector)
    gradient = torch.autograd.functional.jacobian(lambda v: loss(v, gone), vector) + len(gone) * lb * vector
    moved = vector + torch.linalg.solve(hessian + len(y) * lb * torch.eye(len(vector)).double(), gradient)
    nn.utils.vector_to_parameters(moved, module.parameters())


def fails(
    tmp_path: Path, match: str, error: type[Exception], method: WINU, data: Any = None, module: Any = None
) -> None:
    module = module or Ridge()
    before = module.vector() if isinstance(module, Ridge) else None
    data = data or ForgetRetain(Regression(), forget="indices", indices=[1, 2])
    with pytest.raises(error, match=match):
        trainer(tmp_path / "failed", method, precision="64-true").fit(module, datamodule=data)
    assert not last(tmp_path / "failed").exists(), "a failed request must leave no checkpoint"
    if before is not None and method.checkpoint is None:
        assert torch.equal(module.vector(), before)


def test_bad_input(tmp_path: Path) -> None:
    record(tmp_path / "a")
    file = last(tmp_path / "a")
    kept = file.read_bytes()
    content = torch.load(file, weights_only=True)
    fails(tmp_path, "give it as `checkpoint`", MisconfigurationException, WINU())
    torch.save({k: v for k, v in content.items() if k != "curvature"}, tmp_path / "bare.ckpt")
    fails(tmp_path, "CurvatureRecorder among", MisconfigurationException, WINU(tmp_path / "bare.ckpt"))
    moved = content | {"state_dict": {k: v + 1 for k, v in content["state_dict"].items()}}
    torch.save(moved, tmp_path / "moved.ckpt")
    fails(tmp_path, "belongs to other weights", MisconfigurationException, WINU(tmp_path / "moved.ckpt"))
    other = ForgetRetain(Regression(seed=1), forget="indices", indices=[1, 2])
    fails(tmp_path, "other training data", MisconfigurationException, WINU(file), other)
    frozen = Ridge()
    frozen.linear.bias.requires_grad_(False)
    fails(tmp_path, "same parameters frozen", ValueError, WINU(file), module=frozen)
    few = copy.deepcopy(content)
    few["curvature"]["num_records"] = 2
    torch.save(few, tmp_path / "few.ckpt")
    fails(tmp_path, "2 of 2 recorded samples", ValueError, WINU(tmp_path / "few.ckpt"))
    broken = copy.deepcopy(content)
    broken["curvature"]["gradient"][0] = float("nan")
    torch.save(broken, tmp_path / "nan.ckpt")
    fails(tmp_path, "not finite", RuntimeError, WINU(tmp_path / "nan.ckpt", kappa=1.0))
    assert file.read_bytes() == kept
    for arguments in ({"damping": -1.0}, {"kappa": 2.0}, {"alpha": 0.0}, {"radius": 0.0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=f"`{next(iter(arguments))}`"):
            WINU("x", **arguments)  # type: ignore[arg-type]


def test_a_singular_system_is_refused_and_damping_helps(tmp_path: Path) -> None:
    """Without weight decay, forgetting all but five of the records leaves directions that no record determines."""
    record(tmp_path / "a", decay=0.0)
    gone = list(range(N - 5))
    with pytest.raises(SingularCurvatureError, match="Raise `damping`"):
        unlearn(tmp_path / "a", tmp_path / "b", gone, decay=0.0)
    damped = unlearn(tmp_path / "a", tmp_path / "c", gone, WINU(last(tmp_path / "a"), damping=1.0), decay=0.0)
    assert torch.isfinite(damped.vector()).all()


def test_a_model_that_is_not_at_its_optimum_is_damped_with_a_warning(tmp_path: Path) -> None:
    data = Regression()
    trainer(tmp_path / "a", CurvatureRecorder(), precision="64-true").fit(Ridge(), datamodule=data)
    method = WINU(last(tmp_path / "a"))
    with pytest.warns(UserWarning, match="not at its optimum"):
        unlearn(tmp_path / "a", tmp_path / "b", [1, 2], method)
    assert method.details["tau"] == pytest.approx(0.001 * N)


def test_another_loss_than_the_modules_own_is_noticed(tmp_path: Path) -> None:
    record(tmp_path / "a")
    method = WINU(last(tmp_path / "a"), output_loss=lambda z, y: (z - y).square().sum())
    with pytest.warns(UserWarning, match="training_step gives a loss of"):
        unlearn(tmp_path / "a", tmp_path / "b", [1, 2], method)


# ---------------------------------------------------------------- the recorder


def test_a_finished_run_can_be_recorded_afterwards(tmp_path: Path) -> None:
    module = Ridge().fit_exactly(*Regression().train_data)
    trainer(tmp_path, precision="64-true").fit(module, datamodule=Regression())
    assert "curvature" not in torch.load(last(tmp_path), weights_only=True)
    resumed = trainer(tmp_path, CurvatureRecorder(), precision="64-true")
    resumed.fit(Ridge(), datamodule=Regression(), ckpt_path=last(tmp_path), weights_only=True)
    gone = [3, 4, 5]
    assert distance(unlearn(tmp_path, tmp_path / "b", gone), retrained(gone)) < 1e-8


def test_with_lightnings_own_checkpoints_there_is_a_file_beside_them(tmp_path: Path) -> None:
    module = Ridge().fit_exactly(*Regression().train_data)
    t = trainer(tmp_path, callbacks=[CurvatureRecorder()], precision="64-true")
    t.fit(module, datamodule=Regression())
    (file,) = tmp_path.rglob("curvature.ckpt")
    forgotten = Ridge()
    data = ForgetRetain(Regression(), forget="indices", indices=[3])
    trainer(tmp_path / "b", WINU(file), precision="64-true").fit(forgotten, datamodule=data)
    assert distance(forgotten, retrained([3])) < 1e-8


def test_a_train_loader_without_a_datamodule_is_gone_through_in_its_own_order(tmp_path: Path) -> None:
    x, y = Regression().train_data
    shuffled = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)
    recorder = CurvatureRecorder()
    trainer(tmp_path, recorder, precision="64-true").fit(Ridge().fit_exactly(x, y), shuffled)
    data = ForgetRetain(Regression(), forget="indices", indices=[0])
    data.setup("fit")
    assert recorder.record is not None
    assert recorder.record.data_sha256 == data.data_digest


def test_the_objectives_weight_decay_is_the_optimizers(tmp_path: Path) -> None:
    recorder = CurvatureRecorder()
    record(tmp_path, recorder)
    assert recorder.record is not None
    assert recorder.record.weight_decay == {"linear.weight": LB, "linear.bias": 0.0}
    assert float(recorder.record.gradient.norm()) < 1e-10  # which it is only with the right decay


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kind": "full"}, "20,100 parameters takes"),
        ({"draws": 2, "output_loss": lambda z, y: z.sum()}, "leave `loss` at its default"),
        ({"source": LogitsSource("linear")}, "outputs of `forward`"),
    ],
)
def test_what_cannot_be_recorded_is_said_before_the_training(
    tmp_path: Path, options: dict[str, Any], match: str
) -> None:
    module = Ridge()
    module.linear = nn.Linear(200, 100).double()
    with pytest.raises((ValueError, MisconfigurationException), match=match):
        trainer(tmp_path, CurvatureRecorder(**options)).fit(module, datamodule=Regression())


@pytest.mark.parametrize("argument", [{"kind": "diag"}, {"rank": 0}, {"batch_size": 0}, {"draws": 0}])
def test_bad_arguments_of_the_recorder(tmp_path: Path, argument: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(argument))}`"):
        trainer(tmp_path, CurvatureRecorder(**argument)).fit(Ridge(), datamodule=Regression())


def test_beside_a_one_shot_method_there_is_nothing_to_record(tmp_path: Path) -> None:
    record(tmp_path / "a")
    data = ForgetRetain(Regression(), forget="indices", indices=[1])
    t = trainer(tmp_path / "b", WINU(last(tmp_path / "a")), CurvatureRecorder(), precision="64-true")
    with pytest.raises(MisconfigurationException, match="Take CurvatureRecorder out"):
        t.fit(Ridge(), datamodule=data)


def test_after_retraining_the_retained_records_are_recorded_and_the_stream_goes_on(tmp_path: Path) -> None:
    record(tmp_path / "a")
    data = ForgetRetain(Regression(), forget="indices", indices=[1, 2, 3])
    module = retrained([1, 2, 3])
    t = trainer(tmp_path / "b", Retrain(last(tmp_path / "a")), CurvatureRecorder(), precision="64-true")
    t.fit(module, datamodule=data)
    content = torch.load(last(tmp_path / "b"), weights_only=True)["curvature"]
    assert content["num_records"] == N - 3
    assert not content["row_digests"][[1, 2, 3]].any()
    forgotten = unlearn(tmp_path / "b", tmp_path / "c", [10, 11])
    assert distance(forgotten, retrained([1, 2, 3, 10, 11])) < 1e-8


def test_one_devices_data_can_be_forgotten(tmp_path: Path) -> None:
    """Trained over devices, recorded, and then without the third one's samples."""
    federated = lambda: Federated(Digits(seed=0), num_devices=4, samples_per_device=100, seed=0)
    t = trainer(
        tmp_path / "a", CurvatureRecorder(weight_decay=1e-3), strategy=EdgeStrategy(num_devices=4), max_epochs=20
    )
    t.fit(SoftmaxRegression(input_shape=(1, 8, 8)), datamodule=federated())
    content = torch.load(last(tmp_path / "a"), weights_only=True)["curvature"]
    assert content["num_records"] == 400
    data = ForgetRetain(federated(), forget="device", device=2, retain_access=False)
    method = WINU(last(tmp_path / "a"), damping=4.0)
    trainer(tmp_path / "b", method).fit(SoftmaxRegression(input_shape=(1, 8, 8)), datamodule=data)
    assert len(data.forget_indices) == 100
    assert torch.load(last(tmp_path / "b"), weights_only=True)["curvature"]["num_records"] == 300


def _record_loader_ddp(folder: Path) -> None:
    x, y = Regression().train_data
    options = {"devices": 2, "strategy": "ddp", "precision": "64-true"}
    loader = DataLoader(TensorDataset(x, y), batch_size=50, shuffle=True)
    trainer(folder, CurvatureRecorder(), **options).fit(Ridge().fit_exactly(x, y), loader)


def test_two_processes_record_a_train_loader_that_lightning_splits(tmp_path: Path) -> None:
    run_ddp(_record_loader_ddp, tmp_path)
    assert torch.load(last(tmp_path), weights_only=True)["curvature"]["num_records"] == N


def test_squared_gradients_are_means_over_records(tmp_path: Path) -> None:
    recorder = CurvatureRecorder()
    module = record(tmp_path, recorder)
    total = torch.zeros(D * C + C).double()
    for x, y in zip(*Regression().train_data, strict=True):
        module.zero_grad()
        F.mse_loss(module(x), y).backward()
        total += torch.cat([p.grad.flatten().square() for p in module.parameters()])
    assert recorder.record is not None
    torch.testing.assert_close(recorder.record.squared_gradients, total / N)


def _ddp(folder: Path, file: Path) -> Tensor:
    module = Ridge()
    data = ForgetRetain(Regression(), forget="indices", indices=[1, 2, 3])
    options = {"devices": 2, "strategy": "ddp", "precision": "64-true"}
    trainer(folder, WINU(file), **options).fit(module, datamodule=data)
    return module.vector()


def _record_ddp(folder: Path) -> None:
    module = Ridge().fit_exactly(*Regression().train_data)
    options = {"devices": 2, "strategy": "ddp", "precision": "64-true", "use_distributed_sampler": False}
    trainer(folder, CurvatureRecorder(), **options).fit(module, datamodule=Regression())


def test_two_processes_record_and_unlearn_as_one(tmp_path: Path) -> None:
    run_ddp(_record_ddp, tmp_path / "a")
    first, second = run_ddp(_ddp, tmp_path / "b", last(tmp_path / "a"))
    assert torch.equal(first, second)
    assert float((first - retrained([1, 2, 3]).vector()).norm()) < 1e-8
