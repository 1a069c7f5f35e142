from __future__ import annotations

import contextlib
import copy
import functools
import os
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn

from groundwire.callbacks.information import DIST, DKD, KD, TTM, Distillation, LogitsSource
from groundwire.datamodules import Digits
from helpers.callbacks import check_step_callback
from helpers.edge import CLASSES, FEATURES, Classifier, Killed, Losses, Stateful, fit, loader, mlp, trainer, weights


@functools.cache
def _trained() -> nn.Module:
    """A network that knows the (random) labels of ``loader()``."""
    with torch.random.fork_rng():
        torch.manual_seed(11)
        network = nn.Sequential(
            nn.Linear(FEATURES, 64), nn.BatchNorm1d(64), nn.Dropout(0.1), nn.ReLU(), nn.Linear(64, CLASSES)
        )
        x, y = (torch.cat(parts) for parts in zip(*loader(), strict=True))
        optimizer = torch.optim.Adam(network.parameters(), lr=2e-2)
        for _ in range(150):
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()
    return network


def teacher() -> nn.Module:
    return copy.deepcopy(_trained())


class ByHand(Classifier):
    """Distillation written into the training step, with the losses of the papers spelled out."""

    def __init__(self, method: str, ramp_epochs: int = 0) -> None:
        super().__init__(mlp())
        self.method, self.ramp_epochs = method, ramp_epochs
        self.known = [teacher().eval()]  # in a list: no submodule

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        s, own = self(x), F.cross_entropy(self(x), y)
        with torch.no_grad():
            t = self.known[0].to(x.dtype)(x)
        kl = functools.partial(F.kl_div, reduction="batchmean", log_target=True)
        if self.method == "kd":
            return 0.1 * own + 0.9 * 16 * kl((s / 4).log_softmax(1), (t / 4).log_softmax(1))
        if self.method == "ttm":
            return own + 2.0 * kl(s.log_softmax(1), (t / 4).log_softmax(1))
        if self.method == "wttm":
            p_t = t.softmax(1) ** 0.25
            u, q = p_t.sum(1), p_t / p_t.sum(1, keepdim=True)
            return own + 2.0 * (u * (q * (q.log() - s.log_softmax(1))).sum(1)).mean()
        if self.method == "dist":
            p_s, p_t = s.softmax(1), t.softmax(1)
            rows = torch.stack([torch.corrcoef(torch.stack([p_s[i], p_t[i]]))[0, 1] for i in range(len(y))])
            columns = torch.stack([torch.corrcoef(torch.stack([p_s[:, k], p_t[:, k]]))[0, 1] for k in range(CLASSES)])
            return own + 1.5 * (1 - rows.mean()) + 0.5 * (1 - columns.mean())
        p_s, p_t = (s / 4).softmax(1), (t / 4).softmax(1)
        tckd, nckd = [], []
        for i, label in enumerate(y.tolist()):
            others = [k for k in range(CLASSES) if k != label]
            b_s, b_t = (torch.stack([p[i, label], 1 - p[i, label]]) for p in (p_s, p_t))
            o_s, o_t = (p[i, others] / p[i, others].sum() for p in (p_s, p_t))
            tckd.append((b_t * (b_t / b_s).log()).sum())
            nckd.append((o_t * (o_t / o_s).log()).sum())
        ramp = min((self.trainer.current_epoch + 1) / self.ramp_epochs, 1.0) if self.ramp_epochs else 1.0
        return own + ramp * 16 * (torch.stack(tckd).mean() + 8.0 * torch.stack(nckd).mean())


METHODS = {
    "kd": lambda: KD(),
    "dkd": lambda: DKD(warmup_epochs=0),
    "dist": lambda: DIST(beta=1.5, gamma=0.5),
    "ttm": lambda: TTM(weight=2.0),
    "wttm": lambda: TTM(weight=2.0, weighted=True),
}
OFF = {
    "kd": lambda: KD(ce_weight=1.0, kd_weight=0.0),
    "dkd": lambda: DKD(alpha=0.0, beta=0.0),
    "dist": lambda: DIST(beta=0.0, gamma=0.0),
    "ttm": lambda: TTM(weight=0.0),
    "wttm": lambda: TTM(weight=0.0, weighted=True),
}


@pytest.mark.parametrize("method", METHODS)
def test_it_is_a_step_callback(method: str) -> None:
    check_step_callback(
        lambda: Distillation(teacher(), method=METHODS[method]()),
        off=lambda: Distillation(teacher(), method=OFF[method]()),
    )


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_trains_as_the_objective_written_by_hand(method: str, accumulate: int) -> None:
    run = {"precision": "64-true", "accumulate_grad_batches": accumulate}
    known = teacher().double()
    plugged, _, losses = fit("auto", callbacks=[Distillation(known, method=METHODS[method]())], **run)
    own, _, own_losses = fit("auto", ByHand(method), **run)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(own_losses), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(plugged, own, rtol=1e-6, atol=1e-8)
    plain, _, _ = fit("auto", **run)
    assert (plugged - plain).abs().max() > 1e-3


def test_dkd_warms_up_by_epochs() -> None:
    run = {"precision": "64-true", "steps": 14}
    plugged, _, _ = fit("auto", callbacks=[Distillation(teacher().double(), method=DKD(warmup_epochs=2))], **run)
    own, _, _ = fit("auto", ByHand("dkd", ramp_epochs=2), **run)
    torch.testing.assert_close(plugged, own, rtol=1e-6, atol=1e-8)


class Counts(nn.Module):
    """A teacher that watches how it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls, self.modes, self.graphs = teacher(), 0, set[bool](), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.modes |= {sub.training for sub in self.modules()}
        self.graphs += torch.is_grad_enabled() or any(p.requires_grad for p in self.parameters())
        out: Tensor = self.inner(x)
        return out


def test_the_teacher_is_called_once_a_step_and_not_touched() -> None:
    known = Counts().train()
    known.inner[0].bias.requires_grad_(False)  # type: ignore[index]
    known.inner[1].eval()  # type: ignore[index]
    flags = [p.requires_grad for p in known.parameters()], [sub.training for sub in known.modules()]
    before = weights(known)
    fit("auto", callbacks=[Distillation(known)], steps=6)
    assert known.calls == 6 + 1  # one more to see whether it fits, before the first step
    assert known.modes == {False}
    assert known.graphs == 0
    assert torch.equal(weights(known), before)
    assert all(p.grad is None for p in known.parameters())
    assert flags == ([p.requires_grad for p in known.parameters()], [sub.training for sub in known.modules()])


def test_flags_of_the_teacher_are_restored_after_an_error() -> None:
    known = teacher().train()
    with contextlib.suppress(Killed.Error):
        fit("auto", callbacks=[Distillation(known), Killed(2)])
    assert known.training
    assert all(p.requires_grad for p in known.parameters())
    with pytest.raises(MisconfigurationException, match="no better than chance"):
        fit(
            "auto",
            data=loader(batch_size=96),
            callbacks=[Distillation(nn.Linear(FEATURES, CLASSES).requires_grad_(True), method=KD())],
        )


def test_the_teacher_is_in_no_state_dict_checkpoint_or_optimizer(tmp_path: Path) -> None:
    module, callback = Classifier(mlp()), Distillation(teacher())
    t = trainer(steps=2, callbacks=[callback])
    t.fit(module, loader())
    t.save_checkpoint(tmp_path / "student.ckpt")
    assert set(module.state_dict()) == set(Classifier(mlp()).state_dict())
    held = {id(p) for group in t.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}
    checkpoint = torch.load(tmp_path / "student.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == set(module.state_dict())
    assert len(checkpoint["callbacks"]["Distillation[distillation]"]["teacher"]) == 64  # a fingerprint


def test_a_resumed_run_equals_an_uninterrupted_one_and_another_teacher_is_refused(tmp_path: Path) -> None:
    def build() -> Distillation:
        return Distillation(teacher(), method=DKD(warmup_epochs=3))

    module = Classifier(mlp())
    final, _, losses = fit("auto", module, callbacks=[build()], steps=10)
    for step in (2, 4, 8):
        saver = ModelCheckpoint(
            dirpath=tmp_path / f"{step}", every_n_train_steps=step, save_top_k=-1, filename="{step}"
        )
        killed = trainer(steps=10, enable_checkpointing=True, callbacks=[build(), saver, Killed(step + 1)])
        with contextlib.suppress(Killed.Error):
            killed.fit(copy.deepcopy(module), Stateful(loader()))
        fresh, recorded = copy.deepcopy(module), Losses()
        file = str(tmp_path / f"{step}" / f"step={step}.ckpt")
        trainer(steps=10, callbacks=[recorded, build()]).fit(fresh, Stateful(loader()), ckpt_path=file)
        assert recorded.values == losses[step:]
        assert torch.equal(weights(fresh), final)
    other = teacher()
    with torch.no_grad():
        other[0].bias[0] += 1e-3  # type: ignore[index]
    with pytest.raises(MisconfigurationException, match="written with another teacher"):
        trainer(steps=10, callbacks=[Distillation(other)]).fit(fresh, Stateful(loader()), ckpt_path=file)
    assert all(p.requires_grad for p in other.parameters())


# ---------------------------------------------------------------- where the teacher comes from


def _save(folder: Path, module: pl.LightningModule, name: str = "last.ckpt") -> Path:
    t = trainer(steps=1)
    t.fit(module, loader())
    folder.mkdir(parents=True, exist_ok=True)
    t.save_checkpoint(folder / name)
    return folder / name


def test_a_teacher_may_be_a_module_a_file_or_the_folder_of_a_run(tmp_path: Path) -> None:
    trained = Classifier(teacher(), lr=0.0)
    old = _save(tmp_path / "version_0" / "checkpoints", Classifier(nn.Linear(FEATURES, CLASSES)))
    file = _save(tmp_path / "version_1" / "checkpoints", trained)
    os.utime(old, (time.time() - 100, time.time() - 100))
    expected, _, _ = fit("auto", callbacks=[Distillation(trained)])
    for checkpoint in (file, str(file), tmp_path):
        untrained = Classifier(copy.deepcopy(teacher()).apply(lambda m: getattr(m, "reset_parameters", lambda: None)()))
        found, _, _ = fit("auto", callbacks=[Distillation(untrained, checkpoint=checkpoint)])
        assert torch.equal(found, expected)
    assert not torch.equal(expected, fit("auto")[0])


class Saved(pl.LightningModule):
    """As a user may write it for LightningCLI."""

    def __init__(self, hidden: int = 64, lr: float = 2e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(FEATURES, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def train_dataloader(self) -> Any:
        return loader()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def _cli(folder: Path, subclass: bool) -> pl.LightningModule:
    model = ["--model=test_distillation.Saved", "--model.init_args.hidden=48"] if subclass else ["--model.hidden=48"]
    cli = LightningCLI(
        pl.LightningModule if subclass else Saved,
        subclass_mode_model=subclass,
        seed_everything_default=False,
        trainer_defaults={"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False},
        args=["fit", *model, f"--trainer.default_root_dir={folder}", "--trainer.max_epochs=40"],
    )
    module: pl.LightningModule = copy.deepcopy(cli.model)
    module._trainer = None
    return module


def test_a_checkpoint_of_lightningcli_is_enough(tmp_path: Path) -> None:
    module = _cli(tmp_path, subclass=True)
    expected, _, _ = fit("auto", callbacks=[Distillation(module)])
    found, _, _ = fit("auto", callbacks=[Distillation(checkpoint=tmp_path)])
    assert torch.equal(found, expected)


def test_a_checkpoint_of_lightningcli_with_a_fixed_class_is_refused_by_message(tmp_path: Path) -> None:
    module = _cli(tmp_path, subclass=False)
    with pytest.raises(MisconfigurationException, match="does not say which class wrote it"):
        fit("auto", callbacks=[Distillation(checkpoint=tmp_path)])
    assert torch.equal(
        fit("auto", callbacks=[Distillation(Saved(hidden=48), checkpoint=tmp_path)])[0],
        fit("auto", callbacks=[Distillation(module)])[0],
    )


def test_a_checkpoint_that_does_not_name_its_class_is_refused(tmp_path: Path) -> None:
    file = _save(tmp_path, Saved())  # hyperparameters, but not of which class
    with pytest.raises(MisconfigurationException, match="does not say which class wrote it"):
        fit("auto", callbacks=[Distillation(checkpoint=file)])


# ---------------------------------------------------------------- what is refused


def test_without_a_teacher_it_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="A teacher is needed"):
        Distillation()


def test_a_missing_checkpoint_and_one_of_another_architecture_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="train that model first"):
        fit("auto", callbacks=[Distillation(teacher(), checkpoint=tmp_path / "nothing")])
    file = _save(tmp_path, Classifier(nn.Linear(FEATURES, CLASSES)))
    with pytest.raises(ValueError, match="does not fit"):
        fit("auto", callbacks=[Distillation(Classifier(teacher()), checkpoint=file)])


def test_a_teacher_of_other_classes_is_refused() -> None:
    class Wider(nn.Module):
        def __init__(self, columns: int) -> None:
            super().__init__()
            self.inner, self.columns = teacher(), columns

        def forward(self, x: Tensor) -> Tensor:
            return F.pad(self.inner(x), (0, self.columns - CLASSES), value=-9.0)

    with pytest.raises(MisconfigurationException, match="The teacher has 5 classes and the student 3"):
        fit("auto", callbacks=[Distillation(Wider(5))])
    with pytest.raises(MisconfigurationException, match="does not fit the data: label 2 but the logits have 2 columns"):
        fit("auto", callbacks=[Distillation(Wider(2))])


def test_shared_parameters_are_refused() -> None:
    module = Classifier(mlp())
    for shared in (module, module.network, nn.Sequential(module.network[0], nn.Linear(16, CLASSES))):  # type: ignore[index]
        with pytest.raises(MisconfigurationException, match="share parameters"):
            trainer(callbacks=[Distillation(shared)]).fit(module, loader())
    assert all(p.requires_grad for p in module.parameters())


def test_a_teacher_put_into_training_mode_during_the_fit_is_refused() -> None:
    known = teacher()

    class Trains(pl.Callback):
        def on_train_start(self, *_: Any) -> None:
            known.train()

    with pytest.raises(MisconfigurationException, match="put into training mode"):
        fit("auto", callbacks=[Distillation(known), Trains()])


def test_a_teacher_that_does_not_know_the_data_is_refused_unless_told_otherwise() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        untrained = nn.Linear(FEATURES, CLASSES)
    with pytest.raises(MisconfigurationException, match="no better than chance for 3 classes"):
        fit("auto", data=loader(batch_size=96), callbacks=[Distillation(untrained)])
    fit("auto", callbacks=[Distillation(untrained)], steps=1)  # 24 samples of 3 classes cannot tell
    fit("auto", callbacks=[Distillation(untrained, check_teacher=False)], steps=1)


class Rescaled(Digits):
    """Digits normalised otherwise."""

    factor, offset = 1.0, 0.0

    def load(self, seed: int) -> Any:
        return tuple((self.factor * x + self.offset, y) for x, y in super().load(seed))


@pytest.mark.parametrize(("factor", "offset", "refused"), [(-1.0, 1.0, True), (1.0, -5.0, True), (16.0, -8.0, False)])
def test_a_teacher_whose_inputs_were_normalised_otherwise(factor: float, offset: float, refused: bool) -> None:
    """It is refused where that ruins it. Digits times 16 minus 8 do not: it is still right on half of them or more."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        known = Classifier(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)))
        student = Classifier(nn.Linear(64, 10))
    trainer(steps=200).fit(known, Digits(flatten=True, seed=0))

    def data() -> Digits:
        rescaled = Rescaled(flatten=True, seed=0)
        rescaled.factor, rescaled.offset = factor, offset
        return rescaled

    if refused:
        with pytest.raises(MisconfigurationException, match=r"no better than chance for 10 classes.*normalised like"):
            fit("auto", student, data(), callbacks=[Distillation(known)])
    else:
        _, t, _ = fit("auto", student, data(), callbacks=[Distillation(known)], steps=1)
        assert float(t.callback_metrics["distillation/teacher_acc"]) < 0.85  # the log shows it
    told = Distillation(known, teacher_inputs=lambda x: (x - offset) / factor)
    _, t, _ = fit("auto", student, data(), callbacks=[told], steps=1)
    assert float(t.callback_metrics["distillation/teacher_acc"]) > 0.9


@pytest.mark.parametrize("method", [KD, DKD, DIST, TTM])
def test_negative_weights_and_temperatures_are_refused(method: Any) -> None:
    names = {KD: ["kd_weight"], DKD: ["alpha", "beta", "warmup_epochs"], DIST: ["beta", "gamma"], TTM: ["weight"]}
    for name in ["ce_weight", *names[method]]:
        with pytest.raises(ValueError, match=f"`{name}` of {method.__name__} must be at least 0, got -1"):
            method(**{name: -1})
    with pytest.raises(ValueError, match=f"`temperature` of {method.__name__} must be above 0"):
        method(temperature=0.0)


def test_logs_its_terms_and_how_often_the_teacher_is_right() -> None:
    _, t, losses = fit("auto", callbacks=[Distillation(teacher(), method=DKD(warmup_epochs=0))], steps=1)
    logged = {name: float(value) for name, value in t.callback_metrics.items()}
    assert set(logged) == {"train/loss", "distillation/tckd", "distillation/nckd", "distillation/teacher_acc"}
    total = logged["train/loss"] + logged["distillation/tckd"] + 8 * logged["distillation/nckd"]
    assert losses[0] == pytest.approx(total, rel=1e-5)
    x, y = next(iter(loader()))
    right = (teacher().eval()(x).argmax(dim=1) == y).float().mean()
    assert logged["distillation/teacher_acc"] == pytest.approx(float(right))


def test_the_teacher_sees_what_the_step_made_of_the_batch() -> None:
    class Flips(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self(-batch[0]), batch[1])

    class Sees(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.inputs = teacher(), list[Tensor]()

        def forward(self, x: Tensor) -> Tensor:
            self.inputs.append(x)
            return self.inner(x)

    sees = Sees()
    fit("auto", Flips(mlp()), callbacks=[Distillation(sees, check_teacher=False)], steps=1)
    first = next(iter(loader()))[0]
    assert torch.equal(sees.inputs[-1], -first)
    fit(
        "auto",
        Flips(mlp()),
        callbacks=[Distillation(sees, check_teacher=False, source=LogitsSource("network"))],
        steps=1,
    )
    assert torch.equal(sees.inputs[-1], first), "of another submodule, inputs are features: the batch's are taken"


def test_trying_the_teacher_does_not_take_the_place_of_the_students_check() -> None:
    class Probabilities(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).softmax(1)

    with pytest.warns(UserWarning, match="look like probabilities"):
        fit("auto", Probabilities(mlp()), callbacks=[Distillation(teacher(), check_teacher=False)], steps=1)
