import math

import pytest

from groundwire.plugins.channels import (
    GaussianMAC,
    db_to_linear,
    gaussian_mac_bits_per_device,
    linear_to_db,
    mac_sum_rate_bits,
    power_per_round,
    power_per_symbol,
)
from helpers.channels import ChannelTester


class TestGaussianMAC(ChannelTester):
    yaml = """
class_path: groundwire.plugins.channels.GaussianMAC
init_args: {noise_var: 2.0}
"""

    def make(self, noise_var: float) -> GaussianMAC:
        return GaussianMAC(noise_var)


# Table "Budget" of the specification of A-DSGD and D-DSGD, from R = s/(2M) log2(1 + M P / s); noise variance 1.
@pytest.mark.parametrize(
    ("num_devices", "s", "power", "bits"),
    [
        (25, 3925, 50, 31.31),
        (25, 3925, 200, 93.04),
        (25, 3925, 500, 162.11),
        (25, 3925, 1000, 226.20),
        (25, 2355, 500, 125.15),
        (25, 785, 500, 64.07),
        (10, 1962, 500, 179.25),
        (20, 1962, 500, 127.93),
    ],
)
def test_bits_per_device_match_the_table(num_devices: int, s: int, power: float, bits: float) -> None:
    assert gaussian_mac_bits_per_device(s, num_devices, power, 1.0) == pytest.approx(bits, abs=0.005)
    assert GaussianMAC(1.0).bits_per_device(s, num_devices, power) == pytest.approx(bits, abs=0.005)
    sum_rate = mac_sum_rate_bits(s, num_devices, power, 1.0)
    assert sum_rate == pytest.approx(num_devices * bits, abs=0.005 * num_devices)


def test_capacity_is_of_the_real_channel_and_power_is_of_the_round() -> None:
    # Two real uses at SNR 3 per symbol: 2 * (1/2) log2(4) = 2 bits. The complex form would give 4.
    assert gaussian_mac_bits_per_device(2, 1, power=2 * 3.0, noise_var=1.0) == pytest.approx(2.0, abs=1e-12)
    assert gaussian_mac_bits_per_device(2, 1, power=2 * 3.0 * 7, noise_var=7.0) == pytest.approx(2.0, abs=1e-12)


def test_capacity_moves_the_right_way_and_has_its_limits() -> None:
    def bits(s: int = 100, m: int = 5, power: float = 50.0, noise_var: float = 1.0) -> float:
        return gaussian_mac_bits_per_device(s, m, power, noise_var)

    assert bits(power=51) > bits() < bits(s=101)
    assert bits(m=6) < bits() > bits(noise_var=1.1)
    assert bits(power=0) == 0
    assert bits(noise_var=0) == math.inf
    assert bits(power=1e-12) == pytest.approx(1e-12 / (2 * math.log(2)), rel=1e-9)  # low SNR: P / (2 ln 2), stable
    assert mac_sum_rate_bits(10**9, 1, 3.0, 1.0) == pytest.approx(3 / (2 * math.log(2)), rel=1e-8)  # s -> infinity


@pytest.mark.parametrize("kwargs", [{"channel_uses": 0}, {"num_devices": 0}, {"power": -1.0}, {"noise_var": -1.0}])
def test_capacity_refuses_what_makes_no_sense(kwargs: dict[str, float]) -> None:
    arguments = {"channel_uses": 4, "num_devices": 2, "power": 1.0, "noise_var": 1.0} | kwargs
    with pytest.raises(ValueError, match="must be"):
        mac_sum_rate_bits(**arguments)  # type: ignore[arg-type]


def test_decibels() -> None:
    assert db_to_linear(0.0) == 1
    assert db_to_linear(3.0) == pytest.approx(1.995, abs=1e-3)
    assert db_to_linear(-math.inf) == 0
    assert linear_to_db(0) == -math.inf
    assert linear_to_db(db_to_linear(-17.3)) == pytest.approx(-17.3)
    with pytest.raises(ValueError, match="got -1"):
        linear_to_db(-1.0)


def test_power_of_a_round_and_of_a_symbol() -> None:
    assert power_per_symbol(power_per_round(0.25, 400), 400) == 0.25
    # The paper's setting: 500 over 3,925 symbols is about -9 dB a device.
    assert linear_to_db(power_per_symbol(500, 3925)) == pytest.approx(-8.95, abs=0.01)
    with pytest.raises(ValueError, match="`channel_uses` must be at least 1, got 0"):
        power_per_symbol(1.0, 0)
