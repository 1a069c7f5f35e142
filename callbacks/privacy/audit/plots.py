"""Pictures of an audit."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from groundwire.callbacks.privacy.audit.result import AuditReport
from groundwire.callbacks.reporting.plots import figure_and_axes


def plot_roc(report: AuditReport, *, ax: Axes | None = None) -> tuple[Figure, Axes]:
    """The ROC curve of each attack in double logarithmic scale, with the region in which the claim lets it lie.

    Under (epsilon, delta) every test satisfies TPR <= e^eps FPR + delta and 1 - FPR <= e^eps (1 - TPR) + delta. A curve
    above the region refutes nothing by itself: it is measured on finitely many records.

    Args:
        report: What was found.
        ax: Axes to draw into; a new figure where None.

    Returns:
        The figure and its axes.
    """
    fig, ax = figure_and_axes(ax)
    left = min(1 / (2 * max(attack.nonmembers for attack in report.attacks)), 1e-2)  # a rate of 0 is drawn here
    low = min(1 / (2 * max(attack.members for attack in report.attacks)), left)
    grid = np.geomspace(left, 1, 400)
    if report.claimed_epsilon is not None:
        delta = report.claimed_delta or 0.0
        highest = claimed_tpr(grid, report.claimed_epsilon, delta)
        label = f"claim: $\\epsilon$ = {report.claimed_epsilon:.3g}, $\\delta$ = {delta:.2g}"
        ax.plot(grid, highest, color="tab:green", linestyle="--", linewidth=1.5, label=label)
        ax.fill_between(grid, low, highest, color="tab:green", alpha=0.1, linewidth=0)
    for attack in report.attacks:
        fpr, tpr = (rates.numpy() for rates in attack.roc)
        label = f"{attack.name}: AUC {attack.auc:.3f}, $\\epsilon$ at least {attack.epsilon_lower:.2f}"
        ax.plot(fpr.clip(left), tpr.clip(low), drawstyle="steps-post", label=label)
    ax.plot(grid, grid, color="0.5", linestyle=":", linewidth=1, label="guessing")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(left, 1)
    ax.set_ylim(low, 1)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    ax.set_xlabel("False positive rate (%)")
    ax.set_ylabel("True positive rate (%)")
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small", loc="lower right")
    return fig, ax


def claimed_tpr(
    fpr: np.ndarray[tuple[int], np.dtype[np.float64]], epsilon: float, delta: float
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """The largest true positive rate that an (epsilon, delta)-private mechanism allows at each false positive rate.

    Args:
        fpr: False positive rates in [0, 1], any shape.
        epsilon: At least 0; may be infinite.
        delta: In [0, 1].

    Returns:
        Rates in [0, 1], same shape.

    Example:
        >>> claimed_tpr(np.array([0.0, 0.1, 0.5]), math.log(3), 0.0).round(3).tolist()
        [0.0, 0.3, 0.833]

    Reference:
        Kairouz, Oh, Viswanath, "The Composition Theorem for Differential Privacy", ICML 2015. arXiv:1311.0776
    """
    if epsilon > 700:  # e^eps overflows
        return np.ones_like(fpr)
    ahead = math.exp(epsilon) * fpr + delta
    behind = 1 - (1 - fpr - delta) * math.exp(-epsilon)
    return np.minimum(np.minimum(ahead, behind), 1.0)
