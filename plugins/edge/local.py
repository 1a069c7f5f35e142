"""What a device does with the model and its data before it sends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

from groundwire.plugins.edge.part import Part
from groundwire.plugins.layout import Params


class Gradient(Protocol):
    """The gradient of ``training_step`` at some parameters, on some of the device's samples of this round.

    It is either one device's, or that of all devices at once; then every leaf has a leading device dimension.
    """

    def __call__(self, params: Params, samples: slice) -> tuple[Params, Any]:
        """Gradients by name, and the step's outputs."""
        ...


class LocalWork(Part, ABC):
    """Turns a device's received model into the update it sends, which points like a gradient."""

    @abstractmethod
    def forward(self, gradient: Gradient, model: Params, batch_size: int) -> tuple[Params, list[Any]]:
        """The update by name, and the outputs of every step; ``batch_size`` samples a device are there to use."""


class LocalGradient(LocalWork):
    """One gradient on all samples of the round: federated SGD.

    Reference:
        McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017.
        arXiv:1602.05629
    """

    def forward(self, gradient: Gradient, model: Params, batch_size: int) -> tuple[Params, list[Any]]:
        """The gradient itself."""
        grads, outputs = gradient(model, slice(None))
        return grads, [outputs]


class LocalSGD(LocalWork):
    """``num_steps`` steps of SGD on the device; the update is ``model - local model``.

    With ``torch.optim.SGD(lr=1.0)`` as the module's own optimizer, which acts as the server's, this is FedAvg. Step
    ``j`` uses the next ``batch_size`` samples of the round's batch and starts over when it is used up.

    Args:
        lr: Learning rate on the device.
        num_steps: Local steps, ``tau``.
        batch_size: Samples a local step; by default the round's batch is cut into ``num_steps`` parts, so that each
            sample is used once.

    Raises:
        ValueError: If an argument is out of range.

    Reference:
        McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017.
        arXiv:1602.05629
    """

    def __init__(self, lr: float, num_steps: int, batch_size: int | None = None) -> None:
        super().__init__()
        if not lr > 0:
            raise ValueError(f"`lr` must be > 0, got {lr}.")
        if num_steps < 1:
            raise ValueError(f"`num_steps` must be at least 1, got {num_steps}.")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        self.lr = lr
        self.num_steps = num_steps
        self.batch_size = batch_size

    def steps(self, batch_size: int) -> list[slice]:
        """Which of the round's ``batch_size`` samples each local step uses.

        Args:
            batch_size: Samples a device in the round's batch.

        Returns:
            One slice a step.

        Raises:
            ValueError: If the batch cannot be cut that way.
        """
        parts = self.num_steps if self.batch_size is None else batch_size // self.batch_size
        size = batch_size // parts if parts else 0
        if size < 1 or size * parts != batch_size:
            raise ValueError(
                f"{batch_size} samples a device and round cannot be cut into local batches of "
                f"{self.batch_size or f'1/{self.num_steps} of them'}: choose a `batch_size` that divides "
                f"{batch_size}, or without one `num_steps` that does."
            )
        return [slice(j % parts * size, (j % parts + 1) * size) for j in range(self.num_steps)]

    def forward(self, gradient: Gradient, model: Params, batch_size: int) -> tuple[Params, list[Any]]:
        """The sum of the steps taken, ``lr * sum_j grad_j``."""
        local, update, outputs = model, None, []
        for samples in self.steps(batch_size):
            grads, out = gradient(local, samples)
            step = {name: self.lr * grad for name, grad in grads.items()}
            update = step if update is None else {name: update[name] + step[name] for name in step}
            local = {name: model[name] - update[name] for name in step}
            outputs.append(out)
        assert update is not None  # num_steps >= 1
        return update, outputs
