"""The paper's order of schemes, on Fashion-MNIST: minutes, so only on demand (`make test-slow`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest

from groundwire.datamodules import DatasetMissingError, FashionMNIST, Federated
from groundwire.plugins.compression import QSGD, DDSGDQuantizer, SignSGD
from groundwire.plugins.edge import ADSGD, CapacityLimited, EdgeStrategy, ErrorFree, Uplink
from groundwire.recipes import SoftmaxRegression
from helpers.edge import trainer

SCHEMES: dict[str, Callable[[float], Uplink]] = {
    "error_free": lambda power: ErrorFree(),
    "a_dsgd": lambda power: ADSGD(power=power),
    "d_dsgd": lambda power: CapacityLimited(DDSGDQuantizer(), error_feedback=True, power=power),
    "signsgd": lambda power: CapacityLimited(SignSGD(), power=power),
    "qsgd": lambda power: CapacityLimited(QSGD(num_levels=4), power=power),
}


def accuracy(scheme: str, partition: Literal["iid", "by_label"], power: float = 500.0, rounds: int = 100) -> float:
    data = Federated(
        FashionMNIST(batch_size=5000, seed=1),
        num_devices=25, partition=partition, samples_per_device=1000, rounds_per_epoch=rounds, seed=1,
    )  # fmt: skip
    module = SoftmaxRegression()
    strategy = EdgeStrategy(num_devices=25, uplink=SCHEMES[scheme](power), seed=1)
    t = trainer(strategy, steps=rounds)
    try:
        t.fit(module, data)
    except DatasetMissingError as error:
        pytest.skip(str(error))
    return float(t.test(module, data, verbose=False)[0]["test/acc"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("partition", "rounds"),
    # with two classes a device, D-DSGD and SignSGD are level after 100 rounds (three seeds: 0.45 each)
    [("iid", 100), ("by_label", 300)],
)
def test_the_papers_order(partition: Literal["iid", "by_label"], rounds: int) -> None:
    reached = {scheme: accuracy(scheme, partition, rounds=rounds) for scheme in SCHEMES}
    assert reached["error_free"] > reached["a_dsgd"]
    assert reached["a_dsgd"] > reached["d_dsgd"] + 0.04
    assert reached["d_dsgd"] > max(reached["signsgd"], reached["qsgd"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:There are rounds")
def test_at_low_power_digital_is_silent_and_analog_learns() -> None:
    assert accuracy("d_dsgd", "iid", power=50.0) <= 0.15
    assert accuracy("a_dsgd", "iid", power=50.0) >= 0.65
