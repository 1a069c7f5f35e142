"""RC-FED and its baselines: scalar quantisers of standardised rows, entropy coded under the design's own model."""

from __future__ import annotations

import hashlib
import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.compression.base import Compressor, Message, Payload, check_rows
from groundwire.plugins.compression.entropy_coding import (
    Bytes,
    ans_decode,
    ans_encode,
    huffman_code,
    huffman_decode,
    huffman_encode,
    join_streams,
    model_weights,
    require_constriction,
    split_streams,
    symbol_bits,
)
from groundwire.plugins.compression.packing import pack_integers, packed_bytes, unpack_integers
from groundwire.plugins.compression.quantizer_design import (
    QuantizerDesign,
    check_levels,
    companding,
    contraction,
    design_for_rate,
    entropy_constrained,
    lloyd_max,
    uniform_entropy_constrained,
)
from groundwire.plugins.random import Key

Entropy = Literal["ans", "huffman", "fixed"]


def standardize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract every row's mean and divide by its standard deviation, both as float32.

    Each row is summed by itself, in float64, so that a row alone gives the same numbers as in a matrix.

    Args:
        x: Rows, shape ``(rows, d)``, float32 or float64.

    Returns:
        ``(z, scale)``: the shape and dtype of ``x``; and mean and standard deviation (population), float32, shape
        ``(rows, 2)``. A constant row has deviation 0 and ``z = 0``. What is not finite, in the row or as a float32, makes
        both NaN, and ``z = 0``.

    Example:
        >>> standardize(torch.tensor([[1.0, 3.0], [4.0, 4.0]]))
        (tensor([[-1.,  1.],
                [ 0.,  0.]]), tensor([[2., 1.],
                [4., 0.]]))
    """
    rows, d = x.shape
    wide = torch.zeros(rows, 2, dtype=torch.float64, device=x.device)
    if d == 0:
        return x.clone(), wide.float()
    for row, (mean, deviation) in zip(x, wide, strict=True):
        torch.sum(row, 0, dtype=torch.float64, out=mean)
        torch.linalg.vector_norm(row.to(torch.float64, copy=True).sub_(mean.div_(d)), out=deviation)
    constant = x.amin(dim=1) == x.amax(dim=1)  # whatever the rounding of the mean makes of it
    wide[:, 1].div_(math.sqrt(d)).masked_fill_(constant, 0)
    scale = wide.float()
    scale.masked_fill_(~scale.isfinite().all(dim=1, keepdim=True), torch.nan)
    mean, std = scale.to(x.dtype).unsqueeze(2).unbind(1)
    z = (x - mean).div_(torch.where(std > 0, std, 1))
    return z if (std > 0).all() else torch.where(std > 0, z, 0), scale


class CellFinder:
    """Counts the boundaries below each value, by one look into a table of bins that hold one boundary at most.

    On the CPU that takes a few passes over the data for any number of boundaries, where a binary search takes four times
    as long for 8 and ten times for 64. The answer is the same: a value's bin is a monotone function of it, rounding
    included.

    Args:
        boundaries: Ascending.
        dtype: Of the values.
    """

    _MOST_BINS = 2**16

    def __init__(self, boundaries: NDArray[np.float64], dtype: torch.dtype) -> None:
        self.boundaries = torch.from_numpy(boundaries).to(dtype)
        self._num_bins = 256
        while boundaries.size and self._num_bins <= self._MOST_BINS:
            width = self.boundaries[-1] - self.boundaries[0]
            self._per_width = self._num_bins / width.clamp_min(1e-6)
            bins = self._bins(self.boundaries).long()
            if (bins.diff() > 0).all():
                self._within = torch.full((self._num_bins + 1,), torch.inf, dtype=dtype)
                self._within[bins] = self.boundaries
                self._below = torch.bucketize(torch.arange(self._num_bins + 1), bins).to(torch.uint8)
                return
            self._num_bins *= 2
        self._num_bins = 0  # none, or too close to each other for a table

    def _bins(self, z: Tensor) -> Tensor:
        return ((z - self.boundaries[0]) * self._per_width).clamp_(0, self._num_bins).to(torch.int32)

    def __call__(self, z: Tensor) -> Tensor:
        """Cells, uint8, the shape of ``z``, in which nothing may be NaN."""
        if z.device.type != "cpu" or not self._num_bins:
            return torch.bucketize(z, self.boundaries.to(z.device), out_int32=True).to(torch.uint8)
        bins = self._bins(z).flatten()
        above = z.flatten() > self._within.index_select(0, bins)
        return self._below.index_select(0, bins).add_(above).view(z.shape)


class ScalarQuantizer(Compressor):
    """Standardises every row, sends the cell of each entry, and is decoded to that cell's level.

    Mean and standard deviation of a row travel as float32; a constant row sends nothing else, a row that is not finite
    (or beyond float32) arrives as NaN. The quantiser is designed for ``N(0, 1)``: sender and receiver know it, and
    the probabilities under which its symbols are coded. A row that is not normal costs the cross-entropy, and with heavier
    tails errs more.

    ``bits_ideal`` is the cross-entropy: what an ideal coder that expects ``N(0, 1)`` spends on these very symbols, and 64
    bits a row; at most ``bits_wire``, as a row for which the design is wrong can be shorter in a fixed code.

    Entropy coding runs on the host; ``entropy="fixed"`` has messages of one size, which suits an accelerator and a process
    group better.

    Args:
        table: The quantiser.
        entropy: ``"ans"`` for asymmetric numeral systems (needs ``constriction``), some bytes a row above
            ``bits_ideal``; ``"huffman"`` for a canonical Huffman code of at most 16 bits, a bit an entry at least;
            ``"fixed"`` for ``ceil(log2 N)`` bits an entry.

    Raises:
        ValueError: If ``entropy`` is none of these.
        ModuleNotFoundError: If ``entropy="ans"`` and ``constriction`` is not installed.
    """

    def __init__(self, table: QuantizerDesign, entropy: Entropy = "ans") -> None:
        super().__init__()
        if entropy not in ("ans", "huffman", "fixed"):
            raise ValueError(f"`entropy` must be 'ans', 'huffman' or 'fixed', got {entropy!r}.")
        if entropy == "ans":
            require_constriction()
        self.table = table
        self.entropy: Entropy = entropy
        self._weights = model_weights(table.pmf)
        self._finders = {dtype: CellFinder(table.boundaries, dtype) for dtype in (torch.float32, torch.float64)}

    @property
    def ragged(self) -> bool:  # type: ignore[override]
        """Whether symbols are coded in different numbers of bits."""
        return self.entropy != "fixed"

    @override
    def extra_repr(self) -> str:
        digest = hashlib.sha256(self.table.levels.tobytes() + self.table.boundaries.tobytes()).hexdigest()[:8]
        return f"{self.num_symbols} levels {digest}, {self.rate:.3f} bits, {self.entropy}"

    @property
    def num_symbols(self) -> int:
        """Levels of the quantiser, as designed."""
        return len(self._weights)

    @property
    def distortion(self) -> float:
        """Mean squared error of the design on ``N(0, 1)``, and so of a normal row over its variance."""
        return self.table.distortion

    @property
    def rate(self) -> float:
        """Entropy of the design's symbols on ``N(0, 1)``, in bits an entry."""
        return self.table.rate

    @property
    def huffman_rate(self) -> float:
        """Mean length of their Huffman code, in bits an entry."""
        return self.table.huffman_rate

    @property
    def _width(self) -> int:
        return (self.num_symbols - 1).bit_length()

    def _quantize(self, x: Tensor, key: Key) -> tuple[Tensor, Tensor]:
        """The cell of each entry, uint8 ``(rows, d)``, and what each row is scaled by, ``(rows, 2)``."""
        check_rows(x, key)
        z, scale = standardize(x.detach().to(torch.promote_types(x.dtype, torch.float32)))
        step = self.table.step
        if step is not None:
            side = self.num_symbols // 2
            return z.div_(step).round_().clamp_(-side, side).add_(side).to(torch.uint8), scale
        return self._finders[z.dtype](z), scale

    def _dequantize(self, symbols: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows ``(rows, d)`` of what each symbol stands for, nothing beyond what ``dtype`` holds."""
        levels = torch.from_numpy(self.table.levels).to(scale.device)
        mean, std = scale.double().unsqueeze(2).unbind(1)
        most = torch.finfo(dtype).max
        values = (mean + std * levels).clamp_(-most, most).to(dtype)
        offset = torch.arange(0, values.numel(), values.shape[1], dtype=torch.int32, device=scale.device)
        where = symbols.to(torch.int32).add_(offset[:, None])
        return values.flatten().index_select(0, where.flatten()).view(symbols.shape)

    def _streams(self, symbols: Tensor, scale: Tensor) -> list[Bytes]:
        """One stream a row, empty where a row sends its scale alone."""
        code = ans_encode if self.entropy == "ans" else huffman_encode
        sends = (scale[:, 1] > 0).tolist()
        return [code(row if s else row[:0], self._weights) for row, s in zip(symbols.numpy(), sends, strict=True)]

    def _bits(self, symbols: Tensor, scale: Tensor, streams: list[Bytes] | None) -> tuple[int, float]:
        """On the wire and ideal, all rows together; without streams, their sizes are computed from the counts."""
        rows, numel = symbols.shape
        counts = torch.zeros(rows, self.num_symbols, dtype=torch.int64)
        for row in (scale[:, 1] > 0).nonzero().flatten().tolist():
            counts[row] = torch.bincount(symbols[row], minlength=self.num_symbols)
        if self.entropy == "fixed":
            size = rows * (8 + packed_bytes(numel, self._width))
        elif streams is None:
            lengths = torch.from_numpy(huffman_code(self._weights).lengths)
            size = rows * 12 + int(((counts * lengths).sum(1) + 7).div(8, rounding_mode="floor").sum())
        else:
            size = rows * 12 + sum(stream.size for stream in streams)
        ideal = 64 * rows + float(counts.sum(0).double() @ torch.from_numpy(symbol_bits(self._weights)))
        return 8 * size, min(8 * size, ideal)

    @override
    def encode(self, x: Tensor, key: Key) -> Payload:
        symbols, scale = self._quantize(x, key)
        host, parts, padding, streams = symbols.cpu(), {"scale": scale}, 0, None
        if self.entropy == "fixed":
            parts["stream"] = pack_integers(symbols, self._width) if self._width else symbols[:, :0]
        else:
            streams = self._streams(host, scale)
            joined, length = join_streams(streams)
            parts |= {"length": length.to(x.device), "stream": joined.to(x.device)}
            padding = joined.numel() - int(length.sum())
        ideal = self._bits(host, scale, streams)[1]
        return Payload(parts=parts, numel=x.shape[1], dtype=x.dtype, bits_ideal=ideal, padding_bytes=padding)

    @override
    def decode(self, payload: Payload) -> Tensor:
        scale, stream = payload.parts["scale"], payload.parts["stream"]
        if self.entropy == "fixed":
            symbols = self._unpack(stream, payload.numel)
        else:
            code = ans_decode if self.entropy == "ans" else huffman_decode
            sends = (scale[:, 1] > 0).tolist()
            symbols = torch.zeros(scale.shape[0], payload.numel, dtype=torch.uint8)
            for row, one in enumerate(split_streams(stream, payload.parts["length"])):
                if sends[row]:
                    symbols[row] = torch.from_numpy(code(one, payload.numel, self._weights))
                elif one.size:
                    raise ValueError(
                        f"A row whose standard deviation is not positive sends no stream, got {one.size} bytes."
                    )
        return self._dequantize(symbols.to(scale.device), scale, payload.dtype)

    def _unpack(self, packed: Tensor, numel: int) -> Tensor:
        if not self._width:
            return torch.zeros(packed.shape[0], numel, dtype=torch.uint8)
        symbols = unpack_integers(packed, self._width, numel)
        if symbols.numel() and symbols.max() >= self.num_symbols:
            raise ValueError(f"A code says {int(symbols.max())}, but the quantiser has {self.num_symbols} levels.")
        return symbols.to(torch.uint8)

    @override
    def roundtrip(self, x: Tensor, key: Key) -> Message:
        symbols, scale = self._quantize(x, key)
        host = symbols.cpu()
        wire, ideal = self._bits(host, scale, self._streams(host, scale) if self.entropy == "ans" else None)
        return Message(values=self._dequantize(symbols, scale, x.dtype), bits_wire=wire, bits_ideal=ideal)

    @override
    def alpha(self, numel: int) -> float | None:
        return contraction(self.table, numel)


class RCFED(ScalarQuantizer):
    """RC-FED: the quantiser whose error is least at a given rate, entropy coded.

    Every row is standardised, quantised with the entropy-constrained scalar quantiser of ``N(0, 1)``, which minimises
    ``D + lam * H``, and entropy coded. The paper codes with Huffman's codes (``entropy="huffman"``), which lose about 0.05
    bits an entry above 2.5 bits and 0.4 at 0.85. Asymmetric numeral systems lose some bytes a row.

    With enough levels, uniform cells of the right width err no more than a part in a thousand above the optimal ones at
    the same rate; with few levels they do. See :class:`ScalarQuantizer` for what travels.

    Args:
        lam: Price of a bit, in mean squared error of a standardised entry, in place of ``target_rate``; from 1.386 on
            a row sends its mean alone.
        num_levels: Most levels, 2 to 256 (3 if uniform); None for as many as serve.
        target_rate: Entropy of the symbols under the design, in bits an entry, in place of ``lam``; what travels is this
            and the coder's loss, if the row is normal.
        design: ``"optimal"``, or ``"uniform"`` for cells of one width about zero.
        entropy: How symbols are coded; see :class:`ScalarQuantizer`.

    Raises:
        ValueError: If not exactly one of ``lam`` and ``target_rate`` is given, or an argument is out of range.
        ModuleNotFoundError: If ``entropy="ans"`` and ``constriction`` is not installed.

    Reference:
        Mohajer Hamidi, Bereyhi, "Rate-Constrained Quantization for Communication-Efficient Federated Learning", ICASSP
        2025. arXiv:2409.06319

    Example:
        >>> compressor = RCFED(target_rate=2.0, entropy="huffman")
        >>> round(compressor.rate, 3), round(compressor.distortion, 3)
        (2.0, 0.089)
        >>> x = torch.randn(1, 10_000, generator=torch.Generator().manual_seed(0))
        >>> message = compressor.roundtrip(x, Key(seed=0))
        >>> round(message.bits_wire / 10_000, 1), round(float((message.values - x).square().mean()), 2)
        (2.1, 0.09)
    """

    def __init__(
        self,
        lam: float | None = None,
        num_levels: int | None = None,
        target_rate: float | None = None,
        design: Literal["optimal", "uniform"] = "optimal",
        entropy: Entropy = "ans",
    ) -> None:
        if design not in ("optimal", "uniform"):
            raise ValueError(f"`design` must be 'optimal' or 'uniform', got {design!r}.")
        if (lam is None) == (target_rate is None):
            raise ValueError(f"Give either `lam` or `target_rate`, got {lam=}, {target_rate=}.")
        check_levels(num_levels, fewest=2 if design == "optimal" else 3)
        family = entropy_constrained if design == "optimal" else uniform_entropy_constrained
        if target_rate is not None:
            table, price = design_for_rate(family, target_rate, num_levels)
        else:
            assert lam is not None
            table, price = family(lam, num_levels), lam
        super().__init__(table, entropy)
        self.lam = price
        self.num_levels = num_levels
        self.target_rate = target_rate
        self.design = design

    @override
    def extra_repr(self) -> str:
        return f"lam={self.lam!r}, {self.design}, {self.num_symbols} levels, {self.rate:.3f} bits, {self.entropy}"


class LloydMax(ScalarQuantizer):
    """The quantiser of ``N(0, 1)`` with the least error at a number of levels, as a baseline of :class:`RCFED`.

    Bits are free in its design, not on the wire: it is entropy coded, too. See :class:`ScalarQuantizer` for what travels.

    Args:
        num_levels: Levels, 2 to 256.
        entropy: How symbols are coded; see :class:`ScalarQuantizer`.

    Raises:
        ValueError: If an argument is out of range.
        ModuleNotFoundError: If ``entropy="ans"`` and ``constriction`` is not installed.

    Reference:
        Max, "Quantizing for Minimum Distortion", IRE Trans. Inf. Theory 6, 1960. Lloyd, "Least Squares Quantization in
        PCM", IEEE Trans. Inf. Theory 28, 1982.

    Example:
        >>> x = torch.tensor([[1.0, -1.0, 3.0, -3.0]])  # mean 0, mean square 5
        >>> LloydMax(2, entropy="fixed").roundtrip(x, Key(seed=0)).values  # sqrt(5) times sqrt(2 / pi)
        tensor([[ 1.7841, -1.7841,  1.7841, -1.7841]])
    """

    def __init__(self, num_levels: int, entropy: Entropy = "ans") -> None:
        super().__init__(lloyd_max(num_levels), entropy)
        self.num_levels = num_levels

    @override
    def extra_repr(self) -> str:
        return f"num_levels={self.num_levels}, {self.rate:.3f} bits, {self.entropy}"


class NQFL(ScalarQuantizer):
    """A non-uniform quantiser by companding, as a baseline of :class:`RCFED`.

    Levels are evenly spaced after the mu-law, dense near zero. This is our reading of the method, in the form of
    standardised rows that all quantisers here have. See :class:`ScalarQuantizer` for what travels.

    Args:
        num_levels: Levels, 2 to 256.
        mu: Curvature of the mu-law, above 0.
        clip: What the outermost level's cell ends at, in standard deviations; larger entries belong to it, too.
        entropy: How symbols are coded; see :class:`ScalarQuantizer`.

    Raises:
        ValueError: If an argument is out of range.
        ModuleNotFoundError: If ``entropy="ans"`` and ``constriction`` is not installed.

    Reference:
        Chen et al., "NQFL: Nonuniform Quantization for Communication Efficient Federated Learning", IEEE Commun. Lett.
        28, 2024.

    Example:
        >>> x = torch.tensor([[1.0, -1.0, 3.0, -3.0]])
        >>> NQFL(4, entropy="fixed").roundtrip(x, Key(seed=0)).values
        tensor([[ 2.2098, -2.2098,  2.2098, -2.2098]])
    """

    def __init__(self, num_levels: int, mu: float = 255.0, clip: float = 4.0, entropy: Entropy = "ans") -> None:
        super().__init__(companding(num_levels, mu, clip), entropy)
        self.num_levels = num_levels
        self.mu = mu
        self.clip = clip

    @override
    def extra_repr(self) -> str:
        return f"num_levels={self.num_levels}, mu={self.mu}, clip={self.clip}, {self.rate:.3f} bits, {self.entropy}"
