from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from groundwire.callbacks.information import LabelSmoothing
from helpers.callbacks import check_step_callback
from helpers.edge import Classifier, fit, mlp


class ByHand(Classifier):
    smoothing = 0.1

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return F.cross_entropy(self(x), y, label_smoothing=self.smoothing)


def test_it_is_a_step_callback() -> None:
    check_step_callback(lambda: LabelSmoothing(0.2), off=lambda: LabelSmoothing(0.0))


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"precision": "32-true"}])
def test_trains_as_torchs_own_label_smoothing(options: dict[str, Any]) -> None:
    run: dict[str, Any] = {"precision": "64-true", "steps": 10} | options
    plugged, _, losses = fit("auto", Classifier(mlp()), callbacks=[LabelSmoothing(0.1)], **run)
    own, _, own_losses = fit("auto", ByHand(mlp()), **run)
    close = {"rtol": 1e-9, "atol": 1e-11} if run["precision"] == "64-true" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(own_losses), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(plugged, own, **close)
    other = ByHand(mlp())
    other.smoothing = 0.11
    assert (plugged - fit("auto", other, **run)[0]).abs().max() > 1e-4


def test_logs_its_loss_and_the_module_logs_its_own() -> None:
    _, t, losses = fit("auto", callbacks=[LabelSmoothing(0.5)], steps=1)
    assert float(t.callback_metrics["label_smoothing/loss"]) == pytest.approx(losses[0])
    assert float(t.callback_metrics["train/loss"]) != pytest.approx(losses[0])


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan")])
def test_bad_settings_are_refused(smoothing: float) -> None:
    with pytest.raises(ValueError, match=r"`smoothing` must be in \[0, 1\)"):
        LabelSmoothing(smoothing)
