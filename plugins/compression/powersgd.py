"""PowerSGD: low-rank approximation by one warm-started power iteration a round, which all devices share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.compression.base import Compressor, Message, Payload, check_rows
from groundwire.plugins.random import Key


class PowerSGD(Compressor):
    """Sends two thin factors of each device's matrix ``X_i``, of which ``P P^T X_i`` arrives, of rank ``r``.

    The orthonormal ``P`` is shared: devices first add up their ``X_i Q``, with the ``Q`` that the last round left
    behind, and orthonormalise the sum; each then sends ``X_i^T P``. Both factors add, so two all-reduces serve. The sum
    of what arrives is the projection of ``sum X_i``, on which the rounds do subspace iteration; devices count alike in
    it, whatever weights the receiver gives them. It is biased: use it inside error feedback, as the paper does.

    A tensor of two or more dimensions is the matrix ``(shape[0], rest)``; any other, and one of which :meth:`setup` was
    not told, for example the whole model, is cut into a near-square one. Factors are float32 at least. Something that
    is not finite on one device reaches all of them in that round, and leaves ``Q`` as it is.

    Args:
        rank: Columns ``r`` of each factor, at least 1 and at most the shorter side of each matrix, where it is exact.
        warm_start: Start from the last round's ``Q``; else from a fresh Gaussian one each round, the same everywhere.

    Raises:
        ValueError: If ``rank`` is below 1; later, if a tensor is too small for it.

    Reference:
        Vogels, Karimireddy, Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization",
        NeurIPS 2019. arXiv:1905.13727, Algorithms 1 and 2

    Example:
        >>> compressor = PowerSGD(rank=1)
        >>> compressor.setup({"weight": torch.Size([2, 3])})
        >>> x = torch.tensor([[1.0, 2.0, 3.0, 2.0, 4.0, 6.0]])  # of rank 1
        >>> message = compressor.roundtrip(x, Key(seed=0, name="weight"))
        >>> message.values.round(decimals=3), message.bits_wire
        (tensor([[1., 2., 3., 2., 4., 6.]]), 160)
    """

    linear = True
    negotiates = True

    def __init__(self, rank: int = 2, warm_start: bool = True) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"`rank` must be at least 1, got {rank}.")
        self.rank = rank
        self.warm_start = warm_start
        self._shapes: dict[str, torch.Size] = {}
        self._factors: dict[str, Tensor] = {}  # by name: the rows of Q^T, (r, b), orthonormal

    @override
    def setup(self, shapes: Mapping[str, torch.Size]) -> None:
        for name, shape in shapes.items():
            self._check(name, shape)
        self._shapes = {name: torch.Size(shape) for name, shape in shapes.items()}

    def payload_numel(self, shape: Sequence[int]) -> int:
        """Numbers that travel for one tensor of ``shape``: ``r (a + b)``."""
        return self.rank * sum(matrix_shape(shape))

    @override
    def is_worthwhile(self, shape: torch.Size) -> bool:
        return self.payload_numel(shape) < shape.numel()  # so `rank` is below the shorter side, too

    @override
    def propose(self, x: Tensor, key: Key) -> Tensor:
        check_rows(x, key)
        x = _wide(x)
        _, b = self._matrix(x, key)
        return times(x, self._start(b, x, key)).flatten(1) if b else x

    @override
    def encode_agreed(self, x: Tensor, key: Key, agreed: Tensor) -> Payload:
        check_rows(x, key)
        wide = _wide(x)
        a, b = self._matrix(x, key)
        basis = orthonormalize(agreed.to(wide).reshape(self.rank, a))
        q = transposed_times(wide, basis, b).flatten(1) if b else wide
        return _payload({"q": q}, x, basis)

    @override
    def encode(self, x: Tensor, key: Key) -> Payload:
        p = self.propose(x, key)
        payload = self.encode_agreed(x, key, p.sum(0))
        return _payload({"p": p, **payload.parts}, x, payload.meta["basis"])

    @override
    def decode(self, payload: Payload) -> Tensor:
        basis, q = payload.meta["basis"], payload.parts["q"]
        assert isinstance(basis, Tensor)
        if payload.numel == 0:
            return q.to(payload.dtype)
        q = q.reshape(len(q), len(basis), q.shape[1] // len(basis))
        return low_rank(basis, q, payload.numel).to(payload.dtype)

    @override
    def settle(self, total: Payload, key: Key, num_devices: int) -> None:
        if not self.warm_start or total.numel == 0:
            return
        q = total.parts["q"].reshape(self.rank, -1)
        old = self._start(q.shape[1], q, key)
        # The sum spans what the mean does. A column of zeros spans nothing, and Q would never leave it.
        new = orthonormalize(torch.where((q == 0).all(dim=1, keepdim=True), old, q))
        self._factors[key.name] = torch.where(new.isfinite().all(), new, old)

    @override
    def roundtrip(self, x: Tensor, key: Key) -> Message:
        payload = self.encode(x, key)
        total = replace(payload, parts={"q": payload.parts["q"].sum(0, keepdim=True)})
        self.settle(total, key, len(key))
        return Message(values=self.decode(payload), bits_wire=payload.bits_wire, bits_ideal=payload.bits_ideal)

    @override
    def price(self, x: Tensor, key: Key) -> tuple[float, int]:
        """What it would lose of a row after five rounds, which a warm start has behind it; changes nothing.

        Args:
            x: One row, shape ``(1, d)``.
            key: Of the row.

        Returns:
            ``|C(x) - x|_2`` and the bits of the message.
        """
        trial = PowerSGD(self.rank, self.warm_start)
        trial._shapes, trial._factors = self._shapes, dict(self._factors)
        for _ in range(4 if self.warm_start else 0):
            trial.roundtrip(x, key)
        return Compressor.price(trial, x, key)

    @override
    def reset_state(self) -> None:
        self._factors.clear()

    def _check(self, name: str, shape: Sequence[int]) -> None:
        a, b = matrix_shape(shape)
        if 0 < min(a, b) < self.rank:
            what = f"Tensor {name!r}" if name else "A tensor without a name"
            raise ValueError(
                f"{what} of shape {tuple(shape)} is a {a} x {b} matrix to PowerSGD, whose `rank` can be 1 to "
                f"{min(a, b)} there, got {self.rank}: lower it, or send that tensor as it is."
            )

    def _matrix(self, x: Tensor, key: Key) -> tuple[int, int]:
        """The shape of the matrix in each row of ``x``."""
        shape = self._shapes.get(key.name)
        if shape is None:
            shape = x.shape[1:]
            self._check(key.name, shape)
        if shape.numel() != x.shape[1]:
            raise RuntimeError(
                f"{key.name!r} was set up with shape {tuple(shape)}, but rows of {x.shape[1]} entries came; call setup() "
                "and reset_state() if the model changed."
            )
        return matrix_shape(shape)

    def _start(self, b: int, like: Tensor, key: Key) -> Tensor:
        """The shared ``Q^T``, shape ``(r, b)``, with the dtype and device of ``like``."""
        known = self._factors.get(key.name) if self.warm_start else None
        if known is None:
            generator = (replace(key, round=0) if self.warm_start else key).shared("powersgd")
            known = orthonormalize(torch.randn(self.rank, b, generator=generator, dtype=torch.float64))
        if known.shape != (self.rank, b):
            raise RuntimeError(
                f"{key.name!r}: the warm start is of rank {known.shape[0]} for {known.shape[1]} columns, but rank "
                f"{self.rank} for {b} is wanted; call reset_state() if the model or the rank changed."
            )
        return known.to(like)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._factors = {name: factor.to(fn(factor).device) for name, factor in self._factors.items()}
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    @override
    def get_extra_state(self) -> dict[str, Any]:
        return {"factors": dict(self._factors)}

    @override
    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._factors = dict(state["factors"])  # never changed in place

    @override
    def extra_repr(self) -> str:
        return f"rank={self.rank}, warm_start={self.warm_start}"


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """How PowerSGD sees a tensor: ``(shape[0], rest)``, or the near-square matrix that a vector fills row by row.

    Args:
        shape: Of the tensor.

    Returns:
        ``(a, b)``; for a vector, its last row may be short. ``(0, 0)`` for a tensor without entries.

    Example:
        >>> matrix_shape((64, 3, 7, 7)), matrix_shape((10,))
        ((64, 147), (3, 4))
    """
    numel = math.prod(shape)
    if numel == 0:
        return 0, 0
    if len(shape) > 1:
        return shape[0], numel // shape[0]
    b = math.isqrt(numel - 1) + 1
    return -(-numel // b), b


def orthonormalize(rows: Tensor) -> Tensor:
    """An orthonormal basis whose first ``i`` vectors span the first ``i`` rows, for all ``i`` up to linear dependence.

    Args:
        rows: Shape ``(r, n)`` with ``r <= n``, of any scale and rank.

    Returns:
        The same shape, by Householder's QR decomposition: orthonormal whatever the rank. NaN if a row is not finite.

    Example:
        >>> orthonormalize(torch.tensor([[0.0, 3e30, 0.0], [0.0, 0.0, 0.0]])).abs().sum(1)
        tensor([1., 1.])
    """
    if rows.numel() == 0:
        return rows
    scale = rows.abs().amax(dim=1, keepdim=True)  # LAPACK sees to this itself, others may not
    basis = torch.linalg.qr((rows / torch.where(scale > 0, scale, 1)).T).Q.T
    return torch.where(scale.isfinite().all(), basis, torch.nan)


def times(x: Tensor, q: Tensor) -> Tensor:
    """``(X Q)^T`` for the matrix in each row.

    Args:
        x: Matrices, row after row, shape ``(rows, n)``; the last row of each may be short.
        q: ``Q^T``, shape ``(r, b)``.

    Returns:
        Shape ``(rows, r, a)``.
    """
    body, tail = _cut(x, q.shape[1])
    p = q @ body.mT  # on the CPU three times as fast as body @ q.T
    if tail.shape[1] == 0:
        return p
    return torch.cat([p, (tail @ q[:, : tail.shape[1]].T).unsqueeze(2)], dim=2)


def transposed_times(x: Tensor, p: Tensor, b: int) -> Tensor:
    """``(X^T P)^T`` for the matrix in each row.

    Args:
        x: Matrices, row after row, shape ``(rows, n)``; the last row of each may be short.
        p: ``P^T``, shape ``(r, a)``.
        b: Columns of each matrix.

    Returns:
        Shape ``(rows, r, b)``.
    """
    body, tail = _cut(x, b)
    q = p[:, : body.shape[1]] @ body
    if tail.shape[1] > 0:
        q[:, :, : tail.shape[1]] += p[:, -1:] * tail.unsqueeze(1)
    return q


def low_rank(p: Tensor, q: Tensor, numel: int) -> Tensor:
    """``P Q^T``, row after row.

    Args:
        p: ``P^T``, shape ``(r, a)``.
        q: ``Q^T`` of each row, shape ``(rows, r, b)``.
        numel: Entries of each row, ``n``; what the last row of the matrix has beyond them is left out.

    Returns:
        Shape ``(rows, n)``.
    """
    out = q.new_empty(q.shape[0], numel)
    body, tail = _cut(out, q.shape[2])
    left = p[:, : body.shape[1]]
    if p.shape[0] <= 4 and q.device.type == "cpu":  # where products with so short an inner side are slow
        torch.mul(left[0].unsqueeze(1), q[:, :1], out=body)
        for k in range(1, p.shape[0]):
            body.addcmul_(left[k].unsqueeze(1), q[:, k : k + 1])
    else:
        torch.matmul(left.T, q, out=body)
    if tail.shape[1] > 0:
        tail.copy_(p[:, -1] @ q[:, :, : tail.shape[1]])
    return out


def _cut(x: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Views of rows ``(rows, n)``: the full rows of ``b`` as matrices, ``(rows, n // b, b)``, and what is left."""
    full = x.shape[1] // b
    return x[:, : full * b].view(len(x), full, b), x[:, full * b :]


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def _payload(parts: dict[str, Tensor], x: Tensor, basis: object) -> Payload:
    payload = Payload(parts=parts, numel=x.shape[1], dtype=x.dtype, bits_ideal=0.0, meta={"basis": basis})
    return replace(payload, bits_ideal=float(payload.bits_wire))
