"""Training data in two parts: what is to be forgotten, and what is retained."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from typing_extensions import override

from groundwire.callbacks.training_data import TrainingSamples, refuse_hooks, training_samples
from groundwire.callbacks.unlearning.data import Part, earlier_request
from groundwire.datamodules.base import ResumableDataModule, ResumableLoader, Split, TensorLoader
from groundwire.datamodules.federated import Federated
from groundwire.datamodules.forget_set import ForgetSetError, given_rows, refuse_overlap
from groundwire.plugins.random import root_seed, stream

Forget = Literal["random", "class", "indices", "device"]


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
    samples earlier requests have removed: they are neither in the forget nor in the retain set of the next one. Where the
    checkpoint has hashes of its training data, other data are refused.

    Validation, test and prediction data pass through. Batches for training are dicts with the entries ``forget`` and
    ``retain``, for the callbacks of ``groundwire.callbacks.unlearning``.

    Args:
        datamodule: Where the data comes from: one of this package, or any whose training set gives ``(x, y)`` pairs of
            tensors. What is read of a data set is kept.
        forget: ``"random"`` samples, one ``"class"``, given ``"indices"``, or what one ``"device"`` of ``Federated``
            holds.
        fraction: Share of the training samples for ``"random"``, in (0, 1), rounded; at least one sample.
        label: For ``"class"``: the label, or the group where the datamodule has ``train_groups`` (a topic of text).
        indices: For ``"indices"``: rows of the training data, whole numbers, or a file of them (text, or ``.npy``).
        device: For ``"device"``: its number.
        batch_size: Samples a batch of each part.
        drop_last: Leave out a last batch that is smaller, of each part: for ``EdgeStrategy``, which needs equally many
            samples of both. The order is new in every pass, and so are the samples left out.
        retain_access: Whether retained data may be touched at all; False lets every access to it raise, as if it were gone.
            Then no sample is read, or hashed, but those to forget; the labels of a ``"class"`` have to be in memory.
        seed: Root seed of the random choice and the order; by default that of ``seed_everything``, else 0.

    Raises:
        ValueError: If an argument is out of range.
        ForgetSetError: At setup, if the forget set is empty, everything, not in the training data, forgotten already, or
            holds a sample of the test data; in :meth:`adopt` also if the checkpoint was trained on other data.
        MisconfigurationException: At setup, if the training samples cannot be had in their order, or a checkpoint that
            was loaded belongs to another request.

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
        self._samples: TrainingSamples | None = None
        self._read: dict[Part | Literal["earlier"], Split] = {}  # what was read of a data set
        self._digest: str | None = None
        self._forget_digest: str | None = None
        self._forget: Tensor | None = None
        self._loaded: dict[str, Any] | None = None  # a checkpoint's state that came before `setup`
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
        self._refuse_to_read_devices(stage or "fit")
        self.datamodule.setup(stage or "fit")
        if stage in (None, "fit") and self._forget is None:
            refuse_hooks(self.datamodule, type(self).__name__)
            self._root_seed = root_seed(self.seed)
            if self._loaded is None:
                self._open()
                self._choose()
            else:
                self._go_on_from(self._loaded)
                self._loaded = None
        elif self._loaded is not None:
            self.datamodule.load_state_dict(self._loaded["datamodule"])

    def _refuse_to_read_devices(self, stage: str) -> None:
        """``Federated`` reads all samples when it deals them out."""
        if self.retain_access or not isinstance(self.datamodule, Federated) or stage != "fit":
            return
        within = self.datamodule.datamodule
        within.trainer = self.trainer
        within.setup(stage)
        if training_samples(within, type(self).__name__).labels is None:
            raise MisconfigurationException(
                f"Federated reads every sample of {type(within).__name__} to deal them out, but "
                "ForgetRetain(retain_access=False) says that retained data is gone. Keep the training data as tensors "
                "(`train_data`), or allow access."
            )

    def _open(self) -> None:
        """Find the training data again: another seed may have been loaded into the datamodule."""
        self._samples = training_samples(self.datamodule, type(self).__name__)
        self._digest = None

    def _choose(self) -> None:
        self._read, self._forget_digest = {}, None
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
            groups = self.groups[left]
            chosen = left[groups == self.label]
            if not len(chosen):
                raise ForgetSetError(
                    f"The forget set is empty: no training sample has the label {self.label}; there are "
                    f"{torch.unique(groups).tolist()}."
                )
        elif self.forget == "device":
            chosen = self._of_device()
        else:
            assert self.indices is not None
            chosen = given_rows(self.indices)
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
                f"{len(self._all)} samples: give rows of the training data, from 0."
            )
        if len(chosen) == len(left):
            raise ForgetSetError(
                "The forget set is all of the training data: nothing would be retained. Start a new model."
            )
        return chosen

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
        refuse_overlap(self._part("forget")[0], self.datamodule.test_dataloader())

    # ---------------------------------------------------------------- what is where

    @property
    def _all(self) -> TrainingSamples:
        if self._samples is None:
            raise RuntimeError("The training data is known after setup('fit').")
        return self._samples

    @property
    def trained_on(self) -> Tensor:
        """Rows of the training data that the model was trained on at first, ascending."""
        return self._all.trained_on

    @property
    def groups(self) -> Tensor:
        """Of each row: the label, or the group where the datamodule has ``train_groups``.

        Raises:
            ForgetSetError: If they are no integers, or retained samples would have to be read for them and must not.
        """
        inner = self.datamodule.datamodule if isinstance(self.datamodule, Federated) else self.datamodule
        groups = getattr(inner, "train_groups", self._all.labels)
        if groups is None:
            if not self.retain_access:
                raise ForgetSetError(
                    "forget='class' has to know the labels of all samples, and retained ones may not be read for theirs "
                    f"(retain_access=False): give {type(inner).__name__} `train_groups`, the label of each row, or use "
                    "forget='indices'."
                )
            groups = self._all.fetch_all()[1]
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
    def data_digest(self) -> str | None:
        """SHA-256 of the training data, by which checkpoints know it: see ``TrainingSamples.digest``.

        Without access to retained data it is what the checkpoint says that was adopted or loaded; None if it says nothing.
        """
        if self._digest is None and self.retain_access:
            self._digest = self._all.digest()
        return self._digest

    def batches(self, part: Part | Literal["earlier"], batch_size: int | None = None) -> Iterator[Split]:
        """All samples of a part, or those that earlier requests removed, in the order of their indices, unaugmented."""
        rows, in_memory = self._rows(part), self._all.labels is not None
        if not len(rows):
            return
        for some in torch.split(torch.arange(len(rows)), batch_size or self.batch_size):
            if in_memory:
                yield self._all.fetch(rows[some])
            else:
                x, y = self._part(part)
                yield x[some], y[some]

    def _rows(self, part: Part | Literal["earlier"]) -> Tensor:
        if part == "earlier":
            return self.earlier
        return self.forget_indices if part == "forget" else self.retain_indices

    def _part(self, part: Part | Literal["earlier"]) -> Split:
        """All of a part at once; what is read of a data set is read once."""
        if self._all.labels is not None:
            return self._all.fetch(self._rows(part))
        if part not in self._read:
            self._read[part] = self._all.fetch(self._rows(part))
        return self._read[part]

    def serve(self, *parts: Part, in_turn: int | None = None) -> None:
        """Say which parts a training batch has, and for how many epochs they come in turn; see the loader."""
        self._parts, self._in_turn = parts, in_turn

    def adopt(self, checkpoint: Mapping[str, Any]) -> None:
        """Take over from the checkpoint that is to forget: the seed of its splits, and what it has forgotten before.

        Args:
            checkpoint: A Lightning checkpoint of the run that trained, or of an earlier request.

        Raises:
            ForgetSetError: If the samples named now are not in its training data, or were forgotten by it, or it was
                trained on other data, as far as it has hashes of them: an earlier request's, or a curvature record's.
            MisconfigurationException: If its data was split with another seed than the one given here.
        """
        before, record = earlier_request(checkpoint), checkpoint.get("curvature") or {}
        self.earlier = torch.empty(0, dtype=torch.int64)  # this object may have served another checkpoint
        if before is not None:
            self.earlier = torch.cat([before["earlier"], before["forget"]]).sort().values
        state = checkpoint.get(type(self.datamodule).__qualname__) if before is None else before.get("datamodule")
        if state:
            self.datamodule.load_state_dict(state)
        self._open()
        recorded = record.get("row_digests")
        if recorded is not None and len(recorded) != len(self._all):
            raise ForgetSetError(_other_data(f"{len(recorded)} rows were recorded, and there are {len(self._all)}"))
        self._choose()
        if recorded is not None:
            self._refuse_other_samples(recorded)
        known = [one for one in (before and before["data_digest"], record.get("data_sha256")) if one]
        if not self.retain_access:
            self._digest = known[0] if known else None
        elif any(one != self.data_digest for one in known):
            raise ForgetSetError(_other_data("the hashes of all rows differ"))

    def _refuse_other_samples(self, recorded: Tensor) -> None:
        """Refuse a forget set whose samples are not those that were recorded under their rows."""
        there, here = recorded[self.forget_indices], self._all.row_digests(self.forget_indices)
        unknown = self.forget_indices[(there == 0).all(dim=1)]
        if len(unknown):
            raise ForgetSetError(
                f"{len(unknown)} samples of the forget set, such as {int(unknown[0])}, were not among the recorded training "
                "data: the model was not trained on them, or they were forgotten before. Leave them out."
            )
        others = self.forget_indices[(there != here).any(dim=1)]
        if len(others):
            raise ForgetSetError(
                _other_data(f"{len(others)} samples of the forget set, such as {int(others[0])}, differ from theirs")
            )

    # ---------------------------------------------------------------- loaders

    @override
    def make_train_loader(self) -> ForgetRetainLoader:
        rank, num_ranks = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        loaders: dict[Part, TensorLoader] = {}
        for part in self._parts:
            split = self._part(part)
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
                raise ForgetSetError(f"The {part} set has {len(split[1])} samples: too few for {num_ranks} processes.")
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
        self._loaded = None

    # ---------------------------------------------------------------- checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "forget": self.forget_indices,
            "earlier": self.earlier,
            "seed": self._root_seed,
            "data_digest": self.data_digest,
            "forget_digest": self._digest_of_forget_set(),
            "datamodule": self.datamodule.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._forget is not None:
            self._go_on_from(state_dict)
            return
        self._loaded = state_dict  # for `setup`
        self.datamodule.load_state_dict(state_dict["datamodule"])

    def _go_on_from(self, state: dict[str, Any]) -> None:
        """Take over a state of the same request.

        Raises:
            MisconfigurationException: If it is another one.
        """
        super().load_state_dict(state)
        self.datamodule.load_state_dict(state["datamodule"])
        self.earlier = state["earlier"]
        if self.seed is None:
            self._root_seed = state["seed"]
        adopted, there = self._digest, state["data_digest"]
        self._open()
        self._choose()
        if not self.retain_access:
            self._digest = adopted or there
        same = torch.equal(state["forget"], self.forget_indices)
        same = same and state["forget_digest"] == self._digest_of_forget_set()
        if not same or (there is not None and there != self.data_digest):
            raise MisconfigurationException(
                "The checkpoint belongs to another request: its forget set or its training data is not the one given "
                "here. Resume with the same settings of ForgetRetain, or start a new run."
            )

    def _digest_of_forget_set(self) -> str:
        """SHA-256 of its samples: by it they are known again where retained ones must not be read."""
        if self._forget_digest is None:
            digests = self._all.row_digests(self.forget_indices)
            self._forget_digest = hashlib.sha256(digests.numpy().tobytes()).hexdigest()
        return self._forget_digest


def _other_data(found: str) -> str:
    return (
        f"The checkpoint was trained and recorded on other training data ({found}): the forget set's indices would name other "
        "samples. Use the datamodule that the model was trained with, with the same seed and without an augmentation in its "
        "data set."
    )
