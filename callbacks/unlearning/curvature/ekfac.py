"""The diagonal of the Gauss-Newton matrix in a Kronecker-factored eigenbasis of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from groundwire.callbacks.unlearning.curvature.base import Curvature, Removal
from groundwire.callbacks.unlearning.curvature.solve import (
    SINGULAR,
    NewtonStep,
    SingularCurvatureError,
    refuse_nonfinite,
)
from groundwire.plugins.layout import ParameterLayout


@dataclass
class _Block:
    """One matrix of parameters: where its entries are in the flat vector, and its eigenbasis."""

    rows: int
    columns: int
    parts: list[tuple[int, int]]  # (start, entries) in the flat vector: weight, then perhaps bias
    left: Tensor | None = None  # (rows, rows); None is the identity
    right: Tensor | None = None  # (columns, columns)
    values: Tensor | None = None  # (rows, columns)

    def take(self, flat: Tensor) -> Tensor:
        """Matrices ``(..., rows, columns)`` of flat vectors; a bias is the last column."""
        found = [
            flat[..., a : a + size].reshape(*flat.shape[:-1], self.rows, size // self.rows) for a, size in self.parts
        ]
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)

    def put(self, matrix: Tensor, flat: Tensor) -> None:
        """The other way, in place."""
        column = 0
        for start, size in self.parts:
            width = size // self.rows
            flat[..., start : start + size] = matrix[..., column : column + width].flatten(-2)
            column += width

    def rotate(self, matrix: Tensor) -> Tensor:
        """Into the eigenbasis."""
        if self.left is not None:
            matrix = self.left.to(matrix).T @ matrix
        return matrix if self.right is None else matrix @ self.right.to(matrix)

    def rotate_back(self, matrix: Tensor) -> Tensor:
        """Out of it."""
        if self.left is not None:
            matrix = self.left.to(matrix) @ matrix
        return matrix if self.right is None else matrix @ self.right.to(matrix).T


class EKFACCurvature(Curvature):
    """Eigenvalues in a Kronecker-factored eigenbasis of each layer: for large models.

    Each matrix of parameters (a layer's weight with its bias as one more column; a convolution's kernel as
    ``(out, in * kh * kw)``; a vector as one column) has the basis ``Q_left (x) Q_right`` of the mean ``V V^T`` and
    ``V^T V`` of its columns ``V``, and the diagonal of the curvature in that basis, exactly. Layers are taken as
    independent. For a linear layer that is used once a record, ``V = b a^T`` and the bases are those of KFAC with each
    record's inputs weighed by ``|b|^2``; any orthogonal basis is valid, and this one exists for tied and convolved
    weights as well.

    Two passes over the data; the first uses few records.

    Args:
        layout: The parameters.
        weight_decay: Of each parameter, in the layout's order: a bias joins its weight where they have the same.
        basis_columns: Columns after which the bases are fixed.
        most: A side longer than this keeps its own basis.

    Reference:
        George et al., "Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis", NeurIPS 2018,
        Section 3. arXiv:1806.03884
    """

    kind = "ekfac"
    num_passes = 2

    def __init__(
        self,
        layout: ParameterLayout,
        weight_decay: Sequence[float] | None = None,
        basis_columns: int = 10_000,
        most: int = 2_048,
    ) -> None:
        self.blocks = _blocks(layout, weight_decay or [0.0] * len(layout.names))
        self.basis_columns = basis_columns
        self.most = most
        self._seen = 0
        self._sums: list[list[Tensor | None]] = [[None, None] for _ in self.blocks]

    @override
    def observe(self, rows: Tensor, number: int) -> None:
        if number == 0:
            rows = rows[: self.basis_columns - self._seen]
            self._seen += len(rows)
            for block, sums in zip(self.blocks, self._sums, strict=True):
                self._add_products(block, sums, rows)
            return
        for block in self.blocks:
            found = self._diagonal(block, rows)
            block.values = found if block.values is None else block.values.to(found).add_(found)

    @override
    def has_enough(self, number: int) -> bool:
        return number == 0 and self._seen >= self.basis_columns

    def _add_products(self, block: _Block, sums: list[Tensor | None], rows: Tensor) -> None:
        matrices = block.take(rows)
        flat = {0: matrices.transpose(0, 1).flatten(1), 1: matrices.permute(2, 0, 1).flatten(1)}
        for side, size in enumerate((block.rows, block.columns)):
            if 1 < size <= self.most:
                found = flat[side] @ flat[side].T
                before = sums[side]
                sums[side] = found if before is None else before.add_(found)

    @staticmethod
    def _diagonal(block: _Block, rows: Tensor) -> Tensor:
        """What columns add to the diagonal in the block's basis."""
        return block.rotate(block.take(rows)).square().sum(dim=0).double()

    @override
    def end_pass(self, number: int) -> None:
        if number == 0:
            for block, (left, right) in zip(self.blocks, self._sums, strict=True):
                block.left = None if left is None else torch.linalg.eigh(left.double()).eigenvectors.to(left)
                block.right = None if right is None else torch.linalg.eigh(right.double()).eigenvectors.to(right)
            self._sums = []

    @override
    def _reduced(self, rows: Tensor) -> Tensor:
        return torch.cat([self._diagonal(block, rows).flatten() for block in self.blocks])

    @override
    def _joined(self, parts: list[Tensor]) -> Tensor:
        return torch.stack(parts).sum(dim=0)

    def _by_block(self, removal: Removal) -> list[tuple[_Block, Tensor]]:
        found = torch.split(removal.part, [block.rows * block.columns for block in self.blocks])
        return [(block, part.view(block.rows, block.columns)) for block, part in zip(self.blocks, found, strict=True)]

    @override
    def newton_step(self, removal: Removal, rhs: Tensor, ridge: Tensor, *, clip: float | None) -> NewtonStep:
        delta, top, high = torch.zeros_like(rhs, dtype=torch.float64), 0.0, 0
        for block, removed in self._by_block(removal):
            assert block.values is not None
            refuse_nonfinite(block.values, removed, rhs)
            whole = block.values.to(rhs.device) + float(ridge[block.parts[0][0]])
            if bool((whole <= 0).any()):
                raise SingularCurvatureError(
                    "The curvature is singular and there is no damping: raise `damping` (tau), for instance to "
                    f"{1e-3 * float(block.values.mean()):.2g}."
                )
            leverages = removed / whole
            top, high = max(top, float(leverages.max())), high + int((leverages >= 0.95).sum())
            if clip is not None:
                removed = removed.minimum(clip * whole)
            elif top > 1 - SINGULAR:
                raise SingularCurvatureError(
                    f"The forget set has leverage {top:.6g} on the curvature: what remains is singular. Raise `damping` "
                    f"(tau) by {float((removed / 0.9 - whole).max()):.2g} at least, or bound leverages with "
                    "clip_leverage=True."
                )
            block.put(block.rotate_back(block.rotate(block.take(rhs.double())) / (whole - removed)), delta)
        return NewtonStep(delta=delta, max_leverage=top, num_high=high)

    @override
    def remove(self, removal: Removal) -> None:
        for block, removed in self._by_block(removal):
            assert block.values is not None
            block.values = (block.values.to(removed.device) - removed).clamp_min(0)

    @override
    def apply(self, vector: Tensor) -> Tensor:
        result = torch.zeros_like(vector, dtype=torch.float64)
        for block in self.blocks:
            assert block.values is not None
            inside = block.rotate(block.take(vector.double())) * block.values.to(vector.device)
            block.put(block.rotate_back(inside), result)
        return result

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "blocks": [
                {
                    "rows": block.rows,
                    "columns": block.columns,
                    "parts": [list(part) for part in block.parts],
                    "left": None if block.left is None else block.left.cpu(),
                    "right": None if block.right is None else block.right.cpu(),
                    "values": None if block.values is None else block.values.cpu(),
                }
                for block in self.blocks
            ]
        }

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.blocks = [_Block(**block | {"parts": [(a, b) for a, b in block["parts"]]}) for block in state["blocks"]]


def _blocks(layout: ParameterLayout, weight_decay: Sequence[float]) -> list[_Block]:
    """The matrices of a model's parameters."""
    starts = dict(zip(layout.names, torch.tensor([0, *layout.sizes]).cumsum(0).tolist(), strict=False))
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    decay = dict(zip(layout.names, weight_decay, strict=True))
    joined = {}
    for name, shape in shapes.items():
        bias = name.removesuffix("weight") + "bias"
        same = name.endswith("weight") and len(shape) > 1 and decay.get(bias) == decay[name]
        if same and shapes[bias] == shape[:1]:
            joined[name] = bias
    blocks = []
    for name, shape in shapes.items():
        if name in joined.values():
            continue
        rows = shape[0] if shape else 1
        parts = [(starts[name], shape.numel())]
        if name in joined:
            parts.append((starts[joined[name]], rows))
        blocks.append(_Block(rows=rows, columns=sum(size for _, size in parts) // rows, parts=parts))
    return blocks
