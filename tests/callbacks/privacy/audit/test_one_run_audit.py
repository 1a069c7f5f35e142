"""PrivacyAudit in a Trainer: who is trained on, what is found, what is refused, and what survives a resume."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from groundwire.callbacks.privacy import DPSGD
from groundwire.callbacks.privacy.audit import PrivacyAudit, RecordFormat, draw_canaries
from groundwire.callbacks.privacy.audit.canaries import add_records, record_format
from groundwire.datamodules import Digits
from groundwire.datamodules.base import TensorLoader
from groundwire.plugins.edge import EdgeStrategy
from groundwire.plugins.privacy.statement import PrivacyStatement
from helpers.edge import CLASSES, FEATURES, Classifier, Killed, loader, mlp, trainer, weights
from helpers.privacy import no_noise

pytestmark = pytest.mark.usefixtures("seed_of_the_run")

LOW = 1e-9  # a learning rate at which nothing is learned


class DigitsModule(Classifier):
    num_classes = 10

    def __init__(self, width: int = 128, lr: float = 3e-3) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = nn.Sequential(
                nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Dropout(0.0), nn.Linear(width, 10)
            )
        super().__init__(network, lr=lr)


class Seen(pl.Callback):
    """Remembers the batches."""

    def __init__(self) -> None:
        self.batches: list[tuple[Tensor, Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)


class Claims(pl.Callback):
    """Says that training was private."""

    def __init__(self, epsilon: float, delta: float = 1e-5, adjacency: str = "add-remove") -> None:
        self.statement = PrivacyStatement(
            mechanism="none",
            unit="one record",
            adjacency=adjacency,
            epsilon=epsilon,
            delta=delta,  # type: ignore[arg-type]
        )

    def privacy_spent(self) -> PrivacyStatement:
        return self.statement


def audit(num_canaries: int = 40, **options: Any) -> PrivacyAudit:
    return PrivacyAudit(num_canaries, **({"num_classes": CLASSES, "seed": 0} | options))


def run(callback: PrivacyAudit, folder: Path, data: Any = None, module: Any = None, **options: Any) -> pl.Trainer:
    others = options.pop("callbacks", [])
    t = trainer(callbacks=[callback, *others], default_root_dir=folder, **options)
    t.fit(module if module is not None else Classifier(mlp()), loader() if data is None else data)
    return t


def rows_of(*parts: tuple[Tensor, Tensor]) -> list[tuple[float, ...]]:
    """Records as something to compare as multisets."""
    return sorted((*x.flatten().tolist(), float(y)) for xs, ys in parts for x, y in zip(xs, ys, strict=True))


# ---------------------------------------------------------------- the verdict


@pytest.mark.parametrize("as_loader", ["TensorLoader", "DataLoader"])
def test_training_without_privacy_refutes_a_claim_of_epsilon_one(as_loader: str, tmp_path: Path) -> None:
    data: Any = Digits(batch_size=64, seed=0, train_fraction=0.2)
    if as_loader == "DataLoader":
        data.setup("fit")
        data = DataLoader(TensorDataset(*data.train_data), batch_size=64, shuffle=True)
    callback = PrivacyAudit(300, delta=1e-5, seed=1)
    logger = CSVLogger(tmp_path)
    run(callback, tmp_path, data, DigitsModule(), steps=-1, max_epochs=40, callbacks=[Claims(1.0)], logger=logger)
    report = callback.report
    assert report is not None
    assert report.refuted
    assert report.claimed_epsilon == 1.0
    assert report.attacks[0].auc > 0.95
    assert report.attacks[0].members + report.attacks[0].nonmembers == 300
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        logged = [row for row in csv.DictReader(file) if row["audit/auc"]]
    assert len(logged) == 1
    assert float(logged[0]["audit/epsilon_lower"]) == pytest.approx(report.epsilon_lower)
    assert float(logged[0]["audit/auc"]) == pytest.approx(report.attacks[0].auc)
    assert float(logged[0]["audit/refuted"]) == 1.0
    content = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert content["refuted"] is True
    assert content["epsilon_lower"] == report.epsilon_lower
    assert (tmp_path / "audit" / "audit.md").read_text() == report.table()
    assert (tmp_path / "audit" / "audit.csv").read_text() == report.to_csv()
    assert (tmp_path / "audit" / "audit_roc.png").stat().st_size > 10_000


@pytest.mark.parametrize("bug", [None, no_noise])
@pytest.mark.parametrize(("clipping", "noise_multiplier"), [("flat", 20.0), ("adaptive", 9.5)])
def test_the_claim_of_dp_sgd_is_refuted_if_its_noise_is_missing(
    clipping: Any,
    noise_multiplier: float,
    bug: Callable[[pytest.MonkeyPatch], None] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seeded: Callable[[int], None],
) -> None:
    """At fixed seeds; at others, a true claim is refuted with a probability of at most 5 %."""
    seeded(1)
    if bug is not None:
        bug(monkeypatch)
    callback = PrivacyAudit(300, seed=1)
    private = DPSGD(
        noise_multiplier=noise_multiplier,
        target_delta=1e-5,
        max_grad_norm=10.0,
        clipping=clipping,
        accountant="gdp",  # it says less than is spent, if anything, and the claim is easier to refute
        probe=False,
        reproducible=True,
    )
    data = Digits(batch_size=100, seed=0, train_fraction=0.05)
    run(callback, tmp_path, data, DigitsModule(lr=1e-2), steps=-1, max_epochs=60, callbacks=[private])
    assert callback.canaries is not None
    report = callback.report
    assert report is not None
    assert report.claimed_epsilon == private.privacy_spent().epsilon
    assert 0.5 < report.claimed_epsilon < 2.5
    assert report.claimed_delta == report.attacks[0].delta == 1e-5
    assert f"sample rate {100 / (63 + int(callback.canaries.included.sum())):.4g}," in str(private.privacy_spent())
    assert report.refuted == (bug is not None)
    assert (report.epsilon_lower > report.claimed_epsilon) == (bug is not None)


def test_training_that_learns_nothing_refutes_nothing(tmp_path: Path) -> None:
    bounds, areas = [], []
    for seed in range(4):
        callback = audit(400, seed=seed, claimed_epsilon=0.1)
        run(callback, tmp_path, module=Classifier(mlp(), lr=LOW), steps=2)
        assert callback.report is not None
        bounds.append(callback.report.epsilon_lower)
        areas.append(callback.report.attacks[0].auc)
    deviation = (401 / (12 * 200 * 200)) ** 0.5  # of an AUC that knows nothing, Mann and Whitney
    assert all(abs(area - 0.5) < 3.5 * deviation for area in areas)
    assert sum(bound > 0.1 for bound in bounds) <= 1


def test_losses_of_a_lookup_table_give_an_auc_of_one(tmp_path: Path) -> None:
    callback = audit(200)

    def lookup(pl_module: pl.LightningModule, batch: tuple[Tensor, Tensor]) -> Tensor:
        assert not pl_module.training
        assert not torch.is_grad_enabled()
        assert callback.canaries is not None
        inside = callback.canaries.x[callback.canaries.included]
        return torch.stack([(~(inside == x).all(dim=1)).all().double() for x in batch[0]])

    callback.losses, callback.batch_size = lookup, 64
    module = Classifier(mlp(nn.Dropout()))
    module.network[0].eval()  # whatever mode a part is in, it is in afterwards
    run(callback, tmp_path, module=module)
    assert callback.report is not None
    assert callback.report.attacks[0].auc == 1.0
    assert not callback.report.refuted  # nothing is claimed
    assert [part.training for part in module.network] == [False, True, True, True]


def test_losses_must_be_one_a_record(tmp_path: Path) -> None:
    callback = audit(losses=lambda module, batch: F.cross_entropy(module(batch[0]), batch[1]))
    with pytest.raises(MisconfigurationException, match="averaged over the batch"):
        run(callback, tmp_path)


def test_a_diverged_network_gives_no_error(tmp_path: Path) -> None:
    callback = audit(losses=lambda module, batch: torch.full((len(batch[1]),), float("nan")), claimed_epsilon=0.0)
    run(callback, tmp_path)
    assert callback.report is not None
    assert callback.report.epsilon_lower == 0.0


def test_whose_claim_it_is(tmp_path: Path) -> None:
    for own, others, expected in (
        ({"claimed_epsilon": 2.0, "delta": 1e-3}, [Claims(1.0)], (2.0, 1e-3)),
        ({}, [Claims(1.0, 1e-4)], (1.0, 1e-4)),
        ({"claimed_epsilon": 2.0}, [Claims(1.0, 1e-4)], (2.0, 1e-4)),
        ({"claimed_epsilon": 2.0}, [], (2.0, None)),
        ({"delta": 1e-3}, [Claims(1.0, 1e-4)], (1.0, 1e-3)),
        ({"delta": 1e-3}, [], (None, 1e-3)),
        ({}, [], (None, None)),
    ):
        callback = audit(**own)
        run(callback, tmp_path, callbacks=others, steps=1)
        assert callback.report is not None
        assert (callback.report.claimed_epsilon, callback.report.claimed_delta) == expected
        assert callback.report.attacks[0].delta == (expected[1] or 0.0)
    with pytest.warns(UserWarning, match="below the delta 0.0001 of the claim"):
        run(callback := audit(delta=1e-5), tmp_path, callbacks=[Claims(1.0, 1e-4)], steps=1)
    assert callback.report is not None
    assert callback.report.claimed_delta == 1e-4
    with pytest.warns(UserWarning, match="replace-one"):
        run(callback := audit(), tmp_path, callbacks=[Claims(1.0, adjacency="replace-one")], steps=1)
    assert callback.report is not None
    assert callback.report.claimed_epsilon is None


# ---------------------------------------------------------------- who is trained on


@pytest.mark.parametrize("kind", ["TensorLoader", "DataLoader", "DataLoader with workers"])
def test_the_data_and_the_included_canaries_are_trained_on_once_an_epoch(kind: str, tmp_path: Path) -> None:
    x, y = next(iter(loader(batch_size=96)))
    data: Any = TensorLoader((x, y), 24, shuffle=True)
    if kind != "TensorLoader":
        data = DataLoader(TensorDataset(x, y), batch_size=24, shuffle=True, num_workers=2 * kind.endswith("workers"))
    callback, seen = audit(), Seen()
    t = run(callback, tmp_path, data, steps=-1, max_epochs=1, callbacks=[seen])
    assert callback.canaries is not None
    included = callback.canaries.included
    expected = rows_of((x, y), (callback.canaries.x[included], callback.canaries.y[included]))
    assert rows_of(*seen.batches) == expected
    assert t.num_training_batches == -(-len(expected) // 24)
    assert len(rows_of(*data)) == 96  # the user's own is as it was
    assert "process_dataloader" not in vars(t.strategy)


def test_simulated_devices_are_audited_too(tmp_path: Path) -> None:
    callback, seen = audit(100), Seen()
    x, y = next(iter(loader(batch_size=96)))
    data = TensorLoader((x, y), 24, drop_last=True)
    run(callback, tmp_path, data, strategy=EdgeStrategy(num_devices=4), steps=-1, max_epochs=1, callbacks=[seen])
    assert callback.canaries is not None
    assert len(seen.batches) == (96 + int(callback.canaries.included.sum())) // 24 > 4
    assert callback.report is not None


def test_a_second_fit_throws_new_coins_and_one_with_a_seed_the_same(tmp_path: Path) -> None:
    coins = []
    for seed in (None, 3):
        callback = audit(100, seed=seed)
        for _ in range(2):
            run(callback, tmp_path, steps=1)
            assert callback.canaries is not None
            coins.append(callback.canaries.included)
    assert not torch.equal(coins[0], coins[1])
    assert torch.equal(coins[2], coins[3])


def test_the_global_stream_is_not_used(tmp_path: Path, seeded: Callable[[int], None]) -> None:
    seeded(0)
    before = torch.get_rng_state()
    data = DataLoader(Augmented(), batch_size=8)
    form = record_format(data)
    add_records(data, torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
    draw_canaries(100, form, 3, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


class Augmented(Dataset[Any]):
    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.randn(3), index % 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8, torch.int64])
def test_canaries_look_like_records(dtype: torch.dtype) -> None:
    x = torch.arange(5 * 6).reshape(5, 2, 3).to(dtype)
    form = record_format(DataLoader(TensorDataset(x, torch.arange(5) % 4)))
    canaries = draw_canaries(2000, form, 4, seed=0)
    assert canaries.x.dtype == dtype
    assert canaries.x.shape == (2000, 2, 3)
    assert canaries.x.min() >= 0
    assert canaries.x.max() <= 29
    assert canaries.x.double().mean().item() == pytest.approx(14.5, abs=5 * 8.7 / 12_000**0.5)
    assert canaries.y.bincount().tolist() == pytest.approx([500] * 4, abs=5 * (2000 * 3 / 16) ** 0.5)
    assert canaries.included.sum().item() == pytest.approx(1000, abs=5 * 500**0.5)
    again = draw_canaries(2000, form, 4, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(canaries, again, strict=True))
    assert not torch.equal(draw_canaries(2000, form, 4, seed=1).included, canaries.included)


class Records(Dataset[Any]):
    """Records of a given kind."""

    def __init__(self, record: Callable[[int], Any]) -> None:
        self.record = record

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> Any:
        return self.record(index)


@pytest.mark.parametrize(
    "label", [int, lambda i: torch.tensor(i), lambda i: torch.tensor(i, dtype=torch.int32), lambda i: torch.tensor([i])]
)
@pytest.mark.parametrize("container", [tuple, list])
def test_labels_and_containers_are_those_of_the_records(label: Callable[[int], Any], container: Any) -> None:
    data = DataLoader(Records(lambda i: container((torch.zeros(2), label(i % 3)))), batch_size=16)
    longer = add_records(data, torch.ones(10, 2), torch.full((10,), 2))
    batches = list(longer)
    assert len(longer.dataset) == 40
    assert torch.cat([x for x, _ in batches]).sum() == 20
    own, with_canaries = next(iter(data))[1], batches[-1][1]
    assert with_canaries.dtype == own.dtype
    assert with_canaries.shape[1:] == own.shape[1:]
    assert type(longer.dataset[35]) is container
    assert type(longer.dataset[35][1]) is type(data.dataset[0][1])


def collate(records: list[Any]) -> Any:
    return torch.stack([x for x, _ in records]), torch.tensor([y for _, y in records])


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_dataloader_keeps_its_options(shuffle: bool) -> None:
    g = torch.Generator()
    data = DataLoader(
        Records(lambda i: (torch.zeros(2), i % 3)),
        batch_size=7,
        shuffle=shuffle,
        drop_last=True,
        collate_fn=collate,
        num_workers=1,
        prefetch_factor=3,
        persistent_workers=True,
        worker_init_fn=print,
        timeout=5,
        generator=g,
    )
    longer = add_records(data, torch.ones(5, 2), torch.zeros(5, dtype=torch.int64))
    assert len(longer) == 5
    assert type(longer.sampler) is (RandomSampler if shuffle else SequentialSampler)
    for name in ("batch_size", "drop_last", "collate_fn", "num_workers", "prefetch_factor", "persistent_workers"):
        assert getattr(longer, name) == getattr(data, name), name
    for name in ("worker_init_fn", "timeout", "generator", "pin_memory", "multiprocessing_context"):
        assert getattr(longer, name) == getattr(data, name), name


def test_a_distributed_sampler_shares_out_the_canaries_too() -> None:
    dataset = Records(lambda i: (torch.tensor([float(i)]), i % 3))
    seen = []
    for rank in range(2):
        sampler = DistributedSampler(dataset, 2, rank, seed=3)
        longer = add_records(DataLoader(dataset, 10, sampler=sampler), torch.ones(4, 1) * 100, torch.zeros(4).long())
        assert longer.sampler.seed == 3
        seen += [x for x, _ in longer]
    assert torch.cat(seen).flatten().sort().values.tolist() == [*map(float, range(30)), *[100.0] * 4]


def test_a_random_sampler_with_a_number_keeps_it() -> None:
    dataset = Records(lambda i: (torch.zeros(2), i % 3))
    sampler = RandomSampler(dataset, replacement=True, num_samples=12)
    longer = add_records(DataLoader(dataset, 4, sampler=sampler), torch.ones(4, 2), torch.zeros(4).long())
    assert longer.sampler.replacement
    assert len(longer) == 3


def test_a_tensor_loader_that_was_iterated_gives_the_canaries_all_the_same() -> None:
    data = TensorLoader((torch.zeros(6, 2), torch.zeros(6).long()), 10, shuffle=True)
    list(data)
    data.load_state_dict({"epoch": 0, "position": 0})
    longer = add_records(data, torch.ones(4, 2), torch.ones(4).long())
    assert next(iter(longer))[0].sum() == 8
    assert len(data.split[0]) == 6


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("step", [2, 6, 8])
def test_a_resumed_run_has_the_same_canaries_and_the_same_end(step: int, tmp_path: Path) -> None:
    """Within an epoch, and at its end: an epoch has 5 steps without canaries, 6 with them."""

    def fit(callback: PrivacyAudit, *others: pl.Callback, ckpt_path: str | None = None) -> Tensor:
        data, module = Digits(batch_size=64, seed=0, train_fraction=0.25), DigitsModule(16)
        t = trainer(callbacks=[callback, *others], steps=14, default_root_dir=tmp_path, enable_checkpointing=True)
        t.fit(module, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        return weights(module)

    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    killed = PrivacyAudit(100)
    with pytest.raises(Killed.Error):
        fit(killed, saver, Killed(step + 1))
    resumed = PrivacyAudit(100)
    final = fit(resumed, ckpt_path=str(tmp_path / "saved" / f"step={step}.ckpt"))
    assert killed.canaries is not None
    assert resumed.canaries is not None
    assert all(torch.equal(a, b) for a, b in zip(killed.canaries, resumed.canaries, strict=True))
    whole = PrivacyAudit(100, seed=killed.state_dict()["seed"])
    assert torch.equal(fit(whole), final)
    assert whole.report == resumed.report


def test_other_canaries_than_the_checkpoint_s_are_refused(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, filename="saved")
    run(audit(seed=1), tmp_path, callbacks=[saver], enable_checkpointing=True, steps=2)
    for other, message in ((audit(seed=2), "seed 1, and now it is 2"), (audit(60, seed=1), "num_canaries 40")):
        t = trainer(callbacks=[other], default_root_dir=tmp_path, steps=3)
        with pytest.raises(MisconfigurationException, match=message):
            t.fit(Classifier(mlp()), loader(), ckpt_path=str(tmp_path / "saved.ckpt"))


# ---------------------------------------------------------------- what is refused


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield torch.zeros(FEATURES), 0


class OwnLoader(DataLoader[Any]):
    pass


def of_records(record: Any) -> DataLoader[Any]:
    return DataLoader(Records(lambda i: record), batch_size=4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: DataLoader(Stream(), batch_size=4), "stream"),
        (lambda: OwnLoader(loader().dataset), "OwnLoader"),
        (lambda: of_records((torch.zeros(2), 1, 2)), "a tuple of 3"),
        (lambda: of_records({"x": torch.zeros(2), "y": 1}), "a dict of 2"),
        (lambda: of_records((torch.zeros(2), 0.5)), "y is float"),
        (lambda: of_records((torch.zeros(2), torch.zeros(3).long())), r"y is torch.int64 of shape \(3,\)"),
        (lambda: of_records((torch.zeros(2), torch.zeros(()))), "only classification"),
        (lambda: of_records(([0.0, 1.0], 1)), "x is a list"),
        (lambda: of_records((torch.zeros(2) > 0, 1)), "x is torch.bool"),
        (
            lambda: DataLoader(loader().dataset, 8, sampler=WeightedRandomSampler([1.0] * 96, 96)),
            "WeightedRandomSampler",
        ),
        (
            lambda: DataLoader(
                loader().dataset, batch_sampler=type("Own", (BatchSampler,), {})(SequentialSampler(range(96)), 8, False)
            ),
            "SequentialSampler in a Own",
        ),
        (lambda: [loader(), loader()], "several"),
        (lambda: {"a": loader(), "b": loader()}, "several"),
    ],
)
def test_data_that_cannot_take_canaries_are_refused(data: Callable[[], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        run(audit(), tmp_path, data())


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="List PrivacyAudit before Claims"):
        trainer(callbacks=[Claims(1.0), audit()], default_root_dir=tmp_path).fit(Classifier(mlp()), loader())
    with pytest.raises(MisconfigurationException, match="give it `num_classes`"):
        run(audit(num_classes=None), tmp_path)
    with pytest.raises(MisconfigurationException, match="give `losses`"):
        run(audit(), tmp_path, module=NoLogits(mlp()))


class NoLogits(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def forward(self, x: Tensor) -> Any:
        return self.network(x).sum()


def test_the_number_of_classes_is_that_of_the_module_or_the_datamodule() -> None:
    form = RecordFormat((FEATURES,), "float32", 0.0, 1.0)
    callback = audit(num_classes=None)
    module, data = Classifier(mlp()), SimpleNamespace(datamodule=SimpleNamespace(num_classes=5))
    assert callback._number_of_classes(data, module) == 5  # type: ignore[arg-type]
    module.num_classes = 7  # type: ignore[assignment]
    assert callback._number_of_classes(data, module) == 7  # type: ignore[arg-type]
    assert draw_canaries(500, form, 7, seed=0).y.max() == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_canaries": 19}, "at least 20, got 19"),
        ({"num_classes": 1}, "`num_classes`"),
        ({"claimed_epsilon": -1.0}, "`claimed_epsilon`"),
        ({"delta": 1.0}, "`delta`"),
        ({"confidence": 0.0}, "`confidence`"),
        ({"guesses": [3]}, "`guesses`"),
        ({"guesses": [2000]}, "`guesses`"),
        ({"batch_size": 0}, "`batch_size`"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrivacyAudit(**options)


def test_only_a_fit_is_audited(tmp_path: Path) -> None:
    module = DigitsModule(4)
    callback = audit(num_classes=None)
    t = trainer(callbacks=[callback], default_root_dir=tmp_path)
    t.predict(module, DataLoader(torch.zeros(4, 1, 8, 8), batch_size=2))
    assert callback.canaries is None
    assert callback.state_dict() == {}
    assert not (tmp_path / "audit").exists()
