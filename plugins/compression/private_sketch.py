"""Private sketches: a random projection, clipped and noised where it is short."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.compression.base import Compressor, Payload, check_releases, check_rows
from groundwire.plugins.compression.functional import hadamard_transform, next_power_of_two
from groundwire.plugins.compression.support import check_kept, kept
from groundwire.plugins.random import Key

if TYPE_CHECKING:  # at run time in the methods: it brings Opacus along
    from groundwire.plugins.privacy.statement import PrivacyStatement


class PrivateSketch(Compressor):
    """Sends ``R x`` with noise, and decodes by ``R^T``; the sketch ``R`` of a round is the same for all devices.

    ``E[R^T R]`` is the identity. What is sent is clipped to ``clip_norm`` after sketching, so the sensitivity is exact
    whatever ``R`` does to the norm, and noise is only added to the ``k`` entries that travel. The sketch itself is
    public and protects nothing. Decoding multiplies the squared norm by about ``d / k``, so learning rates have to
    shrink alike.

    Sketches add, in float32 (float64 for float64 rows). A row that is not finite counts as zeros, since a mark for it
    would not be private.

    Args:
        clip_norm: Largest L2 norm of a sketched row, positive; ``inf`` does not clip, and then goes without noise.
        noise_multiplier: Noise of the sum of ``num_shares`` devices, in units of ``clip_norm``; each adds
            ``noise_multiplier * clip_norm / sqrt(num_shares)`` to each entry. 0 promises nothing.
        density: Entries of the sketch over those of the row, in (0, 1]; at least one.
        k: Entries of the sketch, instead of ``density``; at most those of the row.
        kind: ``"srht"``, the subsampled randomised Hadamard transform, mixes all entries; ``"count"`` adds each entry
            to one bucket under a random sign, and is faster.
        num_shares: Honest devices whose noise is in each sum, at least 1; above 1 under secure aggregation.

    Raises:
        ValueError: If an argument is out of range, or noise is wanted without a clip.

    Reference:
        Song, Wang, Yu, Zhang, "Sketching for First Order Method: Efficient Algorithm for Low-Bandwidth Channel and
        Vulnerability", ICML 2023. arXiv:2210.08371; the noise there is added before sketching.

    Example:
        >>> sketch = PrivateSketch(clip_norm=1.0, noise_multiplier=0.0, k=4)
        >>> sketch.roundtrip(torch.tensor([[0.0, 3.0, 0.0, 0.0]]), Key(seed=0)).values.round(decimals=3).abs()
        tensor([[0., 1., 0., 0.]])
    """

    linear = True
    carries_nan = False

    def __init__(
        self,
        clip_norm: float,
        noise_multiplier: float,
        density: float | None = None,
        k: int | None = None,
        kind: Literal["srht", "count"] = "srht",
        num_shares: int = 1,
    ) -> None:
        super().__init__()
        check_kept(density, k)
        if not clip_norm > 0:
            raise ValueError(f"`clip_norm` must be positive, got {clip_norm}.")
        if not 0 <= noise_multiplier < math.inf:
            raise ValueError(f"`noise_multiplier` must be at least 0 and finite, got {noise_multiplier}.")
        if math.isinf(clip_norm) and noise_multiplier > 0:
            raise ValueError("Noise is in units of `clip_norm`, which is inf: give a finite one.")
        if kind not in ("srht", "count"):
            raise ValueError(f"`kind` must be 'srht' or 'count', got {kind!r}.")
        if num_shares < 1:
            raise ValueError(f"`num_shares` must be at least 1, got {num_shares}.")
        self.clip_norm = clip_norm
        self.noise_multiplier = noise_multiplier
        self.density = density
        self.k = k
        self.kind = kind
        self.num_shares = num_shares

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        """Whether nothing is clipped."""
        return math.isinf(self.clip_norm)

    @override
    def encode(self, x: Tensor, key: Key) -> Payload:
        check_rows(x, key)
        d = x.shape[1]
        k = kept(d, self.density, self.k)
        row = x.detach().double()
        row = row.masked_fill(~row.isfinite().all(dim=1, keepdim=True), 0.0)
        shared = key.shared(f"private_sketch/{self.kind}")
        length = next_power_of_two(d) if self.kind == "srht" else d
        signs = (2.0 * torch.randint(2, (length,), generator=shared).double() - 1).to(x.device)
        if self.kind == "srht":
            places = torch.randperm(length, generator=shared)[:k].to(x.device)
        else:
            places = torch.randint(max(k, 1), (d,), generator=shared).to(x.device)
        values = self._sketch(row, signs, places, k)
        norm = torch.linalg.vector_norm(values, dim=1, keepdim=True)
        if not math.isinf(self.clip_norm):
            values = values * (self.clip_norm / norm.clamp(min=self.clip_norm))
        std = self.noise_multiplier * self.clip_norm / math.sqrt(self.num_shares) if self.noise_multiplier else 0.0
        if std > 0:
            values = values + std * key.rows(
                "private_sketch/noise",
                lambda g: torch.randn(values.shape[1], generator=g, dtype=torch.float64, device=x.device),
                on=x.device,
            )
        values = values.to(torch.promote_types(x.dtype, torch.float32))
        return Payload(
            parts={"values": values},
            numel=d,
            dtype=x.dtype,
            bits_ideal=8 * values.numel() * values.element_size(),
            meta={"signs": signs, "places": places},
        )

    def _sketch(self, row: Tensor, signs: Tensor, places: Tensor, k: int) -> Tensor:
        """``R x``, shape ``(rows, k)``."""
        if self.kind == "count":
            return row.new_zeros(len(row), k).index_add_(1, places, row * signs)
        mixed = hadamard_transform(torch.nn.functional.pad(row, (0, len(signs) - row.shape[1])) * signs)
        return mixed[:, places] * math.sqrt(len(signs) / max(k, 1))

    @override
    def decode(self, payload: Payload) -> Tensor:
        signs, places = payload.meta["signs"], payload.meta["places"]
        assert isinstance(signs, Tensor)
        assert isinstance(places, Tensor)
        values = payload.parts["values"].double()
        if self.kind == "count":
            return (values[:, places] * signs).to(payload.dtype)
        k = values.shape[1]
        mixed = values.new_zeros(len(values), len(signs)).index_copy_(1, places, values)
        rows = hadamard_transform(mixed) * (signs * math.sqrt(len(signs) / max(k, 1)))
        return rows[:, : payload.numel].to(payload.dtype)

    @override
    def omega(self, numel: int) -> float | None:
        if self.noise_multiplier > 0 or not self.unbiased:
            return None
        k = kept(numel, self.density, self.k)
        return next_power_of_two(numel) / k - 1 if self.kind == "srht" else (numel - 1) / k

    @override
    def privacy(
        self, *, numel: int, rounds: int = 1, delta: float = 1e-5, sample_rate: float = 1.0
    ) -> PrivacyStatement | None:
        """What the sums of sketches guarantee to one device, for its updates or none.

        Args:
            numel: Entries of each update; without effect, since the sketch as a whole is clipped.
            rounds: Rounds of the run.
            delta: Of the whole run, in (0, 1).
            sample_rate: Counted as 1: the noise of a sum tells how many shares are in it, and so who takes part.

        Returns:
            The guarantee, or None without noise.

        Raises:
            ValueError: If an argument is out of range.
        """
        from groundwire.plugins.privacy.accounting import spent_epsilon
        from groundwire.plugins.privacy.statement import PrivacyStatement

        check_releases(numel, rounds, sample_rate)
        if self.noise_multiplier == 0:
            return None
        if self.num_shares == 1:
            who = ["Nobody else is trusted: the guarantee is of what the device sends."]
        else:
            secure = f"Secure aggregation shows nothing but sums with at least {self.num_shares} honest shares of noise"
            who = [f"{secure} in every round, which stay in when a device's update is taken out; fewer void it."]
        if sample_rate < 1:
            who.append(
                "The sampling of devices is counted as 1, since it is seen who sends, or how many shares of noise."
            )
        return PrivacyStatement(
            mechanism="Gaussian",
            unit="one device's updates",
            adjacency="zero-out",
            epsilon=spent_epsilon(self.noise_multiplier, 1.0, rounds, delta),
            delta=delta,
            assumptions=(
                *who,
                f"The run has {rounds} round(s); removing a device puts zeros in its place.",
                "The noise is Gaussian to the precision of floating point.",
                "Its random stream is secret (in a simulation, the seed of the run); the sketch is public.",
            ),
        )

    @override
    def extra_repr(self) -> str:
        return (
            f"clip_norm={self.clip_norm}, noise_multiplier={self.noise_multiplier}, density={self.density}, k={self.k}, "
            f"kind={self.kind!r}, num_shares={self.num_shares}"
        )
