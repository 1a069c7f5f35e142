"""FedZip: top-z sparsification, three clusters, and the shortest of three codes for who belongs to which."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.compression.base import Compressor, Message, Payload, check_rows, log2_binomial
from groundwire.plugins.compression.functional import topk_indices
from groundwire.plugins.compression.packing import packed_bytes, width_of
from groundwire.plugins.compression.support import check_kept, kept
from groundwire.plugins.random import Key

Encoding = Literal["huffman", "positions", "gaps"]
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)
"""The codes of two sets of positions; the first byte of a code is an index into them."""

Floats = npt.NDArray[np.float64]
Positions = npt.NDArray[np.int64]
Bits = npt.NDArray[np.uint8] | npt.NDArray[np.bool_]


def three_means(values: Floats, zeros: int = 0, max_iterations: int = 20) -> tuple[Floats, Floats]:
    """Lloyd's k-means of numbers, with three centroids that start evenly spread over their range.

    It ends in a local optimum: for Gaussian numbers it is hardly above the best there is, for those with heavy tails its
    cost can be twice that.

    Args:
        values: Finite numbers, shape ``(n,)``, float32 or float64.
        zeros: Zeros that count beside them; with ``values``, there must be one number at least.
        max_iterations: How often the centroids are moved at most, 1 or more; it ends when they stay.

    Returns:
        ``(cuts, centroids)``, ascending, shapes ``(2,)`` and ``(3,)``. A number is in the cluster of as many ``cuts`` as
        are below it, and ``centroids`` are the means of the clusters; an empty one's stays where it was.

    Example:
        >>> three_means(np.array([-4.0, 3.0, 5.0]), zeros=7)
        (array([-2.,  2.]), array([-4.,  0.,  4.]))
    """
    ordered = np.sort(values).astype(np.float64)
    ends = [*ordered[:1], *ordered[-1:], *[0.0] * min(zeros, 1)]
    centroids = np.linspace(min(ends), max(ends), 3)
    cuts = np.full(2, np.nan)
    for _ in range(max_iterations):
        before, cuts = cuts, (centroids[:-1] + centroids[1:]) / 2
        if (before == cuts).all():
            break
        clusters = np.split(ordered, np.searchsorted(ordered, cuts, side="right"))
        sizes = np.array([len(cluster) for cluster in clusters])
        sizes[(cuts < 0).sum()] += zeros
        sums = np.array([cluster.sum() for cluster in clusters])
        centroids = np.where(sizes > 0, sums / np.maximum(sizes, 1), centroids)
    return cuts, centroids


def encoded_bytes(first: Positions, second: Positions, numel: int, encoding: Encoding | Literal["auto"]) -> int:
    """Bytes that :func:`encode_positions` makes."""
    marked = len(first) + len(second)
    if marked == 0:
        return 0
    if encoding == "auto":
        return min(encoded_bytes(first, second, numel, each) for each in ENCODINGS)
    if encoding == "huffman":
        return 1 + packed_bytes(numel + marked, 1)
    if encoding == "positions":
        return 9 + packed_bytes(marked, width_of(numel - 1))
    return 11 + packed_bytes(_rice(first)[2] + _rice(second)[2], 1)


def encode_positions(
    first: Positions, second: Positions, numel: int, encoding: Encoding | Literal["auto"] = "auto"
) -> bytes:
    """Encode two disjoint sets of positions.

    The codes, each behind a byte that names it:

    - ``"huffman"``: 1 bit for an entry in neither set, 2 for one in a set; all first bits, then all second bits.
    - ``"positions"``: the sizes of the sets, 32 bits each, and each position in ``ceil(log2 numel)`` bits.
    - ``"gaps"``: the sizes, and how many entries lie between neighbours in a set, in Golomb-Rice codes: the width of
      the remainders, 8 bits a set, then for each set all remainders, and then all quotients in unary.

    Args:
        first: Positions in ``[0, numel)``, ascending.
        second: Positions of the other set, ascending.
        numel: Entries in all.
        encoding: One of them, or ``"auto"`` for the shortest.

    Returns:
        The code; nothing if both sets are empty.

    Example:
        >>> code = encode_positions(np.array([5]), np.array([2, 900]), numel=1000)
        >>> ENCODINGS[code[0]], len(code), decode_positions(code, numel=1000)
        ('positions', 13, (array([5]), array([  2, 900])))
    """
    if len(first) + len(second) == 0:
        return b""
    if encoding == "auto":
        encoding = min(ENCODINGS, key=lambda each: encoded_bytes(first, second, numel, each))
    name = bytes([ENCODINGS.index(encoding)])
    if encoding == "huffman":
        cluster = np.zeros(numel, dtype=np.uint8)
        cluster[first], cluster[second] = 1, 2
        return name + _pack(cluster > 0, cluster[cluster > 0] == 2)
    sizes = np.array([len(first), len(second)], dtype="<u4").tobytes()
    if encoding == "positions":
        return name + sizes + _pack(_to_bits(np.concatenate([first, second]), width_of(numel - 1)))
    widths, bits = [], []
    for gaps, width, length in (_rice(first), _rice(second)):
        unary = np.zeros(length - width * len(gaps), dtype=np.uint8)
        unary[np.cumsum((gaps >> width) + 1) - 1] = 1
        widths.append(width)
        bits += [_to_bits(gaps, width), unary]
    return name + sizes + bytes(widths) + _pack(*bits)


def decode_positions(code: bytes, numel: int) -> tuple[Positions, Positions]:
    """Undo :func:`encode_positions`.

    Raises:
        ValueError: If that is no code of two sets of ``numel`` entries.
    """
    if not code:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    try:
        first, second, length = _decode(code, numel)
    except (IndexError, ValueError):  # it ended too early
        length = -1
    if length != len(code) or any(((each < 0) | (each >= numel)).any() for each in (first, second)):
        raise ValueError(f"{len(code)} bytes are not a code of clusters of {numel} entries.")
    return first, second


def _decode(code: bytes, numel: int) -> tuple[Positions, Positions, int]:
    """The sets, and how many bytes their code must have."""
    encoding, body = ENCODINGS[code[0]], np.frombuffer(code, dtype=np.uint8)
    if encoding == "huffman":
        bits = np.unpackbits(body[1:], bitorder="little")
        marked = np.flatnonzero(bits[:numel])
        in_second = bits[numel : numel + len(marked)] == 1
        return marked[~in_second], marked[in_second], 1 + packed_bytes(numel + len(marked), 1)
    sizes = body[1:9].view("<u4").tolist()
    if encoding == "positions":
        width, total = width_of(numel - 1), sum(sizes)
        both = _from_bits(np.unpackbits(body[9:], bitorder="little")[: total * width], total, width)
        return both[: sizes[0]], both[sizes[0] :], 9 + packed_bytes(total, width)
    bits, used, sets = np.unpackbits(body[11:], bitorder="little"), 0, []
    for size, width in zip(sizes, body[9:11].tolist(), strict=True):
        remainders = _from_bits(bits[used : used + size * width], size, width)
        used += size * width
        ends = np.flatnonzero(bits[used:])[:size]
        sets.append(np.cumsum((np.diff(ends, prepend=-1) - 1 << width) + remainders + 1) - 1)
        used += int(ends[-1]) + 1 if size else 0
    return sets[0], sets[1], 11 + packed_bytes(used, 1)


def _rice(positions: Positions) -> tuple[Positions, int, int]:
    """Gaps between ascending positions, the width of their remainders, and the bits of all."""
    gaps = np.diff(positions, prepend=-1) - 1
    if len(gaps) == 0:
        return gaps, 0, 0
    about = int(gaps.mean()).bit_length()
    bits = {
        width: int((gaps >> width).sum()) + len(gaps) * (1 + width) for width in range(max(about - 2, 0), about + 1)
    }
    width = min(bits, key=lambda each: bits[each])
    return gaps, width, bits[width]


def _to_bits(values: Positions, width: int) -> Bits:
    """The lowest bits of integers, least significant first."""
    return ((values[:, None] >> np.arange(width)) & 1).astype(np.uint8).ravel()


def _from_bits(bits: Bits, count: int, width: int) -> Positions:
    return bits.reshape(count, width) @ (np.int64(1) << np.arange(width))


def _pack(*bits: Bits) -> bytes:
    return np.packbits(np.concatenate(bits), bitorder="little").tobytes()


class FedZip(Compressor):
    """Keeps the largest entries, sorts all into three clusters, and sends these and their means.

    The clusters are those of :func:`three_means`, what was pruned counting as zeros. If there are such, their cluster
    is sent as exactly 0, so that it stays sparse; the others as their mean. The means travel as float32, by falling
    size of the clusters, and after them which entries belong to the two smaller ones, in a code of
    :func:`encode_positions`. So messages differ in length; each is preceded by its own, 32 bits.

    A row with an entry that is not finite, or that float32 cannot hold, arrives as NaN.

    Args:
        density: Share of the entries kept, the paper's z, in (0, 1]; at least one entry is kept.
        encoding: ``"huffman"``, ``"positions"``, ``"gaps"``, or ``"auto"`` for the shortest of each row.
        max_iterations: Of k-means, at least 1.

    Raises:
        ValueError: If an argument is out of range.

    Reference:
        Malekijoo et al., "FEDZIP: A Compression Framework for Communication-Efficient Federated Learning", 2021.
        arXiv:2102.01593

    Example:
        >>> x = torch.tensor([[0.1, -4.0, 0.2, 3.0, 5.0, 0.0, 0.1, -0.2]])
        >>> message = FedZip(density=0.5).roundtrip(x, Key(seed=0))
        >>> message.values, message.bits_wire
        (tensor([[ 0., -4.,  0.,  4.,  4.,  0.,  0.,  0.]]), 152)
    """

    ragged = True

    def __init__(
        self, density: float = 0.2, encoding: Encoding | Literal["auto"] = "auto", max_iterations: int = 20
    ) -> None:
        super().__init__()
        check_kept(density, None)
        if encoding not in ("auto", *ENCODINGS):
            raise ValueError(f"`encoding` must be 'auto' or one of {ENCODINGS}, got {encoding!r}.")
        if max_iterations < 1:
            raise ValueError(f"`max_iterations` must be at least 1, got {max_iterations}.")
        self.density = density
        self.encoding = encoding
        self.max_iterations = max_iterations

    def _cluster(self, x: Tensor, key: Key) -> tuple[Tensor, list[tuple[Positions, Positions]]]:
        """Means by falling size of the clusters, float32, shape ``(rows, 3)``; and each row's two smaller clusters."""
        check_rows(x, key)
        indices = topk_indices(x.detach(), kept(x.shape[1], self.density, None))
        values = x.detach().gather(1, indices).to(torch.promote_types(x.dtype, torch.float32)).cpu().numpy()
        found = [self._cluster_row(*row, x.shape[1]) for row in zip(values, indices.cpu().numpy(), strict=True)]
        means = np.array([means for means, _ in found], dtype=np.float32).reshape(len(x), 3)
        return torch.from_numpy(means).to(x.device), [sets for _, sets in found]

    def _cluster_row(
        self, values: Floats, indices: Positions, numel: int
    ) -> tuple[Floats, tuple[Positions, Positions]]:
        none = np.empty(0, dtype=np.int64)
        if not (np.abs(values) <= np.finfo(np.float32).max).all():
            return np.full(3, np.nan), (none, none)
        if numel == 0:
            return np.zeros(3), (none, none)
        pruned = numel - len(values)
        cuts, means = three_means(values, pruned, self.max_iterations)
        of_zero = (cuts < 0).sum()
        if pruned:
            means[of_zero] = 0
        cluster = np.full(numel, of_zero, dtype=np.uint8)
        cluster[indices] = (values > cuts[0]).view(np.uint8) + (values > cuts[1])
        order = np.argsort(-np.bincount(cluster, minlength=3), kind="stable")
        return means[order], (np.flatnonzero(cluster == order[1]), np.flatnonzero(cluster == order[2]))

    @staticmethod
    def _fill(means: Tensor, sets: list[tuple[Positions, Positions]], numel: int, dtype: torch.dtype) -> Tensor:
        means = means.to(dtype)
        values = means[:, :1].repeat(1, numel)
        for row, pair in enumerate(sets):
            for rank, positions in enumerate(pair, start=1):
                values[row].index_fill_(0, torch.from_numpy(positions).to(means.device), means[row, rank])
        return values

    def _bits(self, sets: list[tuple[Positions, Positions]], numel: int) -> tuple[int, float]:
        """On the wire and ideal, all rows together; ideal are the means, and the number of the clusters among all."""
        wire, ideal = 0, 0.0
        for first, second in sets:
            both, sent = len(first) + len(second), 8 * (16 + encoded_bytes(first, second, numel, self.encoding))
            wire += sent
            number = log2_binomial(numel, both) + log2_binomial(both, len(second))
            ideal += min(sent, 96 + number)  # a code may be shorter where the clusters are orderly
        return wire, ideal

    @override
    def encode(self, x: Tensor, key: Key) -> Payload:
        means, sets = self._cluster(x, key)
        codes = [encode_positions(*pair, x.shape[1], self.encoding) for pair in sets]
        lengths = [len(code) for code in codes]
        longest = max(lengths, default=0)
        stream = np.frombuffer(b"".join(code.ljust(longest, b"\0") for code in codes), dtype=np.uint8)
        parts = {
            "means": means,
            "length": torch.tensor(lengths, dtype=torch.int32, device=x.device).view(len(x), 1),
            "stream": torch.from_numpy(stream.copy()).view(len(x), longest).to(x.device),
        }
        return Payload(
            parts=parts,
            numel=x.shape[1],
            dtype=x.dtype,
            bits_ideal=self._bits(sets, x.shape[1])[1],
            padding_bytes=len(x) * longest - sum(lengths),
        )

    @override
    def decode(self, payload: Payload) -> Tensor:
        stream, lengths = payload.parts["stream"].cpu().numpy(), payload.parts["length"].flatten().tolist()
        sets = [
            decode_positions(row[:length].tobytes(), payload.numel) for row, length in zip(stream, lengths, strict=True)
        ]
        return self._fill(payload.parts["means"], sets, payload.numel, payload.dtype)

    @override
    def roundtrip(self, x: Tensor, key: Key) -> Message:
        means, sets = self._cluster(x, key)
        wire, ideal = self._bits(sets, x.shape[1])
        return Message(values=self._fill(means, sets, x.shape[1], x.dtype), bits_wire=wire, bits_ideal=ideal)

    @override
    def extra_repr(self) -> str:
        return f"density={self.density}, encoding={self.encoding!r}, max_iterations={self.max_iterations}"
