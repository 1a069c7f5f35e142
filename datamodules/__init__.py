"""Real data, split over devices."""

from groundwire.datamodules.base import (
    ResumableDataModule,
    ResumableLoader,
    TensorClassification,
    TensorDataModule,
    TensorLoader,
)
from groundwire.datamodules.bbc_news import BBCNews
from groundwire.datamodules.descriptions import DatasetDescriptions
from groundwire.datamodules.digits import Digits
from groundwire.datamodules.fashion_mnist import DatasetMissingError, FashionMNIST
from groundwire.datamodules.federated import Federated, RoundLoader
from groundwire.datamodules.forget_retain import ForgetRetain, ForgetRetainLoader
from groundwire.datamodules.forget_set import ForgetSetError
from groundwire.datamodules.partition import Partition, PartitionError
from groundwire.datamodules.plots import plot_partition

__all__ = [
    "BBCNews",
    "DatasetDescriptions",
    "DatasetMissingError",
    "Digits",
    "FashionMNIST",
    "Federated",
    "ForgetRetain",
    "ForgetRetainLoader",
    "ForgetSetError",
    "Partition",
    "PartitionError",
    "ResumableDataModule",
    "ResumableLoader",
    "RoundLoader",
    "TensorClassification",
    "TensorDataModule",
    "TensorLoader",
    "plot_partition",
]
