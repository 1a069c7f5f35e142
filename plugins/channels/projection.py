"""Seeded random projections: devices and server make the same matrix and never exchange it."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from typing import Literal, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from groundwire.plugins.channels.functional import dct, idct
from groundwire.plugins.random import stream

_GIB = 2**30


class Projection(nn.Module, ABC):
    """A random matrix ``A`` of shape ``(s, d)`` whose columns have unit norm on average, made from a seed.

    Computation is in the projection's own dtype (float32; float64 after ``.double()``), which its inputs must have.
    The buffers are made again from the seed, so ``state_dict`` holds nothing. They are drawn on the CPU and moved:
    the matrix is the same on every kind of device.

    Args:
        num_rows: Rows ``s``, ``1 <= s <= d``.
        numel: Columns ``d``: entries of the vectors to project.
        seed: Root seed of the run.

    Raises:
        ValueError: If ``num_rows`` is outside ``[1, numel]``.
    """

    row_orthogonal: bool = False
    """Whether ``A A^T = (d / s) I``."""

    def __init__(self, num_rows: int, numel: int, seed: int) -> None:
        super().__init__()
        if not 1 <= num_rows <= numel:
            raise ValueError(
                f"A projection needs 1 <= num_rows <= numel, got num_rows={num_rows} and numel={numel}: "
                "choose fewer channel uses than the vector has entries, and enough to leave one row."
            )
        self.num_rows = num_rows
        self.numel = numel
        self.seed = seed

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype of the matrix, and of what it takes and gives."""

    def mv(self, x: Tensor) -> Tensor:
        """``A x`` for vectors of shape ``(..., d)``: shape ``(..., s)``.

        Raises:
            TypeError: If ``x`` has another dtype than the projection.
            ValueError: If the last dimension of ``x`` is not ``d``.
        """
        self._check(x, self.numel, "numel")
        return self._mv(x)

    def mtv(self, r: Tensor) -> Tensor:
        """``A^T r`` for vectors of shape ``(..., s)``: shape ``(..., d)``.

        Raises:
            TypeError: If ``r`` has another dtype than the projection.
            ValueError: If the last dimension of ``r`` is not ``s``.
        """
        self._check(r, self.num_rows, "num_rows")
        return self._mtv(r)

    def least_squares(self, v: Tensor) -> Tensor:
        """``A^T (A A^T)^-1 v``, the vector of least norm that ``A`` maps to ``v``: shape ``(..., s)`` to ``(..., d)``.

        Raises:
            TypeError: If ``v`` has another dtype than the projection.
            ValueError: If the last dimension of ``v`` is not ``s``.
        """
        self._check(v, self.num_rows, "num_rows")
        return self._least_squares(v)

    def truncated(self, num_rows: int) -> Self:
        """The projection on the first ``num_rows`` rows, rescaled so that its columns keep unit norm on average.

        It shares memory with this one and costs nothing to make: A-DSGD sends ``s - 1`` rows, and ``s - 2`` in the
        rounds with mean removal, of one matrix. Moving either moves both.

        Raises:
            ValueError: If ``num_rows`` is outside ``[1, self.num_rows]``.
        """
        if not 1 <= num_rows <= self.num_rows:
            raise ValueError(f"Can keep from 1 to {self.num_rows} rows of this projection, got {num_rows}.")
        view = copy.copy(self)  # a shallow copy of a module shares the dict of its buffers
        view.num_rows = num_rows
        return view

    def select(self, rows: Tensor) -> Self:
        """The projection on some of the rows, in their order, rescaled so that its columns keep unit norm on average.

        It maps ``x`` to ``sqrt(s / r)`` times those ``r`` of the ``s`` entries of ``A x``.

        Args:
            rows: Distinct positions in ``[0, s)``, int64, shape ``(r,)``, at least one.

        Returns:
            A projection with as many rows; its dense matrix is a copy.

        Raises:
            ValueError: If there is no row.
        """
        if not len(rows):
            raise ValueError("A projection needs at least one row, and `rows` names none.")
        view = copy.copy(self)
        view._buffers = dict(self._buffers)
        view._keep(rows)
        view.num_rows = len(rows)
        return view

    @abstractmethod
    def _keep(self, rows: Tensor) -> None:
        """Replace the buffers by those of some rows."""

    @abstractmethod
    def _mv(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _mtv(self, r: Tensor) -> Tensor: ...

    @abstractmethod
    def _least_squares(self, v: Tensor) -> Tensor: ...

    def _check(self, x: Tensor, length: int, name: str) -> None:
        if x.ndim == 0 or x.shape[-1] != length:
            raise ValueError(f"Expected vectors of shape (..., {length}), with {name}={length}, got {tuple(x.shape)}.")
        if x.dtype != self.dtype:
            raise TypeError(
                f"This projection computes in {self.dtype}, got {x.dtype}: cast the vectors, or the projection by "
                "`.double()`."
            )

    @override
    def extra_repr(self) -> str:
        return f"num_rows={self.num_rows}, numel={self.numel}, seed={self.seed}"


class GaussianProjection(Projection):
    """Dense matrix with independent entries ``N(0, 1/s)``.

    The classical choice, on which the theory of AMP rests; it costs ``4 s d`` bytes, and every product reads them.

    Args:
        num_rows: Rows ``s``, ``1 <= s <= d``.
        numel: Columns ``d``.
        seed: Root seed of the run.
        memory_limit: Most bytes the matrix may take.

    Raises:
        ValueError: If ``num_rows`` is outside ``[1, numel]``, or the matrix would not fit into ``memory_limit``.

    Example:
        >>> projection = GaussianProjection(num_rows=50, numel=100, seed=0)
        >>> projection.mv(torch.ones(3, 100)).shape, projection.mtv(torch.ones(50)).shape
        (torch.Size([3, 50]), torch.Size([100]))
    """

    matrix: Tensor
    factor: Tensor | None

    def __init__(self, num_rows: int, numel: int, seed: int, memory_limit: int = 2 * _GIB) -> None:
        super().__init__(num_rows, numel, seed)
        if 4 * num_rows * numel > memory_limit:
            raise ValueError(
                f"dense Gaussian projection would need {4 * num_rows * numel / _GIB:.2f} GiB (s={num_rows}, d={numel}), "
                f"above the limit of {memory_limit / _GIB:.2f} GiB; use projection='dct'."
            )
        generator = stream(seed, purpose="projection/gaussian")
        # Entries N(0, 1): the scale is applied to the short side, so that a truncated projection shares the memory.
        self.register_buffer("matrix", torch.randn(num_rows, numel, generator=generator), persistent=False)
        self.register_buffer("factor", None, persistent=False)

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    @override
    def _keep(self, rows: Tensor) -> None:
        self.matrix, self.factor = self.matrix[rows], None

    @override
    def _mv(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.matrix[: self.num_rows]).div_(math.sqrt(self.num_rows))

    @override
    def _mtv(self, r: Tensor) -> Tensor:
        return (r / math.sqrt(self.num_rows)) @ self.matrix[: self.num_rows]

    @override
    def _least_squares(self, v: Tensor) -> Tensor:
        if self.factor is None:
            matrix = self.matrix.double()  # the Gram matrix squares the condition number
            self.factor = torch.linalg.cholesky(matrix @ matrix.T)
        # The factor of fewer rows is the leading block of the factor of all.
        factor = self.factor[: self.num_rows, : self.num_rows]
        dual = torch.cholesky_solve(v.double().reshape(-1, self.num_rows).T, factor.double()).T.reshape(v.shape)
        return dual.mul_(math.sqrt(self.num_rows)).to(v.dtype) @ self.matrix[: self.num_rows]


class DCTProjection(Projection):
    """Random rows of an orthonormal cosine transform with random signs: ``sqrt(d/s) P F diag(eps)``.

    A product costs ``O(d log d)`` and the matrix takes ``O(d)`` bytes. ``F`` has the length of the vector itself, no
    padding, so that ``A A^T = (d / s) I`` holds exactly and least squares is ``(s / d) A^T v``.

    Args:
        num_rows: Rows ``s``, ``1 <= s <= d``.
        numel: Columns ``d``.
        seed: Root seed of the run.

    Raises:
        ValueError: If ``num_rows`` is outside ``[1, numel]``.

    Reference:
        Do, Gan, Nguyen, Tran, "Fast and Efficient Compressive Sensing Using Structurally Random Matrices", IEEE Trans.
        Signal Process. 60(1), 2012. arXiv:1106.5037

    Example:
        >>> projection = DCTProjection(num_rows=50, numel=100, seed=0)
        >>> projection.mv(torch.ones(3, 100)).shape, projection.mtv(torch.ones(50)).shape
        (torch.Size([3, 50]), torch.Size([100]))
    """

    row_orthogonal = True
    signs: Tensor
    rows: Tensor

    def __init__(self, num_rows: int, numel: int, seed: int) -> None:
        super().__init__(num_rows, numel, seed)
        coins = torch.randint(2, (numel,), generator=stream(seed, purpose="projection/dct/signs"))
        # In random order, so that the first rows of the projection are a fair sample, too.
        rows = torch.randperm(numel, generator=stream(seed, purpose="projection/dct/rows"))[:num_rows].clone()
        self.register_buffer("signs", (2 * coins - 1).float(), persistent=False)
        self.register_buffer("rows", rows, persistent=False)

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self.signs.dtype

    @override
    def _keep(self, rows: Tensor) -> None:
        self.rows = self.rows[rows]

    @override
    def _mv(self, x: Tensor) -> Tensor:
        return dct(x * self.signs).index_select(-1, self.rows[: self.num_rows]).mul_(self._scale)

    @override
    def _mtv(self, r: Tensor) -> Tensor:
        spectrum = r.new_zeros(*r.shape[:-1], self.numel)
        spectrum.index_copy_(-1, self.rows[: self.num_rows], r * self._scale)
        return idct(spectrum).mul_(self.signs)

    @override
    def _least_squares(self, v: Tensor) -> Tensor:
        return self._mtv(v).div_(self._scale**2)

    @property
    def _scale(self) -> float:
        return math.sqrt(self.numel / self.num_rows)


def make_projection(
    kind: Literal["auto", "gaussian", "dct"],
    num_rows: int,
    numel: int,
    seed: int,
    memory_limit: int = 2 * _GIB,
) -> Projection:
    """Make the projection that a setting names.

    Args:
        kind: ``"gaussian"``, ``"dct"``, or ``"auto"``: Gaussian up to 128 MiB (the softmax model of 7,850 weights at
            half bandwidth, where a product takes about as long as reading the matrix), else DCT.
        num_rows: Rows ``s``, ``1 <= s <= d``.
        numel: Columns ``d``.
        seed: Root seed of the run.
        memory_limit: Most bytes that a Gaussian matrix may take.

    Returns:
        The projection, on the CPU in float32.

    Raises:
        ValueError: If ``kind`` is unknown, the shape impossible, or the matrix too large.

    Example:
        >>> make_projection("auto", num_rows=200_000, numel=400_000, seed=0)
        DCTProjection(num_rows=200000, numel=400000, seed=0)
    """
    if kind == "auto":
        kind = "gaussian" if 4 * num_rows * numel <= 128 * 2**20 else "dct"
    if kind == "gaussian":
        return GaussianProjection(num_rows, numel, seed, memory_limit)
    if kind == "dct":
        return DCTProjection(num_rows, numel, seed)
    raise ValueError(f"Unknown projection {kind!r}; allowed are 'auto', 'gaussian' and 'dct'.")
