from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BaseFinetuning, GradientAccumulationScheduler, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    WeightedRandomSampler,
)
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from groundwire.callbacks.privacy import DPSGD
from groundwire.plugins.edge import EdgeStrategy
from helpers.edge import CLASSES, FEATURES, Classifier, fit, loader, mlp, trainer, weights

pytestmark = [pytest.mark.filterwarnings("ignore:.*[Gg][Dd][Pp]"), pytest.mark.usefixtures("seed_of_the_run")]


def dp(**options: Any) -> DPSGD:
    return DPSGD(**({"noise_multiplier": 1.0, "accountant": "gdp", "reproducible": True} | options))


def train(module: pl.LightningModule, data: Any = None, *, callback: DPSGD | None = None, **options: Any) -> pl.Trainer:
    """Two steps of the module itself."""
    callbacks = [callback if callback is not None else dp(), *options.pop("callbacks", [])]
    t = trainer(options.pop("strategy", "auto"), **({"steps": 2} | options), callbacks=callbacks)
    t.fit(module, data if data is not None else loader())
    return t


def refused(module: pl.LightningModule, match: str, data: Any = None, **options: Any) -> None:
    """Nothing may have been trained when the message comes."""
    before = weights(module)
    with pytest.raises(MisconfigurationException, match=match):
        train(module, data, **options)
    assert torch.equal(weights(module), before)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in module.modules())


# ---------------------------------------------------------------- the optimizer and the Trainer


def test_manual_optimization() -> None:
    module = Classifier(mlp())
    module.automatic_optimization = False
    refused(module, "automatic optimization")


def test_several_optimizers() -> None:
    class Two(Classifier):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.network[0], self.network[2])]

    with pytest.raises((MisconfigurationException, RuntimeError), match=r"one optimizer|multiple optimizers"):
        train(Two(mlp()))


def test_an_optimizer_that_evaluates_the_loss_several_times() -> None:
    refused(Classifier(mlp(), "LBFGS"), "LBFGS.*SGD or Adam")


def test_no_optimizer() -> None:
    class Without(Classifier):
        def configure_optimizers(self) -> Any:
            return None

    refused(Without(mlp()), r"optimizer does not train network\.0\.weight")


def test_edge_strategy_names_what_to_use_instead() -> None:
    refused(Classifier(mlp()), "DPFedAvg", strategy=EdgeStrategy(num_devices=2))


def test_an_optimizer_that_misses_parameters() -> None:
    class Half(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.network[0].parameters(), lr=0.1)

    refused(Half(mlp()), r"network\.2\.weight, network\.2\.bias.*requires_grad_")
    module = Half(mlp())
    module.network[2].requires_grad_(False)
    train(module)


def test_an_optimizer_with_parameters_of_others() -> None:
    class Foreign(Classifier):
        def __init__(self, network: nn.Module) -> None:
            super().__init__(network)
            self.hidden = [nn.Linear(2, 2)]

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([*self.parameters(), *self.hidden[0].parameters()], lr=0.1)

    refused(Foreign(mlp()), "2 tensors.*Register")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"overfit_batches": 2}, "overfit_batches.*Subset"),
        (
            {"callbacks": [GradientAccumulationScheduler({0: 1, 1: 2})]},
            "GradientAccumulationScheduler.*accumulate_grad",
        ),
        ({"callbacks": [LearningRateFinder(num_training_steps=3)]}, "LearningRateFinder.*public data"),
    ],
    ids=["overfit_batches", "accumulation scheduler", "learning rate finder"],
)
def test_options_of_the_trainer(options: dict[str, Any], match: str) -> None:
    refused(Classifier(mlp()), match, **options)


def test_two_of_them() -> None:
    class Other(DPSGD):
        pass

    with pytest.raises(RuntimeError, match="more than one stateful callback of type `DPSGD`"):  # Lightning's own
        train(Classifier(mlp()), callbacks=[dp()])
    refused(Classifier(mlp()), "two DPSGD", callbacks=[Other(noise_multiplier=1.0)])


def test_tuner_is_refused(tmp_path: Any) -> None:
    module = Classifier(mlp())
    before = weights(module)
    t = trainer(callbacks=[dp()], default_root_dir=tmp_path)
    with pytest.raises(MisconfigurationException, match="LearningRateFinder"):
        Tuner(t).lr_find(module, loader(), num_training=3)
    assert torch.equal(weights(module), before)


# ---------------------------------------------------------------- the data


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from loader().dataset


class WithoutLength(Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return loader().dataset[index]


def _own_batches() -> DataLoader[Any]:
    class Own(BatchSampler):
        pass

    data = loader().dataset
    return DataLoader(data, batch_sampler=Own(SequentialSampler(data), 24, drop_last=False))


def _weighted() -> DataLoader[Any]:
    return DataLoader(loader().dataset, batch_size=24, sampler=WeightedRandomSampler([1.0] * 96, 96))


def _with_replacement() -> DataLoader[Any]:
    data: Any = loader().dataset
    return DataLoader(data, batch_size=24, sampler=torch.utils.data.RandomSampler(data, replacement=True))


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (DataLoader(Stream(), batch_size=24), "Stream.*map-style"),
        (_own_batches(), "Own.*batch_size"),
        (DataLoader(loader().dataset, batch_size=None), "batch_size"),
        (_weighted(), "WeightedRandomSampler.*Subset"),
        (_with_replacement(), "RandomSampler"),
        (loader(batch_size=97), "97 records"),
    ],
    ids=["iterable", "own batch sampler", "no batches", "weighted", "with replacement", "rate above one"],
)
def test_loaders(data: Any, match: str) -> None:
    refused(Classifier(mlp()), match, data)


class Several(Classifier):
    """Takes a batch of each loader."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        parts = list(batch.values()) if isinstance(batch, dict) else batch
        return super().training_step(parts[0], batch_idx)


@pytest.mark.parametrize("probe", [True, False])
@pytest.mark.parametrize("kind", ["list", "dict", "combined", "unequal"])
def test_several_loaders(kind: str, probe: bool) -> None:
    """The sample rate of one loader would be counted for all of them."""
    data: Any = {
        "list": [loader(), loader()],
        "dict": {"a": loader(), "b": loader()},
        "combined": CombinedLoader([loader(), loader()], "max_size_cycle"),
        "unequal": [loader(), loader(batch_size=2)],
    }[kind]
    refused(Several(mlp()), "one", data, callback=dp(probe=probe))


def test_one_loader_in_a_dict() -> None:
    refused(Several(mlp()), "one", {"a": loader()})


def test_sample_rate_above_one_counts_accumulated_batches() -> None:
    refused(Classifier(mlp()), "2 accumulated batches.* = 98", loader(batch_size=49), accumulate_grad_batches=2)
    train(Classifier(mlp()), loader(batch_size=48), accumulate_grad_batches=2)


# ---------------------------------------------------------------- layers


class Convolutional(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, CLASSES))


def test_batch_norm_is_named_and_can_be_replaced() -> None:
    refused(Classifier(mlp(nn.BatchNorm1d(16))), r"`network\.1` \(BatchNorm1d\).*fix=True")
    module = Classifier(Convolutional(), "SGD", 0.5)
    t = train(module, loader(shape=(1, 6, 6)), callback=dp(fix=True))
    assert isinstance(module.network[1], nn.GroupNorm)
    stepped = {p for group in t.optimizers[0].param_groups for p in group["params"]}
    assert stepped == set(module.parameters())
    assert not torch.equal(module.network[1].weight, torch.ones(8))


def test_a_replaced_batch_norm_of_features_still_passes_them_on() -> None:
    """A GroupNorm with as many groups as features makes zeros of them."""
    module = Classifier(mlp(nn.BatchNorm1d(16)), "SGD", 0.5)
    train(module, callback=dp(fix=True))
    x = loader().dataset.tensors[0][:5]
    assert float(module.network[:2](x).detach().std(0).max()) > 0.1


class Recurrent(nn.Module):
    def __init__(self, kind: str, heads: int = 1) -> None:
        super().__init__()
        is_attention = kind == "MultiheadAttention"
        self.layer: Any = getattr(nn, kind)(4, heads if is_attention else 4, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 3, 4)
        out, _ = self.layer(x, x, x) if "Attention" in type(self.layer).__name__ else self.layer(x)
        return self.head(out[:, -1])


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "MultiheadAttention"])
def test_recurrent_and_attention_layers_are_named(kind: str) -> None:
    refused(Classifier(Recurrent(kind)), rf"`network\.layer` \({kind}")


@pytest.mark.parametrize(("kind", "heads"), [("LSTM", 1), ("GRU", 1), ("MultiheadAttention", 1)])
def test_recurrent_and_attention_layers_can_be_replaced(kind: str, heads: int) -> None:
    module = Classifier(Recurrent(kind, heads), "SGD", 0.5)
    plain = copy.deepcopy(module)
    x = loader().dataset.tensors[0][:5]
    callback = dp(fix=True, noise_multiplier=0.0, max_grad_norm=1e-12)  # leaves the weights where they are
    train(module, callback=callback)
    assert type(module.network.layer).__name__.startswith("DP")
    torch.testing.assert_close(module.network(x), plain.network(x), rtol=1e-4, atol=1e-5)
    train(module, callback=dp())
    assert not torch.allclose(module.network(x), plain.network(x), atol=1e-3)


@pytest.mark.parametrize(("kind", "heads"), [("RNN", 1), ("MultiheadAttention", 2)])
def test_layers_without_a_right_stand_in_are_refused_even_with_fix(kind: str, heads: int) -> None:
    """Opacus's attention computes something else with batch_first and several heads."""
    refused(Classifier(Recurrent(kind, heads)), rf"`network\.layer` \({kind}", callback=dp(fix=True))


def test_frozen_batch_norm_in_training_mode() -> None:
    module = Classifier(mlp(nn.BatchNorm1d(16)))
    module.network[1].requires_grad_(False)
    refused(module, r"`network\.1` \(BatchNorm1d\) uses or keeps statistics of the batch.*evaluation mode")

    class InEvaluation(Classifier):
        def on_train_epoch_start(self) -> None:
            self.network[1].eval()

        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            self.network[1].eval()
            return self

    module = InEvaluation(mlp(nn.BatchNorm1d(16)))
    module.network[1].requires_grad_(False)
    buffers = [b.clone() for b in module.buffers()]
    train(module)
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), buffers, strict=True))


def test_parameters_of_the_module_itself() -> None:
    class Owner(Classifier):
        def __init__(self) -> None:
            super().__init__(mlp())
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * super().forward(x)

    refused(Owner(), "`scale` belongs to Owner itself.*submodule")
    frozen = Owner()
    frozen.scale.requires_grad_(False)
    train(frozen)


# ---------------------------------------------------------------- the step


class BatchCoupled(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0])
        return F.cross_entropy(logits - logits.mean(0), batch[1])


class Contrastive(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        z = F.normalize(self(batch[0]), dim=1)
        return F.cross_entropy(z @ z.T, torch.arange(len(z)))


class Summed(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1], reduction="sum")


class Weighted(Classifier):
    """Class weights: torch divides by the weights of the batch's labels."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1], weight=torch.tensor([1.0, 10.0, 100.0]))


class Penalised(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) + 0.1 * self.network[0].weight.square().sum()


class Functional(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        first = self.network[0]
        hidden = F.linear(batch[0], first.weight, first.bias).relu()
        return F.cross_entropy(self.network[2](hidden), batch[1])


class Both(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        extra = F.linear(batch[0], self.network[0].weight).square().mean()
        return super().training_step(batch, batch_idx) + extra


class Unused(Classifier):
    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.spare = nn.Linear(3, 3)


class Skips(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None


class MixesUp(Classifier):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        return (0.5 * (x + x[torch.randperm(len(x))]), y) if self.trainer.training else batch


class MixesUpInside(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return super().training_step((0.5 * (x + x.roll(1, 0)), y), batch_idx)


class Statistics(Classifier):
    """A buffer that follows the data."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.register_buffer("mean", torch.zeros(FEATURES))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.mean.lerp_(batch[0].mean(0), 0.1)
        return super().training_step(batch, batch_idx)


class MergesRows(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self.network[2](self.network[0](x).relu().repeat_interleave(2, 0))
        return F.cross_entropy(logits, y.repeat_interleave(2))


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (BatchCoupled, "other records"),
        (Contrastive, "other records|number of records"),
        (Summed, "number of records.*reduction='mean'"),
        (Weighted, "other records"),
        (Penalised, r"network\.0\.weight.*weight_decay"),
        (Functional, r"network\.0\.weight, network\.0\.bias.*call the layer"),
        (Both, r"network\.0\.weight.*call the layer"),
        (Unused, r"spare\.weight, spare\.bias.*Freeze"),
        (Skips, "returned None.*return a loss"),
        (MixesUp, "other records.*mixup"),
        (MixesUpInside, "other records.*mixup"),
        (Statistics, "mean"),
        (MergesRows, r"network\.2.*records"),
    ],
)
def test_steps_that_cannot_be_private(kind: Any, match: str) -> None:
    refused(kind(mlp()), match)


@pytest.mark.parametrize("engine", ["ghost", "hooks", "functorch"])
@pytest.mark.parametrize("kind", [BatchCoupled, Summed])
def test_the_probe_works_with_all_engines(kind: Any, engine: Any) -> None:
    refused(kind(mlp()), "records", callback=dp(engine=engine))
    train(Classifier(mlp()), callback=dp(engine=engine))


@pytest.mark.parametrize("kind", [Penalised, Functional, Both, MergesRows])
def test_what_is_found_without_the_probe(kind: Any) -> None:
    refused(kind(mlp()), "", callback=dp(probe=False))


@pytest.mark.parametrize("kind", [BatchCoupled, Summed, Unused])
def test_without_the_probe(kind: Any) -> None:
    module = kind(mlp())
    before = weights(module)
    assert train(module, callback=dp(probe=False)).global_step == 2
    assert not torch.equal(weights(module), before)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_step_that_is_skipped_now_and_then(accumulated: int) -> None:
    class SkipsLater(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 2 else super().training_step(batch, batch_idx)

    module = SkipsLater(mlp(), "SGD", 0.5)
    data = loader(batch_size=24 // accumulated)
    with pytest.raises(MisconfigurationException, match="returned None"):
        train(module, data, steps=4, accumulate_grad_batches=accumulated)
    expected = Classifier(mlp(), "SGD", 0.5)
    train(expected, data, steps=2 // accumulated, accumulate_grad_batches=accumulated)
    assert torch.equal(weights(module), weights(expected))


# ---------------------------------------------------------------- the probe leaves no trace


class Busy(Classifier):
    """Logs, counts, drops out, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__(mlp(nn.Dropout(0.3)), "SGD", 0.5)
        self.accuracy = MulticlassAccuracy(CLASSES, average="micro")
        self.mean = MeanMetric()
        self.register_buffer("constant", torch.ones(3))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self(x + 0.01 * torch.randn(()))
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.mean.update(loss.detach())
        self.log("train/accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.log_dict({"train/loss": loss, "train/mean": self.mean}, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.counted = int(self.accuracy.tp.sum() + self.accuracy.fn.sum())


@pytest.mark.parametrize("engine", ["auto", "ghost", "hooks", "functorch"])
def test_the_probe_leaves_no_trace(seeded: Any, engine: Any) -> None:
    found = []
    for probe in (True, False):
        module = Busy()
        callback = dp(probe=probe, engine=engine)
        seeded(1)
        t = train(module, callback=callback, steps=-1, max_epochs=1)
        metrics = {name: float(value) for name, value in t.callback_metrics.items()}
        found.append((weights(module), torch.get_rng_state(), metrics, module.counted, module.training))
        assert callback.steps == 4
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_the_probe_draws_nothing_for_a_dataset_with_augmentation(seeded: Any) -> None:
    class Augmented(Dataset[Any]):
        def __len__(self) -> int:
            return 96

        def __getitem__(self, index: int) -> Any:
            x, y = loader().dataset[index]
            return x + 0.1 * torch.randn(FEATURES), y

    ends = []
    for probe in (True, False):
        module = Classifier(mlp(), "SGD", 0.5)
        seeded(1)
        train(module, DataLoader(Augmented(), batch_size=24), callback=dp(probe=probe))
        ends.append(weights(module))
    assert torch.equal(ends[0], ends[1])


def test_the_probe_keeps_what_a_metric_holds() -> None:
    class Lifelong(Classifier):
        """Counts all records that it ever was trained on."""

        def __init__(self) -> None:
            super().__init__(mlp())
            self.count = MeanMetric()

        def on_train_start(self) -> None:
            self.count.update(torch.ones(7))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.count.update(torch.ones(len(batch[0])))
            return super().training_step(batch, batch_idx)

    counts = []
    for probe in (True, False):
        module = Lifelong()
        train(module, callback=dp(probe=probe))
        counts.append(float(module.count.weight))
    assert counts[0] == counts[1]


def test_the_probe_restores_everything_when_it_refuses(seeded: Any) -> None:
    seeded(5)
    module = Statistics(mlp(nn.Dropout(0.2)))
    state = {name: value.clone() for name, value in module.state_dict().items()}
    refused(module, "mean")
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert not {"log", "log_dict", "training_step"} & set(module.__dict__)
    assert all(p.grad is None and p.requires_grad for p in module.parameters())
    assert all(m.training for m in module.modules())


# ---------------------------------------------------------------- unfreezing during the fit


class Unfreezes(BaseFinetuning):
    """The first layer joins in epoch 1."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.network[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.network[0], optimizer, lr=0.5, initial_denom_lr=1.0)


class Trainable(Classifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.5)


class Norms(pl.Callback):
    """The norm of the private gradient in each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        grads = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.values.append(float(torch.cat(grads).norm()))


@pytest.mark.parametrize("first", [True, False])
def test_layers_that_are_unfrozen_become_private(first: bool) -> None:
    """Whatever the order of the callbacks, no gradient of a step exceeds the clipping norm."""
    norms = Norms()
    callback = dp(noise_multiplier=0.0, max_grad_norm=1e-3)
    module = Trainable(mlp())
    initial = module.network[0].weight.detach().clone()
    callbacks = [callback, Unfreezes()] if first else [Unfreezes(), callback]
    t = trainer(steps=12, callbacks=[*callbacks, norms])
    t.fit(module, loader())
    assert not torch.equal(module.network[0].weight, initial)
    assert max(norms.values) < 3e-3  # a batch has at most twice the expected number of records


def test_the_module_may_unfreeze_its_own_layers() -> None:
    class Own(Classifier):
        def on_train_epoch_start(self) -> None:
            self.network[0].requires_grad_(self.current_epoch > 0)

    norms = Norms()
    module = Own(mlp(), "SGD", 0.5)
    module.network[0].requires_grad_(False)
    t = trainer(steps=12, callbacks=[dp(noise_multiplier=0.0, max_grad_norm=1e-3), norms])
    t.fit(module, loader())
    assert max(norms.values) < 3e-3


def test_a_layer_that_is_frozen_during_the_fit_stays_where_it_is() -> None:
    class Freezes(pl.Callback):
        frozen: Tensor

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                pl_module.network[0].requires_grad_(False)
                self.frozen = pl_module.network[0].weight.detach().clone()

    freezes, module = Freezes(), Classifier(mlp(), "SGD", 0.5)
    fit("auto", module, callbacks=[])
    t = trainer(steps=12, callbacks=[freezes, dp()])
    t.fit(module, loader())
    assert torch.equal(module.network[0].weight, freezes.frozen)


def test_nothing_to_train() -> None:
    class Frozen(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) + torch.zeros((), requires_grad=True)

    module = Frozen(mlp())
    module.network.requires_grad_(False)
    refused(module, "no parameter")
