"""Linear sketches, the same for all devices of a round, decoded by their transpose."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.compression.base import Compressor, Payload, check_rows
from groundwire.plugins.compression.functional import hadamard_transform, next_power_of_two
from groundwire.plugins.compression.support import check_kept, kept
from groundwire.plugins.random import Key


def count_sketch(x: Tensor, slots: Tensor, k: int) -> Tensor:
    """Add each entry to one of ``k`` buckets, or subtract it.

    Args:
        x: Rows, shape ``(rows, d)``.
        slots: For each entry, ``2 * bucket + 1`` where it is added, ``2 * bucket`` where it is subtracted; ``(d,)``.
        k: Buckets.

    Returns:
        ``x R^T``, shape ``(rows, k)``, dtype of ``x``.

    Example:
        >>> count_sketch(torch.tensor([[1.0, 2.0, 5.0]]), torch.tensor([3, 0, 2]), k=2)
        tensor([[-2., -4.]])
    """
    sums = x.new_zeros(len(x), 2 * k).scatter_add_(1, slots.expand(len(x), -1), x)
    return sums[:, 1::2] - sums[:, ::2]


def count_sketch_transpose(y: Tensor, slots: Tensor) -> Tensor:
    """The transpose of :func:`count_sketch`: to each entry the value of its bucket, or that negated.

    Args:
        y: Sketches, shape ``(rows, k)``.
        slots: As there, ``(d,)``.

    Returns:
        ``y R``, shape ``(rows, d)``.

    Example:
        >>> count_sketch_transpose(torch.tensor([[-2.0, -4.0]]), torch.tensor([3, 0, 2]))
        tensor([[-4.,  2.,  4.]])
    """
    return torch.stack([-y, y], dim=2).flatten(1).index_select(1, slots)


def srht(x: Tensor, signs: Tensor, places: Tensor) -> Tensor:
    """Subsampled randomised Hadamard transform, ``sqrt(n / k) P H D`` with orthonormal ``H`` of size ``n``.

    Args:
        x: Rows, shape ``(rows, d)``; padded with zeros to ``n``, the next power of two.
        signs: The diagonal ``D``, 1 or -1, shape ``(d,)``.
        places: Which ``k`` of the ``n`` transformed entries are kept, each at most once, shape ``(k,)``.

    Returns:
        ``x R^T``, shape ``(rows, k)``, dtype of ``x``.

    Example:
        >>> srht(torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([1.0, -1.0, 1.0]), torch.tensor([0, 1]))
        tensor([[-0.7071,  2.1213]])
    """
    n = next_power_of_two(x.shape[1])
    mixed = hadamard_transform(torch.nn.functional.pad(x * signs, (0, n - x.shape[1])))
    return mixed.index_select(1, places).mul_(math.sqrt(n / max(len(places), 1)))


def srht_transpose(y: Tensor, signs: Tensor, places: Tensor) -> Tensor:
    """The transpose of :func:`srht`.

    Args:
        y: Sketches, shape ``(rows, k)``.
        signs: As there, ``(d,)``.
        places: As there, ``(k,)``.

    Returns:
        ``y R``, shape ``(rows, d)``.

    Example:
        >>> srht_transpose(torch.tensor([[1.0, 0.0]]), torch.tensor([1.0, -1.0, 1.0]), torch.tensor([0, 1]))
        tensor([[ 0.7071, -0.7071,  0.7071]])
    """
    d = len(signs)
    n = next_power_of_two(d)
    mixed = hadamard_transform(y.new_zeros(len(y), n).index_copy_(1, places, y))
    return mixed[:, :d] * (signs * math.sqrt(n / max(len(places), 1)))


class _Sketch(Compressor):
    """Sends ``R x``, and decodes by ``R^T``, with an ``R`` of its round whose ``E[R^T R]`` is the identity."""

    linear = True

    def __init__(self, density: float | None = None, k: int | None = None, unbiased: bool = True) -> None:
        super().__init__()
        check_kept(density, k)
        self.density = density
        self.k = k
        self.unbiased = unbiased

    @abstractmethod
    def _draw(self, d: int, k: int, key: Key) -> tuple[Tensor, ...]:
        """The operator of a round."""

    @abstractmethod
    def _sketch(self, x: Tensor, operator: tuple[Tensor, ...], k: int) -> Tensor:
        """``x R^T``."""

    @abstractmethod
    def _transpose(self, y: Tensor, operator: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """``y R``, in that dtype."""

    @abstractmethod
    def _omega(self, d: int, k: int) -> float:
        """``E|R^T R x - x|^2 / |x|^2``, which is the same for all ``x``."""

    @override
    def encode(self, x: Tensor, key: Key) -> Payload:
        check_rows(x, key)
        d = x.shape[1]
        k = kept(d, self.density, self.k)
        operator = tuple(part.to(x.device) for part in self._draw(d, k, key)) if d else ()
        values = self._sketch(x.detach().double(), operator, k) if d else x.detach()  # float64: in any order alike
        values = values.to(torch.promote_types(x.dtype, torch.float32))
        return Payload(
            parts={"values": values},
            numel=d,
            dtype=x.dtype,
            bits_ideal=8 * values.numel() * values.element_size(),
            meta={"operator": operator},
        )

    @override
    def decode(self, payload: Payload) -> Tensor:
        values, operator = payload.parts["values"].double(), payload.meta["operator"]
        assert isinstance(operator, tuple)
        if payload.numel == 0:
            return values.to(payload.dtype)
        if not self.unbiased:
            values = values / (1 + self._omega(payload.numel, values.shape[1]))
        return self._transpose(values, operator, payload.dtype)

    @override
    def omega(self, numel: int) -> float | None:
        return self._omega(numel, kept(numel, self.density, self.k)) if self.unbiased else None

    @override
    def alpha(self, numel: int) -> float | None:
        return None if self.unbiased else 1 / (1 + self._omega(numel, kept(numel, self.density, self.k)))

    @override
    def extra_repr(self) -> str:
        return f"density={self.density}, k={self.k}, unbiased={self.unbiased}"


class CountSketch(_Sketch):
    """Adds each entry to one of ``k`` buckets under a random sign, the same for all devices of a round.

    Only the ``k`` sums travel, and they add. Decoding gives every entry its bucket, with its sign: the row itself plus,
    in each entry, what else fell into the bucket. That error has ``(d - 1) / k`` times the squared norm in expectation,
    and since the sketch is shared, the mean over devices does not lessen it. A row that is not finite arrives as one
    that is not.

    Args:
        density: Buckets over entries, ``k / d``, in (0, 1]; at least one bucket.
        k: Buckets, instead of ``density``; at most as many as entries.
        unbiased: Whether the expectation of what arrives is the row. Else it is divided by ``1 + (d - 1) / k``, which
            makes it contractive with ``alpha = k / (k + d - 1)``, as error feedback wants.

    Raises:
        ValueError: If not exactly one of ``density`` and ``k`` is given, or it is out of range.

    Reference:
        Charikar, Chen, Farach-Colton, "Finding Frequent Items in Data Streams", ICALP 2002; as a compressor decoded by
        the transpose: Song, Wang, Yu, Zhang, "Sketching for First Order Method: Efficient Algorithm for Low-Bandwidth
        Channel and Vulnerability", ICML 2023. arXiv:2210.08371

    Example:
        >>> message = CountSketch(density=0.5).roundtrip(torch.tensor([[0.0, 3.0, 0.0, 0.0]]), Key(seed=0))
        >>> message.values[0, 1], message.bits_wire
        (tensor(3.), 64)
    """

    @override
    def _draw(self, d: int, k: int, key: Key) -> tuple[Tensor, ...]:
        return (torch.randint(2 * k, (d,), generator=key.shared("count_sketch")),)

    @override
    def _sketch(self, x: Tensor, operator: tuple[Tensor, ...], k: int) -> Tensor:
        return count_sketch(x, operator[0], k)

    @override
    def _transpose(self, y: Tensor, operator: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        return count_sketch_transpose(y.to(dtype), *operator)

    @override
    def _omega(self, d: int, k: int) -> float:
        return max(d - 1, 0) / max(k, 1)


class SRHT(_Sketch):
    """Subsampled randomised Hadamard transform: random signs, the transform, and ``k`` of its entries, for all alike.

    Rows are padded with zeros to ``n`` entries, the next power of two. With ``k = d = n`` every row arrives as it is;
    in general the error has ``(d - 1)(n - k) / (k (n - 1))`` times the squared norm in expectation. All devices of a
    round share the transform, so payloads add, and the mean over devices does not lessen the error. It errs less than
    :class:`CountSketch`, which is faster. A row that is not finite arrives as one that is not.

    Args:
        density: Share of entries that are sent, ``k / d``, in (0, 1]; at least one.
        k: Entries sent, instead of ``density``; at most all of them.
        unbiased: Whether the expectation of what arrives is the row. Else it is divided by one more than that error,
            which makes it contractive with ``alpha`` one over it (``k / d`` where ``d`` is a power of two), as error
            feedback wants.

    Raises:
        ValueError: If not exactly one of ``density`` and ``k`` is given, or it is out of range.

    Reference:
        Ailon, Chazelle, "The Fast Johnson-Lindenstrauss Transform and Approximate Nearest Neighbors", SIAM J. Comput.
        2009; as a compressor decoded by the transpose: Song, Wang, Yu, Zhang, "Sketching for First Order Method:
        Efficient Algorithm for Low-Bandwidth Channel and Vulnerability", ICML 2023. arXiv:2210.08371

    Example:
        >>> message = SRHT(k=2).roundtrip(torch.tensor([[0.0, 3.0, 0.0, 0.0]]), Key(seed=0))
        >>> message.values[0, 1].round(decimals=3), message.bits_wire
        (tensor(3.), 64)
    """

    @override
    def _draw(self, d: int, k: int, key: Key) -> tuple[Tensor, ...]:
        shared = key.shared("srht")
        signs = 2.0 * torch.randint(2, (d,), generator=shared).double() - 1
        return signs, torch.randperm(next_power_of_two(d), generator=shared)[:k].clone()

    @override
    def _sketch(self, x: Tensor, operator: tuple[Tensor, ...], k: int) -> Tensor:
        return srht(x, *operator)

    @override
    def _transpose(self, y: Tensor, operator: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        return srht_transpose(y, *operator).to(dtype)

    @override
    def _omega(self, d: int, k: int) -> float:
        n = next_power_of_two(d)
        return (d - 1) * (n - k) / (k * (n - 1)) if d > 1 else 0.0
