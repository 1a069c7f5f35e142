"""Representations of the generalised Gauss-Newton matrix from which records can be removed again.

All are sums over records of outer products of the same columns (``Records.columns``). What is removed goes out of the same
representation into which it came: an exact removal from an approximate sum makes the remainder indefinite, and the
step explodes. A diagonal, and the empirical Fisher matrix, are left out on purpose: unlearning with them is worse than
not to unlearn.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.edge.layout import ParameterLayout
from groundwire.plugins.random import stream

CurvatureKind = Literal["auto", "full", "ekfac", "lowrank"]

EXTRA_COLUMNS = 10  # of the random start, beyond the rank
MOST_FULL = 10_000  # parameters: 800 MB in float64
AUTO_FULL = 4_096
_AUTO_LOW_RANK = 2**30  # bytes of the vectors that low rank keeps
_SINGULAR = 1e-6  # distance of a leverage from 1 at which the system counts as singular


class SingularCurvatureError(MisconfigurationException):
    """Removing the forget set's curvature leaves a singular or indefinite system."""


@dataclass(frozen=True, kw_only=True)
class NewtonStep:
    """A solution of the damped system without the forget set's curvature.

    Args:
        delta: Shape ``(p,)``.
        max_leverage: The largest generalised leverage of the forget set: its share of the curvature in the direction in
            which that is largest. Below 1 where the forget set's curvature is part of the whole.
        num_high: Directions of a leverage of at least 0.95.
    """

    delta: Tensor
    max_leverage: float
    num_high: int


def solve_without(system: Tensor, rows: Tensor, rhs: Tensor, *, clip: float | None = None) -> NewtonStep:
    """``(B - U^T U)^{-1} b`` by the Woodbury identity, in the metric of ``B``.

    With ``B = L L^T`` and ``W = L^{-1} U^T``, the eigenvalues of ``W^T W`` are the generalised leverages of the rows; the
    identity needs the smaller one of ``W^T W`` and ``W W^T`` alone.

    Args:
        system: ``B``, symmetric and positive definite, shape ``(k, k)``.
        rows: ``U``, the columns to be removed, as rows: shape ``(s, k)``.
        rhs: ``b``, shape ``(k,)``.
        clip: Leverages above this are lowered to it; None to leave them.

    Returns:
        The solution and the leverages.

    Raises:
        SingularCurvatureError: If ``B`` is not positive definite, or a leverage is at least 1.
        RuntimeError: If something is not finite.

    Example:
        >>> step = solve_without(2 * torch.eye(2), torch.tensor([[1.0, 0.0]]), torch.tensor([1.0, 1.0]))
        >>> step.delta, round(step.max_leverage, 6)
        (tensor([1.0000, 0.5000]), 0.5)
    """
    _refuse_nonfinite(system, rows, rhs)
    factor, info = torch.linalg.cholesky_ex(system)
    if int(info):
        raise SingularCurvatureError(
            "The curvature is not positive definite even with its damping: raise `damping` (tau)"
            f"{_enough_damping(system, rows)}."
        )
    whitened = torch.linalg.solve_triangular(factor, rows.T, upper=False)
    b = torch.linalg.solve_triangular(factor, rhs.unsqueeze(1), upper=False).squeeze(1)
    tall = whitened.shape[1] < whitened.shape[0]
    leverages, vectors = torch.linalg.eigh(whitened.T @ whitened if tall else whitened @ whitened.T)
    top = float(leverages[-1]) if len(leverages) else 0.0
    high = int((leverages >= 0.95).sum())
    if clip is None and top > 1 - _SINGULAR:
        raise SingularCurvatureError(
            f"The forget set has leverage {top:.6g} on the curvature, at least 0.95 in {high} directions: what remains is "
            f"singular, indefinite or nearly so. Raise `damping` (tau){_enough_damping(system, rows)}, or bound leverages "
            "with clip_leverage=True."
        )
    bounded = leverages if clip is None else leverages.clamp_max(clip)
    if tall:  # (I - W W^T)^{-1} = I + W V (bounded / (1 - bounded) / leverages) V^T W^T
        gain = torch.where(bounded < leverages, bounded / leverages, 1.0) / (1 - bounded)
        b = b + whitened @ (vectors @ (gain * (vectors.T @ (whitened.T @ b))))
    else:
        b = vectors @ ((vectors.T @ b) / (1 - bounded))
    delta = torch.linalg.solve_triangular(factor.T, b.unsqueeze(1), upper=True).squeeze(1)
    return NewtonStep(delta=delta, max_leverage=top, num_high=high)


def _refuse_nonfinite(*tensors: Tensor) -> None:
    for name, tensor in zip(
        ("recorded curvature", "forget set's curvature", "forget set's gradient"), tensors, strict=True
    ):
        if not bool(torch.isfinite(tensor).all()):
            raise RuntimeError(
                f"The {name} is not finite: there are NaN or infinite values in the weights, the data or the record. Nothing "
                "was changed; damping does not help. Check the trained model, and record its curvature again."
            )


def _enough_damping(system: Tensor, rows: Tensor) -> str:
    """Of what damping is known to be enough: with it, no leverage is above 0.9."""
    missing = float(torch.linalg.eigvalsh(rows.T @ rows / 0.9 - system)[-1])
    return f" by {missing:.2g} at least" if missing > 0 else ""


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What some records take out of a curvature, in its own representation.

    Args:
        part: Their columns, whole or projected, or their diagonal.
        trace: The sum of the squares of their columns.
    """

    part: Tensor
    trace: float


class Curvature(ABC):
    """A sum of outer products of columns, in some representation.

    Attributes:
        kind: Its name in checkpoints.
        num_passes: How often the training data has to be gone through.
    """

    kind: ClassVar[str]
    num_passes: int = 1

    @abstractmethod
    def observe(self, rows: Tensor, number: int) -> None:
        """Add columns, given as rows ``(r, p)``, in pass ``number``."""

    def end_pass(self, number: int) -> None:  # noqa: B027  nothing to do for some
        """All records have been observed once more."""

    def has_enough(self, number: int) -> bool:
        """Whether pass ``number`` needs no more columns."""
        return False

    def removal(self, chunks: Iterable[Tensor]) -> Removal:
        """What columns, given as rows ``(r, p)`` in chunks, would take out."""
        parts, trace = [], 0.0
        for rows in chunks:
            parts.append(self._reduced(rows))
            trace += float(rows.double().square().sum())
        if not parts:
            raise ValueError("There is no record to remove.")
        return Removal(part=self._joined(parts), trace=trace)

    @abstractmethod
    def _reduced(self, rows: Tensor) -> Tensor:
        """Columns in this representation."""

    def _joined(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts)

    @abstractmethod
    def newton_step(self, removal: Removal, rhs: Tensor, ridge: Tensor, *, clip: float | None) -> NewtonStep:
        """Solve ``(H - U^T U + diag(ridge)) delta = rhs``.

        Args:
            removal: ``U``, the forget set's columns.
            rhs: Shape ``(p,)``.
            ridge: Shape ``(p,)``, positive.
            clip: As in :func:`solve_without`.

        Returns:
            The step.

        Raises:
            SingularCurvatureError: If the system is not positive definite.
        """

    @abstractmethod
    def remove(self, removal: Removal) -> None:
        """Take columns out again: afterwards it is the sum over the records that remain."""

    @abstractmethod
    def apply(self, vector: Tensor) -> Tensor:
        """``H v``, shape ``(p,)``."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""


class FullCurvature(Curvature):
    """The matrix itself, in float64: exact, for up to 10,000 parameters.

    Args:
        layout: The parameters.

    Raises:
        ValueError: If there are more.
    """

    kind = "full"

    def __init__(self, layout: ParameterLayout) -> None:
        size = layout.numel
        check_kind("full", size, 1)
        self.matrix = torch.zeros(size, size, dtype=torch.float64)

    @override
    def observe(self, rows: Tensor, number: int) -> None:
        self.matrix = self.matrix.to(rows.device)
        rows = rows.double()
        self.matrix.addmm_(rows.T, rows)

    @override
    def _reduced(self, rows: Tensor) -> Tensor:
        return rows.double()

    @override
    def newton_step(self, removal: Removal, rhs: Tensor, ridge: Tensor, *, clip: float | None) -> NewtonStep:
        system = self.matrix.to(rhs.device) + torch.diag(ridge.double())
        return solve_without(system, removal.part, rhs.double(), clip=clip)

    @override
    def remove(self, removal: Removal) -> None:
        rows = removal.part
        self.matrix = self.matrix.to(rows.device).addmm(rows.T, rows, alpha=-1)

    @override
    def apply(self, vector: Tensor) -> Tensor:
        return self.matrix.to(vector.device) @ vector.double()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"matrix": self.matrix.cpu()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.matrix = state["matrix"]


class LowRankCurvature(Curvature):
    """The leading eigenpairs, by randomised subspace iteration, and the mean of the other eigenvalues.

    The forget set's columns are projected to the eigenvectors before they are removed. Three passes over the data, and
    ``rank + 10`` vectors of the parameters' size in memory.

    Args:
        layout: The parameters.
        rank: Eigenpairs kept, at most the number of parameters.
        seed: Of the random start.

    Raises:
        ValueError: If ``rank`` is out of range.

    Reference:
        Halko, Martinsson, Tropp, "Finding Structure with Randomness", SIAM Review 2011, Algorithm 4.4. arXiv:0909.4061
    """

    kind = "lowrank"
    num_passes = 3

    def __init__(self, layout: ParameterLayout, rank: int = 200, seed: int = 0) -> None:
        if not 1 <= rank <= layout.numel:
            raise ValueError(f"`rank` must be in [1, {layout.numel}] for as many parameters, got {rank}.")
        self.rank = rank
        columns = min(rank + EXTRA_COLUMNS, layout.numel)
        start = torch.randn(
            layout.numel, columns, generator=stream(seed, purpose="unlearning/subspace"), dtype=layout.dtype
        )
        self.basis = torch.linalg.qr(start).Q
        self.values = torch.zeros(0)
        self.trace = 0.0
        self._sum: Tensor | None = None

    @override
    def observe(self, rows: Tensor, number: int) -> None:
        self.basis = self.basis.to(rows)
        inside = rows @ self.basis
        last = number == self.num_passes - 1
        if last:
            self.trace += float(rows.double().square().sum())
        found = inside.T @ inside if last else rows.T @ inside
        self._sum = found if self._sum is None else self._sum.add_(found)

    @override
    def end_pass(self, number: int) -> None:
        assert self._sum is not None
        if number < self.num_passes - 1:
            self.basis = torch.linalg.qr(self._sum).Q
        else:
            values, vectors = torch.linalg.eigh(self._sum.double())
            kept = slice(len(values) - self.rank, None)
            self.values = values[kept].clamp_min(0)
            self.basis = self.basis @ vectors[:, kept].to(self.basis)
        self._sum = None

    def _tail(self, removal: Removal | None = None) -> float:
        """Mean of the eigenvalues that are not kept, perhaps without what is removed."""
        others = self.basis.shape[0] - len(self.values)
        if not others:
            return 0.0
        left: float = self.trace - float(self.values.sum())
        if removal is not None:
            left -= removal.trace - removal.part.square().sum().item()
        mean: float = max(0.0, left) / others
        return mean

    @override
    def _reduced(self, rows: Tensor) -> Tensor:
        inside: Tensor = rows.double() @ self.basis.to(rows.device).double()
        return inside

    @override
    def newton_step(self, removal: Removal, rhs: Tensor, ridge: Tensor, *, clip: float | None) -> NewtonStep:
        basis = self.basis.to(rhs.device).double()
        ridge, rhs = ridge.double(), rhs.double()
        system = torch.diag(self.values.to(rhs.device)) + basis.T @ (ridge.unsqueeze(1) * basis)
        inside = basis.T @ rhs
        step = solve_without(system, removal.part, inside, clip=clip)
        delta = basis @ step.delta
        if basis.shape[1] < basis.shape[0]:
            elsewhere = ridge + self._tail(removal)
            if not bool((elsewhere > 0).all()):
                raise SingularCurvatureError(
                    "Outside of the leading eigenvectors there is neither curvature nor damping: raise `damping` (tau), or "
                    "the `rank` of the recorded curvature."
                )
            delta = delta + (rhs - basis @ inside) / elsewhere
        return NewtonStep(delta=delta, max_leverage=step.max_leverage, num_high=step.num_high)

    @override
    def remove(self, removal: Removal) -> None:
        inside = removal.part
        values, vectors = torch.linalg.eigh(torch.diag(self.values.to(inside.device)) - inside.T @ inside)
        self.trace -= removal.trace
        self.values = values.clamp_min(0)
        self.basis = self.basis.to(inside.device) @ vectors.to(self.basis.dtype)

    @override
    def apply(self, vector: Tensor) -> Tensor:
        basis, vector = self.basis.to(vector.device).double(), vector.double()
        inside = basis.T @ vector
        tail = self._tail()
        result: Tensor = basis @ (self.values.to(vector.device) * inside) + tail * (vector - basis @ inside)
        return result

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"basis": self.basis.cpu(), "values": self.values.cpu(), "trace": self.trace, "rank": self.rank}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.basis, self.values = state["basis"], state["values"]
        self.trace, self.rank = state["trace"], state["rank"]


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
            _refuse_nonfinite(block.values, removed, rhs)
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
            elif top > 1 - _SINGULAR:
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


def check_kind(kind: str, numel: int, rank: int) -> None:
    """Refuse a representation that cannot hold so many parameters, before any work is done.

    Args:
        kind: As for :func:`make_curvature`.
        numel: Parameters.
        rank: Of ``"lowrank"``.

    Raises:
        ValueError: If it is unknown or too large.
    """
    if kind not in ("auto", "full", "ekfac", "lowrank"):
        raise ValueError(f"`kind` must be 'auto', 'full', 'ekfac' or 'lowrank', got {kind!r}.")
    if rank < 1:
        raise ValueError(f"`rank` must be at least 1, got {rank}.")
    if kind == "full" and numel > MOST_FULL:
        raise ValueError(
            f"A full matrix for {numel:,} parameters takes {8 * numel**2 / 2**30:.1f} GiB and {numel**3 / 3e12:.1f} "
            f"TFLOP a step; the most is {MOST_FULL:,}. Use kind='ekfac' or kind='lowrank'."
        )


def make_curvature(
    kind: CurvatureKind, layout: ParameterLayout, weight_decay: Sequence[float], rank: int, seed: int
) -> Curvature:
    """An empty representation.

    ``"auto"`` is full up to 4,096 parameters, low rank while its vectors fit into a GiB, and ekfac beyond.

    Args:
        kind: Which.
        layout: The parameters.
        weight_decay: Of each parameter.
        rank: For ``"lowrank"``.
        seed: For ``"lowrank"``.

    Returns:
        The representation.

    Raises:
        ValueError: If the kind is unknown, or cannot hold that many parameters.
    """
    check_kind(kind, layout.numel, rank)
    if kind == "auto":
        fits = (rank + EXTRA_COLUMNS) * layout.numel * 4 <= _AUTO_LOW_RANK
        kind = "full" if layout.numel <= AUTO_FULL else "lowrank" if fits else "ekfac"
    if kind == "full":
        return FullCurvature(layout)
    if kind == "lowrank":
        return LowRankCurvature(layout, min(rank, layout.numel), seed)
    return EKFACCurvature(layout, weight_decay)
