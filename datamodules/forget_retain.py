"""Training data in two parts: what is to be forgotten, and what is retained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from typing_extensions import override

from groundwire.callbacks.training_data import refuse_hooks, training_tensors
from groundwire.callbacks.unlearning.data import Part, data_digest
from groundwire.datamodules.base import ResumableDataModule, ResumableLoader, Split, TensorLoader
from groundwire.datamodules.federated import Federated
from groundwire.plugins.random import root_seed, stream

Forget = Literal["random", "class", "indices", "device"]


class ForgetSetError(MisconfigurationException, ValueError):
    """The samples cannot be forgotten as asked."""


class ForgetRetainLoader(ResumableLoader[dict[Part, Split]]):
    """Batches ``{"forget": (x, y), "retain": (x, y)}``, or of one of the two.

    An epoch is a pass over the longer part; the shorter one is gone through again and again, in a new order each time.
    In turn, the forget batches come first and the retain batches after them, each in a dict of its own.

    Args:
        loaders: One for each part that is served.
        in_turn: Epochs at the beginning in which the parts come in turn; the later ones, just as long, have retain
            batches alone. None for both parts in every batch.
    """

    def __init__(self, loaders: Mapping[Part, TensorLoader], in_turn: int | None = None) -> None:
        super().__init__()
        self.loaders = dict(loaders)
        self.in_turn = in_turn

    @override
    def __len__(self) -> int:
        lengths = [len(loader) for loader in self.loaders.values()]
        return max(lengths) if self.in_turn is None else sum(lengths)

    @override
    def batch(self, epoch: int, index: int) -> dict[Part, Split]:
        if self.in_turn is None:
            number = epoch * len(self) + index
            return {part: _nth(loader, number) for part, loader in self.loaders.items()}
        forget, retain = self.loaders["forget"], self.loaders["retain"]
        turns = min(epoch, self.in_turn)
        if epoch < self.in_turn and index < len(forget):
            return {"forget": _nth(forget, epoch * len(forget) + index)}
        retained = turns * len(retain) + (epoch - turns) * len(self)
        return {"retain": _nth(retain, retained + index - (len(forget) if epoch < self.in_turn else 0))}


def _nth(loader: TensorLoader, number: int) -> Split:
    """The batch of that number, passes one after the other."""
    return loader.batch(*divmod(number, len(loader)))


class ForgetRetain(ResumableDataModule):
    """Splits the training data of any datamodule into the samples to forget and those to retain.

    Which samples are meant is kept in checkpoints, by number (their row in the training data): a later run names the same
    ones. A method that starts from a trained checkpoint takes over from it with which seed its data was split, and which
    samples earlier requests have removed: they are neither in the forget nor in the retain set of the next one.

    Validation, test and prediction data pass through. Batches for training are dicts with the entries ``forget`` and
    ``retain``, for the callbacks of ``groundwire.callbacks.unlearning``.

    Args:
        datamodule: Where the data comes from: one of this package, or any whose training set gives ``(x, y)`` pairs of
            tensors.
        forget: ``"random"`` samples, one ``"class"``, given ``"indices"``, or what one ``"device"`` of ``Federated``
            holds.
        fraction: Share of the training samples for ``"random"``, in (0, 1), rounded; at least one sample.
        label: For ``"class"``: the label, or the group where the datamodule has ``train_groups`` (a topic of text).
        indices: For ``"indices"``: rows of the training data, or a file of them (text, or ``.npy``).
        device: For ``"device"``: its number.
        batch_size: Samples a batch of each part.
        drop_last: Leave out a last batch that is smaller, of each part: for ``EdgeStrategy``, which needs equally many
            samples of both. The order is new in every pass, and so are the samples left out.
        retain_access: Whether retained data may be touched at all; False lets every access to it raise, as if it were gone.
        seed: Root seed of the random choice and the order; by default that of ``seed_everything``, else 0.

    Raises:
        ValueError: If an argument is out of range.
        ForgetSetError: At setup, if the forget set is empty, everything, not in the training
            data, forgotten already, or holds a sample of the test data.

    Example:
        >>> from groundwire.datamodules import Digits
        >>> data = ForgetRetain(Digits(seed=0), forget="class", label=3, seed=0)
        >>> data.setup("fit")
        >>> len(data.forget_indices), len(data.retain_indices)
        (131, 1127)
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch["forget"][1].unique(), len(batch["retain"][1])
        (tensor([3]), 128)
    """

    def __init__(
        self,
        datamodule: pl.LightningDataModule,
        forget: Forget = "random",
        fraction: float = 0.05,
        label: int | None = None,
        indices: Sequence[int] | str | Path | None = None,
        device: int | None = None,
        batch_size: int = 128,
        drop_last: bool = False,
        retain_access: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        needed = {"class": ("label", label), "indices": ("indices", indices), "device": ("device", device)}
        if forget != "random" and forget not in needed:
            raise ValueError(f"`forget` must be 'random', 'class', 'indices' or 'device', got {forget!r}.")
        if forget in needed and needed[forget][1] is None:
            raise ValueError(f"forget={forget!r} needs `{needed[forget][0]}`.")
        given = sorted(name for kind, (name, value) in needed.items() if kind != forget and value is not None)
        if given:
            raise ValueError(f"forget={forget!r} does not use {', '.join(given)}: leave it out, or change `forget`.")
        if not 0 < fraction < 1:
            raise ValueError(f"`fraction` must be in (0, 1), got {fraction}.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        if forget == "device" and not isinstance(datamodule, Federated):
            raise ValueError(f"forget='device' needs the data of a Federated, got {type(datamodule).__name__}.")
        self.datamodule = datamodule
        self.forget = forget
        self.fraction = fraction
        self.label = label
        self.indices = indices
        self.device = device
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.retain_access = retain_access
        self.seed = seed
        self.earlier = torch.empty(0, dtype=torch.int64)
        self._root_seed = 0
        self._data: Split
        self._digest: str | None = None
        self._forget: Tensor | None = None
        self._parts: tuple[Part, ...] = ("forget", "retain")
        self._in_turn: int | None = None

    # ---------------------------------------------------------------- set-up

    @override
    def prepare_data(self) -> None:
        self.datamodule.trainer = self.trainer
        self.datamodule.prepare_data()

    @override
    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        self.datamodule.trainer = self.trainer
        self.datamodule.setup(stage or "fit")
        if stage in (None, "fit") and self._forget is None:
            refuse_hooks(self.datamodule, type(self).__name__)
            self._root_seed = root_seed(self.seed)
            self._choose()

    def _choose(self) -> None:
        inner = self.datamodule
        self._data = training_tensors(inner.datamodule if isinstance(inner, Federated) else inner, "ForgetRetain")
        self._digest = None
        self._forget = self._chosen()
        self._refuse_test_samples()

    def _chosen(self) -> Tensor:
        trained_on = self.trained_on
        left = trained_on[~torch.isin(trained_on, self.earlier)]
        if self.forget == "random":
            number = max(1, round(self.fraction * len(trained_on)))
            order = torch.randperm(len(left), generator=stream(self._root_seed, purpose="data/forget"))
            chosen = left[order[:number]]
        elif self.forget == "class":
            chosen = left[self.groups[left] == self.label]
            what = (
                f"no training sample has the label {self.label}; there are {torch.unique(self.groups[left]).tolist()}"
            )
            if not len(chosen):
                raise ForgetSetError(f"The forget set is empty: {what}.")
        elif self.forget == "device":
            chosen = self._of_device()
        else:
            chosen = self._given()
        return self._checked(chosen.sort().values, left)

    def _checked(self, chosen: Tensor, left: Tensor) -> Tensor:
        if not len(chosen):
            raise ForgetSetError("The forget set is empty: name at least one training sample.")
        if len(torch.unique(chosen)) < len(chosen):
            raise ForgetSetError("The forget set names a sample twice: give each index once.")
        again = chosen[torch.isin(chosen, self.earlier)]
        if len(again):
            raise ForgetSetError(
                f"{len(again)} samples of the forget set, such as {int(again[0])}, were forgotten by an earlier request: "
                "leave them out."
            )
        unknown = chosen[~torch.isin(chosen, left)]
        if len(unknown):
            raise ForgetSetError(
                f"{len(unknown)} indices of the forget set, such as {int(unknown[0])}, are not in the training data of "
                f"{len(self._data[1])} samples: give rows of the training data, from 0."
            )
        if len(chosen) == len(left):
            raise ForgetSetError(
                "The forget set is all of the training data: nothing would be retained. Start a new model."
            )
        return chosen

    def _given(self) -> Tensor:
        if isinstance(self.indices, str | Path):
            path = Path(self.indices)
            if not path.is_file():
                raise FileNotFoundError(f"There is no file of indices at {path}: write one index a line, or an .npy.")
            try:
                array = np.load(path) if path.suffix == ".npy" else np.loadtxt(path, dtype=np.int64, ndmin=1)
            except ValueError as error:
                raise ForgetSetError(
                    f"{path} is no list of indices: {error}. Write one index a line, or an .npy."
                ) from error
            return torch.from_numpy(np.asarray(array, dtype=np.int64).reshape(-1))
        assert self.indices is not None
        return torch.tensor(list(self.indices), dtype=torch.int64)

    def _of_device(self) -> Tensor:
        assert isinstance(self.datamodule, Federated)
        assert self.device is not None
        partition = self.datamodule.partition
        if not 0 <= self.device < len(partition.counts):
            raise ForgetSetError(f"`device` must be in [0, {len(partition.counts)}), got {self.device}.")
        end = int(partition.counts[: self.device + 1].sum())
        return partition.indices[end - int(partition.counts[self.device]) : end]

    def _refuse_test_samples(self) -> None:
        if not is_overridden("test_dataloader", self.datamodule):
            return
        self.datamodule.setup("test")  # another package's datamodule may load its test data only then
        forgotten = {_bytes_of(x) for x in self._data[0][self.forget_indices]}
        found = sum(_bytes_of(x) in forgotten for x in _inputs(self.datamodule.test_dataloader()))
        if found:
            raise ForgetSetError(
                f"{found} samples of the test data are in the forget set: forgetting could not be told from "
                "generalisation. Take them out of the test data."
            )

    # ---------------------------------------------------------------- what is where

    @property
    def trained_on(self) -> Tensor:
        """Rows of the training data that the model was trained on at first, ascending."""
        if isinstance(self.datamodule, Federated):
            return self.datamodule.partition.indices.sort().values
        return torch.arange(len(self._data[1]))

    @property
    def groups(self) -> Tensor:
        """Of each row: the label, or the group where the datamodule has ``train_groups``."""
        inner = self.datamodule.datamodule if isinstance(self.datamodule, Federated) else self.datamodule
        groups = getattr(inner, "train_groups", self._data[1])
        if not isinstance(groups, Tensor) or groups.is_floating_point() or groups.ndim != 1:
            raise ForgetSetError(
                "forget='class' needs integer labels of shape (n,), or `train_groups` of that shape in the datamodule: "
                "use forget='indices'."
            )
        return groups

    @property
    def forget_indices(self) -> Tensor:
        """Rows of the training data to forget, ascending.

        Raises:
            RuntimeError: Before :meth:`setup`.
        """
        if self._forget is None:
            raise RuntimeError("The forget set is chosen by setup('fit').")
        return self._forget

    @property
    def retain_indices(self) -> Tensor:
        """Rows of the training data that remain, ascending: neither forgotten now nor earlier.

        Raises:
            MisconfigurationException: If ``retain_access`` is False.
        """
        if not self.retain_access:
            raise MisconfigurationException(
                "The retained data was asked for, but ForgetRetain(retain_access=False) says that it is gone. Use a method "
                "that needs the forget set alone (WINU, SSD with recorded importances, GradientAscent), or allow access."
            )
        gone = torch.cat([self.earlier, self.forget_indices])
        return self.trained_on[~torch.isin(self.trained_on, gone)]

    @property
    def data_digest(self) -> str:
        """SHA-256 of the training data, by which a checkpoint's curvature knows it."""
        if self._digest is None:
            self._digest = data_digest(self._data)
        return self._digest

    def batches(self, part: Part, batch_size: int | None = None) -> Iterator[Split]:
        """All samples of a part, in the order of their indices, without augmentation."""
        indices = self.forget_indices if part == "forget" else self.retain_indices
        for rows in torch.split(indices, batch_size or self.batch_size):
            yield self._data[0][rows], self._data[1][rows]

    def serve(self, *parts: Part, in_turn: int | None = None) -> None:
        """Say which parts a training batch has, and for how many epochs they come in turn; see the loader."""
        self._parts, self._in_turn = parts, in_turn

    def adopt(self, checkpoint: Mapping[str, Any]) -> None:
        """Take over from the checkpoint that is to forget: the seed of its splits, and what it has forgotten before.

        Args:
            checkpoint: A Lightning checkpoint of the run that trained, or of an earlier request.

        Raises:
            ValueError: If the samples named now are not in its training data, or were forgotten by it.
            MisconfigurationException: If its data was split with another seed than the one given here.
        """
        before = checkpoint.get(type(self).__qualname__)
        self.earlier = torch.empty(0, dtype=torch.int64)  # this object may have served another checkpoint
        if before is not None:
            self.earlier = torch.cat([before["earlier"], before["forget"]]).sort().values
        state = checkpoint.get(type(self.datamodule).__qualname__) if before is None else before["datamodule"]
        if state:
            self.datamodule.load_state_dict(state)
        self._choose()
        if before is not None and before["data_digest"] != self.data_digest:
            raise ForgetSetError(
                "The checkpoint was trained on other data (their hashes differ): the indices would name other samples. "
                "Use the datamodule that it was trained with."
            )

    # ---------------------------------------------------------------- loaders

    @override
    def make_train_loader(self) -> ForgetRetainLoader:
        rank, num_ranks = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        loaders: dict[Part, TensorLoader] = {}
        for part in self._parts:
            indices = self.forget_indices if part == "forget" else self.retain_indices
            split = self._data[0][indices], self._data[1][indices]
            loaders[part] = TensorLoader(
                split,
                self.batch_size,
                shuffle=True,
                seed=self._root_seed,
                drop_last=self.drop_last,
                rank=rank,
                num_ranks=num_ranks,
            )
            if not len(loaders[part]):
                raise ForgetSetError(f"The {part} set has {len(indices)} samples: too few for {num_ranks} processes.")
        return ForgetRetainLoader(loaders, self._in_turn)

    @override
    def val_dataloader(self) -> Any:
        return self.datamodule.val_dataloader() if is_overridden("val_dataloader", self.datamodule) else []

    @override
    def test_dataloader(self) -> Any:
        return self.datamodule.test_dataloader()

    @override
    def predict_dataloader(self) -> Any:
        return self.datamodule.predict_dataloader()

    @override
    def teardown(self, stage: str | None = None) -> None:
        self.datamodule.teardown(stage or "fit")

    # ---------------------------------------------------------------- checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "forget": self.forget_indices,
            "earlier": self.earlier,
            "seed": self._root_seed,
            "data_digest": self.data_digest,
            "datamodule": self.datamodule.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.datamodule.load_state_dict(state_dict["datamodule"])
        self.earlier = state_dict["earlier"]
        if self.seed is None:
            self._root_seed = state_dict["seed"]
        if self._forget is None:
            return
        self._choose()
        if state_dict["data_digest"] != self.data_digest or not torch.equal(state_dict["forget"], self.forget_indices):
            raise MisconfigurationException(
                "The checkpoint belongs to another request: its forget set or its training data is not the one given "
                "here. Resume with the same settings of ForgetRetain, or start a new run."
            )


def _bytes_of(sample: Tensor) -> bytes:
    return sample.contiguous().numpy().tobytes()


def _inputs(loader: Any) -> Iterator[Tensor]:
    for batch in loader:
        if isinstance(batch, tuple | list) and isinstance(batch[0], Tensor):
            yield from batch[0]
