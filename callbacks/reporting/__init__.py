"""What a run leaves behind: metrics, checkpoints to resume from, progress on the screen, plots."""

from groundwire.callbacks.reporting.checkpoint import ResumableCheckpoint
from groundwire.callbacks.reporting.metrics_csv import MetricsCSV, read_metrics
from groundwire.callbacks.reporting.plots import plot_curves, plot_sweep
from groundwire.callbacks.reporting.progress import RoundProgressBar

__all__ = ["MetricsCSV", "ResumableCheckpoint", "RoundProgressBar", "plot_curves", "plot_sweep", "read_metrics"]
