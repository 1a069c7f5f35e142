"""EdgeStrategy: equal to plain training where it should be, and different where it claims to be."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from groundwire.plugins.compression import ErrorFeedback, Identity, TopK
from groundwire.plugins.edge import (
    Aggregator,
    AnalogDownlink,
    CheckpointMismatchError,
    Cost,
    DeviceBatch,
    Digital,
    Downlink,
    EdgeStrategy,
    LocalSGD,
    MajorityVote,
    NonFiniteUpdateError,
    Received,
    Round,
    Scheduler,
    UniformSample,
)
from helpers.edge import (
    CLASSES,
    FEATURES,
    Classifier,
    Rounds,
    check_resume,
    check_strategy_part,
    fit,
    generator,
    loader,
    mlp,
    trainer,
    weights,
)

PARTS = {
    "scheduler": lambda: EdgeStrategy(num_devices=4, scheduler=UniformSample(2)),
    "local_sgd": lambda: EdgeStrategy(num_devices=4, local=LocalSGD(lr=0.1, num_steps=3)),
    "majority_vote": lambda: EdgeStrategy(num_devices=4, aggregator=MajorityVote()),
}


OFF = {
    "scheduler": lambda: EdgeStrategy(num_devices=1, scheduler=UniformSample(1)),
    "compressed": lambda: EdgeStrategy(num_devices=1, uplink=Digital(ErrorFeedback(TopK(density=1.0)))),
    "identity": lambda: EdgeStrategy(num_devices=1, uplink=Digital(Identity())),
}


@pytest.mark.parametrize("name", PARTS)
def test_part(name: str) -> None:
    check_strategy_part(PARTS[name])


@pytest.mark.parametrize("name", OFF)
def test_switched_off_it_is_a_plain_trainer(name: str) -> None:
    check_strategy_part(PARTS["scheduler"], off=OFF[name])


def test_parts_are_built_from_yaml() -> None:
    parser = ArgumentParser()
    parser.add_argument("--strategy", type=EdgeStrategy)
    config = parser.parse_string("""
    strategy:
      class_path: groundwire.plugins.edge.EdgeStrategy
      init_args:
        num_devices: 9
        scheduler: {class_path: groundwire.plugins.edge.UniformSample, init_args: {num_scheduled: 4}}
        local: {class_path: groundwire.plugins.edge.LocalSGD, init_args: {lr: 0.1, num_steps: 2}}
        aggregator: {class_path: groundwire.plugins.edge.MajorityVote}
        downlink: {class_path: groundwire.plugins.edge.PerfectDownlink}
        vectorize: false
    """)
    strategy = parser.instantiate(config).strategy
    assert repr(strategy.scheduler) == "UniformSample(num_scheduled=4)"
    assert repr(strategy.local) == "LocalSGD(lr=0.1, num_steps=2, batch_size=None)"
    assert isinstance(strategy.aggregator, MajorityVote)
    assert strategy.vectorize is False


@pytest.mark.parametrize("vectorize", [True, False])
def test_gradients_of_devices_against_single_sample_backwards(vectorize: bool) -> None:
    """The updates that reach the uplink are each device's own gradients, computed here by plain autograd."""
    seen: list[Tensor] = []

    class Spy(Aggregator):
        def forward(self, received: Received, round: Round) -> Tensor:
            seen.append(received.rows.clone())
            return received.weights @ received.rows

    module, data = Classifier(mlp()), loader()
    expected = []
    x, y = next(iter(data))
    for m in range(4):
        twin = copy.deepcopy(module)
        F.cross_entropy(twin.network(x[6 * m : 6 * m + 6]), y[6 * m : 6 * m + 6]).backward()
        expected.append(torch.cat([p.grad.flatten() for p in twin.parameters()]))
    fit(EdgeStrategy(num_devices=4, aggregator=Spy(), vectorize=vectorize), module, data, steps=1)
    torch.testing.assert_close(seen[0], torch.stack(expected), rtol=1e-5, atol=1e-7)


def test_one_device_equals_the_plain_trainer_bit_for_bit() -> None:
    for options in ({}, {"gradient_clip_val": 0.05}, {"precision": "64-true"}):
        plain, _, plain_losses = fit("auto", **options)
        edge, _, edge_losses = fit(EdgeStrategy(num_devices=1), **options)
        assert torch.equal(plain, edge)
        assert plain_losses == edge_losses


def test_many_devices_with_equal_shards_equal_one_large_batch() -> None:
    plain, _, _ = fit("auto", Classifier(mlp(), "SGD", lr=0.1))
    edge, _, _ = fit(EdgeStrategy(num_devices=8), Classifier(mlp(), "SGD", lr=0.1))
    torch.testing.assert_close(edge, plain, rtol=1e-5, atol=1e-6)
    assert not torch.equal(edge, weights(Classifier(mlp())))


@pytest.mark.parametrize("local", [None, LocalSGD(lr=0.1, num_steps=3)])
@pytest.mark.parametrize(
    "network",
    [
        mlp,
        lambda: nn.Sequential(nn.Unflatten(1, (1, FEATURES)), nn.Conv1d(1, 4, 3), nn.Flatten(), nn.Linear(40, CLASSES)),
    ],
)
def test_vectorised_and_loop_give_equal_numbers(local: Any, network: Any) -> None:
    module = Classifier(network())
    together, _, losses = fit(EdgeStrategy(num_devices=4, local=local, vectorize=True), module)
    loop, _, loop_losses = fit(EdgeStrategy(num_devices=4, local=local, vectorize=False), module)
    torch.testing.assert_close(together, loop, rtol=1e-4, atol=1e-6)
    assert losses == pytest.approx(loop_losses, rel=1e-5)


def test_local_sgd_with_one_full_step_is_a_scaled_gradient() -> None:
    """tau = 1 on the full batch and server SGD at lr 1 is plain SGD at the local rate."""
    plain, _, _ = fit("auto", Classifier(mlp(), "SGD", lr=0.1))
    fedavg, _, _ = fit(
        EdgeStrategy(num_devices=4, local=LocalSGD(lr=0.1, num_steps=1)), Classifier(mlp(), "SGD", lr=1.0)
    )
    torch.testing.assert_close(fedavg, plain, rtol=1e-5, atol=1e-6)


def test_fedavg_equals_hand_written_fedavg() -> None:
    """Two rounds of FedAvg, against deepcopies trained by torch.optim.SGD and averaged with their sample counts."""
    module = Classifier(mlp(), "SGD", lr=1.0)
    g = generator(5)
    x, y = torch.randn(3, 8, FEATURES, generator=g), torch.randint(0, CLASSES, (3, 8), generator=g)
    counts = torch.tensor([10, 20, 70])
    batch = DeviceBatch(data=(x, y), device_ids=torch.arange(3), num_samples=counts)
    server = copy.deepcopy(module.network)
    for _ in range(2):
        models = []
        for m in range(3):
            device = copy.deepcopy(server)
            sgd = torch.optim.SGD(device.parameters(), lr=0.2)
            for step in range(4):
                sgd.zero_grad()
                F.cross_entropy(device(x[m, 2 * step : 2 * step + 2]), y[m, 2 * step : 2 * step + 2]).backward()
                sgd.step()
            models.append(device)
        with torch.no_grad():
            for name, p in server.named_parameters():
                p.copy_(
                    sum(float(c) / 100 * dict(d.named_parameters())[name] for c, d in zip(counts, models, strict=True))
                )
    for vectorize in (True, False):
        strategy = EdgeStrategy(num_devices=3, local=LocalSGD(lr=0.2, num_steps=4), vectorize=vectorize)
        trained, _, _ = fit(strategy, module, Rounds(batch, batch), steps=2)
        torch.testing.assert_close(trained, weights(server), rtol=1e-5, atol=1e-6)


def test_ragged_devices_use_their_own_samples_only() -> None:
    g = generator(6)
    x, y = torch.randn(2, 5, FEATURES, generator=g), torch.randint(0, CLASSES, (2, 5), generator=g)
    x[1, 3:] = float("nan")  # padding: must never be read
    counts = torch.tensor([5, 3])
    batch = DeviceBatch(data=(x, y), device_ids=torch.arange(2), num_samples=counts, lengths=counts)
    module = Classifier(mlp(), "SGD", lr=0.1)
    with pytest.warns(UserWarning, match="different numbers of samples"):
        trained, _, losses = fit(EdgeStrategy(num_devices=2), module, Rounds(batch), steps=1)
    twin = copy.deepcopy(module.network)
    pooled_x, pooled_y = torch.cat([x[0], x[1, :3]]), torch.cat([y[0], y[1, :3]])
    loss = F.cross_entropy(twin(pooled_x), pooled_y)  # weights n_m / n make it the pooled mean
    loss.backward()
    with torch.no_grad():
        for p in twin.parameters():
            p -= 0.1 * p.grad
    torch.testing.assert_close(trained, weights(twin), rtol=1e-5, atol=1e-6)
    assert losses == pytest.approx([float(loss)], rel=1e-6)


def test_logged_values_are_averaged_over_devices() -> None:
    class Logs(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            self.log("mean_y", y.float().mean())
            self.log_dict({"constant": 3.0, "first": x[0, 0]}, prog_bar=False)
            return {"loss": F.cross_entropy(self(x), y), "logits": self(x)}

    data = loader()
    x, y = next(iter(data))
    for vectorize in (True, False):
        _, t, _ = fit(EdgeStrategy(num_devices=4, vectorize=vectorize), Logs(mlp()), data, steps=1)
        logged = t.callback_metrics
        assert float(logged["mean_y"]) == pytest.approx(float(y.float().mean()), rel=1e-6)
        assert float(logged["constant"]) == 3.0
        assert float(logged["first"]) == pytest.approx(float(x[::6, 0].mean()), rel=1e-5)


def test_what_the_step_returns_keeps_a_device_dimension(tmp_path: Any) -> None:
    class Outputs(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            logits = self(batch[0])
            return {"loss": F.cross_entropy(logits, batch[1]), "logits": logits, "note": "kept"}

    shapes = []

    class Read(ModelCheckpoint):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
            shapes.append((tuple(outputs["logits"].shape), outputs["note"], outputs["logits"].requires_grad))

    for vectorize in (True, False):
        fit(
            EdgeStrategy(num_devices=4, vectorize=vectorize),
            Outputs(mlp()),
            steps=1,
            callbacks=[Read()],
            enable_checkpointing=True,
            default_root_dir=tmp_path,
        )
    assert shapes == [((4, 6, CLASSES), "kept", False)] * 2


class WithMetric(Classifier):
    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(CLASSES, average="micro")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return F.cross_entropy(logits, batch[1])


def test_torchmetrics_in_the_step_fall_back_to_the_loop_and_count_every_sample() -> None:
    module = WithMetric(mlp())
    module.lr = 0.0  # the model stays as it is, so the epoch's accuracy is that of the model on all samples
    x, y = loader().dataset.tensors
    expected = float((module.network(x).argmax(1) == y).float().mean())
    with pytest.warns(UserWarning, match="torchmetrics"):
        _, t, _ = fit(EdgeStrategy(num_devices=4), module, steps=4)
    assert float(t.callback_metrics["accuracy"]) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(MisconfigurationException, match="torchmetrics"):
        fit(EdgeStrategy(num_devices=4, vectorize=True), module, steps=1)


class Branches(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        return loss if loss.item() > 0 else loss * 2


@pytest.mark.parametrize(
    ("module", "cause"),
    [(Branches(mlp()), "item"), (Classifier(mlp(nn.BatchNorm1d(16))), "BatchNorm1d")],
)
def test_auto_falls_back_once_and_names_the_cause(module: Classifier, cause: str) -> None:
    with pytest.warns(UserWarning, match="in a loop") as caught:
        auto, _, _ = fit(EdgeStrategy(num_devices=4), module)
    messages = [str(w.message) for w in caught if "in a loop" in str(w.message)]
    assert len(messages) == 1
    assert cause in messages[0]
    loop, _, _ = fit(EdgeStrategy(num_devices=4, vectorize=False), module)
    assert torch.equal(auto, loop)
    with pytest.raises(MisconfigurationException, match=cause):
        fit(EdgeStrategy(num_devices=4, vectorize=True), module)


def test_batch_norm_statistics_are_the_mean_over_devices() -> None:
    module = Classifier(mlp(nn.BatchNorm1d(16)))
    x, _ = next(iter(loader()))
    hidden = module.network[0](x).detach().view(4, 6, 16)
    _, t, _ = fit(EdgeStrategy(num_devices=4, vectorize=False), module, steps=1)
    norm = t.lightning_module.network[1]
    torch.testing.assert_close(norm.running_mean, 0.1 * hidden.mean((0, 1)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * hidden.var(1).mean(0), rtol=1e-5, atol=1e-6)
    assert int(norm.num_batches_tracked) == 1


def test_dropout_is_drawn_from_counters_and_leaves_the_global_stream_alone() -> None:
    module = Classifier(mlp(nn.Dropout(0.5)))
    for vectorize in (True, False):
        build = lambda v=vectorize: EdgeStrategy(num_devices=4, vectorize=v)
        first, t, losses = fit(build(), module)
        torch.rand(3)  # the global stream has moved on
        second, _, again = fit(build(), module)
        assert losses == again
        assert torch.equal(first, second)
        check_resume(build, module, losses, first, t.strategy)
        other, _, _ = fit(EdgeStrategy(num_devices=4, vectorize=vectorize, seed=9), module)
        assert not torch.equal(first, other)


def test_lr_schedule_and_clipping_act_on_the_aggregated_gradient() -> None:
    class Scheduled(Classifier):
        def configure_optimizers(self) -> Any:
            sgd = torch.optim.SGD(self.parameters(), lr=1.0)
            return [sgd], [{"scheduler": torch.optim.lr_scheduler.StepLR(sgd, 1, 0.5), "interval": "step"}]

    start = weights(Scheduled(mlp()))
    one, _, _ = fit(EdgeStrategy(num_devices=4), Scheduled(mlp()), steps=1, gradient_clip_val=0.01)
    assert float((one - start).norm()) == pytest.approx(0.01, rel=1e-3)
    two, _, _ = fit(EdgeStrategy(num_devices=4), Scheduled(mlp()), steps=2, gradient_clip_val=0.01)
    assert float((two - one).norm()) == pytest.approx(0.005, rel=1e-3)


def test_frozen_and_unused_parameters() -> None:
    network = mlp()
    network[0].weight.requires_grad_(False)
    module = Classifier(network)
    module.unused = nn.Parameter(torch.ones(2))
    before = network[0].weight.clone()
    for vectorize in (True, False):
        _, t, _ = fit(EdgeStrategy(num_devices=4, vectorize=vectorize), module)
        assert torch.equal(t.lightning_module.network[0].weight, before)
        assert torch.equal(t.lightning_module.unused, torch.ones(2))
        assert "network.0.weight" not in t.strategy.layout.names


class Shifted(Downlink):
    """Each device sees the model shifted by its own number (or all by one)."""

    def __init__(self, per_device: bool) -> None:
        super().__init__()
        self.per_device = per_device

    def forward(self, model: Tensor, round: Round) -> Tensor:
        if not self.per_device:
            return model + 1.0
        return model + torch.tensor(round.devices, dtype=model.dtype).unsqueeze(1)

    def cost(self, numel: int, round: Round) -> Cost:
        return Cost(bits=numel, bits_ideal=numel)


@pytest.mark.parametrize("per_device", [True, False])
@pytest.mark.parametrize("vectorize", [True, False])
def test_downlink_decides_at_which_model_devices_compute(per_device: bool, vectorize: bool) -> None:
    module = Classifier(mlp(), "SGD", lr=1.0)
    x, y = next(iter(loader()))
    gradients = []
    for m in range(4):
        twin = copy.deepcopy(module)
        with torch.no_grad():
            for p in twin.parameters():
                p += float(m) if per_device else 1.0
        F.cross_entropy(twin.network(x[6 * m : 6 * m + 6]), y[6 * m : 6 * m + 6]).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in twin.parameters()]))
    strategy = EdgeStrategy(num_devices=4, downlink=Shifted(per_device), vectorize=vectorize)
    trained, t, _ = fit(strategy, module, steps=1)
    expected = weights(module) - torch.stack(gradients).mean(0).double()
    torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-5)
    assert t.strategy.ledger.totals["downlink/bits"] == t.strategy.layout.numel


def test_ledger_counts_exactly_and_is_logged() -> None:
    _, t, _ = fit(EdgeStrategy(num_devices=4, scheduler=UniformSample(3)), steps=5)
    numel = t.strategy.layout.numel
    assert t.strategy.ledger.totals == {"uplink/bits": 5 * 3 * 32 * numel, "downlink/bits": 5 * 32 * numel}
    assert t.callback_metrics["uplink/bits"].dtype == torch.float64
    assert float(t.callback_metrics["uplink/bits_cumulative"]) == 5 * 3 * 32 * numel
    assert float(t.callback_metrics["uplink/bits"]) == 3 * 32 * numel


class Poisoned(Classifier):
    """The device that holds sample 0 of a batch has a loss of NaN in the second round."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        marked = (batch[0][0] == self.mark).all() & (batch_idx == 1)
        loss = loss * torch.where(marked, float("nan"), 1.0)
        self.log("train/loss", loss)
        return loss


@pytest.mark.parametrize("vectorize", [True, False])
def test_nonfinite_updates_are_refused_or_dropped_never_averaged_in(vectorize: bool) -> None:
    data = loader()
    module = Poisoned(mlp(), "SGD", lr=0.1)
    module.mark = data.dataset.tensors[0][24 + 6]  # the first sample of device 1 in the second batch
    clean, _, _ = fit(EdgeStrategy(num_devices=4, vectorize=vectorize), module, data, steps=1)
    watched = copy.deepcopy(module)
    with pytest.raises(NonFiniteUpdateError, match=r"Device 1 produced \d+ non-finite entries in round 1"):
        trainer(EdgeStrategy(num_devices=4, vectorize=vectorize), steps=3).fit(watched, data)
    assert torch.equal(weights(watched), clean), "the weights are those after the last good round"
    with pytest.warns(UserWarning, match="leaves it out"):
        dropped, t, _ = fit(
            EdgeStrategy(num_devices=4, vectorize=vectorize, on_nonfinite="drop"), module, data, steps=2
        )
    x, y = (t[24:48].view(4, 6, *t.shape[1:])[[0, 2, 3]].flatten(0, 1) for t in data.dataset.tensors)
    twin = copy.deepcopy(t.lightning_module.network)
    torch.nn.utils.vector_to_parameters(clean.float(), twin.parameters())
    F.cross_entropy(twin(x), y).backward()
    expected = clean - 0.1 * torch.cat([p.grad.flatten() for p in twin.parameters()]).double()
    torch.testing.assert_close(dropped, expected, rtol=1e-5, atol=1e-6)
    assert torch.isfinite(t.callback_metrics["train/loss"])
    assert float(t.callback_metrics["round/dropped_devices"]) == 1.0


def test_resumes_with_plain_mean() -> None:
    build = lambda: EdgeStrategy(num_devices=4)
    final, t, losses = fit(build(), Classifier(mlp()))
    check_resume(build, Classifier(mlp()), losses, final, t.strategy)


def test_checkpoint_of_another_configuration_names_both(tmp_path: Any) -> None:
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, filename="two")
    fit(EdgeStrategy(num_devices=4), enable_checkpointing=True, callbacks=[saver], steps=2)
    for other, both in [
        (EdgeStrategy(num_devices=8), "num_devices was '4' and is now '8'"),
        (EdgeStrategy(num_devices=4, scheduler=UniformSample(2)), r"AllDevices.*UniformSample\(num_scheduled=2\)"),
        (EdgeStrategy(num_devices=4, seed=5), "seed was '0' and is now '5'"),
    ]:
        with pytest.raises(CheckpointMismatchError, match=both):
            trainer(other, steps=4).fit(Classifier(mlp()), loader(), ckpt_path=str(tmp_path / "two.ckpt"))
    plain = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, filename="plain")
    fit("auto", enable_checkpointing=True, callbacks=[plain], steps=2)
    t = trainer(EdgeStrategy(num_devices=4), steps=4)
    with pytest.warns(UserWarning, match="not written by an EdgeStrategy"):
        t.fit(Classifier(mlp()), loader(), ckpt_path=str(tmp_path / "plain.ckpt"))


def test_weights_only_checkpoint_stays_one(tmp_path: Any) -> None:
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, filename="w", save_weights_only=True)
    fit(EdgeStrategy(num_devices=4), enable_checkpointing=True, callbacks=[saver], steps=2)
    assert "groundwire.edge" not in torch.load(tmp_path / "w.ckpt", weights_only=True)
    full = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, filename="f")
    fit(EdgeStrategy(num_devices=4), enable_checkpointing=True, callbacks=[full], steps=2)
    assert torch.load(tmp_path / "f.ckpt", weights_only=True)["groundwire.edge"]["round"] == 2


class Manual(Classifier):
    def __init__(self) -> None:
        super().__init__(mlp())
        self.automatic_optimization = False


class TwoOptimizers(Classifier):
    def configure_optimizers(self) -> Any:
        self.automatic_optimization = True
        half = list(self.parameters())
        return [torch.optim.SGD(half[:2], lr=0.1), torch.optim.SGD(half[2:], lr=0.1)]


class NoLoss(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None


def test_bad_input_is_refused_by_message() -> None:
    for options, message in [
        ({"num_devices": 0}, "`num_devices` must be at least 1, got 0"),
        ({"num_devices": 2, "vectorize": "maybe"}, "`vectorize` must be 'auto', True or False"),
        ({"num_devices": 2, "on_nonfinite": "ignore"}, "`on_nonfinite` must be 'raise' or 'drop'"),
    ]:
        with pytest.raises(ValueError, match=message):
            EdgeStrategy(**options)
    with pytest.raises(ValueError, match="24 samples cannot be split evenly over 5 devices"):
        fit(EdgeStrategy(num_devices=5))
    with pytest.raises(ValueError, match="24 samples cannot be split evenly over 48 devices"):
        fit(EdgeStrategy(num_devices=48))
    with pytest.raises(MisconfigurationException, match="automatic optimization"):
        fit(EdgeStrategy(num_devices=2), Manual())
    with pytest.raises(MisconfigurationException, match="accumulate_grad_batches=2"):
        fit(EdgeStrategy(num_devices=2), accumulate_grad_batches=2)
    with pytest.raises(MisconfigurationException, match="must return a loss tensor"):
        fit(EdgeStrategy(num_devices=2), NoLoss(mlp()))
    batch = DeviceBatch(
        data=(torch.zeros(1, 2, FEATURES), torch.zeros(1, 2, dtype=torch.long)),
        device_ids=torch.tensor([7]),
        num_samples=torch.tensor([2]),
    )
    with pytest.raises(ValueError, match="names device 7, but EdgeStrategy\\(num_devices=2\\)"):
        fit(EdgeStrategy(num_devices=2), None, Rounds(batch))
    with pytest.raises(ValueError, match="`num_scheduled` is 9, but only 2 devices have data"):
        fit(EdgeStrategy(num_devices=2, scheduler=UniformSample(9)))
    frozen = Classifier(mlp())
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        fit(EdgeStrategy(num_devices=2), frozen)


def test_several_optimizers_are_refused() -> None:
    with pytest.raises(RuntimeError, match="multiple optimizers is only supported with manual optimization"):
        fit(EdgeStrategy(num_devices=2), TwoOptimizers(mlp()))


def test_local_sgd_bad_input() -> None:
    for options, message in [
        ({"lr": 0.0, "num_steps": 1}, "`lr` must be > 0"),
        ({"lr": 0.1, "num_steps": 0}, "`num_steps` must be at least 1"),
        ({"lr": 0.1, "num_steps": 1, "batch_size": 0}, "`batch_size` must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            LocalSGD(**options)
    with pytest.raises(ValueError, match="6 samples a device and round cannot be cut"):
        fit(EdgeStrategy(num_devices=4, local=LocalSGD(lr=0.1, num_steps=4)))


def test_validation_and_prediction_work_as_ever() -> None:
    class Validated(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]))

        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0])

    t = trainer(EdgeStrategy(num_devices=4), steps=4)
    module = Validated(mlp())
    t.fit(module, loader(), loader())
    assert "val/loss" in t.callback_metrics
    assert len(t.predict(module, loader())) == 4
    assert t.validate(module, loader(), verbose=False)[0]["val/loss"] > 0


def test_round_plan_is_told_the_number_of_rounds() -> None:
    told: list[tuple[int, int | None]] = []

    class Spy(Downlink):
        def forward(self, model: Tensor, round: Round) -> Tensor:
            told.append((round.index, round.num_rounds))
            assert round.weights.sum().item() == pytest.approx(1.0)
            return model

        def cost(self, numel: int, round: Round) -> Cost:
            return Cost()

    fit(EdgeStrategy(num_devices=4, downlink=Spy()), steps=3)
    assert told == [(0, 3), (1, 3), (2, 3)]


def test_unfreezing_during_the_run_is_refused() -> None:
    class Thaws(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            module.network[0].weight.requires_grad_(True)

    network = mlp()
    network[0].weight.requires_grad_(False)
    with pytest.raises(MisconfigurationException, match=r"network.0.weight changed `requires_grad`"):
        fit(EdgeStrategy(num_devices=2), Classifier(network), callbacks=[Thaws()])


def test_testing_from_a_checkpoint_does_not_leak_into_the_next_fit(tmp_path: Any) -> None:
    class Tested(Classifier):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test/loss", F.cross_entropy(self(batch[0]), batch[1]))

    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, filename="two")
    fit(EdgeStrategy(num_devices=4), Tested(mlp()), enable_checkpointing=True, callbacks=[saver], steps=2)
    t = trainer(EdgeStrategy(num_devices=4), steps=3)
    t.test(Tested(mlp()), loader(), ckpt_path=str(tmp_path / "two.ckpt"), verbose=False)
    t.fit(Tested(mlp()), loader())
    assert t.strategy.round_index == 3


# ---------------------------------------------------------------- what a review found


@pytest.mark.parametrize("policy", ["raise", "drop"])
@pytest.mark.parametrize("devices", [1, 4])
def test_a_nonfinite_device_leaves_no_trace_in_buffers(policy: Any, devices: int) -> None:
    module = Classifier(mlp(nn.BatchNorm1d(16)))
    g = generator(1)
    x, y = torch.randn(4, 6, FEATURES, generator=g), torch.randint(0, CLASSES, (4, 6), generator=g)
    x[1] = float("nan")
    if devices == 1:
        x, y = x[1:2], y[1:2]
    batch = DeviceBatch(data=(x, y), device_ids=torch.arange(devices), num_samples=torch.full((devices,), 6))
    trained = copy.deepcopy(module)
    t = trainer(EdgeStrategy(num_devices=devices, vectorize=False, on_nonfinite=policy), steps=1)
    if policy == "raise" or devices == 1:
        with pytest.raises(NonFiniteUpdateError):
            t.fit(trained, Rounds(batch))
        assert torch.equal(weights(trained), weights(module))
        return
    t.fit(trained, Rounds(batch))
    hidden = module.network[0](x[[0, 2, 3]]).detach()
    torch.testing.assert_close(trained.network[1].running_mean, 0.1 * hidden.mean((0, 1)), rtol=1e-5, atol=1e-6)


def test_a_buffer_that_the_step_replaces_is_averaged_too() -> None:
    class Smoothed(Classifier):
        def __init__(self) -> None:
            super().__init__(mlp())
            self.register_buffer("ema", torch.zeros(()))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.ema = 0.9 * self.ema + 0.1 * batch[0].mean()
            return F.cross_entropy(self(batch[0]), batch[1])

    x = next(iter(loader()))[0]
    for strategy in (EdgeStrategy(num_devices=4, vectorize=False), EdgeStrategy(num_devices=4)):
        _, t, _ = fit(strategy, Smoothed(), steps=1)
        assert float(t.lightning_module.ema) == pytest.approx(0.1 * float(x.mean()), rel=1e-4)


def test_what_cannot_be_split_is_refused_and_constants_pass() -> None:
    class Named(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert batch["kind"] == "train"
            return F.cross_entropy(self(batch["x"]), batch["y"])

    x, y = next(iter(loader()))
    for vectorize in (True, False):
        fit(
            EdgeStrategy(num_devices=4, vectorize=vectorize),
            Named(mlp()),
            Rounds({"x": x, "y": y, "kind": "train"}),
            steps=1,
        )
    with pytest.raises(ValueError, match="a list of 24 str, one a sample, which cannot be split over devices"):
        DeviceBatch.split({"x": x, "y": y, "ids": [str(i) for i in range(24)]}, 4)


def test_hooks_on_parameters_see_the_servers_gradient_once() -> None:
    finals = []
    for strategy in ("auto", EdgeStrategy(num_devices=1), EdgeStrategy(num_devices=1, vectorize=True)):
        module = Classifier(mlp(), "SGD", lr=1.0)
        calls: list[int] = []
        for p in module.parameters():
            p.register_hook(lambda g, calls=calls: calls.append(1) or 0.5 * g)
        t = trainer(strategy, steps=1)
        t.fit(module, loader())
        assert len(calls) == 4
        finals.append(weights(module))
    assert torch.equal(finals[0], finals[1])
    torch.testing.assert_close(finals[0], finals[2], rtol=1e-5, atol=1e-6)


def test_accumulation_that_begins_later_and_lbfgs_are_refused() -> None:
    scheduler = pl.callbacks.GradientAccumulationScheduler({1: 2})
    with pytest.raises(MisconfigurationException, match="accumulate_grad_batches=2"):
        fit(EdgeStrategy(num_devices=2), callbacks=[scheduler])
    with pytest.raises(MisconfigurationException, match="LBFGS evaluates the loss several times"):
        fit(EdgeStrategy(num_devices=2), Classifier(mlp(), "LBFGS"))


def test_an_unused_parameter_is_left_alone_as_by_a_plain_trainer() -> None:
    finals = []
    for strategy in ("auto", EdgeStrategy(num_devices=1)):
        module = Classifier(mlp(), "AdamW")
        module.unused = nn.Parameter(torch.ones(2))
        finals.append(fit(strategy, module, steps=3)[0])
    assert torch.equal(*finals)


def test_everything_that_log_takes() -> None:
    class Logs(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            logits = self(x)
            self.log("correct", (logits.argmax(1) == y).sum(), reduce_fx="sum", on_step=False, on_epoch=True)
            self.log("largest", x.max(), True, reduce_fx=torch.max, on_step=False, on_epoch=True)
            self.log("flag", y[0] > 0, on_epoch=True, on_step=False)
            self.log("lr", 0.1)
            return F.cross_entropy(logits, y)

    module = Logs(mlp(), lr=0.0)
    x, y = loader().dataset.tensors
    _, plain, _ = fit("auto", module, steps=4)
    for vectorize in (True, False):
        _, t, _ = fit(EdgeStrategy(num_devices=4, vectorize=vectorize), module, steps=4)
        for name in ("correct", "largest", "lr"):
            assert float(t.callback_metrics[name]) == pytest.approx(float(plain.callback_metrics[name])), name
        assert float(t.callback_metrics["flag"]) == pytest.approx(float((y[::6] > 0).float().mean()))
    assert float(plain.callback_metrics["correct"]) == float((module.network(x).argmax(1) == y).sum())


def test_epoch_means_of_ragged_rounds_count_samples_not_padding() -> None:
    class Logs(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("mark", batch[0][0, 0], on_step=False, on_epoch=True)
            return F.cross_entropy(self(batch[0]), batch[1])

    def round_of(value: float, lengths: list[int]) -> DeviceBatch:
        x = torch.zeros(2, 4, FEATURES)
        x[:, 0, 0] = value
        counts = torch.tensor(lengths)
        data = (x, torch.zeros(2, 4, dtype=torch.long))
        return DeviceBatch(data=data, device_ids=torch.arange(2), num_samples=counts, lengths=counts)

    batches = Rounds(round_of(1.0, [1, 1]), round_of(0.0, [4, 4]))
    _, t, _ = fit(EdgeStrategy(num_devices=2, vectorize=False), Logs(mlp()), batches, steps=2)
    assert float(t.callback_metrics["mark"]) == pytest.approx(2 / 10)


def test_tensors_kept_by_the_module_fall_back_and_the_attempt_leaves_nothing() -> None:
    class Keeps(Classifier):
        def __init__(self) -> None:
            super().__init__(mlp())
            self.outs: list[Tensor] = []
            self.calls = 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.calls += 1
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.outs.append(loss.detach())
            return loss

        def on_train_epoch_end(self) -> None:
            self.log("mean", torch.stack(self.outs).mean())

    with pytest.warns(UserWarning, match=r"keeps a tensor of one device in `self\.outs`"):
        _, t, losses = fit(EdgeStrategy(num_devices=4), Keeps(), steps=4)
    assert t.lightning_module.calls == len(t.lightning_module.outs) == 16
    assert float(t.callback_metrics["mean"]) == pytest.approx(sum(losses) / 4, rel=1e-5)


@pytest.mark.parametrize("precision", ["64-true", "32-true"])
def test_device_batches_in_double_precision(precision: Any) -> None:
    x, y = next(iter(loader()))
    batch = DeviceBatch(
        data=(x.view(4, 6, -1), y.view(4, 6)), device_ids=torch.arange(4), num_samples=torch.full((4,), 6)
    )
    ours, _, _ = fit(EdgeStrategy(num_devices=4), Classifier(mlp(), "SGD"), Rounds(batch), steps=1, precision=precision)
    plain, _, _ = fit("auto", Classifier(mlp(), "SGD"), Rounds((x, y)), steps=1, precision=precision)
    torch.testing.assert_close(
        ours, plain, rtol=1e-12 if precision == "64-true" else 1e-5, atol=1e-12 if precision == "64-true" else 1e-6
    )


def test_the_trainers_autocast_reaches_the_devices() -> None:
    class Elementwise(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append(torch.is_autocast_enabled("cpu"))
            return (self.network[0].bias * batch[0].mean()).sum()

    for vectorize in (True, False):
        for precision, expected in (("bf16-mixed", True), ("32-true", False)):
            seen: list[bool] = []
            fit(EdgeStrategy(num_devices=4, vectorize=vectorize), Elementwise(mlp()), steps=1, precision=precision)
            assert set(seen) == {expected}


def test_devices_draw_their_own_dropout() -> None:
    seen: list[Tensor] = []

    class Spy(Aggregator):
        def forward(self, received: Received, round: Round) -> Tensor:
            seen.append(received.rows.clone())
            return received.weights @ received.rows

    x, y = next(iter(loader()))
    same = (x[:6].repeat(4, 1), y[:6].repeat(4))
    for vectorize in (True, False):
        strategy = EdgeStrategy(num_devices=4, aggregator=Spy(), vectorize=vectorize)
        fit(strategy, Classifier(mlp(nn.Dropout(0.5))), Rounds(same), steps=1)
        assert len({tuple(row) for row in seen[-1].tolist()}) == 4


def test_uniform_sample_draws_anew_every_round_and_by_seed() -> None:
    ids = torch.arange(20)
    draws = [tuple(UniformSample(5)(ids, round_index=t, seed=0).tolist()) for t in range(30)]
    assert len(set(draws)) > 25
    assert all(list(d) == sorted(set(d)) for d in draws)
    assert tuple(UniformSample(5)(ids, round_index=0, seed=1).tolist()) != draws[0]
    frequency = torch.bincount(torch.tensor(draws).flatten(), minlength=20) / 30
    assert ((frequency - 0.25).abs() < 5 * (0.25 * 0.75 / 30) ** 0.5).all()


def test_an_estimate_that_is_not_finite_never_reaches_the_weights() -> None:
    class Overflows(Aggregator):
        def forward(self, received: Received, round: Round) -> Tensor:
            return received.rows[0] / 0

    module = Classifier(mlp())
    with pytest.raises(NonFiniteUpdateError, match=r"estimate in round 0 is not finite .* Overflows"):
        trainer(EdgeStrategy(num_devices=2, aggregator=Overflows()), steps=1).fit(module, loader())
    assert torch.equal(weights(module), weights(Classifier(mlp())))


def test_a_strategy_object_used_again_starts_anew(seeded: Any) -> None:
    def train(strategy: EdgeStrategy, module: Classifier) -> Tensor:
        t = pl.Trainer(
            strategy=strategy, max_steps=6, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        t.fit(module, loader())
        return weights(module)

    build = lambda: EdgeStrategy(num_devices=4, uplink=Digital(ErrorFeedback(TopK(k=3))), scheduler=UniformSample(2))
    used = build()
    first = train(used, Classifier(mlp()))
    assert torch.equal(first, train(used, Classifier(mlp())))
    assert used.round_index == used.ledger.rounds == 6
    small = Classifier(nn.Linear(FEATURES, CLASSES))
    assert torch.equal(train(used, copy.deepcopy(small)), train(build(), copy.deepcopy(small)))


def test_a_restore_within_the_fit_takes_the_strategy_back_too(tmp_path: Any) -> None:
    build = lambda: EdgeStrategy(num_devices=4, uplink=Digital(ErrorFeedback(TopK(k=3))))
    finder = pl.callbacks.LearningRateFinder(num_training_steps=5, update_attr=False)
    module = Classifier(mlp())
    plain, _, _ = fit(build(), module)
    found, t, _ = fit(build(), module, callbacks=[finder], default_root_dir=tmp_path, enable_checkpointing=True)
    assert t.strategy.round_index == t.strategy.ledger.rounds == 6
    assert torch.equal(plain, found)


def test_a_checkpoints_own_seed_and_fallback_go_on(tmp_path: Any, seeded: Any) -> None:
    build = lambda: EdgeStrategy(num_devices=4, scheduler=UniformSample(2))
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, filename="two")
    module = Branches(mlp())
    seeded(3)
    whole, _, _ = fit(build(), module, steps=4)
    fit(build(), module, steps=2, enable_checkpointing=True, callbacks=[saver])
    assert torch.load(tmp_path / "two.ckpt", weights_only=True)["groundwire.edge"]["fell_back"] is True
    seeded(4)
    resumed = copy.deepcopy(module)
    t = trainer(build(), steps=4)
    t.fit(resumed, Rounds(*list(loader())[2:]), ckpt_path=str(tmp_path / "two.ckpt"))
    assert torch.equal(weights(resumed), whole)


def test_device_batch_refuses_nonsense() -> None:
    data = (torch.zeros(2, 3, 1),)
    ids, counts = torch.arange(2), torch.tensor([3, 3])
    for options, message in [
        ({"device_ids": torch.tensor([-1, 0])}, r"`device_ids` must be distinct and >= 0, got \[-1, 0\]"),
        ({"device_ids": torch.tensor([1, 1])}, "`device_ids` must be distinct"),
        ({"num_samples": torch.tensor([3, 0])}, "`num_samples` must be at least 1 a device"),
        ({"lengths": torch.tensor([0, 3])}, r"`lengths` must be in \[1, 3\], got \[0, 3\]"),
        ({"lengths": torch.tensor([4, 3])}, r"`lengths` must be in \[1, 3\]"),
        ({"device_ids": torch.arange(3)}, r"`device_ids` must have shape \(2,\), got \(3,\)"),
        ({"data": (torch.zeros(2),)}, "Every leaf must have shape"),
        ({"data": (torch.zeros(2, 3), torch.zeros(2, 4))}, "All leaves must share"),
    ]:
        with pytest.raises(ValueError, match=message):
            DeviceBatch(**({"data": data, "device_ids": ids, "num_samples": counts} | options))


def test_an_endless_loader_has_no_planned_rounds() -> None:
    told: list[int | None] = []

    class Spy(Downlink):
        def forward(self, model: Tensor, round: Round) -> Tensor:
            told.append(round.num_rounds)
            return model

        def cost(self, numel: int, round: Round) -> Cost:
            return Cost()

    class Endless:
        def __iter__(self) -> Any:
            return iter(loader())

    t = pl.Trainer(
        strategy=EdgeStrategy(num_devices=4, downlink=Spy()), accelerator="cpu", max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    t.fit(Classifier(mlp()), Endless())
    assert told == [None] * 4


def test_a_dropped_device_leaves_nothing_in_what_devices_of_differing_sizes_return() -> None:
    class Returns(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            logits = self(batch[0])
            loss = F.cross_entropy(logits, batch[1])
            return {"loss": loss * logits.detach().sum() / logits.detach().sum(), "logits": logits}

    class Seen(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.devices = outputs["devices"]

    x = torch.randn(3, 4, FEATURES)
    x[1, 0] = torch.nan
    batch = DeviceBatch(
        data=(x, torch.zeros(3, 4, dtype=torch.long)),
        device_ids=torch.arange(3),
        num_samples=torch.tensor([4, 4, 2]),
        lengths=torch.tensor([4, 4, 2]),
    )
    seen = Seen()
    with pytest.warns(UserWarning, match="leaves it out"):
        fit(EdgeStrategy(3, on_nonfinite="drop"), Returns(mlp()), Rounds(batch), steps=1, callbacks=[seen])
    assert [tuple(device["logits"].shape) for device in seen.devices] == [(4, CLASSES), (2, CLASSES)]
    assert all(torch.isfinite(device["logits"]).all() for device in seen.devices)


class Nobody(Scheduler):
    """Lets two devices in, and in every other round nobody."""

    def forward(self, device_ids: Tensor, *, round_index: int, seed: int) -> Tensor:
        return torch.arange(0 if round_index % 2 else 2)


class Counts(Classifier):
    """Counts samples; what it moves by in each step is in ``moved``."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.seen = torchmetrics.SumMetric()
        self.moved: list[bool] = []
        self.empty: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.update(len(batch[0]))
        loss: Tensor = super().training_step(batch, batch_idx)
        return loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.before = weights(self.network)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.moved.append(not torch.equal(self.before, weights(self.network)))
        self.empty.append(float(self.trainer.callback_metrics.get("round/empty", 0.0)))


def test_a_round_without_devices_is_skipped_and_logged() -> None:
    """Adam, which would go on with the steps before, rests; nothing is spent, counted or averaged."""
    module = Counts()
    strategy = EdgeStrategy(num_devices=4, scheduler=Nobody(), downlink=AnalogDownlink(power=10.0), vectorize=False)
    trainer(strategy, steps=4, log_every_n_steps=1).fit(module, loader())
    assert module.moved == [True, False, True, False]
    assert (module.empty[0], module.empty[1], module.empty[3]) == (0.0, 1.0, 1.0)
    assert int(module.seen.compute()) == 2 * 2 * 6
    assert strategy.ledger.totals["downlink/energy"] == pytest.approx(2 * 10.0)
