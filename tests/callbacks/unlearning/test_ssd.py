"""Selective synaptic dampening: against per-sample backwards, and with importances from the checkpoint."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from groundwire.callbacks.reporting import ResumableCheckpoint
from groundwire.callbacks.unlearning import CurvatureRecorder
from groundwire.callbacks.unlearning import records as records_file
from groundwire.callbacks.unlearning.records import Records
from groundwire.callbacks.unlearning.ssd import SSD, squared_gradients
from groundwire.callbacks.weights import fingerprint, read_weights
from groundwire.datamodules import ForgetRetain
from groundwire.plugins.edge import EdgeStrategy
from helpers.edge import trainer, weights
from helpers.unlearning import (
    ToForget,
    accuracy,
    check_method,
    checkpoint,
    digits,
    network,
    to_forget,
    trained,
    unlearn,
)

of_class = partial(to_forget, forget="class", label=3)


def importances(module: nn.Module, data: ForgetRetain, part: str) -> tuple[Tensor, int]:
    """The sum of squared gradients, one sample after the other, and the number of samples."""
    total, number = torch.zeros(sum(p.numel() for p in module.parameters())), 0
    for x, y in data.batches(part, 1):
        gradients = torch.autograd.grad(F.cross_entropy(module(x), y), list(module.parameters()))
        total += torch.cat([g.flatten() for g in gradients]).square()
        number += 1
    return total, number


def test_method() -> None:
    check_method(partial(SSD, alpha=2.0), data=of_class)


@pytest.mark.parametrize(("alpha", "lam"), [(2.0, 1.0), (1.0, 0.3)])
def test_it_equals_a_loop_over_samples_and_parameters(alpha: float, lam: float) -> None:
    data, method = of_class(), SSD(checkpoint(), alpha=alpha, lam=lam)
    module, t = unlearn(method, data=data)
    assert t.global_step == 0
    original = trained()
    (forget, m), (retain, r) = importances(original, data, "forget"), importances(original, data, "retain")
    expected, dampened = [], 0
    before = weights(original).tolist()
    for theta, i_f, i_d in zip(before, (forget / m).tolist(), ((forget + retain) / (m + r)).tolist(), strict=True):
        dampened += i_f > alpha * i_d
        expected.append(theta * min(1.0, lam * i_d / i_f) if i_f > alpha * i_d else theta)
    torch.testing.assert_close(weights(module), torch.tensor(expected).double(), rtol=1e-4, atol=1e-6)
    assert method.num_dampened == pytest.approx(dampened, abs=2)
    assert dampened > 50
    assert method.records_read == {"forget": m, "retain": r}


def test_it_forgets_a_class() -> None:
    data = of_class()
    module, _ = unlearn(SSD(checkpoint(), alpha=2.0), data=data)
    assert accuracy(trained(), data, "forget") > 0.9
    assert accuracy(module, data, "forget") < 0.2
    assert accuracy(module, data, "retain") > 0.95


def test_an_infinite_threshold_changes_nothing() -> None:
    method = SSD(checkpoint(), alpha=math.inf)
    module, _ = unlearn(method, data=of_class())
    assert torch.equal(weights(module), weights(trained()))
    assert method.num_dampened == 0


def test_importances_are_taken_in_evaluation_mode_and_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(*network(), nn.Dropout(0.9))
    module.train()
    data = to_forget()
    data.setup("fit")
    found = squared_gradients(Records(module), data.batches("forget"))
    assert module[-1].training
    expected, _ = importances(module.eval(), data, "forget")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(records_file, "_CHUNK_BYTES", 7 * 4 * 2410)  # seven records at a time
    seen: list[int] = []
    records = Records(module)
    own = Records.gradients

    def counted(self: Records, batch: Any) -> Tensor:
        seen.append(len(batch[1]))
        return own(self, batch)

    monkeypatch.setattr(Records, "gradients", counted)
    torch.testing.assert_close(squared_gradients(records, data.batches("forget")), expected, rtol=1e-4, atol=1e-6)
    assert seen == [7, 7, 7, 7, 7, 5] * 2


# ---------------------------------------------------------------- recorded importances


def recorded(path: Path, squared_gradients: Tensor, of: str | None = None) -> Path:
    """A copy of the trained checkpoint with importances of all training data."""
    content: dict[str, Any] = torch.load(checkpoint(), weights_only=True)
    weights_of = fingerprint(content["state_dict"]) if of is None else of
    content["curvature"] = {"squared_gradients": squared_gradients, "num_records": 1258, "weights": weights_of}
    torch.save(content, path)
    return path


def all_importances(data: ForgetRetain) -> Tensor:
    data.setup("fit")
    (forget, m), (retain, r) = (importances(trained(), data, part) for part in ("forget", "retain"))
    return (forget + retain).double() / (m + r)


def test_with_recorded_importances_no_retained_data_is_touched(tmp_path: Path) -> None:
    path = recorded(tmp_path / "recorded.ckpt", all_importances(of_class()))
    without, method = SSD(path, alpha=2.0), SSD(checkpoint(), alpha=2.0)
    free, _ = unlearn(without, data=of_class(retain_access=False))
    computed, _ = unlearn(method, data=of_class())
    torch.testing.assert_close(weights(free), weights(computed), rtol=1e-4, atol=1e-6)
    assert without.records_read == {"forget": 131, "retain": 0}
    assert without.certificate()["records_read"]["retain"] == 0


def test_importances_of_other_weights_are_not_used(tmp_path: Path) -> None:
    path = recorded(tmp_path / "recorded.ckpt", torch.zeros(2410, dtype=torch.float64), of="other weights")
    again, _ = unlearn(SSD(path, alpha=2.0), data=of_class())
    computed, _ = unlearn(SSD(checkpoint(), alpha=2.0), data=of_class())
    assert torch.equal(weights(again), weights(computed)), "computed anew, where that is allowed"
    with pytest.raises(
        MisconfigurationException, match=r"those that are recorded belong to other weights in .*recorded"
    ):
        unlearn(SSD(path), data=of_class(retain_access=False))


def test_without_recorded_importances_retained_data_is_needed() -> None:
    with pytest.raises(
        MisconfigurationException, match=r"and there are none recorded in .*trained\.ckpt\. Record them"
    ):
        unlearn(SSD(checkpoint()), data=of_class(retain_access=False))
    with pytest.raises(MisconfigurationException, match="there are none recorded in a checkpoint"):
        unlearn(SSD(), trained(), data=of_class(retain_access=False))


def test_importances_of_other_parameters_are_refused(tmp_path: Path) -> None:
    path = recorded(tmp_path / "recorded.ckpt", torch.ones(2410))
    module = ToForget()
    module.network[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"are of 2,410 parameters, but 330 are trainable now"):
        unlearn(SSD(path), module, data=of_class())


def test_importances_that_a_training_run_recorded_are_used(tmp_path: Path) -> None:
    keeper = ResumableCheckpoint(tmp_path)
    t = trainer(
        steps=60, limit_val_batches=0, enable_checkpointing=True, callbacks=[keeper, CurvatureRecorder(kind="ekfac")]
    )
    t.fit(ToForget(lr=0.1), datamodule=digits())
    path = tmp_path / "last.ckpt"
    free, _ = unlearn(SSD(path, alpha=2.0), data=of_class(retain_access=False))
    torch.save({"state_dict": read_weights(path)}, tmp_path / "bare.ckpt")
    computed, _ = unlearn(SSD(tmp_path / "bare.ckpt", alpha=2.0), data=of_class())
    torch.testing.assert_close(weights(free), weights(computed), rtol=1e-4, atol=1e-6)
    assert not torch.equal(weights(free), torch.cat([v.flatten().double() for v in read_weights(path).values()]))


# ---------------------------------------------------------------- around it


def test_the_result_is_saved_and_can_be_asked_to_forget_more(tmp_path: Path) -> None:
    method, keeper = SSD(checkpoint(), alpha=2.0), ResumableCheckpoint(tmp_path)
    module, _ = unlearn(method, data=of_class(), callbacks=[keeper], enable_checkpointing=True)
    assert method.saved_to == tmp_path / "last.ckpt"
    state = read_weights(method.saved_to)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    data = of_class(label=4)
    more, _ = unlearn(SSD(method.saved_to, alpha=2.0), data=data)
    assert len(data.earlier) == 131
    assert not set(data.earlier.tolist()) & set(data.retain_indices.tolist())
    assert not torch.equal(weights(more), weights(module))


def test_weights_that_are_not_finite_are_put_back() -> None:
    method = SSD(alpha=1.0, lam=1.0)
    method.unlearn = lambda module, data: nn.init.constant_(module.network[0].bias, math.nan)  # type: ignore[method-assign]
    module = trained()
    with pytest.raises(RuntimeError, match=r"SSD left values that are not finite in network\.0\.bias"):
        unlearn(method, module, data=of_class())
    assert torch.equal(weights(module), weights(trained()))


def test_it_takes_no_step_inside_edge_strategy_either() -> None:
    plain, _ = unlearn(SSD(checkpoint(), alpha=2.0), data=of_class())
    edge, t = unlearn(SSD(checkpoint(), alpha=2.0), data=of_class(), strategy=EdgeStrategy(4))
    assert torch.equal(weights(edge), weights(plain))
    assert t.strategy.round_index == 0


def test_the_loss_of_a_record_can_be_given() -> None:
    def smoothed(outputs: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(outputs, label, label_smoothing=0.5)

    by_default, _ = unlearn(SSD(checkpoint(), alpha=2.0), data=of_class())
    other, _ = unlearn(SSD(checkpoint(), alpha=2.0, loss=smoothed), data=of_class())
    assert not torch.equal(weights(other), weights(by_default))


class Regression(pl.LightningModule):
    """The sum of the pixels of an image, by its squared error."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x)
        return found

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0])[:, 0], batch[1].float())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_a_regression_has_importances_too() -> None:
    inner = digits()
    inner.setup("fit")
    inner.train_data = inner.train_data[0], inner.train_data[0].sum(dim=1, keepdim=True)
    data = ForgetRetain(inner, forget="indices", indices=range(50), batch_size=64, seed=0)
    module = Regression()
    before = module.layer.weight.detach().clone()
    unlearn(SSD(alpha=1.0), module, data=data)
    x, y = inner.train_data
    squares = (2 * (F.linear(x, before, module.layer.bias.detach()) - y) * x).square()
    assert ((module.layer.weight != before)[0] <= (squares[:50].mean(0) > squares.mean(0) * (1 - 0.05))).all()
    assert not torch.equal(module.layer.weight, before)
