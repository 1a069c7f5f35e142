from __future__ import annotations

import math
from functools import partial
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from groundwire.callbacks.privacy import DPSGD
from groundwire.plugins.privacy import spent_epsilon
from helpers.ddp import RankFit, fit_ddp
from helpers.edge import FEATURES, Classifier, fit, loader, mlp

pytestmark = [pytest.mark.filterwarnings("ignore:.*[Gg][Dd][Pp]"), pytest.mark.usefixtures("seed_of_the_run")]
dp = partial(DPSGD, accountant="gdp", reproducible=True, target_delta=1e-3)


class Gradients(pl.Callback):
    """The gradient that each step's optimizer sees, and how many records each batch has."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.sizes: list[int] = []
        self.wrapped: Any = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.wrapped = trainer.strategy.model
        assert trainer.world_size == 1 or not self.wrapped.require_backward_grad_sync

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.values.append(torch.cat([p.grad.flatten() for p in pl_module.parameters()]).clone())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.sizes.append(len(batch[0]))


def build(**options: Any) -> list[pl.Callback]:
    return [dp(**options), Gradients()]


def read(trainer: pl.Trainer, module: pl.LightningModule, callbacks: list[Any]) -> dict[str, Any]:
    return {
        "steps": (callbacks[0].steps, trainer.global_step),
        "epsilon": callbacks[0].privacy_spent().epsilon,
        "gradients": torch.stack(callbacks[1].values),
        "sizes": callbacks[1].sizes,
        "syncs": getattr(callbacks[1].wrapped, "require_backward_grad_sync", None),
        "shadowed": "process_dataloader" in trainer.strategy.__dict__,
        "accumulated": trainer.accumulate_grad_batches,
        "bound": callbacks[0]._clipping.max_grad_norm,
    }


def both(module: Any = None, *, batch: int = 24, samples: int = 96, accumulated: int = 1, **options: Any) -> Any:
    """The same logical batches on two ranks and in one process."""
    trainer_options = {"steps": options.pop("steps", 6), "accumulate_grad_batches": accumulated}
    module = module if module is not None else Classifier(mlp(), "SGD", 0.5)
    ranks = fit_ddp(
        module,
        build=partial(build, **options),
        data=loader(batch_size=batch // 2 // accumulated, samples=samples),
        read=read,
        **trainer_options,
    )
    callbacks = build(**options)
    end, t, _ = fit(
        "auto", module, loader(batch_size=batch // accumulated, samples=samples), callbacks=callbacks, **trainer_options
    )
    one = RankFit(end, [], {name: float(v) for name, v in t.callback_metrics.items()}, read(t, module, callbacks), 0)
    return *ranks, one


@pytest.mark.parametrize(
    "options",
    [
        {"noise_multiplier": 0.0, "max_grad_norm": 0.5, "accumulated": 1},
        {"noise_multiplier": 1.0, "max_grad_norm": 0.5, "accumulated": 2, "engine": "ghost"},
        {"noise_multiplier": 1.0, "max_grad_norm": 0.5, "accumulated": 2, "engine": "ghost", "ghost_output": "network"},
        {"noise_multiplier": 1.0, "max_grad_norm": 0.5, "accumulated": 1, "clipping": "adaptive"},
        {"noise_multiplier": 1.0, "max_grad_norm": 0.5, "accumulated": 1, "max_physical_batch_size": 5},
    ],
    ids=["without noise", "ghost", "ghost of a submodule", "adaptive", "physical"],
)
def test_two_processes_equal_one(options: dict[str, Any]) -> None:
    first, second, one = both(**options)
    assert torch.equal(first.weights, second.weights)
    torch.testing.assert_close(first.weights, one.weights, rtol=0, atol=1e-6)
    for rank in (first, second):
        assert rank.read["steps"] == one.read["steps"] == (6, 6)
        assert rank.read["epsilon"] == one.read["epsilon"]
        assert rank.metrics["privacy/epsilon"] == one.metrics["privacy/epsilon"]
        assert rank.read["syncs"] is True
        assert not rank.read["shadowed"]
        assert rank.read["accumulated"] == options["accumulated"]
        assert rank.read["bound"] == pytest.approx(one.read["bound"])
        assert torch.equal(rank.read["gradients"], first.read["gradients"])
    if options["noise_multiplier"]:
        assert one.read["epsilon"] == spent_epsilon(1.0, 0.25, 6, 1e-3, "gdp")
    if "max_physical_batch_size" in options:
        assert max(first.read["sizes"] + second.read["sizes"]) <= 5


class NoGradient(Classifier):
    def __init__(self) -> None:
        super().__init__(nn.Linear(FEATURES, 100), "SGD", lr=0.0)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return 0.0 * self(batch[0]).mean()


def _secret() -> list[pl.Callback]:
    return build(noise_multiplier=2.0, max_grad_norm=3.0, reproducible=False)


def test_noise_is_added_once_and_alike_on_all_ranks() -> None:
    """With a secret seed, which the ranks must share: each drawing its own would halve the variance, or double it."""
    first, second = fit_ddp(NoGradient(), build=_secret, read=read, steps=30)
    assert torch.equal(first.read["gradients"], second.read["gradients"])
    noise = first.read["gradients"].double() * 24 / 6.0
    n = noise.numel()
    assert abs(noise.square().mean() - 1) < 5 * math.sqrt(2 / n)
    for wrong in (0.5, 2.0):
        assert abs(noise.square().mean() / wrong - 1) > 5 * math.sqrt(2 / n)


def test_ranks_without_records_go_along() -> None:
    """About two records a step in four chunks: most are empty, and so are some steps."""
    first, second, one = both(
        Classifier(mlp(), "SGD", 0.1),
        batch=4,
        samples=40,
        accumulated=2,
        steps=15,
        noise_multiplier=1.0,
        max_grad_norm=0.5,
    )
    assert first.read["steps"] == second.read["steps"] == one.read["steps"] == (15, 15)
    assert torch.equal(first.weights, second.weights)
    torch.testing.assert_close(first.weights, one.weights, rtol=0, atol=1e-6)


def _broken() -> list[pl.Callback]:
    return [dp(noise_multiplier=0.0, max_grad_norm=0.5, probe=False), Gradients()]


def test_a_broken_record_on_one_rank_is_left_out() -> None:
    data = loader(batch_size=12)
    data.dataset.tensors[0][5] = math.nan
    first, second = fit_ddp(Classifier(mlp(), "SGD", 0.5), build=_broken, data=data, read=read)
    assert torch.isfinite(first.weights).all()
    assert torch.equal(first.weights, second.weights)


class Coupled(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0])
        return (logits - logits.mean(0)).square().mean()


def test_the_probe_refuses_on_all_ranks() -> None:
    with pytest.raises(Exception, match="other records"):
        fit_ddp(Coupled(mlp()), build=partial(build, noise_multiplier=1.0))
