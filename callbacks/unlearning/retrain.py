"""Training on the retained data alone: from scratch, the reference; or from the trained weights."""

from __future__ import annotations

from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from groundwire.callbacks.step import Step, loss_of, with_loss
from groundwire.callbacks.unlearning.base import IterativeMethod
from groundwire.callbacks.unlearning.data import Part
from groundwire.callbacks.weights import fingerprint


class Retrain(IterativeMethod):
    """The model that never saw the forget set: trains the module's own initial weights on the retained data.

    What every other method is compared with. Give the Trainer as many epochs as the original training had. Logs
    ``train/retain_loss``.

    Args:
        checkpoint: The trained model, from which only the seed of its data and earlier requests are taken (and the
            weights of ``original``, for reports); None if there is none.

    Raises:
        MisconfigurationException: At setup, if the module has the checkpoint's weights already.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[Retrain()], max_epochs=20, logger=False, enable_checkpointing=False)
    """

    parts: ClassVar[tuple[Part, ...]] = ("retain",)
    starts_trained: ClassVar[bool] = False

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self._file is not None and fingerprint(pl_module.state_dict()) == self._origin:
            raise MisconfigurationException(
                f"Retrain starts from the module's own initial weights, but this module has those of {self._file}, which "
                "know the forget set. Pass a newly built module, or use FineTune."
            )

    @override
    def around_step(self, step: Step, batch: Any) -> Any:
        return _on_retained(self, step, batch)


class FineTune(IterativeMethod):
    """Trains on with the retained data alone, and relies on the forget set being overwritten.

    The weakest baseline: what the weights know about the forget set fades slowly, if at all. Logs
    ``train/retain_loss``.

    Args:
        checkpoint: The trained model; None if the module that is passed to ``trainer.fit`` has the trained weights.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[FineTune()], max_epochs=5, logger=False, enable_checkpointing=False)

    Reference:
        Golatkar et al., "Eternal Sunshine of the Spotless Net: Selective Forgetting in Deep Networks", CVPR 2020 (as a
        baseline). arXiv:1911.04933
    """

    parts: ClassVar[tuple[Part, ...]] = ("retain",)

    @override
    def around_step(self, step: Step, batch: Any) -> Any:
        return _on_retained(self, step, batch)


def _on_retained(method: IterativeMethod, step: Step, batch: Any) -> Any:
    output = step(batch["retain"])
    if output is None:
        return None
    loss = loss_of(output)
    method.log_terms(retain_loss=loss)
    return with_loss(output, method.checked(loss))
