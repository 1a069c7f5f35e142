"""How many channel uses a round of an uplink has."""

from __future__ import annotations


def resolve_channel_uses(numel: int, *, bandwidth: float | None, channel_uses: int | None, least: int) -> int:
    """Channel uses ``s`` of one round, from a fraction of the model size or as they are.

    Args:
        numel: Model size ``d``.
        bandwidth: ``s / d``, in (0, 1]; rounded down.
        channel_uses: ``s`` itself; exactly one of the two must be given.
        least: The fewest that the scheme can work with.

    Returns:
        ``s``, with ``least <= s <= d``.

    Raises:
        ValueError: If not exactly one is given, or ``s`` is out of range.
    """
    if (bandwidth is None) == (channel_uses is None):
        raise ValueError(
            f"Give either `bandwidth` (channel uses per parameter) or `channel_uses`, got {bandwidth=}, {channel_uses=}."
        )
    if bandwidth is not None and not 0 < bandwidth <= 1:
        raise ValueError(f"`bandwidth` is channel uses per parameter and must be in (0, 1], got {bandwidth}.")
    uses = int(bandwidth * numel) if bandwidth is not None else channel_uses
    assert uses is not None  # exactly one was given
    if not least <= uses <= numel:
        given = f"bandwidth={bandwidth} of {numel} parameters is" if bandwidth is not None else "`channel_uses` is"
        raise ValueError(
            f"{given} {uses} channel uses a round, but this scheme needs {least} <= s <= {numel} "
            f"(the model has {numel} parameters)."
        )
    return uses
