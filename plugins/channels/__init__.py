"""Channels, power schedules, seeded projections and sparse recovery."""

from groundwire.plugins.channels.base import Channel, Reception, Recovery
from groundwire.plugins.channels.functional import (
    amp,
    bernoulli_gauss_amp,
    db_to_linear,
    gaussian_mac_bits_per_device,
    least_squares,
    linear_to_db,
    mac_sum_rate_bits,
    minimax_alpha,
    power_per_round,
    power_per_symbol,
)
from groundwire.plugins.channels.mac import GaussianMAC
from groundwire.plugins.channels.power import ConstantPower, LinearPower, PowerSchedule, StepPower
from groundwire.plugins.channels.projection import DCTProjection, GaussianProjection, Projection, make_projection
from groundwire.plugins.channels.recovery import AMP, BernoulliGaussAMP, Decoder, LeastSquares

__all__ = [
    "AMP",
    "BernoulliGaussAMP",
    "Channel",
    "ConstantPower",
    "DCTProjection",
    "Decoder",
    "GaussianMAC",
    "GaussianProjection",
    "LeastSquares",
    "LinearPower",
    "PowerSchedule",
    "Projection",
    "Reception",
    "Recovery",
    "StepPower",
    "amp",
    "bernoulli_gauss_amp",
    "db_to_linear",
    "gaussian_mac_bits_per_device",
    "least_squares",
    "linear_to_db",
    "mac_sum_rate_bits",
    "make_projection",
    "minimax_alpha",
    "power_per_round",
    "power_per_symbol",
]
