from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from groundwire.callbacks.privacy import DPSGD
from helpers.edge import CLASSES, FEATURES, Classifier, generator, loader, mlp, trainer, weights

pytestmark = [pytest.mark.filterwarnings("ignore:.*[Gg][Dd][Pp]"), pytest.mark.usefixtures("seed_of_the_run")]


def train(module: pl.LightningModule, data: Any = None, **options: Any) -> pl.Trainer:
    options = {"noise_multiplier": 1.0, "accountant": "gdp", "reproducible": True} | options
    t = trainer(steps=2, callbacks=[DPSGD(**options)])
    t.fit(module, data if data is not None else loader())
    return t


def refused(module: pl.LightningModule, match: str, data: Any = None, **options: Any) -> None:
    """The message comes, and the weights and buffers are what they were."""
    before = weights(module)
    with pytest.raises(MisconfigurationException, match=match):
        train(module, data, **options)
    assert torch.equal(weights(module), before)


def trained(module: pl.LightningModule, data: Any = None, **options: Any) -> None:
    before = weights(module)
    train(module, data, **options)
    assert not torch.equal(weights(module), before)


def batches(*tensors: Tensor, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*tensors), batch_size=24, **options)


class Step(Classifier):
    """A network under any loss."""

    def __init__(self, network: nn.Module, loss: Callable[..., Tensor] = F.cross_entropy) -> None:
        super().__init__(network)
        self.loss = loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return self.loss(self(x), y)


# ---------------------------------------------------------------- random records


def two_classes(rare: int = 48) -> DataLoader[Any]:
    """The first and the last record are of class 0, as are all but ``rare`` others."""
    y = torch.zeros(96, dtype=torch.long)
    y[20 : 20 + rare] = 1
    return batches(torch.randn(96, FEATURES, generator=generator(7)), y)


@pytest.mark.parametrize("rare", [48, 4])
def test_class_weights_are_refused_where_the_records_at_the_ends_are_of_one_class(rare: int) -> None:
    def weighted(output: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(output, y, weight=torch.tensor([1.0, 100.0, 1.0]))

    refused(Step(mlp(), weighted), "other records.*class weights", two_classes(rare))
    trained(Step(mlp()), two_classes(rare))


def test_a_mean_over_tokens_is_refused_where_there_is_padding() -> None:
    def per_token(output: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), y.flatten())

    def per_record(output: Tensor, y: Tensor) -> Tensor:
        losses = F.cross_entropy(output.transpose(1, 2), y, reduction="none")
        return (losses.sum(1) / (y >= 0).sum(1).clamp(min=1)).mean()

    x, y = torch.randn(96, 5, 4, generator=generator(1)), torch.randint(0, CLASSES, (96, 5), generator=generator(2))
    trained(Step(nn.Linear(4, CLASSES), per_token), batches(x, y))
    for padded in (slice(0, 1), slice(30, 40)):  # at an end, where labels were once drawn from -100 on; and within
        y[padded, 3:] = -100
        refused(Step(nn.Linear(4, CLASSES), per_token), "other records.*ignored labels", batches(x, y))
        trained(Step(nn.Linear(4, CLASSES), per_record), batches(x, y))


def test_columns_of_integers_keep_to_their_own_values() -> None:
    class Tabular(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large = nn.Embedding(2, 4), nn.Embedding(50, 4)
            self.head = nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.small(x[:, 0]) + self.large(x[:, 1]))

    columns = [torch.randint(0, size, (96,), generator=generator(size)) for size in (2, 50)]
    trained(Step(Tabular()), batches(torch.stack(columns, 1), torch.zeros(96, dtype=torch.long)))


def test_a_step_that_fails_on_random_records_names_the_way_out() -> None:
    def particular(output: Tensor, y: Tensor) -> Tensor:
        if not torch.allclose(y.sum(1), torch.ones(len(y))):
            raise KeyError("targets must sum to one")
        return F.cross_entropy(output, y)

    data = batches(torch.randn(96, FEATURES, generator=generator(0)), torch.full((96, CLASSES), 1 / CLASSES))
    refused(Step(mlp(), particular), r"KeyError: 'targets must.*DPSGD\(probe=False\)", data)
    trained(Step(mlp(), particular), data, probe=False)


class Dead(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.layer, self.factor = nn.Linear(FEATURES, CLASSES), factor

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.factor


@pytest.mark.parametrize("factor", [0.0, float("nan")])
def test_a_probe_that_learns_nothing_says_so_once(factor: float) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(Step(Dead(factor)))
    assert len([w for w in caught if "zero or not finite" in str(w.message)]) == 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(Step(Dead(1.0)))
    assert not [w for w in caught if "cannot check" in str(w.message)]


# ---------------------------------------------------------------- collation


def mixup(records: list[Any]) -> list[Tensor]:
    x, y = default_collate(records)
    share = np.random.beta(0.4, 0.4)  # noqa: NPY002
    other = torch.randperm(len(x))
    y = F.one_hot(y, CLASSES).float()
    return [share * x + (1 - share) * x[other], share * y + (1 - share) * y[other]]


def mixes_now_and_then(records: list[Any]) -> list[Tensor]:
    x, y = default_collate(records)
    return [0.5 * (x + x.roll(1, 0)) if np.random.rand() < 0.3 else x, y]  # noqa: NPY002


def centres(records: list[Any]) -> list[Tensor]:
    x, y = default_collate(records)
    return [x - x.mean(0), y]


def adds_noise(records: list[Any]) -> list[Tensor]:
    x, y = default_collate(records)
    return [x + 0.1 * torch.randn(FEATURES), y]


def sorts(records: list[Any]) -> list[Tensor]:
    x, y = default_collate(records)
    order = x[:, 0].argsort()
    return [x[order], y[order]]


@pytest.mark.parametrize("collate", [mixup, mixes_now_and_then, centres])
def test_a_collation_that_mixes_records_is_refused(collate: Any) -> None:
    data = DataLoader(loader().dataset, batch_size=24, collate_fn=collate)
    with isolate_rng():
        refused(Step(mlp()), "collation.*mixup.*collate_fn", data)
        trained(Step(mlp()), data, probe=False)


@pytest.mark.parametrize("collate", [adds_noise, sorts])
def test_a_collation_that_leaves_records_apart_is_not(collate: Any) -> None:
    trained(Step(mlp()), DataLoader(loader().dataset, batch_size=24, collate_fn=collate))


class Sentences(Dataset[Any]):
    """Of 1 to 6 tokens."""

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> Any:
        return torch.randint(1, 9, (1 + index % 6,), generator=generator(index)), index % CLASSES


@pytest.mark.parametrize("left", [True, False])
def test_padding_to_the_longest_of_a_batch_is_no_mixing(left: bool) -> None:
    def pad(records: list[Any]) -> list[Tensor]:
        longest = max(len(x) for x, _ in records)
        sides = [(longest - len(x), 0) if left else (0, longest - len(x)) for x, _ in records]
        padded = [F.pad(x, side) for (x, _), side in zip(records, sides, strict=True)]
        return [torch.stack(padded), torch.tensor([y for _, y in records])]

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 4, padding_idx=0), nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.table(x).sum(1))

    trained(Step(Bag()), DataLoader(Sentences(), batch_size=24, collate_fn=pad))


# ---------------------------------------------------------------- what a step writes


class Writes(nn.Module):
    """Keeps something of the batch in a frozen parameter, or in a buffer."""

    def __init__(self, kept: str) -> None:
        super().__init__()
        self.layer, self.kept = mlp(), kept
        self.memory = nn.Parameter(torch.zeros(FEATURES), requires_grad=False)
        self.register_buffer("last", torch.zeros(FEATURES))
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            match self.kept:
                case "memory":
                    self.memory.lerp_(x.mean(0), 0.1)
                case "last":
                    self.last = x[0].clone()  # another tensor
                case "step":
                    self.step += 1
                case "seen":
                    self.seen += len(x)
        return self.layer(x)


@pytest.mark.parametrize("kept", ["memory", "last", "seen"])
def test_a_step_that_keeps_something_of_the_batch_is_refused(kept: str) -> None:
    module = Step(Writes(kept))
    tensor = getattr(module.network, kept)
    refused(module, rf"writes statistics of the batch into network\.{kept},")
    assert getattr(module.network, kept) is tensor


def test_a_counter_of_steps_is_not() -> None:
    module = Step(Writes("step"))
    train(module)
    assert int(module.network.step) == 2  # and the runs of the probe do not count


class Lookup(nn.Module):
    def __init__(self, kind: Any, max_norm: float | None) -> None:
        super().__init__()
        self.table, self.head = kind(10, 4, max_norm=max_norm), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        found = self.table(x)
        return self.head(found if found.ndim == 2 else found.mean(1))


@pytest.mark.parametrize("is_frozen", [True, False])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_tables_that_renormalise_what_is_looked_up_are_refused(kind: Any, is_frozen: bool) -> None:
    data = batches(
        torch.randint(0, 10, (96, 3), generator=generator(0)), torch.randint(0, CLASSES, (96,), generator=generator(1))
    )
    for max_norm in (0.1, None):
        module = Step(Lookup(kind, max_norm))
        module.network.table.requires_grad_(not is_frozen)
        if max_norm is None:
            trained(module, data)
        else:
            refused(module, r"`network\.table` \(Embedding.*renormalises.*max_norm=None", data, probe=False)


# ---------------------------------------------------------------- gradients that pass by the layers


@pytest.mark.parametrize("ghost_output", ["", "network"])
@pytest.mark.parametrize("is_called", [True, False])
def test_ghost_clipping_sees_a_head_tied_by_a_function(ghost_output: str, is_called: bool) -> None:
    class TiedHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.middle = nn.Embedding(6, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.middle(self.table(x)).relu()
            return F.linear(hidden, self.table.weight) if is_called else hidden

    x = torch.randint(0, 6, (96,), generator=generator(0))
    y = torch.randint(0, 4, (96,), generator=generator(1))
    options: Any = {"engine": "ghost", "ghost_output": ghost_output}
    if is_called:
        refused(
            Step(TiedHead()), r"reached network\.table\.weight in another way.*call the layer", batches(x, y), **options
        )
    else:
        trained(Step(TiedHead()), batches(x, y), **options)


@pytest.mark.parametrize("engine", ["auto", "hooks", "functorch"])
def test_reentrant_checkpoints_pass(engine: Any) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(lambda h: self.second(h.tanh()), self.first(x), use_reentrant=True)

    trained(Step(Checkpointed()), engine=engine)


# ---------------------------------------------------------------- layers


class Masked(nn.Module):
    """Attends over 4 positions with a mask of positions, whose rows are as many as the probe's records."""

    def __init__(self, num_positions: int = 4) -> None:
        super().__init__()
        self.scores = Attends()
        self.head = nn.Linear(3, CLASSES)
        self.register_buffer("mask", torch.randn(num_positions, num_positions, generator=generator(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.scores(x, self.mask).mean(1))


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return (x @ self.weight @ x.transpose(1, 2) + mask).softmax(-1) @ x


@pytest.mark.parametrize("engine", ["auto", "functorch", "ghost"])
@pytest.mark.parametrize("num_positions", [2, 4, 5])
def test_a_mask_of_positions_is_not_taken_for_records(num_positions: int, engine: Any) -> None:
    x = torch.randn(96, num_positions, 3, generator=generator(0))
    y = torch.randint(0, CLASSES, (96,), generator=generator(1))
    trained(Step(Masked(num_positions)), batches(x, y), engine=engine)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "frozen": lambda: nn.BatchNorm1d(16).requires_grad_(False),
    "without parameters": lambda: nn.BatchNorm1d(16, affine=False),
    "without parameters and statistics": lambda: nn.BatchNorm1d(16, affine=False, track_running_stats=False),
    "evaluated without statistics": lambda: nn.BatchNorm1d(16, affine=False, track_running_stats=False).eval(),
}


@pytest.mark.parametrize("probe", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_norms_over_the_batch_are_refused_or_replaced_without_trainable_parameters(norm: str, probe: bool) -> None:
    refused(Step(mlp(NORMS[norm]())), r"`network\.1` \(BatchNorm1d\).*fix=True", probe=probe)
    module = Step(mlp(NORMS[norm]()))
    trained(module, probe=probe, fix=True)
    assert isinstance(module.network[1], nn.GroupNorm)
    assert not any(p.requires_grad for p in module.network[1].parameters())


@pytest.mark.parametrize("fix", [True, False])
def test_a_frozen_norm_in_evaluation_mode_stays(fix: bool) -> None:
    for norm in (nn.BatchNorm1d(16).requires_grad_(False), nn.BatchNorm1d(16, affine=False)):
        module = Step(mlp(norm.eval()))
        trained(module, fix=fix)
        assert module.network[1] is norm


def test_a_norm_that_returns_to_training_mode_is_refused_even_then() -> None:
    class Returns(Step):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.network[1].train(batch_idx > 0)

    module = Returns(mlp(nn.BatchNorm1d(16).requires_grad_(False).eval()))
    buffers = [b.clone() for b in module.buffers()]
    with pytest.raises(MisconfigurationException, match=r"`network\.1` \(BatchNorm1d\)"):
        train(module)
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), buffers, strict=True))


@pytest.mark.parametrize("kind", ["RNN", "attention"])
def test_recurrent_and_attention_layers_are_refused_only_if_they_are_trained(kind: str) -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            make: Any = nn.MultiheadAttention(4, 2, batch_first=True)
            self.layer = make if kind == "attention" else nn.RNN(4, 4, batch_first=True)
            self.head = nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            x = x.view(-1, 3, 4)
            out, _ = self.layer(x, x, x) if kind == "attention" else self.layer(x)
            return self.head(out[:, -1])

    refused(Step(Sequence()), r"`network\.layer`.*built in `setup` or `configure_model`")
    module = Step(Sequence())
    module.network.layer.requires_grad_(False)
    trained(module)


def test_dropout_inside_a_layer_with_parameters_of_its_own() -> None:
    class Block(nn.Module):
        def __init__(self, p: float) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(FEATURES))
            self.inner, self.dropout = nn.Linear(FEATURES, FEATURES), nn.Dropout(p)

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * self.dropout(self.inner(x))

    def module(p: float) -> Step:
        return Step(nn.Sequential(Block(p), nn.Linear(FEATURES, CLASSES)))

    refused(module(0.5), r"`network\.0` has `scale` of its own.*Dropout.*submodule of its own, or set the dropout to 0")
    trained(module(0.0))
    off = module(0.5)
    off.network[0].dropout.eval()
    trained(off)
