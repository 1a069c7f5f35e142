"""Where a callback finds logits, labels and inputs in a step of somebody else's module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from groundwire.callbacks.checks import check_logits, values_are_hidden
from groundwire.callbacks.step import Call, Tap

_LABELS = ("label", "labels", "y", "target", "targets")
_INPUTS = ("x", "image", "images", "input", "inputs", "pixel_values", "img", "features")

Unpack = Callable[[Any], tuple[Any, Any]]


class LogitsSource:
    """Finds logits, labels and inputs in a step of an unmodified LightningModule.

    Args:
        submodule: Dotted name of the submodule whose output are the logits; empty for the module's own ``forward``.
        call: Which forward call of the step, if there are several: ``"first"``, ``"last"``, or its number.
        unpack: From the batch to ``(inputs, labels)``. By default the first two entries of a tuple or list, or the
            usual keys of a mapping (``x``, ``image``, ``input``; ``y``, ``label``, ``target``, and their plurals).
        from_probs: The module gives probabilities instead of logits.
        binary: The module gives one logit ``z`` for two classes; ``[-z/2, z/2]`` is used.
        flatten: Take outputs ``(B, C, ...)`` with labels ``(B, ...)``, as in segmentation, each position a sample.

    Raises:
        ValueError: If ``call`` is neither.

    Example:
        >>> LogitsSource("model.head", call="first").submodule
        'model.head'
    """

    def __init__(
        self,
        submodule: str = "",
        call: Literal["first", "last"] | int = "last",
        unpack: Unpack | None = None,
        from_probs: bool = False,
        binary: bool = False,
        flatten: bool = False,
    ) -> None:
        if not (call in ("first", "last") or (isinstance(call, int) and call >= 0)):
            raise ValueError(f"`call` must be 'first', 'last' or a number from 0, got {call!r}.")
        self.submodule = submodule
        self.call = call
        self.unpack = unpack
        self.from_probs = from_probs
        self.binary = binary
        self.flatten = flatten
        self._tap = Tap(submodule)
        self._looked_at_values = False

    @classmethod
    def of_pairs(cls, source: LogitsSource) -> LogitsSource:
        """The same, for batches that are pairs of inputs and labels already.

        Args:
            source: What took the pairs from the batches.

        Returns:
            One with all other options of ``source``.

        Example:
            >>> pairs = LogitsSource.of_pairs(LogitsSource("head", unpack=lambda batch: (batch["x"], batch["y"]), flatten=True))
            >>> pairs.submodule, pairs.flatten, pairs.inputs_and_labels(("inputs", "labels"))
            ('head', True, ('inputs', 'labels'))
        """
        return cls(
            source.submodule,
            source.call,
            unpack=lambda pair: pair,
            from_probs=source.from_probs,
            binary=source.binary,
            flatten=source.flatten,
        )

    @contextmanager
    def open(self, module: pl.LightningModule) -> Iterator[list[Call]]:
        """Collect the calls of a step; see :meth:`Tap.open`."""
        with self._tap.open(module, required=False) as calls:
            yield calls

    def inputs(self, calls: list[Call], batch_inputs: Any) -> Any:
        """What the network saw: with what the step made of the batch (augmentation), where that can be read.

        Args:
            calls: What :meth:`open` collected.
            batch_inputs: Those of the batch.

        Returns:
            The first argument of the module's ``forward``; the batch's inputs, where logits are read elsewhere or the
            user says what inputs are.
        """
        seen = self._chosen(calls).inputs
        return seen[0] if not self.submodule and self.unpack is None and seen else batch_inputs

    def logits(self, calls: list[Call]) -> Tensor:
        """The logits among the calls, as the module gave them.

        Args:
            calls: What :meth:`open` collected.

        Returns:
            A tensor; of a mapping or object the entry ``logits``.

        Raises:
            MisconfigurationException: If there were too few calls, or the output holds no logits.
        """
        output = self._chosen(calls).output
        found = logits_in(output)
        if found is None:
            raise MisconfigurationException(
                f"The output of {self.submodule or 'forward'!r} is a {type(output).__name__} without `logits`. Name the "
                "submodule that gives the logits, e.g. LogitsSource('model.head')."
            )
        return found

    def _chosen(self, calls: list[Call]) -> Call:
        if not calls:
            self._tap.refuse_silence()
        index = self.call if isinstance(self.call, int) else 0 if self.call == "first" else -1
        if index >= len(calls):
            raise MisconfigurationException(
                f"`call` is {self.call}, but the step called forward {len(calls)} times: use a number below that."
            )
        return calls[index]

    def inputs_and_labels(self, batch: Any) -> tuple[Any, Tensor]:
        """Inputs and labels of a batch.

        Args:
            batch: What the step receives.

        Returns:
            The pair; the labels are a tensor.

        Raises:
            MisconfigurationException: If they cannot be told.
        """
        if self.unpack is not None:
            return self.unpack(batch)
        if isinstance(batch, Mapping):
            inputs = next((batch[key] for key in _INPUTS if key in batch), None)
            labels = next((batch[key] for key in _LABELS if key in batch), None)
            what = f"a mapping with {', '.join(map(str, batch))}"
        elif isinstance(batch, tuple | list) and len(batch) >= 2:
            inputs, labels = batch[0], batch[1]
            what = f"a {type(batch).__name__} of {len(batch)}"
        else:
            inputs, labels, what = None, None, f"a {type(batch).__name__}"
        if not isinstance(labels, Tensor):
            raise MisconfigurationException(
                f"Cannot tell inputs and labels of a batch that is {what}. Say how: "
                "LogitsSource(unpack=lambda batch: (batch['image'], batch['class']))."
            )
        return inputs, labels

    def as_logits(self, outputs: Tensor) -> Tensor:
        """Logits ``(n, C)`` from the network's outputs alone: of probabilities or of one logit, as the options say.

        Args:
            outputs: What the module gave.

        Returns:
            Logits.

        Raises:
            ValueError: If the shape calls for an option that was not given, or is that of a segmentation.
        """
        if not (self.from_probs or self.binary):
            return outputs
        none = torch.zeros(len(outputs), dtype=torch.int64, device=outputs.device)
        return as_rows(outputs, none, from_probs=self.from_probs, binary=self.binary)[0]

    def prepare(self, logits: Tensor, target: Tensor, soft: bool = False, check: bool = True) -> tuple[Tensor, Tensor]:
        """Logits ``(n, C)`` in float32 or wider, and labels ``(n,)``, from what module and batch hold.

        Args:
            logits: What the module gave.
            target: What the batch holds.
            soft: Whether distributions ``(n, C)`` are welcome as labels.
            check: Whether to look at the values of the first batch.

        Returns:
            The pair.

        Raises:
            ValueError: If they do not fit together; the message says what to change.
            RuntimeError: If a logit is NaN or infinite.
        """
        logits, target = as_rows(logits, target, from_probs=self.from_probs, binary=self.binary, flatten=self.flatten)
        if not (soft and target.shape == logits.shape):
            check_logits(logits, target)
        if check and not self._looked_at_values and not values_are_hidden(logits, target):
            check_values(logits, target, warn=not self.from_probs)
            self._looked_at_values = True
        return logits, target


def logits_in(output: Any) -> Tensor | None:
    """The logits in what a network gives: a tensor, or the entry or attribute ``logits``; None if there are none."""
    if isinstance(output, Mapping):
        output = output.get("logits")
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    return found if isinstance(found, Tensor) else None


def as_rows(
    logits: Tensor, target: Tensor, *, from_probs: bool = False, binary: bool = False, flatten: bool = False
) -> tuple[Tensor, Tensor]:
    """Bring outputs and labels into the form ``(n, C)`` and ``(n,)``.

    Args:
        logits: What a module gave.
        target: Its labels.
        from_probs: It gives probabilities; exact zeros are clamped at the smallest normal number.
        binary: It gives one logit, ``(n,)`` or ``(n, 1)``.
        flatten: Outputs are ``(B, C, ...)`` and labels ``(B, ...)``.

    Returns:
        Logits, at least in float32, and labels.

    Raises:
        ValueError: If the shapes call for an option that was not given.

    Example:
        >>> as_rows(torch.tensor([2.0]), torch.tensor([1]), binary=True)[0]
        tensor([[-1.,  1.]])
    """
    if not logits.is_floating_point():
        raise ValueError(f"expected logits [batch, classes], got shape {tuple(logits.shape)} dtype {logits.dtype}.")
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    if from_probs:
        logits = logits.clamp_min(torch.finfo(logits.dtype).tiny)
        logits = logits.log() if not binary else logits.log() - (1 - logits).clamp_min(1e-38).log()
    if binary:
        if target.is_floating_point() and not values_are_hidden(target) and bool((target != target.round()).any()):
            raise ValueError(
                "expected labels 0 and 1 for binary=True, got fractions; soft labels are not supported here."
            )
        z = logits.reshape(-1) / 2
        return torch.stack([-z, z], dim=-1), target.reshape(-1).long()
    if not target.is_floating_point():
        target = target.long()
    if flatten and logits.ndim > 2:
        return logits.movedim(1, -1).reshape(-1, logits.shape[1]), target.reshape(-1)
    if logits.ndim > 2:
        raise ValueError(
            f"expected logits [batch, classes], got shape {tuple(logits.shape)} dtype {logits.dtype}; for segmentation "
            "pass flatten=True."
        )
    return logits, target


def check_values(logits: Tensor, target: Tensor, warn: bool = True) -> None:
    """Refuse logits that are not finite and labels that are out of range; waits for the device.

    Args:
        logits: Shape ``(n, C)``.
        target: Labels ``(n,)``, or distributions ``(n, C)``.
        warn: Whether to say that logits look like probabilities.

    Raises:
        RuntimeError: If a logit is NaN or infinite.
        ValueError: If a label is outside ``[0, C)``.
    """
    if len(logits) == 0:
        return
    low, high = (float(value) for value in logits.detach().aminmax())
    if not (low > float("-inf") and high < float("inf")):  # NaN fails both
        raise RuntimeError(
            "non-finite logits: the network has diverged, or its input is not finite. Lower the learning rate or check "
            "the data."
        )
    if warn and low >= 0 and high <= 1 and bool((logits.detach().sum(dim=1) - 1).abs().max() < 1e-3):
        rank_zero_warn("These logits look like probabilities; pass from_probs=True if they are.")
    if target.is_floating_point():
        return
    least, most = (int(value) for value in target.aminmax())
    if least < 0 or most >= logits.shape[1]:
        raise ValueError(
            f"label {least if least < 0 else most} but the logits have {logits.shape[1]} columns: give the network as "
            "many outputs as there are classes, or count the labels from 0."
        )
