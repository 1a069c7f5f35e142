"""Real data, split over devices."""

from groundwire.datamodules.base import ResumableDataModule, ResumableLoader, TensorClassification, TensorLoader
from groundwire.datamodules.digits import Digits
from groundwire.datamodules.fashion_mnist import DatasetMissingError, FashionMNIST
from groundwire.datamodules.federated import Federated, RoundLoader
from groundwire.datamodules.partition import Partition, PartitionError
from groundwire.datamodules.plots import plot_partition

__all__ = [
    "DatasetMissingError",
    "Digits",
    "FashionMNIST",
    "Federated",
    "Partition",
    "PartitionError",
    "ResumableDataModule",
    "ResumableLoader",
    "RoundLoader",
    "TensorClassification",
    "TensorLoader",
    "plot_partition",
]
