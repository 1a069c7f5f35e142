"""Compressors whose guarantee counts on secure aggregation, what a round gives away, and audits of whole uplinks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.tuner import Tuner
from torch import Tensor

from groundwire.callbacks.privacy.audit import audit_mechanism
from groundwire.plugins.compression import RQM, DistributedDiscreteGaussian, ErrorFeedback, PrivateSketch, TopK
from groundwire.plugins.edge import Digital, DPFedAvg, DPOverTheAir, EdgeStrategy, NonFiniteUpdateError, PoissonSample
from groundwire.plugins.random import Key
from helpers.edge import Classifier, fit, loader, mlp, trainer
from helpers.uplinks import plan, ready, updates

SHARED: dict[str, Any] = {
    "rqm": lambda shares: RQM(clip=1.0, num_shares=shares, max_devices=20),
    "sketch": lambda shares: PrivateSketch(clip_norm=1.0, noise_multiplier=0.5, density=0.5, num_shares=shares),
    "discrete_gaussian": lambda shares: DistributedDiscreteGaussian(
        clip_norm=1.0, noise_multiplier=0.5, granularity=1e-3, bits=20, num_shares=shares
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_the_server_gets_the_mean_alone_and_every_device_counts_the_same(name: str) -> None:
    """Weights would leave a device with many samples with little but its own share of the noise."""
    x, compressor = updates(6, 50), SHARED[name](4)
    uneven = torch.tensor([1000.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    received = ready(lambda: Digital(compressor), 50, 6)(x, plan(6, weights=uneven))
    each = compressor.roundtrip(x, Key(seed=0, round=0, devices=tuple(range(6))))
    torch.testing.assert_close(received.rows, each.values.mean(0, keepdim=True), rtol=1e-4, atol=1e-5)
    assert received.weights.tolist() == [1.0]
    assert received.cost.bits == each.bits_wire


@pytest.mark.parametrize("name", SHARED)
def test_fewer_participants_than_shares_are_refused(name: str) -> None:
    uplink = ready(lambda: Digital(SHARED[name](4)), 50, 6)
    with pytest.raises(MisconfigurationException, match=r"3 devices take part in round 0.*num_shares=4"):
        uplink(updates(3, 50), plan(3))
    with pytest.raises(MisconfigurationException, match="0 devices take part"):
        uplink(torch.zeros(1, 50), plan((0,), is_empty=True))


def test_a_sum_that_the_field_does_not_hold_wraps_around_or_is_refused() -> None:
    """64 integers of 6 bits each: secure aggregation adds modulo 64, which rows by themselves would not show."""
    x = torch.full((40, 16), 0.25)
    narrow = DistributedDiscreteGaussian(
        clip_norm=1.0, noise_multiplier=0.0, granularity=0.05, bits=6, num_shares=2, rotate=False
    )
    wrapped = 40 * ready(lambda: Digital(narrow), 16, 40)(x, plan(40)).rows
    true = 40 * 0.25
    assert ((wrapped - true).abs() > 1).all()
    turns = (wrapped - true) / (64 * 0.05)
    assert (turns - turns.round()).abs().max() < 1e-4
    with pytest.raises(ValueError, match=r"A sum of 21 devices may not fit into the 9 bits of max_devices=20"):
        ready(lambda: Digital(SHARED["rqm"](4)), 16, 40)(x[:21], plan(21))


def test_more_devices_take_wider_fields() -> None:
    x = updates(4, 80)
    bits = [
        ready(lambda n=n: Digital(RQM(clip=1.0, num_shares=4, max_devices=n)), 80, 4)(x, plan(4)).cost.bits
        for n in (4, 40)
    ]
    assert bits == [4 * 80 * width for width in (6, 10)]  # 4 and 40 times 15, plus one
    with pytest.raises(ValueError, match="`max_devices` must be at least num_shares=4, got 3"):
        RQM(clip=1.0, num_shares=4, max_devices=3)


def test_delta_is_the_users() -> None:
    uplink = ready(lambda: Digital(SHARED["sketch"](4), target_delta=1e-3), 50, 6)
    uplink(updates(6, 50), plan(6))
    assert uplink.privacy(rounds=2).delta == 1e-3
    with pytest.raises(ValueError, match=r"`delta` must be in \(0, 1\), got 0"):
        Digital(SHARED["sketch"](4), target_delta=0)


# ---------------------------------------------------------------- what a round gives away


class Breaks(Classifier):
    """Its loss is not finite on some batches: of one device, in round 2."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        return loss * torch.where(torch.isclose(x.sum(), self.at), torch.nan, 1.0)

    @classmethod
    def on_device(cls, device: int) -> Breaks:
        module = cls(mlp(), "SGD", lr=0.1)
        x = list(loader())[2][0]
        module.at = x[6 * device : 6 * device + 6].sum()
        return module


def test_a_device_whose_update_is_not_finite_is_not_told_from_one_that_sends_zeros() -> None:
    with pytest.raises(NonFiniteUpdateError, match="Device 2 produced"):
        fit(EdgeStrategy(4), Breaks.on_device(2))
    strategy = EdgeStrategy(4, uplink=DPFedAvg(1.0, noise_multiplier=1.0))
    on, t, _ = fit(strategy, Breaks.on_device(2))
    assert t.global_step == 6
    assert torch.isfinite(on).all()
    assert not any("dropped" in name for name in t.callback_metrics)


def test_the_statement_says_what_may_be_published() -> None:
    strategy = EdgeStrategy(4, uplink=DPFedAvg(1.0, noise_multiplier=1.0))
    fit(strategy)
    text = str(strategy.privacy_spent())
    assert "Only the weights are published" in text
    assert "run's seed: it stays secret" in text


def test_a_search_for_a_learning_rate_is_refused_with_private_uplinks() -> None:
    module = Classifier(mlp(), "SGD", lr=0.1)
    module.lr = 0.1
    t = trainer(EdgeStrategy(4, uplink=DPFedAvg(1.0, noise_multiplier=1.0)))
    with pytest.raises(MisconfigurationException, match=r"LearningRateFinder trains on the private data.*DPFedAvg"):
        Tuner(t).lr_find(module, loader(), num_training=3)


def test_in_an_empty_round_nobody_sends_what_it_remembers() -> None:
    strategy = EdgeStrategy(4, scheduler=PoissonSample(0.1), uplink=Digital(ErrorFeedback(TopK(density=0.1))), seed=1)
    fit(strategy, Classifier(mlp(), "SGD", lr=0.1))
    empty = [len(PoissonSample(0.1)(torch.arange(4), round_index=r, seed=1)) == 0 for r in range(6)]
    assert 0 < sum(empty) < 6
    sent = strategy.ledger.totals["uplink/bits"]
    one = Digital(TopK(density=0.1))(torch.zeros(1, strategy.layout.numel), plan(1)).cost.bits
    joined = sum(len(PoissonSample(0.1)(torch.arange(4), round_index=r, seed=1)) for r in range(6))
    assert sent == joined * one


# ---------------------------------------------------------------- audits


M = 400
MECHANISMS: dict[str, Any] = {
    "server": lambda: DPFedAvg(1.0, noise_multiplier=2.0, target_delta=1e-5),
    "devices": lambda: DPFedAvg(1.0, noise_multiplier=2.0, target_delta=1e-5, noise="devices"),
    "over the air": lambda: DPOverTheAir(1.0, noise_multiplier=2.0, target_delta=1e-5),
    "sketch": lambda: Digital(PrivateSketch(clip_norm=1.0, noise_multiplier=2.0, density=1.0, num_shares=100)),
    "discrete Gaussian": lambda: Digital(
        DistributedDiscreteGaussian(clip_norm=1.0, noise_multiplier=2.0, granularity=0.01, bits=20, num_shares=100)
    ),
}


@pytest.mark.parametrize("planted", [False, True])
@pytest.mark.parametrize("name", MECHANISMS)
def test_audits_of_uplinks(name: str, planted: bool) -> None:
    """As they are, bounds stay below the claim; if clipping is forgotten, or most of the noise, they exceed it."""
    claim, uplink = (ready(MECHANISMS[name], M, M) for _ in range(2))
    claim(torch.zeros(150, M), plan(150))
    claimed = claim.privacy(rounds=1).epsilon
    assert math.isfinite(claimed)
    longer = 1.0
    if planted and isinstance(uplink, Digital):
        uplink.compressor.noise_multiplier /= 12
    elif planted:
        uplink.device_privacy.clip = lambda rows: rows
        longer = 12.0

    def release(rows: Tensor) -> Tensor:
        return uplink(longer * rows, plan(len(rows))).rows[0]

    report = audit_mechanism(release, M, claimed_epsilon=claimed, delta=1e-5, seed=0)
    assert report.epsilon_lower > 0
    assert report.refuted == planted, (report.epsilon_lower, claimed)
