"""Scikit-learn's digits: real data that needs no download."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from typing_extensions import override

from groundwire.datamodules.base import OmitIn, Split, TensorClassification, shuffled_split


class Digits(TensorClassification):
    """1,797 handwritten digits of 8 x 8 pixels in 10 classes, bundled with scikit-learn; pixels in [0, 1].

    Args:
        batch_size: Samples a batch.
        val_fraction: Share of the samples held out for validation.
        test_fraction: Share of the samples held out for the test.
        flatten: Give vectors of 64 pixels instead of images ``(1, 8, 8)``.
        seed: Root seed of splits and order; by default that of ``seed_everything``, else 0.
        drop_last: Leave out a last training batch that is smaller.
        train_fraction: Few-shot: share of the training samples of every class to keep, in (0, 1]; at least one a class.
        omit_classes: Zero-shot: classes without a training sample; validation and test data keep theirs.
        omit_in: ``"all"`` leaves these classes out of validation and test data, too.

    Raises:
        ValueError: If a fraction or a class is out of range, or nothing remains to train on.

    Example:
        >>> data = Digits(batch_size=32, seed=0)
        >>> data.setup()
        >>> x, y = next(iter(data.train_dataloader()))
        >>> x.shape, y.shape, len(data.train_data[0])
        (torch.Size([32, 1, 8, 8]), torch.Size([32]), 1258)
        >>> few = Digits(seed=0, train_fraction=0.1, omit_classes=[0, 1])
        >>> few.setup()
        >>> few.train_data[1].bincount().tolist()
        [0, 0, 13, 13, 13, 13, 13, 11, 13, 12]

    Reference:
        Alpaydin, Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
    """

    num_classes = 10

    def __init__(
        self,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        flatten: bool = False,
        seed: int | None = None,
        drop_last: bool = False,
        train_fraction: float = 1.0,
        omit_classes: list[int] | None = None,
        omit_in: OmitIn = "train",
    ) -> None:
        super().__init__(batch_size, seed, drop_last, train_fraction, omit_classes, omit_in)
        if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
            raise ValueError(
                "`val_fraction` and `test_fraction` must be >= 0 and leave something to train on, got "
                f"{val_fraction} and {test_fraction}."
            )
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.flatten = flatten
        self.input_shape = (64,) if flatten else (1, 8, 8)

    @override
    def load(self, seed: int) -> tuple[Split, Split, Split]:
        images, labels = load_digits(return_X_y=True)
        x = torch.from_numpy(images).float().div_(16).view(-1, *self.input_shape)
        y = torch.from_numpy(labels).long()
        rest, test = shuffled_split(x, y, round(self.test_fraction * len(x)), seed, "data/test")
        train, val = shuffled_split(*rest, round(self.val_fraction * len(x)), seed, "data/val")
        return train, val, test
