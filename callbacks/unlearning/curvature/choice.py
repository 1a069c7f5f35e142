"""Which representation of curvature, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from groundwire.callbacks.unlearning.curvature.base import Curvature
from groundwire.callbacks.unlearning.curvature.ekfac import EKFACCurvature
from groundwire.callbacks.unlearning.curvature.full import FullCurvature, check_size
from groundwire.callbacks.unlearning.curvature.low_rank import EXTRA_COLUMNS, LowRankCurvature
from groundwire.plugins.layout import ParameterLayout

CurvatureKind = Literal["auto", "full", "ekfac", "lowrank"]
KINDS: dict[str, type[Curvature]] = {c.kind: c for c in (FullCurvature, LowRankCurvature, EKFACCurvature)}
AUTO_FULL = 4_096
_AUTO_LOW_RANK = 2**30  # bytes of the vectors that low rank keeps


def check_kind(kind: str, numel: int, rank: int) -> None:
    """Refuse a representation that cannot hold so many parameters, before any work is done.

    Args:
        kind: As for :func:`make_curvature`.
        numel: Parameters.
        rank: Of ``"lowrank"``.

    Raises:
        ValueError: If it is unknown or too large.
    """
    if kind not in ("auto", "full", "ekfac", "lowrank"):
        raise ValueError(f"`kind` must be 'auto', 'full', 'ekfac' or 'lowrank', got {kind!r}.")
    if rank < 1:
        raise ValueError(f"`rank` must be at least 1, got {rank}.")
    if kind == "full":
        check_size(numel)


def make_curvature(
    kind: CurvatureKind, layout: ParameterLayout, weight_decay: Sequence[float], rank: int, seed: int
) -> Curvature:
    """An empty representation.

    ``"auto"`` is full up to 4,096 parameters, low rank while its vectors fit into a GiB, and ekfac beyond.

    Args:
        kind: Which.
        layout: The parameters.
        weight_decay: Of each parameter.
        rank: For ``"lowrank"``.
        seed: For ``"lowrank"``.

    Returns:
        The representation.

    Raises:
        ValueError: If the kind is unknown, or cannot hold that many parameters.
    """
    check_kind(kind, layout.numel, rank)
    if kind == "auto":
        fits = (rank + EXTRA_COLUMNS) * layout.numel * 4 <= _AUTO_LOW_RANK
        kind = "full" if layout.numel <= AUTO_FULL else "lowrank" if fits else "ekfac"
    if kind == "full":
        return FullCurvature(layout)
    if kind == "lowrank":
        return LowRankCurvature(layout, min(rank, layout.numel), seed)
    return EKFACCurvature(layout, weight_decay)
