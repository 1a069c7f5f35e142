"""What the memory-efficient optimizers share: which parameters they compress, AdamW for the others, and resuming."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from typing_extensions import override

from groundwire.plugins.random import root_seed

Group = dict[str, Any]


class CompressedStateOptimizer(Optimizer, ABC):
    """An optimizer whose state is smaller than Adam's for matrices, and which is ``torch.optim.AdamW`` for all else.

    Parameters with one dimension (biases, normalisation) and those that ``exclude`` names keep both moments in full.
    Weight decay is decoupled, as in AdamW. A gradient that is not finite reaches the weights as NaN, as with torch's
    optimizers. Everything is in the ``state_dict``, of whatever dtype, so a resumed run is bit-identical.

    Args:
        params: Parameters, or groups of them; with names (``module.named_parameters()``) where ``exclude`` is used.
        defaults: Settings of a group, among them ``lr``, ``betas``, ``eps``, ``weight_decay`` and ``exclude``.

    Raises:
        ValueError: If a setting is out of range, names are missing, or there is nothing to compress.
        RuntimeError: At a step, if a parameter is sharded.
        TypeError: At a step, if a gradient is sparse or complex.
    """

    def __init__(self, params: Iterable[Any], defaults: Group) -> None:
        defaults["seed"] = root_seed(defaults["seed"])
        defaults["exclude"] = [defaults["exclude"]] if isinstance(defaults["exclude"], str) else [*defaults["exclude"]]
        super().__init__(params, defaults)
        if not any(self._compressed(group) for group in self.param_groups):
            raise ValueError(f"{type(self).__name__} found no parameter to compress: {self._why_nothing()}")

    @property
    def shared_tensors(self) -> tuple[Tensor, ...]:
        """What is kept once for all parameters, beside the state of each."""
        return ()

    @abstractmethod
    def _keeps_full_state(self, group: Group, parameter: Tensor) -> bool:
        """Whether compressing a parameter, of at least two dimensions, would gain nothing."""

    @abstractmethod
    def _step_compressed(self, group: Group, items: list[tuple[int, Tensor]]) -> None:
        """Update the parameters of a group that are compressed and have a gradient, each with its place in the group."""

    @abstractmethod
    def _check(self, group: Group) -> None:
        """Refuse bad settings of a group."""

    def _why_nothing(self) -> str:
        return "all have one dimension, or are excluded. Use torch.optim.AdamW."

    @override
    def add_param_group(self, param_group: Group) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check_adam(group)
        if group["exclude"] and "param_names" not in group:
            raise ValueError(
                f"`exclude` {group['exclude']} needs the names of the parameters: pass module.named_parameters() instead of "
                "module.parameters()."
            )
        self._check(group)

    @torch.no_grad()
    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient.

        Args:
            closure: Computes the loss anew, with gradients.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            compressed = set(self._compressed(group))
            present = [(i, p) for i, p in enumerate(group["params"]) if p.grad is not None]
            for _, p in present:
                _refuse(type(self).__name__, p)
            self._adamw(group, [p for i, p in present if i not in compressed])
            self._step_compressed(group, [(i, p) for i, p in present if i in compressed])
        return loss

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state; unlike torch's own, this keeps every dtype as it was saved (indices stay integers).

        Args:
            state_dict: Of :meth:`state_dict`.
        """
        super().load_state_dict(state_dict)
        places = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for place, p in zip(places, chain.from_iterable(g["params"] for g in self.param_groups), strict=True):
            for name, value in state_dict["state"].get(place, {}).items():
                if isinstance(value, Tensor) and name != "step":
                    self.state[p][name] = value.detach().clone().to(p.device)

    def _compressed(self, group: Group) -> list[int]:
        """Places of the parameters of a group that are compressed."""
        names = group["param_names"] if group["exclude"] else [""] * len(group["params"])
        return [
            i
            for i, (name, p) in enumerate(zip(names, group["params"], strict=True))
            if p.ndim > 1
            and not any(re.search(pattern, name) for pattern in group["exclude"])
            and not self._keeps_full_state(group, p)
        ]

    def _adamw(
        self, group: Group, params: list[Tensor], weights: list[Tensor] | None = None, grads: list[Tensor] | None = None
    ) -> None:
        """AdamW by torch with the state of ``params``, on them or on other ``weights`` and ``grads`` in their places."""
        if not params:
            return
        weights = params if weights is None else weights
        grads = [p.grad for p in params if p.grad is not None] if grads is None else grads
        states = [self.state[p] for p in params]
        for state, weight in zip(states, weights, strict=True):
            if "step" not in state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        adamw(
            weights,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _check_adam(group: Group) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"`{name}` must be at least 0, got {group[name]}.")
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"`betas` must be two numbers in [0, 1), got {group['betas']}.")


def _refuse(optimizer: str, parameter: Tensor) -> None:
    """Refuse what cannot be compressed as it is."""
    grad, what = parameter.grad, f"{optimizer}, on a parameter of shape {tuple(parameter.shape)}: "
    assert grad is not None
    if isinstance(parameter, DTensor) or getattr(parameter, "_is_flat_param", False):
        raise RuntimeError(what + "it is sharded, but whole gradients are needed. Use DDP instead of FSDP.")
    if grad.is_sparse:
        raise TypeError(what + "sparse gradients are not supported; set sparse=False on the embedding.")
    if not grad.is_floating_point():
        raise TypeError(what + f"expected a real floating gradient, got {grad.dtype}.")
