"""Channels, power schedules, seeded projections and sparse recovery."""

from groundwire.plugins.channels.alignment import alignment_mse, minimum_mse
from groundwire.plugins.channels.base import Channel, Reception, Recovery
from groundwire.plugins.channels.broadcast import FadingBroadcast, common_rate, superposition_bits
from groundwire.plugins.channels.fading import Fading, NoFading, PathLoss, Rayleigh, Rician
from groundwire.plugins.channels.fading_mac import FadingMAC
from groundwire.plugins.channels.functional import (
    amp,
    bernoulli_gauss_amp,
    db_to_linear,
    gaussian_mac_bits_per_device,
    least_squares,
    linear_to_db,
    mac_sum_rate_bits,
    minimax_alpha,
    pack_complex,
    power_per_round,
    power_per_symbol,
    unpack_complex,
    water_filling,
)
from groundwire.plugins.channels.mac import GaussianMAC
from groundwire.plugins.channels.mimo import greedy_lmmse
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
    "Fading",
    "FadingBroadcast",
    "FadingMAC",
    "GaussianMAC",
    "GaussianProjection",
    "LeastSquares",
    "LinearPower",
    "NoFading",
    "PathLoss",
    "PowerSchedule",
    "Projection",
    "Rayleigh",
    "Reception",
    "Recovery",
    "Rician",
    "StepPower",
    "alignment_mse",
    "amp",
    "bernoulli_gauss_amp",
    "common_rate",
    "db_to_linear",
    "gaussian_mac_bits_per_device",
    "greedy_lmmse",
    "least_squares",
    "linear_to_db",
    "mac_sum_rate_bits",
    "make_projection",
    "minimax_alpha",
    "minimum_mse",
    "pack_complex",
    "power_per_round",
    "power_per_symbol",
    "superposition_bits",
    "unpack_complex",
    "water_filling",
]
