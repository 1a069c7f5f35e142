"""Small modules, data and a Trainer for tests of EdgeStrategy and its parts; and the tester of strategy parts."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from groundwire.plugins.edge import EdgeStrategy

FEATURES, CLASSES = 12, 3


class Classifier(pl.LightningModule):
    """Any network under cross entropy and Adam."""

    def __init__(self, network: nn.Module | None = None, optimizer: str = "Adam", lr: float = 1e-2) -> None:
        super().__init__()
        self.network = network if network is not None else nn.Linear(FEATURES, CLASSES)
        self.optimizer_name, self.lr = optimizer, lr

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return getattr(torch.optim, self.optimizer_name)(self.parameters(), lr=self.lr)


class Losses(pl.Callback):
    """Remembers the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(float(outputs["loss"]))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mlp(*extra: nn.Module) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(FEATURES, 16), *extra, nn.ReLU(), nn.Linear(16, CLASSES))


def loader(batch_size: int = 24, samples: int = 96, shape: tuple[int, ...] = (FEATURES,)) -> DataLoader[Any]:
    g = generator(7)
    x = torch.randn(samples, *shape, generator=g)
    y = torch.randint(0, CLASSES, (samples,), generator=g)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


class Rounds:
    """A loader of given batches (Lightning takes a plain list for several loaders)."""

    def __init__(self, *batches: Any) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        return iter(self.batches)


def trainer(strategy: Any = "auto", *, steps: int = 6, **options: Any) -> pl.Trainer:
    options = {"logger": False, "enable_checkpointing": False} | options
    return pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def fit(
    strategy: Any = "auto", module: pl.LightningModule | None = None, data: Any = None, **options: Any
) -> tuple[Tensor, pl.Trainer, list[float]]:
    """Train a copy of ``module``: its final weights, the trainer, and the losses."""
    module = copy.deepcopy(module) if module is not None else Classifier(mlp())
    losses = Losses()
    t = trainer(strategy, callbacks=[losses, *options.pop("callbacks", [])], **options)
    t.fit(module, data if data is not None else loader())
    return weights(module), t, losses.values


def weights(module: nn.Module) -> Tensor:
    return torch.cat([v.detach().flatten().double() for v in module.state_dict().values()])


def check_strategy_part(
    build: Callable[[], EdgeStrategy],
    *,
    changes: bool = True,
    off: Callable[[], EdgeStrategy] | None = None,
    module: pl.LightningModule | None = None,
) -> None:
    """What every part of EdgeStrategy must pass.

    Args:
        build: A strategy with the part switched on.
        changes: Whether the part is meant to change the trained weights.
        off: The same with the part switched off and one device; must equal a plain Trainer bit for bit.
        module: What to train.
    """
    module = module if module is not None else Classifier(mlp())
    on, t, losses = fit(build(), module)
    again, _, _ = fit(build(), module)
    assert torch.equal(on, again), "the same settings and seed must give the same weights"
    assert torch.isfinite(on).all()
    base, _, _ = fit(EdgeStrategy(num_devices=build().num_devices), module)
    assert torch.equal(on, base) != changes, "a part must change what it claims to, and nothing if it claims nothing"
    if off is not None:
        plain, _, plain_losses = fit("auto", module)
        switched_off, _, off_losses = fit(off(), module)
        assert torch.equal(plain, switched_off), "switched off, it must equal the plain Trainer bit for bit"
        assert plain_losses == off_losses
    check_resume(build, module, losses, on, t.strategy)


class Killed(pl.Callback):
    """Ends the run in the middle of it, one step after the last checkpoint."""

    class Error(Exception):
        """Not a kind that anything handles."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if trainer.global_step == self.step:
            raise self.Error


def check_resume(
    build: Callable[[], EdgeStrategy],
    module: pl.LightningModule,
    losses: list[float],
    final: Tensor,
    uninterrupted: EdgeStrategy,
    callbacks: Callable[[], list[pl.Callback]] = list,
    **options: Any,
) -> None:
    """Kill a run of six rounds (four an epoch) between checkpoints and go on in a new Trainer: nothing may differ."""
    for step in (2, 4):  # a checkpoint within an epoch, and one at its end
        with tempfile.TemporaryDirectory() as folder:
            saver = ModelCheckpoint(dirpath=folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")
            killed = trainer(
                build(),
                steps=6,
                enable_checkpointing=True,
                callbacks=[saver, Killed(step + 1), *callbacks()],
                **options,
            )
            with contextlib.suppress(Killed.Error):
                killed.fit(copy.deepcopy(module), Stateful(loader()))
            assert killed.global_step == step + 1
            fresh, recorded = copy.deepcopy(module), Losses()
            t = trainer(build(), steps=6, callbacks=[recorded, *callbacks()], **options)
            t.fit(fresh, Stateful(loader()), ckpt_path=str(Path(folder) / f"step={step}.ckpt"))
            assert recorded.values == losses[step:]
            assert torch.equal(weights(fresh), final)
            assert t.strategy.round_index == uninterrupted.round_index == 6
            assert t.strategy.privacy_spent() == uninterrupted.privacy_spent()
            assert t.strategy.ledger.rounds == 6
            assert t.strategy.ledger.totals == uninterrupted.ledger.totals
            assert torch.equal(t.strategy.ledger.energy_per_device, uninterrupted.ledger.energy_per_device)


class Stateful:
    """An ordinary loader that goes on at the right batch when Lightning resumes within an epoch."""

    def __init__(self, inner: DataLoader[Any]) -> None:
        self.inner, self.start, self.position = inner, 0, 0

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Any:
        start, self.start = self.start, 0
        for i, batch in enumerate(self.inner):
            self.position = i + 1
            if i >= start:
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["position"]
