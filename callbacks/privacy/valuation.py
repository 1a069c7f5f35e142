"""What is a seller's data worth to a buyer? Diversity and relevance, from a few numbers about it."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from groundwire.callbacks.privacy.independence import gaussian_mu
from groundwire.plugins.privacy import PrivacyStatement, gaussian_epsilon
from groundwire.plugins.random import stream


@dataclass(frozen=True, kw_only=True, eq=False)
class BuyerQuery:
    """What a buyer asks: the variance of a seller's data in the principal directions of its own.

    Args:
        directions: Orthonormal rows, shape ``(k, d)``, float64, by falling variance.
        variances: The buyer's own variances ``lambda_i`` in them, shape ``(k,)``, float64, positive.
        mean: Subtracted from every row, shape ``(d,)``.
        scale: By which every row is divided then, shape ``(d,)``.
        clip_norm: L2 norm to which longer rows are scaled after that; None to leave them.
    """

    directions: Tensor
    variances: Tensor
    mean: Tensor
    scale: Tensor
    clip_norm: float | None = None


def principal_query(
    buyer: Tensor,
    num_directions: int | None = None,
    tol: float = 1e-2,
    standardize: bool = True,
    clip_norm: float | None = None,
) -> BuyerQuery:
    """The buyer's side: principal directions of its data and the variances in them.

    Args:
        buyer: Shape ``(n, d)``; further dimensions are flattened.
        num_directions: The most directions to use, those of largest variance; all if None.
        tol: Directions of a variance below ``tol`` times the largest are left out.
        standardize: Subtract the buyer's mean and divide by its standard deviation (both sides' rows, so that another mean
            counts as diversity); else second moments of the raw rows are compared. Constant features are not scaled.
        clip_norm: L2 norm to which longer rows of both sides are scaled, which private answers need.

    Returns:
        The query.

    Raises:
        ValueError: If there are fewer than two rows, values are NaN or infinite, all rows are equal, or an argument is out
            of range.

    Example:
        >>> query = principal_query(torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]]), standardize=False)
        >>> query.variances
        tensor([2.0000, 0.5000], dtype=torch.float64)
    """
    rows = _rows("buyer", buyer)
    if len(rows) < 2:
        raise ValueError(f"`buyer` needs at least 2 rows to have a variance, got {len(rows)}.")
    if num_directions is not None and not 1 <= num_directions <= rows.shape[1]:
        raise ValueError(
            f"`num_directions` must be in [1, {rows.shape[1]}] for rows of {rows.shape[1]} entries, got {num_directions}."
        )
    if not 0 < tol <= 1:
        raise ValueError(f"`tol` must be in (0, 1], got {tol}.")
    if clip_norm is not None and not 0 < clip_norm < math.inf:
        raise ValueError(f"`clip_norm` must be positive and finite, got {clip_norm}.")
    mean, scale = torch.zeros_like(rows[0]), torch.ones_like(rows[0])
    if standardize:
        mean, std = rows.mean(dim=0), rows.std(dim=0, correction=0)
        scale = torch.where(std > 1e-12 * (1 + mean.abs()), std, 1.0)  # what rounding leaves of a constant is no spread
    rows = _prepared(rows, mean, scale, clip_norm)
    variances, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    variances, directions = variances.flip(0)[:num_directions], vectors.T.flip(0)[:num_directions]
    if not bool(variances[0] > 1e-20):
        raise ValueError("`buyer` has no variance: all rows are equal. Valuation needs data that varies.")
    kept = variances >= tol * variances[0]
    return BuyerQuery(
        directions=directions[kept].contiguous(),
        variances=variances[kept],
        mean=mean,
        scale=scale,
        clip_norm=clip_norm,
    )


def answer_query(seller: Tensor, query: BuyerQuery) -> Tensor:
    """The seller's side: the variances of its data in the buyer's directions.

    Args:
        seller: Shape ``(n, d)``; further dimensions are flattened.
        query: The buyer's.

    Returns:
        ``u_i^T C_s u_i`` for the second moments ``C_s`` of the seller's prepared rows: shape ``(k,)``, float64.

    Raises:
        ValueError: If there is no row, rows have another length than the buyer's, or values are NaN or infinite.

    Example:
        >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> query = principal_query(x)
        >>> torch.allclose(answer_query(x, query), query.variances)
        True
    """
    squares = _squared_projections(seller, query)
    if not len(squares):
        raise ValueError("`seller` has no row.")
    return squares.mean(dim=0)


def answer_sensitivity(clip_norm: float, num_rows: int, num_directions: int) -> float:
    """By how much, in L2 norm, :func:`answer_query` moves at most if one row is replaced by another.

    A row adds ``(u_i^T x)^2 / n`` to answer ``i``: numbers of at least 0 whose sum is at most ``clip_norm^2 / n``. Two such
    vectors differ by at most ``sqrt(2)`` times that, and by that itself if there is one direction only.

    Args:
        clip_norm: To which rows are clipped.
        num_rows: Rows ``n`` of the seller, public.
        num_directions: Answers ``k``.

    Returns:
        The sensitivity, in units of variance.

    Example:
        >>> answer_sensitivity(clip_norm=2.0, num_rows=100, num_directions=1)
        0.04
    """
    return (math.sqrt(2.0) if num_directions > 1 else 1.0) * clip_norm**2 / num_rows


def diversity_and_relevance(buyer_variances: Tensor, seller_variances: Tensor) -> tuple[Tensor, Tensor]:
    """Geometric means over the directions of how far, and how well, the two variances agree.

    ``D = (prod_i |l_i - s_i| / max(l_i, s_i))^(1/k)`` and ``R = (prod_i min(l_i, s_i) / max(l_i, s_i))^(1/k)``, through
    logarithms, so that many directions do not underflow. ``D + R <= 1``. The same data has ``D = 0`` and ``R = 1``; one
    direction in which the seller has nothing gives ``R = 0``.

    Args:
        buyer_variances: ``l``, shape ``(k,)``, positive.
        seller_variances: ``s``, shape ``(k,)``; what noise has made negative counts as 0.

    Returns:
        Diversity and relevance, scalars in [0, 1].

    Raises:
        ValueError: If shapes differ, there is no direction, or a variance of the buyer is not positive.

    Reference:
        Mohammadi Amiri, Berdoz, Raskar, "Fundamentals of Task-Agnostic Data Valuation", AAAI 2023. arXiv:2208.12354

    Example:
        >>> diversity_and_relevance(torch.tensor([4.0, 1.0]), torch.tensor([1.0, 1.0]))
        (tensor(0.), tensor(0.5000))
    """
    if buyer_variances.ndim != 1 or buyer_variances.shape != seller_variances.shape or not len(buyer_variances):
        raise ValueError(
            f"expected two vectors of one length of at least 1, got {tuple(buyer_variances.shape)} and "
            f"{tuple(seller_variances.shape)}."
        )
    if not bool((buyer_variances > 0).all()):
        raise ValueError("`buyer_variances` must be positive: leave out directions in which the buyer has no variance.")
    seller_variances = seller_variances.clamp_min(0.0)
    larger = torch.maximum(buyer_variances, seller_variances).log()
    smaller = torch.minimum(buyer_variances, seller_variances).log()
    apart = (buyer_variances - seller_variances).abs().log()
    return (apart - larger).mean().exp(), (smaller - larger).mean().exp()


class DataValuation(Metric):
    """Diversity and relevance of a seller's data, which comes in batches, to a buyer's.

    It keeps the sums of squares in the buyer's directions, ``k`` numbers, in float64: the result does not depend on how the
    data is split into batches or processes, on the order of rows, or on whether all are there twice.

    ``compute`` gives a dict: ``diversity`` and ``relevance``, scalars in [0, 1].

    With a finite ``epsilon``, the seller's ``k`` answers carry Gaussian noise, of a size for the number of rows they are
    computed from. Computing again without new rows gives the same result; every result from other rows is a further
    release (the batch values of ``forward`` too): :attr:`privacy` adds them up.

    Args:
        buyer: The buyer's data, shape ``(n, d)``; further dimensions are flattened.
        num_directions: The most principal directions to use; all if None.
        tol: Directions of a variance below ``tol`` times the largest are left out.
        standardize: Standardise both sides' rows by the buyer's mean and standard deviation.
        clip_norm: L2 norm to which longer rows of both sides are scaled (after that); needed for private answers.
        epsilon: Of one release, in nats; ``inf`` for no noise and no privacy.
        delta: Of one release, and of all releases together, in (0, 1).
        noise_seed: Of the noise, to repeat an experiment; None takes entropy from the operating system.
        **kwargs: Of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If an argument is out of range or the buyer's data unfit (see :func:`principal_query`); in ``update`` if
            rows do not fit the buyer's, in ``compute`` if there is none.

    Example:
        >>> x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
        >>> metric = DataValuation(x)
        >>> for batch in x.split(30):
        ...     metric.update(batch)
        >>> {name: round(float(value), 6) for name, value in metric.compute().items()}
        {'diversity': 0.0, 'relevance': 1.0}

    Reference:
        Mohammadi Amiri, Berdoz, Raskar, "Fundamentals of Task-Agnostic Data Valuation", AAAI 2023. arXiv:2208.12354. The
        private answers are this package's own addition.
    """

    higher_is_better = None
    is_differentiable = False
    full_state_update = False

    squares: Tensor
    count: Tensor
    entropy: Tensor

    def __init__(
        self,
        buyer: Tensor,
        num_directions: int | None = None,
        tol: float = 1e-2,
        standardize: bool = True,
        clip_norm: float | None = None,
        epsilon: float = math.inf,
        delta: float = 1e-5,
        noise_seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not epsilon > 0:
            raise ValueError(f"`epsilon` must be positive (inf for no noise), got {epsilon}.")
        if not 0 < delta < 1:
            raise ValueError(f"`delta` must be in (0, 1), got {delta}.")
        if epsilon < math.inf and clip_norm is None:
            raise ValueError("Private answers need a bound on each row: give `clip_norm`, a typical norm of a row.")
        self.query = principal_query(buyer, num_directions, tol, standardize, clip_norm)
        self.epsilon = epsilon
        self.delta = delta
        self.noise_seed = noise_seed
        self.releases = 0
        self._released: tuple[int, int] | None = None
        self._updates = 0
        k = len(self.query.variances)
        self.add_state("squares", torch.zeros(k, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        # the noise is a function of the state: all processes draw the same, and computing again releases nothing new
        self.add_state("entropy", torch.tensor(0), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, seller: Tensor) -> None:
        """Add rows of the seller.

        Args:
            seller: Shape ``(B, d)``; further dimensions are flattened.

        Raises:
            ValueError: If rows have another length than the buyer's, or values are NaN or infinite.
        """
        squares = _squared_projections(seller, self.query)
        self.squares += squares.sum(dim=0).to(self.squares.device)
        self.count += len(squares)
        if self.epsilon < math.inf:
            self.entropy += self._fresh_entropy()

    def compute(self) -> dict[str, Tensor]:
        """``diversity`` and ``relevance``.

        Raises:
            ValueError: If there is no row.
        """
        n = int(self.count)
        if not n:
            raise ValueError("There is no row of the seller: call `update` first.")
        answers = self.squares / n
        if self.epsilon < math.inf:
            noise = torch.randn(len(answers), generator=self._noise(), dtype=answers.dtype)
            answers = answers + self.noise_std(n) * noise.to(answers.device)
            if self._released != (released := (n, int(self.entropy))):
                self._released = released
                self.releases += 1
        diversity, relevance = diversity_and_relevance(self.query.variances.to(answers.device), answers)
        return {"diversity": diversity, "relevance": relevance}

    def noise_std(self, num_rows: int) -> float:
        """Standard deviation of the noise on each answer, if it is made of so many rows; in units of variance.

        Args:
            num_rows: Rows of the seller.

        Returns:
            0 without privacy.
        """
        if self.epsilon == math.inf:
            return 0.0
        assert self.query.clip_norm is not None
        sensitivity = answer_sensitivity(self.query.clip_norm, num_rows, len(self.query.variances))
        return sensitivity / gaussian_mu(self.epsilon, self.delta)

    @property
    def privacy(self) -> PrivacyStatement:
        """What all results computed so far guarantee together."""
        spent, delta = self.epsilon, self.delta
        if self.epsilon == math.inf:
            delta = 0.0
        elif self.releases == 0:
            spent, delta = 0.0, 0.0
        elif (
            self.releases > 1
        ):  # Gaussian releases, each with sensitivity mu, are together one with sensitivity mu * sqrt(releases)
            mu = gaussian_mu(self.epsilon, self.delta) * math.sqrt(self.releases)
            spent = gaussian_epsilon(mu, self.delta)
        return PrivacyStatement(
            mechanism="Gaussian",
            unit="one row of the seller",
            adjacency="replace-one",
            epsilon=spent,
            delta=delta,
            assumptions=(
                "The number of rows is public.",
                "The noise, its seed and the metric's state stay with the seller.",
                "Each row is in the data once.",
            ),
        )

    def _fresh_entropy(self) -> int:
        if self.noise_seed is None:
            return secrets.randbits(62)
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        self._updates += 1
        seeded = stream(self.noise_seed, purpose="valuation/entropy", round=self._updates, device_id=rank)
        return int(torch.randint(1 << 62, (), generator=seeded))

    def _noise(self) -> torch.Generator:
        return stream(int(self.entropy), purpose="valuation/noise")


def _rows(name: str, data: Tensor) -> Tensor:
    if data.ndim < 2:
        raise ValueError(f"`{name}` must have shape (n, d), got {tuple(data.shape)}.")
    rows = data.detach().double().reshape(len(data), math.prod(data.shape[1:]))
    if not bool(rows.isfinite().all()):
        raise ValueError(f"`{name}` has values that are NaN or infinite: drop or replace those rows.")
    return rows


def _prepared(rows: Tensor, mean: Tensor, scale: Tensor, clip_norm: float | None) -> Tensor:
    rows = (rows - mean) / scale
    if clip_norm is not None:
        rows = rows * (clip_norm / rows.norm(dim=1, keepdim=True).clamp_min(clip_norm))
    return rows


def _squared_projections(seller: Tensor, query: BuyerQuery) -> Tensor:
    """Shape ``(n, k)``."""
    rows = _rows("seller", seller)
    if rows.shape[1] != len(query.mean):
        raise ValueError(f"`seller` has rows of {rows.shape[1]} entries, the buyer's have {len(query.mean)}.")
    mean, scale, directions = (t.to(rows.device) for t in (query.mean, query.scale, query.directions))
    return (_prepared(rows, mean, scale, query.clip_norm) @ directions.T).square()
