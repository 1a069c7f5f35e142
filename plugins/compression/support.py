"""How many entries a sparsifier keeps."""

from __future__ import annotations


def check_kept(density: float | None, k: int | None) -> None:
    """Refuse anything but exactly one of a density in (0, 1] and a count of at least 1.

    Args:
        density: Share of the entries to keep.
        k: Entries to keep.

    Raises:
        ValueError: If both or none are given, or the one given is out of range.
    """
    if (density is None) == (k is None):
        raise ValueError(f"Give either `density` (share of entries kept) or `k` (entries kept), got {density=}, {k=}.")
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"`density` must be in (0, 1], got {density}.")
    if k is not None and k < 1:
        raise ValueError(f"`k` must be at least 1, got {k}.")


def kept(numel: int, density: float | None, k: int | None) -> int:
    """Entries to keep of ``numel``: at least 1 and at most all."""
    wanted = round(density * numel) if density is not None else k
    assert wanted is not None  # check_kept saw to it
    return min(max(wanted, 1), numel)
