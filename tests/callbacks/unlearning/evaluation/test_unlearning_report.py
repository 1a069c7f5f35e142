from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import rich.progress
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from groundwire.callbacks import LogitsSource
from groundwire.callbacks.reporting import MetricsCSV, ResumableCheckpoint, progress, read_metrics
from groundwire.callbacks.unlearning.base import IterativeMethod, OneShotMethod
from groundwire.callbacks.unlearning.data import ForgetRetainData
from groundwire.callbacks.unlearning.evaluation import UnlearningReport, evaluate_unlearning
from groundwire.callbacks.unlearning.records import default_output_loss
from groundwire.callbacks.unlearning.retrain import Retrain
from groundwire.callbacks.weights import copy_of
from groundwire.datamodules import Digits, ForgetRetain
from groundwire.recipes import SoftmaxRegression
from helpers.callbacks import state_of
from helpers.ddp import ddp_trainer, run_ddp
from helpers.edge import Killed, trainer

CLASS = 3
QUICK: dict[str, Any] = {"relearn_steps": 3, "relearn_lr": 0.05}
FILES = {"unlearning.md", "unlearning.json", "unlearning.png", "relearning.csv", "certificate.json"}


class Blind(OneShotMethod):
    """Takes away the weights of one class."""

    parts = ("forget",)

    def unlearn(self, pl_module: pl.LightningModule, data: ForgetRetainData) -> None:
        with torch.no_grad():
            for x, _ in data.batches("forget"):
                self.records_read["forget"] += len(x)
            pl_module.net[1].bias[CLASS] -= 100  # type: ignore[index,operator]


class Descent(IterativeMethod):
    """Takes the retain loss minus a little of the forget loss."""

    def around_step(self, step: Callable[[Any], Any], batch: Any) -> Any:
        return self.checked(step(batch["retain"]) - 0.1 * step(batch["forget"]))


class OnForgetAlone(IterativeMethod):
    parts = ("forget",)

    def around_step(self, step: Callable[[Any], Any], batch: Any) -> Any:
        return -0.01 * step(batch["forget"])


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def trained(without: int = -1) -> SoftmaxRegression:
    """A softmax regression on the digits, of the training data of ``data()``."""
    split = Digits(seed=0)
    split.setup()
    x, y = split.train_data
    kept = y != without
    module = SoftmaxRegression((1, 8, 8), optimizer=sgd)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x[kept]), y[kept]).backward()
        optimizer.step()
    return module


@pytest.fixture(scope="module")
def original() -> SoftmaxRegression:
    return trained()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("retrain") / "last.ckpt"
    torch.save({"state_dict": trained(without=CLASS).state_dict()}, path)
    return path


def data(**options: Any) -> ForgetRetain:
    return ForgetRetain(Digits(seed=0), **{"forget": "class", "label": CLASS, "seed": 0} | options)


def unlearn(
    original: nn.Module, method: pl.Callback, report: UnlearningReport, datamodule: Any = None, **options: Any
) -> tuple[Any, pl.Trainer]:
    module = copy_of(original)
    options = {"steps": 3, "limit_val_batches": 0} | options
    t = trainer(callbacks=[report, method, *options.pop("callbacks", [])], **options)
    t.fit(module, datamodule=data() if datamodule is None else datamodule)
    return module, t


def parts(datamodule: Any = None) -> tuple[list[Any], list[Any], list[Any]]:
    datamodule = data() if datamodule is None else datamodule
    datamodule.setup("fit")
    return (
        list(datamodule.batches("forget")),
        list(datamodule.batches("retain")),
        list(datamodule.test_dataloader()),
    )


# ---------------------------------------------------------------- the report


def test_a_one_shot_method_is_measured_certified_and_logged(
    original: SoftmaxRegression, reference: Path, tmp_path: Path
) -> None:
    report = UnlearningReport(reference, **QUICK)
    module, _ = unlearn(original, Blind(), report, logger=MetricsCSV(tmp_path))
    folder = tmp_path / "unlearning"
    assert {file.name for file in folder.iterdir()} == FILES, "and no partial file"
    assert list(report.results) == ["original", "unlearned", "reference"]
    expected = evaluate_unlearning(
        module, *parts(), reference=trained(without=CLASS), original=original, **QUICK
    ).as_dict()
    found = json.loads((folder / "unlearning.json").read_text())
    costs = {"seconds", "recording_seconds", "records_read", "peak_memory_bytes", "touches_retain"}
    for name, value in expected.items():
        if name not in {*costs, "relearning"}:
            close = value if isinstance(value, str | None) else pytest.approx(value, rel=1e-4, abs=1e-7)
            assert found["unlearned"][name] == close, name
    assert found["unlearned"]["relearning"]["losses"] == pytest.approx(expected["relearning"]["losses"], rel=1e-4)
    assert found["unlearned"]["touches_retain"] is False
    assert found["unlearned"]["records_read"] == {"forget": found["unlearned"]["forget_records"], "retain": 0}
    assert found["original"]["relearn_steps"] == found["original"]["relearn_acc_steps"] == 0
    assert found["original"]["forget_acc"] > 0.9 > found["unlearned"]["forget_acc"] == 0
    assert found["reference"]["forget_acc"] == 0
    assert found["original"]["kl_forget"] > 1 > found["original"]["kl_test"] > 0
    table = (folder / "unlearning.md").read_text()
    assert [f"| {name} |" in table for name in ("original", "unlearned", "reference")] == [True] * 3
    (row,) = read_metrics(tmp_path / "metrics.csv")
    assert row.pop("step") == 0
    assert {name.removeprefix("unlearn/"): value for name, value in row.items()} == report.result.scalars()
    assert not [name for name in row if any(cost in name for cost in costs)]
    curve = [line.split(",") for line in (folder / "relearning.csv").read_text().splitlines()]
    assert curve[0] == ["model", "step", "forget_loss", "forget_acc"]
    losses = [float(line[2]) for line in curve if line[0] == "unlearned"]
    assert losses == found["unlearned"]["relearning"]["losses"]


def test_the_certificate_can_be_checked_by_others(original: SoftmaxRegression, reference: Path, tmp_path: Path) -> None:
    start = datetime.now(UTC)
    module, _ = unlearn(original, Blind(), UnlearningReport(reference, dirpath=tmp_path, relearn=False))
    certificate = json.loads((tmp_path / "certificate.json").read_text())

    def hashed(state: dict[str, Tensor]) -> str:
        content = b"".join(name.encode() + value.numpy().tobytes() for name, value in state.items())
        return hashlib.sha256(content).hexdigest()

    assert certificate["result_sha256"] == hashed(module.state_dict())
    assert certificate["original_sha256"] == hashed(original.state_dict())
    assert certificate["reference"] == {
        "checkpoint": str(reference),
        "sha256": hashed(trained(without=CLASS).state_dict()),
    }
    rows = data()
    rows.setup("fit")
    assert certificate["forget"]["sha256"] == hashlib.sha256(rows.forget_indices.numpy().tobytes()).hexdigest()
    assert certificate["forget"]["number"] == len(rows.forget_indices) > 100
    assert certificate["method"] == "Blind"
    assert certificate["figures"] == json.loads((tmp_path / "unlearning.json").read_text())
    assert certificate["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert certificate["test_split"] == "test"
    made = datetime.fromisoformat(certificate["created"])
    assert made.utcoffset() == timedelta(0)
    assert start - timedelta(seconds=1) <= made <= datetime.now(UTC)
    assert {file.name for file in tmp_path.iterdir()} == FILES - {"relearning.csv"}


def test_an_iterative_method_is_measured_where_it_ends(original: SoftmaxRegression, tmp_path: Path) -> None:
    report = UnlearningReport(**QUICK, batch_size=50)
    module, t = unlearn(original, Descent(), report, default_root_dir=tmp_path, logger=MetricsCSV(tmp_path / "run"))
    assert t.global_step == 3
    assert {file.name for file in (tmp_path / "run" / "unlearning").iterdir()} == FILES
    expected = evaluate_unlearning(module, *parts(), original=original, **QUICK)
    assert report.result.forget_loss == pytest.approx(expected.forget_loss, rel=1e-5)
    assert report.result.mia_efficacy == pytest.approx(expected.mia_efficacy)
    assert report.result.relearning.losses == pytest.approx(expected.relearning.losses, rel=1e-4)
    assert report.result.touches_retain is True
    assert report.result.average_gap is None
    last = read_metrics(tmp_path / "run" / "metrics.csv")[-1]
    assert last["step"] == 3
    assert last["unlearn/retain_acc"] == report.result.retain_acc


def test_the_report_changes_nothing(original: SoftmaxRegression) -> None:
    """Neither the training nor what is random after it, nor the module."""
    states = []
    for callbacks in ([], [UnlearningReport(pictures=False, relearn_fraction=0.5, **QUICK)]):
        module, method = copy_of(original), Descent()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            t = trainer(steps=3, limit_val_batches=0, callbacks=[method, *callbacks], default_root_dir="/nowhere")
            if callbacks:
                callbacks[0]._write = lambda *_: None  # type: ignore[method-assign]
            t.fit(module, datamodule=data())
            states.append((state_of(module), state_of(method.original), float(torch.rand(()))))
    assert states[0] == states[1]


def test_retained_data_that_is_gone_is_never_touched(original: SoftmaxRegression, tmp_path: Path) -> None:
    for number, method in enumerate((Blind(), OnForgetAlone())):
        report = UnlearningReport(dirpath=tmp_path / str(number), **QUICK)
        unlearn(original, method, report, data(retain_access=False))
        assert report.result.retain_acc is report.result.mia_efficacy is report.result.retain_loss is None
        assert report.result.test_acc is not None
        assert report.result.touches_retain is False
        plain = json.loads((tmp_path / str(number) / "unlearning.json").read_text())
        assert plain["unlearned"]["retain_acc"] is None


class Other(pl.LightningDataModule):
    """Has validation data, and no test data."""

    def train_dataloader(self) -> Any:
        return DataLoader(self.data(0, 60), batch_size=20)

    def val_dataloader(self) -> Any:
        return [DataLoader(self.data(1, 20), batch_size=8), DataLoader(self.data(2, 10), batch_size=8)]

    @staticmethod
    def data(seed: int, number: int) -> TensorDataset:
        g = torch.Generator().manual_seed(seed)
        return TensorDataset(torch.rand(number, 1, 8, 8, generator=g), torch.arange(number) % 10)


class WithoutAny(Other):
    val_dataloader = pl.LightningDataModule.val_dataloader


def test_validation_data_stand_in_for_test_data(original: SoftmaxRegression, tmp_path: Path) -> None:
    report = UnlearningReport(dirpath=tmp_path, **QUICK)
    unlearn(original, Blind(), report, data_of(Other()))
    assert report.result.test_records == 30
    assert {result.test_split for result in report.results.values()} == {"validation"}
    assert "30 of the validation data" in (tmp_path / "unlearning.md").read_text()
    assert json.loads((tmp_path / "unlearning.json").read_text())["original"]["test_split"] == "validation"
    assert json.loads((tmp_path / "certificate.json").read_text())["test_split"] == "validation"
    assert (report.result.forget_records, report.result.retain_records) == (6, 54)
    with pytest.raises(MisconfigurationException, match="needs data that no model was trained on"):
        unlearn(original, Blind(), UnlearningReport(dirpath=tmp_path), data_of(WithoutAny()))


def data_of(inner: pl.LightningDataModule) -> ForgetRetain:
    return ForgetRetain(inner, forget="class", label=CLASS, seed=0)


# ---------------------------------------------------------------- what it cost


class Costly(Blind):
    """Uses a record, and the memory of two matrices for a while."""

    def unlearn(self, pl_module: pl.LightningModule, data: ForgetRetainData) -> None:
        super().unlearn(pl_module, data)
        self.recording_seconds = 2.5
        torch.ones(2, 2**24).sum()


def test_memory_is_what_the_method_added_and_recording_has_a_column(
    original: SoftmaxRegression, tmp_path: Path
) -> None:
    cheap, costly = (UnlearningReport(dirpath=tmp_path, relearn=False, pictures=False) for _ in range(2))
    unlearn(original, Blind(), cheap)
    assert "recording s" not in (tmp_path / "unlearning.md").read_text()
    unlearn(original, Costly(), costly)
    assert costly.result.recording_seconds == 2.5
    table = (tmp_path / "unlearning.md").read_text()
    assert "| recording s |" in table
    assert "| peak memory increase MiB |" in table
    if costly.result.peak_memory_bytes is None:
        pytest.skip("this system does not tell the memory's peak")
    assert costly.result.peak_memory_bytes > 120 * 2**20 > 60 * 2**20 > cheap.result.peak_memory_bytes
    certificate = json.loads((tmp_path / "certificate.json").read_text())
    assert certificate["peak_memory_bytes"] == costly.result.peak_memory_bytes


def test_what_the_reference_cost_is_read_from_its_checkpoint(
    original: SoftmaxRegression, reference: Path, tmp_path: Path
) -> None:
    module, method = copy_of(original), Retrain()
    t = trainer(steps=4, limit_val_batches=0, callbacks=[method])
    t.fit(module, datamodule=data())
    t.save_checkpoint(tmp_path / "retrained.ckpt")
    report = UnlearningReport(tmp_path / "retrained.ckpt", dirpath=tmp_path, relearn=False, pictures=False)
    unlearn(original, Blind(), report)
    found = report.results["reference"]
    assert (found.seconds, found.records_read) == (method.seconds, method.records_read)
    assert found.seconds > 0
    assert found.touches_retain is True
    assert f"| {found.seconds:.2f} |" in (tmp_path / "unlearning.md").read_text().splitlines()[6]
    unlearn(original, Blind(), other := UnlearningReport(reference, dirpath=tmp_path, relearn=False, pictures=False))
    assert other.results["reference"].seconds is other.results["reference"].records_read is None


def test_what_an_earlier_request_removed_is_measured_too(original: SoftmaxRegression, tmp_path: Path) -> None:
    first = tmp_path / "first.ckpt"
    module, t = unlearn(original, Blind(), UnlearningReport(dirpath=tmp_path, relearn=False, pictures=False))
    plain = json.loads((tmp_path / "unlearning.json").read_text())["unlearned"]
    assert plain["earlier_acc"] is plain["earlier_loss"] is None
    t.save_checkpoint(first)
    report = UnlearningReport(dirpath=tmp_path, relearn=False, pictures=False)
    again, _ = unlearn(module, Descent(first), report, data(label=5), logger=MetricsCSV(tmp_path))
    rows = data()
    rows.setup("fit")
    x, y = (torch.cat(part) for part in zip(*rows.batches("forget"), strict=True))
    with torch.no_grad():
        logits = again(x)
    assert report.result.earlier_records == len(y)
    assert report.result.earlier_acc == pytest.approx(float((logits.argmax(1) == y).double().mean()))
    assert report.result.earlier_loss == pytest.approx(float(nn.functional.cross_entropy(logits, y)), rel=1e-5)
    assert report.result.earlier_acc < 0.5 < report.result.retain_acc
    assert read_metrics(tmp_path / "metrics.csv")[-1]["unlearn/earlier_acc"] == report.result.earlier_acc
    assert json.loads((tmp_path / "unlearning.json").read_text())["unlearned"]["earlier_records"] == len(y)


# ---------------------------------------------------------------- runs that stop and go on


class Stop(pl.Callback):
    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        raise Killed.Error


def test_an_interrupted_fit_leaves_no_report(original: SoftmaxRegression, tmp_path: Path) -> None:
    with pytest.raises(Killed.Error):
        unlearn(original, Descent(), UnlearningReport(dirpath=tmp_path / "report"), callbacks=[Stop()])
    assert not (tmp_path / "report").exists()


def test_a_resumed_run_logs_what_an_uninterrupted_one_does(original: SoftmaxRegression, tmp_path: Path) -> None:
    texts = []
    for number, stop in enumerate((None, 2)):
        folder = tmp_path / str(number)

        def run(*more: pl.Callback, folder: Path = folder, **options: Any) -> None:
            callbacks = [
                UnlearningReport(**QUICK, relearn_fraction=0.5),
                Descent(),
                ResumableCheckpoint(folder, 1),
                *more,
            ]
            t = trainer(
                steps=4, limit_val_batches=0, callbacks=callbacks, logger=MetricsCSV(folder), enable_checkpointing=True
            )
            t.fit(copy_of(original), datamodule=data(), weights_only=True, **options)

        if stop is not None:
            with pytest.raises(Killed.Error):
                run(Killed(stop))
            run(ckpt_path=str(next(folder.rglob("last.ckpt"))))
        else:
            run()
        texts.append((folder / "metrics.csv").read_text())
    assert texts[0] == texts[1]
    assert "unlearn/relearn_steps" in texts[0]


# ---------------------------------------------------------------- loggers


class Tables(CSVLogger):
    """Takes images and tables, as W&B's logger does."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.images: dict[str, list[str]] = {}
        self.tables: dict[str, Any] = {}

    def log_image(self, key: str, images: list[Any], **_: Any) -> None:
        self.images[key] = images

    def log_table(self, key: str, columns: list[str], data: list[list[Any]], step: int) -> None:
        self.tables[key] = (columns, data, step)


def test_tables_and_pictures_go_to_loggers_that_take_them(original: SoftmaxRegression, tmp_path: Path) -> None:
    logger = Tables(tmp_path)
    report = UnlearningReport(dirpath=tmp_path / "here", name="again", **QUICK)
    unlearn(original, Blind(), report, logger=[logger, MetricsCSV(tmp_path / "other")])
    columns, rows, step = logger.tables["again/table"]
    assert [row[0] for row in rows] == ["original", "unlearned"]
    assert {"time s", "peak memory increase MiB", "records read", "forget acc %"} <= set(columns)
    assert all(len(row) == len(columns) for row in rows)
    assert step == 0
    (picture,) = logger.images["again/figure"]
    assert Path(picture).read_bytes().startswith(b"\x89PNG")
    assert {file.name for file in (tmp_path / "here").iterdir()} == {f"again_{name}" for name in FILES}
    assert "again/forget_acc" in read_metrics(tmp_path / "other" / "metrics.csv")[0]


def test_pictures_are_left_out_on_demand(original: SoftmaxRegression, tmp_path: Path) -> None:
    unlearn(original, Blind(), UnlearningReport(dirpath=tmp_path, pictures=False, relearn=False))
    assert {file.name for file in tmp_path.iterdir()} == FILES - {"unlearning.png", "relearning.csv"}


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_progress_is_shown_where_the_trainer_shows_some(
    bar: type[pl.Callback], original: SoftmaxRegression, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, float]] = []
    if bar is RichProgressBar:
        plain = rich.progress.Progress.update

        def update(self: Any, task: Any, **options: Any) -> None:
            seen.append((options.get("description", ""), options.get("completed", 0.0)))
            plain(self, task, **options)

        monkeypatch.setattr(rich.progress.Progress, "update", update)
    else:
        monkeypatch.setattr(progress, "tqdm", functools.partial(Shown, seen))
    report = UnlearningReport(dirpath=tmp_path, pictures=False, **QUICK)
    t = pl.Trainer(
        accelerator="cpu",
        max_steps=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        callbacks=[OnForgetAlone(), report, bar()],
    )
    t.fit(copy_of(original), datamodule=data())
    own = [(what.removeprefix("[white]"), share) for what, share in seen if "Relearning" in what or "Done" in what]
    assert own[-1] == ("Done", 1.0)
    assert any(what == "Relearning, unlearned" for what, _ in own)


class Shown:
    """Instead of tqdm's bar."""

    def __init__(self, seen: list[tuple[str, float]], **_: Any) -> None:
        self.seen, self.n, self.what = seen, 0, ""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def set_description(self, what: str) -> None:
        self.what = what

    def update(self, more: int) -> None:
        self.n += more
        self.seen.append((self.what, self.n / 100))


def own_loss(outputs: Tensor, label: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, label) + 1


def test_it_is_built_from_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=pl.Callback)
    settings = {
        "reference": "runs/retrain",
        "relearn_steps": 30,
        "relearn_fraction": 0.1,
        "output_loss": "groundwire.callbacks.unlearning.records.default_output_loss",
        "source": {"class_path": "groundwire.callbacks.LogitsSource", "init_args": {"submodule": "net"}},
    }
    path = "groundwire.callbacks.unlearning.evaluation.UnlearningReport"
    given = yaml.safe_dump({"callback": {"class_path": path, "init_args": settings}})
    built = parser.instantiate(parser.parse_string(given)).callback
    assert type(built) is UnlearningReport
    assert (built.reference, built.relearn_steps, built.relearn_fraction) == ("runs/retrain", 30, 0.1)
    assert built.output_loss is default_output_loss
    assert built.source.submodule == "net"


def test_the_loss_and_where_outputs_are_may_be_others(original: SoftmaxRegression, tmp_path: Path) -> None:
    plain, other = (
        UnlearningReport(dirpath=tmp_path, pictures=False, relearn=False, **options)
        for options in ({}, {"output_loss": own_loss, "source": LogitsSource("net")})
    )
    for report in (plain, other):
        unlearn(original, Blind(), report)
    assert other.result.forget_loss == pytest.approx(plain.result.forget_loss + 1, rel=1e-6)
    assert other.result.forget_acc == plain.result.forget_acc


# ---------------------------------------------------------------- references of another kind


def test_a_reference_that_knows_the_forget_set_is_warned_of(original: SoftmaxRegression, tmp_path: Path) -> None:
    file, other = tmp_path / "same.ckpt", data(label=5)
    torch.save({"state_dict": original.state_dict()}, file)
    with pytest.warns(UserWarning, match="is the original model itself"):
        unlearn(original, Blind(), UnlearningReport(file, dirpath=tmp_path, relearn=False, pictures=False))
    module, t = copy_of(original), trainer(steps=1, limit_val_batches=0, callbacks=[OnForgetAlone()])
    t.fit(module, datamodule=other)
    t.save_checkpoint(file)
    with pytest.warns(UserWarning, match="which are not the .* that are forgotten here"):
        unlearn(original, Blind(), UnlearningReport(file, dirpath=tmp_path, relearn=False, pictures=False))
    content = torch.load(file, weights_only=True)
    content["ForgetRetain"]["data_digest"] = "0"
    torch.save(content, file)
    with pytest.warns(UserWarning, match="was trained on other data"):
        unlearn(original, Blind(), UnlearningReport(file, dirpath=tmp_path, relearn=False, pictures=False))


# ---------------------------------------------------------------- bad input


def test_what_does_not_fit_together_is_refused_before_the_run(original: SoftmaxRegression, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="the Trainer has none: add one of"):
        trainer(callbacks=[UnlearningReport()]).fit(copy_of(original), datamodule=data())
    with pytest.raises(MisconfigurationException, match="needs to know what to forget"):
        unlearn(original, Blind(), UnlearningReport(), Digits(seed=0))
    with pytest.raises(MisconfigurationException, match="Two UnlearningReports are named 'unlearn'"):
        unlearn(original, Blind(), UnlearningReport(), callbacks=[UnlearningReport()])
    with pytest.raises(FileNotFoundError, match="There is no checkpoint at"):
        unlearn(original, Blind(), UnlearningReport(tmp_path))
    torch.save({"state_dict": SoftmaxRegression((1, 4, 4)).state_dict()}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="does not fit SoftmaxRegression"):
        unlearn(original, Blind(), UnlearningReport(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relearn_steps": 0}, "`relearn_steps` must be at least 1"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"relearn_lr": 0.0}, "`relearn_lr` must be above 0"),
        ({"relearn_fraction": 1.5}, r"`relearn_fraction` must be in \(0, 1\]"),
    ],
)
def test_bad_numbers_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UnlearningReport(**options)


# ---------------------------------------------------------------- several processes


def on_ranks(folder: str, state: dict[str, Tensor], batch_size: int) -> Any:
    module = SoftmaxRegression((1, 8, 8), optimizer=sgd)
    module.load_state_dict(state)
    report = UnlearningReport(dirpath=folder, **QUICK)
    t = ddp_trainer(steps=2, limit_val_batches=0, callbacks=[report, Descent()], logger=MetricsCSV(folder))
    t.fit(module, datamodule=data(batch_size=batch_size))
    read = next(c for c in t.callbacks if isinstance(c, Descent)).records_read
    return report.results, {name: value.clone() for name, value in module.state_dict().items()}, read


def fails_on_ranks(folder: str, state: dict[str, Tensor]) -> str:
    module = SoftmaxRegression((1, 8, 8), optimizer=sgd)
    report = UnlearningReport(dirpath=Path(folder) / "file", **QUICK)
    (Path(folder) / "file").write_text("is no folder")
    try:
        t = ddp_trainer(steps=1, limit_val_batches=0, callbacks=[report, Descent()])
        t.fit(module, datamodule=data())
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_one_of_several_processes_measures_all_of_the_data(original: SoftmaxRegression, tmp_path: Path) -> None:
    (first, state, read), (second, other, too) = run_ddp(on_ranks, str(tmp_path), dict(original.state_dict()), 64)
    assert first == second
    assert all(torch.equal(state[name], other[name]) for name in state)
    assert {file.name for file in tmp_path.iterdir()} == FILES | {"metrics.csv"}
    module = copy_of(original)
    module.load_state_dict(state)
    expected = evaluate_unlearning(module, *parts(), original=original, **QUICK)
    assert first["unlearned"].test_records == expected.test_records == 359
    assert first["unlearned"].test_loss == pytest.approx(expected.test_loss, rel=1e-5)
    assert first["unlearned"].forget_acc == expected.forget_acc
    everywhere = {part: read[part] + too[part] for part in read}
    assert first["unlearned"].records_read == everywhere != read
    assert json.loads((tmp_path / "certificate.json").read_text())["records_read"] == everywhere
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row["unlearn/test_loss"] for row in rows if "unlearn/test_loss" in row] == [first["unlearned"].test_loss]


def test_an_error_of_the_first_process_ends_the_others_too(original: SoftmaxRegression, tmp_path: Path) -> None:
    first, second = run_ddp(fails_on_ranks, str(tmp_path), dict(original.state_dict()))
    assert first.startswith("FileExistsError")
    assert second.startswith("RuntimeError: UnlearningReport failed in the first process: FileExistsError")
