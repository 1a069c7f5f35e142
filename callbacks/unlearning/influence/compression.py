"""Compressors of per-record gradients: dropout (keep some coordinates), and the Gaussian projection it is measured by."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.layout import ParameterLayout
from groundwire.plugins.random import root_seed, stream

_BLOCK = 2**22  # entries of a random matrix that are drawn at once
_KEPT = 2**26  # entries of a random matrix that are kept in memory; a larger one is drawn again for each call


class GradientCompressor(ABC):
    """A fixed linear map ``P`` from gradients of ``p`` entries to ``k``: the same for all records, drawn from a seed.

    Subclasses write :meth:`_fit` and :meth:`_compress`.

    Args:
        density: Entries kept, as a share ``k / p`` in (0, 1]; at least one entry.
        k: Or their number; where it is above ``p``, ``p`` is used.
        seed: Root seed of the map; by default that of ``seed_everything``, else 0.

    Raises:
        ValueError: If neither or both of ``density`` and ``k`` are given, or one is out of range.
    """

    def __init__(self, density: float | None = None, k: int | None = None, seed: int | None = None) -> None:
        if (density is None) == (k is None):
            raise ValueError(f"Give `density` or `k`, and not both; got density={density} and k={k}.")
        if density is not None and not 0 < density <= 1:
            raise ValueError(f"`density` must be in (0, 1], got {density}: 1 keeps every entry.")
        if k is not None and k < 1:
            raise ValueError(f"`k` must be at least 1, got {k}.")
        self.density = density
        self.requested_k = k
        self.seed = seed
        self._layout: ParameterLayout | None = None
        self._k = 0

    def fit(self, layout: ParameterLayout) -> None:
        """Draw the map for gradients of this layout; the same seed and layout give the same map.

        Args:
            layout: Names and shapes of the parameters.
        """
        p = layout.numel
        if self.density is not None:
            k = max(1, round(self.density * p))
        else:
            assert self.requested_k is not None
            k = min(self.requested_k, p)
            if self.requested_k > p:
                rank_zero_info(
                    f"{type(self).__name__}: k={self.requested_k} is above the {p} parameters; k={p} is used."
                )
        self._layout = layout
        self._k = self._fit(layout, k, root_seed(self.seed))

    @property
    def k(self) -> int:
        """Entries of a compressed gradient.

        Raises:
            RuntimeError: Before :meth:`fit`.
        """
        if self._layout is None:
            raise RuntimeError(f"{type(self).__name__} has no map yet: call `fit(layout)` first.")
        return self._k

    def __call__(self, rows: Tensor) -> Tensor:
        """Compress gradients.

        Args:
            rows: Shape ``(B, p)``, any floating dtype.

        Returns:
            ``rows @ P^T``, shape ``(B, k)``, same dtype and device.

        Raises:
            RuntimeError: Before :meth:`fit`.
            ValueError: If rows do not have ``p`` entries.
        """
        k = self.k
        assert self._layout is not None
        if rows.ndim != 2 or rows.shape[1] != self._layout.numel:
            raise ValueError(
                f"expected rows (B, {self._layout.numel}), got shape {tuple(rows.shape)}: call `fit` again if other "
                "parameters are trained now."
            )
        found = self._compress(rows)
        assert found.shape[1] == k
        return found

    @abstractmethod
    def _fit(self, layout: ParameterLayout, k: int, seed: int) -> int:
        """Draw the map; how many entries it keeps."""

    @abstractmethod
    def _compress(self, rows: Tensor) -> Tensor:
        """``(B, p)`` to ``(B, k)``."""


class _Selection(GradientCompressor):
    """Keeps the entries at ``indices``, as they are."""

    indices: Tensor

    @override
    def _compress(self, rows: Tensor) -> Tensor:
        if self.indices.device != rows.device:
            self.indices = self.indices.to(rows.device)
        return rows.index_select(1, self.indices)


class Dropout(_Selection):
    """Dropout as compression: a random set of coordinates of each parameter tensor, the same for all records.

    Each tensor keeps its share of ``k``, up to rounding. Entries are not scaled: all of them by one factor would be the
    same as another damping. For one seed, the coordinates of a smaller ``k`` are among those of a larger one, but for
    rounding. With density 1 gradients pass unchanged. There is no matrix, and compressing a record costs ``O(k)``.

    The paper describes masks on the gradient vector; which layout its authors used is not known here.

    Args:
        density: Share of the coordinates, in (0, 1].
        k: Or their number.
        seed: Root seed of the masks; by default that of ``seed_everything``, else 0.

    Raises:
        ValueError: If not exactly one of ``density`` and ``k`` is given, or it is out of range.

    Reference:
        Zhang, Amiri, "Toward Efficient Influence Function: Dropout as a Compression Tool", 2025. arXiv:2509.15651

    Example:
        >>> compressor = Dropout(density=0.5, seed=0)
        >>> compressor.fit(ParameterLayout.of(torch.nn.Linear(6, 2)))
        >>> compressor.k, compressor(torch.ones(3, 14)).shape
        (7, torch.Size([3, 7]))
    """

    @override
    def _fit(self, layout: ParameterLayout, k: int, seed: int) -> int:
        found, offset = [], 0
        for name, size, kept in zip(layout.names, layout.sizes, _allotted(k, layout.sizes), strict=True):
            found.append(offset + _chosen(size, kept, seed, f"influence/dropout/{name}"))
            offset += size
        self.indices = torch.cat(found)
        return len(self.indices)


class DropoutKron(_Selection):
    """Dropout of whole rows and columns: of each parameter of two or more dimensions, a random block.

    Rows are outputs (the first dimension), columns all inputs; the share of both is about the root of the density.
    Vectors (biases) keep random coordinates. Of each tensor at least one entry is kept, so ``k`` is near the number asked
    for and not equal to it. Such a block of a linear layer's gradient is the product of a part of the layer's inputs and a
    part of the gradients of its outputs; here it is cut out of the full gradient.

    Args:
        density: Share of the coordinates, in (0, 1].
        k: Or their number.
        seed: Root seed of the masks; by default that of ``seed_everything``, else 0.

    Raises:
        ValueError: If not exactly one of ``density`` and ``k`` is given, or it is out of range.

    Reference:
        Zhang, Amiri, "Toward Efficient Influence Function: Dropout as a Compression Tool", 2025. arXiv:2509.15651

    Example:
        >>> compressor = DropoutKron(density=0.25, seed=0)
        >>> compressor.fit(ParameterLayout.of(torch.nn.Linear(6, 4)))
        >>> compressor.k  # 2 rows of 3 columns, and 1 of 4 biases
        7
    """

    @override
    def _fit(self, layout: ParameterLayout, k: int, seed: int) -> int:
        share, found, offset = k / layout.numel, [], 0
        for name, shape, size in zip(layout.names, layout.shapes, layout.sizes, strict=True):
            purpose = f"influence/dropout_kron/{name}"
            if len(shape) < 2:
                inside = _chosen(size, max(1, round(share * size)), seed, purpose)
            else:
                height, width = shape[0], size // shape[0]
                kept_rows = max(1, round(math.sqrt(share) * height))
                kept_columns = min(width, max(1, round(share * size / kept_rows)))
                rows = _chosen(height, kept_rows, seed, f"{purpose}/rows")
                columns = _chosen(width, kept_columns, seed, f"{purpose}/columns")
                inside = (rows[:, None] * width + columns).flatten()
            found.append(offset + inside)
            offset += size
        self.indices = torch.cat(found)
        return len(self.indices)


class GaussianProjection(GradientCompressor):
    """The baseline: a dense random matrix with independent entries of ``N(0, 1/k)``.

    It keeps lengths and angles on average. Compressing a record costs ``O(k p)``. The matrix is drawn block by block, each
    from a stream of its own, so that no more than 16 MiB of it have to be in memory; up to 256 MiB of it are kept, and a
    larger one is drawn again in every call.

    Args:
        density: ``k / p``, in (0, 1].
        k: Or the number itself.
        seed: Root seed of the matrix; by default that of ``seed_everything``, else 0.

    Raises:
        ValueError: If not exactly one of ``density`` and ``k`` is given, or it is out of range.

    Example:
        >>> compressor = GaussianProjection(k=4, seed=0)
        >>> compressor.fit(ParameterLayout.of(torch.nn.Linear(6, 2)))
        >>> compressor(torch.ones(3, 14)).shape
        torch.Size([3, 4])
    """

    @override
    def _fit(self, layout: ParameterLayout, k: int, seed: int) -> int:
        self._seed = seed
        self._width = min(layout.numel, max(1, _BLOCK // k))
        self._blocks: dict[int, Tensor] = {}
        self._keep = k * layout.numel <= _KEPT
        return k

    @override
    def _compress(self, rows: Tensor) -> Tensor:
        found = rows.new_zeros(len(rows), self.k)
        for number, start in enumerate(range(0, rows.shape[1], self._width)):
            part = rows[:, start : start + self._width]
            found += part @ self._block(number, part.shape[1]).to(rows)
        return found

    def _block(self, number: int, width: int) -> Tensor:
        """Rows ``(width, k)`` of the transposed matrix, float32, on the CPU."""
        if (block := self._blocks.get(number)) is not None:
            return block
        generator = stream(self._seed, purpose="influence/gaussian", round=number)
        block = torch.randn(width, self.k, generator=generator) / math.sqrt(self.k)
        if self._keep:
            self._blocks[number] = block
        return block


def _chosen(size: int, number: int, seed: int, purpose: str) -> Tensor:
    """``number`` of ``size`` positions, ascending."""
    return torch.randperm(size, generator=stream(seed, purpose=purpose))[:number].sort().values


def _allotted(k: int, sizes: list[int]) -> list[int]:
    """Shares of ``k`` in proportion to ``sizes``, which sum to ``k``: the largest remainders are rounded up."""
    total = sum(sizes)
    shares = [k * size // total for size in sizes]
    order = sorted(range(len(sizes)), key=lambda i: -(k * sizes[i] % total))
    for i in order[: k - sum(shares)]:
        shares[i] += 1
    return shares
