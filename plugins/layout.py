"""How the parameters of a module lie in the flat vectors that devices send."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Params = dict[str, Tensor]
"""Parameters or gradients by name; the same names as ``named_parameters()``."""


@dataclass(frozen=True)
class ParameterLayout:
    """Names, shapes and order of the trainable parameters in a flat vector of ``numel`` entries.

    Vectors are float32 (float64 if a parameter is), whatever the parameters' own dtype.

    Args:
        names: Parameter names in ``named_parameters()`` order.
        shapes: Their shapes.
        dtypes: Their dtypes.

    Example:
        >>> layout = ParameterLayout.of(nn.Linear(3, 2))
        >>> layout.numel, layout.names
        (8, ('weight', 'bias'))
        >>> layout.unflatten(torch.arange(8.0))["bias"]
        tensor([6., 7.])
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, module: nn.Module) -> ParameterLayout:
        """The layout of the parameters of ``module`` that require gradients.

        Args:
            module: Any module.

        Returns:
            Its layout.

        Raises:
            ValueError: If no parameter requires a gradient, or one is not a real floating tensor.
        """
        trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        if not trainable:
            raise ValueError(f"{type(module).__name__} has no parameter that requires a gradient: nothing to send.")
        for name, p in trainable:
            if not p.is_floating_point():
                raise ValueError(f"`{name}` has dtype {p.dtype}, but only real floating parameters can be sent.")
        return cls(
            names=tuple(name for name, _ in trainable),
            shapes=tuple(p.shape for _, p in trainable),
            dtypes=tuple(p.dtype for _, p in trainable),
        )

    @classmethod
    def of_vector(cls, numel: int, dtype: torch.dtype = torch.float32) -> ParameterLayout:
        """The layout of one nameless parameter of ``numel`` entries, for updates that belong to no module."""
        return cls(names=("",), shapes=(torch.Size((numel,)),), dtypes=(dtype,))

    @property
    def sizes(self) -> list[int]:
        """Entries of each parameter."""
        return [shape.numel() for shape in self.shapes]

    @property
    def numel(self) -> int:
        """Length ``d`` of the flat vector."""
        return sum(self.sizes)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the flat vector."""
        return torch.float64 if torch.float64 in self.dtypes else torch.float32

    def flatten(self, params: Mapping[str, Tensor], *, stacked: bool = False, out: Tensor | None = None) -> Tensor:
        """Concatenate parameters to one vector, or stacked ones to rows.

        Args:
            params: Leaves by name, of shape ``(*shape,)``, or ``(M, *shape)`` if ``stacked``.
            stacked: Whether leaves have a leading device dimension.
            out: Memory to write into if its shape fits; fresh memory costs more than the copy.

        Returns:
            A vector ``(d,)``, or rows ``(M, d)``.
        """
        keep = 1 if stacked else 0
        leaves = [params[name].detach().flatten(keep).to(self.dtype) for name in self.names]
        if out is not None and (out.shape[:-1] != leaves[0].shape[:-1] or out.device != leaves[0].device):
            out = None
        return torch.cat(leaves, dim=keep, out=out)

    def unflatten(self, vector: Tensor) -> Params:
        """Views of ``vector``, shape ``(..., d)``, by parameter name, in the parameters' dtypes."""
        chunks = torch.split(vector, self.sizes, dim=-1)
        return {
            name: chunk.reshape(*chunk.shape[:-1], *shape).to(dtype) if shape else chunk.squeeze(-1).to(dtype)
            for name, chunk, shape, dtype in zip(self.names, chunks, self.shapes, self.dtypes, strict=True)
        }

    def __str__(self) -> str:
        return f"{self.numel:,} parameters: " + ", ".join(
            f"{name}{tuple(shape)}" for name, shape in zip(self.names, self.shapes, strict=True)
        )
