"""A trained network that gives its outputs and is not touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from groundwire.callbacks.logits import logits_in
from groundwire.callbacks.weights import find_checkpoint, fingerprint, load_weights


class Teacher:
    """Gives logits without a graph, in evaluation mode.

    Args:
        module: The network; None if the checkpoint says what it is.
        checkpoint: Its weights; None if the module has them.
        inputs: From the student's inputs to the teacher's, where they are normalised differently.

    Raises:
        MisconfigurationException: If there is neither.
    """

    def __init__(
        self,
        module: nn.Module | None,
        checkpoint: str | Path | None,
        inputs: Callable[[Any], Any] | None = None,
    ) -> None:
        if module is None and checkpoint is None:
            raise MisconfigurationException(
                "A teacher is needed: give the trained network as `teacher`, a network and its `checkpoint`, or a "
                "`checkpoint` alone whose module called `save_hyperparameters()` under LightningCLI."
            )
        self.module = module
        self.checkpoint = checkpoint
        self.inputs = inputs
        self._before: list[tuple[Any, str, bool]] = []

    def prepare(self, student: nn.Module, device: torch.device) -> None:
        """Load, freeze, put into evaluation mode and move.

        Args:
            student: The network to be trained.
            device: Where it will be.

        Raises:
            MisconfigurationException: If student and teacher share parameters.
            FileNotFoundError: If there is no checkpoint.
            ValueError: If the checkpoint does not fit.
        """
        if self.module is None:
            assert self.checkpoint is not None
            self.module = _build_from_checkpoint(find_checkpoint(self.checkpoint))
        elif self.checkpoint is not None:
            load_weights(self.module, self.checkpoint)
        trained = set(map(id, student.parameters()))
        if any(id(parameter) in trained for parameter in self.module.parameters()):
            raise MisconfigurationException(
                "Student and teacher share parameters, so the teacher would be trained: give a copy (`copy.deepcopy`) "
                "as the teacher, and do not make it a submodule of the student."
            )
        self._before = [(sub, "training", sub.training) for sub in self.module.modules()]
        self._before += [(p, "requires_grad", p.requires_grad) for p in self.module.parameters()]
        self.module.requires_grad_(False).eval().to(device)

    def release(self) -> None:
        """Leave the module's flags as they were."""
        for holder, name, value in self._before:
            setattr(holder, name, value)
        self._before = []

    @torch.no_grad()
    def __call__(self, inputs: Any) -> Tensor:
        """The teacher's logits.

        Args:
            inputs: The student's inputs.

        Returns:
            What the network gives for them; of a mapping or object the entry ``logits``.

        Raises:
            MisconfigurationException: If it gives no logits, or was put into training mode.
        """
        assert self.module is not None
        if self.module.training:
            raise MisconfigurationException(
                "The teacher was put into training mode during the fit: its BatchNorm statistics would drift. Keep it "
                "out of the student's submodules."
            )
        if self.inputs is not None:
            inputs = self.inputs(inputs)
        if (dtype := _floating_dtype(self.module)) is not None:  # the student's Trainer may work in another precision
            inputs = apply_to_collection(inputs, Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x)
        output = self.module(inputs)
        logits = logits_in(output)
        if logits is None:
            raise MisconfigurationException(
                f"The teacher's forward gives a {type(output).__name__} without `logits`: wrap it in a module that gives "
                "logits."
            )
        return logits.detach()

    def fingerprint(self) -> str:
        """SHA-256 of the weights, which stand in for them in the student's checkpoints."""
        assert self.module is not None
        return fingerprint(self.module.state_dict())


def _floating_dtype(module: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def _build_from_checkpoint(file: Path) -> nn.Module:
    checkpoint: Any = torch.load(file, map_location="cpu", weights_only=True)
    hyperparameters = checkpoint.get("hyper_parameters", {}) if isinstance(checkpoint, dict) else {}
    if "_class_path" not in hyperparameters:  # LightningCLI with a fixed class writes `_instantiator` alone: not enough
        raise MisconfigurationException(
            f"{file} does not say which class wrote it: give the network as `teacher` (for a recipe, its `model:` "
            "node), and its weights as `checkpoint`."
        )
    return pl.LightningModule.load_from_checkpoint(file, map_location="cpu")
