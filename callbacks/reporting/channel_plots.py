"""A picture of a fading channel: gains over rounds, and how often each strength comes."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from groundwire.callbacks.reporting.plots import Array
from groundwire.plugins.channels import Fading, linear_to_db
from groundwire.plugins.random import Key


def draw_gains_db(fading: Fading, num_devices: int, num_rounds: int, *, uses: int = 1, seed: int = 0) -> Array:
    """The strengths ``10 log10 |h|^2`` that a run with that seed meets.

    Args:
        fading: The law of the gains.
        num_devices: Devices ``M``, with ids from 0.
        num_rounds: Rounds ``T``.
        uses: Complex channel uses a round, ``n``.
        seed: Root seed of the run.

    Returns:
        Shape ``(T, M, n)``, or ``(T, M, 1)`` under block fading, in dB.

    Raises:
        ValueError: If a number is below 1.

    Example:
        >>> from groundwire.plugins.channels import NoFading
        >>> draw_gains_db(NoFading(variance=10.0), num_devices=2, num_rounds=3).round(3).tolist()
        [[[10.0], [10.0]], [[10.0], [10.0]], [[10.0], [10.0]]]
    """
    for name, value in {"num_devices": num_devices, "num_rounds": num_rounds, "uses": uses}.items():
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    keys = [Key(seed=seed, round=t, devices=tuple(range(num_devices))) for t in range(num_rounds)]
    squares: Array = np.stack([fading.gains(key, uses).abs().double().square().numpy() for key in keys])
    return np.asarray(10 * np.log10(squares))


def law_density_db(fading: Fading, edges: Array, num_devices: int, *, seed: int = 0) -> Array:
    """The density of ``10 log10 |h|^2`` over all devices under the law, averaged within bins.

    Args:
        fading: The law of the gains.
        edges: Edges of the bins in dB, ascending, shape ``(B + 1,)``.
        num_devices: Devices, with ids from 0: path loss gives each its own law.
        seed: Root seed of the run, on which the devices' places depend.

    Returns:
        Shape ``(B,)``, per dB.
    """
    means = fading.mean_squares(Key(seed=seed, devices=tuple(range(num_devices)))).tolist()
    above = np.zeros(len(edges))
    for mean in set(means):
        law = fading.law(mean)
        above += means.count(mean) / num_devices * np.array([law.activity(10 ** (edge / 10)) for edge in edges])
    return -np.diff(above) / np.diff(edges)


def plot_fading(
    fading: Fading,
    num_devices: int = 5,
    num_rounds: int = 100,
    *,
    uses: int = 1,
    threshold: float | None = None,
    num_bins: int = 40,
    seed: int = 0,
    title: str | None = None,
) -> tuple[Figure, tuple[Axes, Axes]]:
    """Gains as a run meets them: a line a device over rounds, beside the histogram of all and the density of their law.

    Args:
        fading: The law of the gains.
        num_devices: Devices, with ids from 0.
        num_rounds: Rounds.
        uses: Complex channel uses a round; the lines show the first of them, the histogram all.
        threshold: On ``|h|^2``; drawn as a dashed line, below which devices are silent.
        num_bins: Bins of the histogram.
        seed: Root seed of the run.
        title: Title of the figure.

    Returns:
        The figure, and the axes of the lines and of the histogram, which share the ordinate.

    Raises:
        ValueError: If a number is below 1, or ``threshold`` not positive.

    Example:
        >>> from groundwire.plugins.channels import Rayleigh
        >>> fig, (rounds, histogram) = plot_fading(Rayleigh(), num_devices=3, num_rounds=20)
        >>> len(rounds.lines), rounds.get_ylabel()
        (3, 'Channel gain $|h|^2$ (dB)')
    """
    if threshold is not None and not threshold > 0:
        raise ValueError(f"`threshold`, on |h|^2, must be > 0 to be drawn in dB, got {threshold}.")
    if num_bins < 1:
        raise ValueError(f"`num_bins` must be at least 1, got {num_bins}.")
    gains = draw_gains_db(fading, num_devices, num_rounds, uses=uses, seed=seed)
    fig = Figure(figsize=(9, 4.5), layout="constrained")
    over_rounds, histogram = fig.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    for m in range(num_devices):
        over_rounds.plot(np.arange(num_rounds), gains[:, m, 0], linewidth=1, label=f"device {m}")

    margin = 0.05 + 0.05 * (gains.max() - gains.min())
    edges = np.linspace(gains.min() - margin, gains.max() + margin, num_bins + 1)
    counts, _ = np.histogram(gains, bins=edges)
    histogram.stairs(
        counts / (gains.size * np.diff(edges)), edges, orientation="horizontal", fill=True, alpha=0.4, label="drawn"
    )
    density = law_density_db(fading, edges, num_devices, seed=seed)
    histogram.plot(density, (edges[1:] + edges[:-1]) / 2, color="black", linewidth=1.5, label="law")
    if threshold is not None:
        for ax in (over_rounds, histogram):
            ax.axhline(linear_to_db(threshold), linestyle="--", color="0.4", label="threshold")

    over_rounds.set_xlabel("Round")
    over_rounds.set_ylabel("Channel gain $|h|^2$ (dB)")
    histogram.set_xlabel("Density (per dB)")
    for ax in (over_rounds, histogram):
        ax.grid(alpha=0.3)
    if num_devices <= 10:  # more would hide the lines
        over_rounds.legend(fontsize="small")
    histogram.legend(fontsize="small")
    if title:
        fig.suptitle(title)
    return fig, (over_rounds, histogram)
