"""What a run leaves behind: metrics, checkpoints to resume from, progress on the screen, plots."""

from groundwire.callbacks.reporting.channel_plots import plot_fading
from groundwire.callbacks.reporting.checkpoint import ResumableCheckpoint
from groundwire.callbacks.reporting.fairness import FairnessReport, plot_fairness
from groundwire.callbacks.reporting.metrics_csv import MetricsCSV, read_metrics
from groundwire.callbacks.reporting.plots import plot_curves, plot_sweep
from groundwire.callbacks.reporting.progress import RoundProgressBar

__all__ = [
    "FairnessReport",
    "MetricsCSV",
    "ResumableCheckpoint",
    "RoundProgressBar",
    "plot_curves",
    "plot_fading",
    "plot_fairness",
    "plot_sweep",
    "read_metrics",
]
