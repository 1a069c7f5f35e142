"""Selective synaptic dampening."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from groundwire.callbacks.logits import LogitsSource
from groundwire.callbacks.unlearning.base import OneShotMethod
from groundwire.callbacks.unlearning.data import ForgetRetainData
from groundwire.callbacks.unlearning.functional import ssd_dampen
from groundwire.callbacks.unlearning.records import OutputLoss, Records
from groundwire.callbacks.weights import read_checkpoint


class SSD(OneShotMethod):
    """Shrinks, at once, the parameters that matter much more to the forget set than to all training data.

    A parameter's importance is the mean over records of the squared gradient of the record's loss, at the trained
    weights and in evaluation mode. Where that of the forget set is more than ``alpha`` times that of all data, the
    parameter is multiplied by ``min(1, lam I_all / I_forget)``. Good at forgetting a class, and unfit for random
    samples, whose gradients are like those of all others.

    The importances of all data are read from the checkpoint, where they were recorded at the end of training; then
    retained data is not touched. Otherwise they are computed from the retained and the forget set.

    Args:
        checkpoint: The trained model; None if the module that is passed to ``trainer.fit`` has the trained weights.
        alpha: Selection threshold, at least 0; tune it between 1.2 and 50. ``inf`` changes nothing.
        lam: Dampening constant, at least 0.
        loss: Of one record, from its outputs and its label; by default cross-entropy or the squared error.
        source: Where inputs and labels of a batch are found.

    Attributes:
        num_dampened: How many parameters were shrunk.

    Raises:
        ValueError: If ``alpha`` or ``lam`` is negative; if recorded importances are those of other parameters.
        MisconfigurationException: If importances of all data are not recorded for these weights, and retained data may
            not be touched.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[SSD(alpha=2.0)], max_epochs=-1, logger=False, enable_checkpointing=False)

    Reference:
        Foster et al., "Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening", AAAI 2024.
        arXiv:2308.07707
    """

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        alpha: float = 10.0,
        lam: float = 1.0,
        loss: OutputLoss | None = None,
        source: LogitsSource | None = None,
    ) -> None:
        super().__init__(checkpoint)
        if not alpha >= 0 or not 0 <= lam < math.inf:
            raise ValueError(f"`alpha` and `lam` must be at least 0 (`lam` finite), got {alpha} and {lam}.")
        self.alpha = alpha
        self.lam = lam
        self.loss = loss
        self.source = source or LogitsSource()
        self.num_dampened = 0

    @override
    def settings(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "lam": self.lam}

    @override
    def unlearn(self, pl_module: pl.LightningModule, data: ForgetRetainData) -> None:
        records = Records(pl_module, self.loss, self.source)
        recorded = self._recorded(records, data)
        forget = squared_gradients(records, data.batches("forget"))
        self.records_read["forget"] = num_forget = len(data.forget_indices)
        if recorded is None:
            self.records_read["retain"] = num_retain = len(data.retain_indices)
            total = squared_gradients(records, data.batches("retain")) + forget
            everything = total / (num_retain + num_forget)
        else:
            everything = recorded.to(forget)
        before = records.vector()
        after = ssd_dampen(before, everything, forget / num_forget, self.alpha, self.lam)
        self.num_dampened = int((after != before).sum())
        records.write(after)

    def _recorded(self, records: Records, data: ForgetRetainData) -> Tensor | None:
        """Importances of all training data that the checkpoint holds, if they are those of the weights."""
        record = read_checkpoint(self._file, mmap=True).get("curvature") if self._file is not None else None
        if record is not None and record["weights"] == self._origin and record["squared_gradients"] is not None:
            found: Tensor = record["squared_gradients"]
            if found.shape != (records.layout.numel,):
                raise ValueError(
                    f"The importances in {self._file} are of {found.numel():,} parameters, but {records.layout.numel:,} "
                    "are trainable now. Freeze the same parameters as when they were recorded."
                )
            self.recording_seconds = record.get("seconds")
            return found
        if not data.retain_access:
            why = "there are none recorded" if record is None else "those that are recorded belong to other weights"
            raise MisconfigurationException(
                "SSD compares with importances of all training data, but retained data may not be touched, and "
                f"{why} in {self._file or 'a checkpoint'}. Record them at the end of the training, or allow access: "
                "ForgetRetain(retain_access=True)."
            )
        return None


def squared_gradients(records: Records, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum over all records of their squared gradients, element by element.

    Args:
        records: Gives the gradients.
        batches: Inputs and labels.

    Returns:
        Shape ``(p,)``.

    Example:
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> batch = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), layer.weight.new_zeros(2, 1)
        >>> squared_gradients(Records(layer), [batch])[1]
        tensor(0.)
    """
    total = torch.zeros(records.layout.numel, dtype=records.dtype, device=next(records.module.parameters()).device)
    for batch in batches:
        for rows in records.gradient_chunks(batch):
            total += rows.square().sum(dim=0)
    return total
