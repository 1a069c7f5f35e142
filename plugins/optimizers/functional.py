"""The mathematics of memory-efficient optimizers: sparse recovery, projections, and the size of a state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS_AT_ONCE = 256
"""Rows that are recovered together: enough for full speed, and few enough that what is kept for them stays small."""


def orthogonal_matching_pursuit(
    atoms: Tensor, targets: Tensor, sparsity: int, *, lengths: Sequence[int] | None = None, tol: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Write every row as a combination of few atoms, chosen greedily; all rows at once.

    Each of ``sparsity`` rounds takes the atom that correlates most with what is left of a row, and then fits the row by
    least squares with all atoms taken so far. A round costs one product of all rows with all atoms, ``2 rows n k``
    operations, which dominates. The orthogonal basis is kept by Gram-Schmidt, done twice.

    Args:
        atoms: The dictionary, one atom of unit norm per row, shape ``(n, k)``, float32 or float64.
        targets: Rows to write, shape ``(rows, k)``, dtype of ``atoms``.
        sparsity: Atoms a row takes at most, ``1 <= sparsity <= k``.
        lengths: For each row, how many atoms it may choose from, the first of them; all of them if None.
        tol: A row stops when what is left of it is at most ``tol`` times its norm.

    Returns:
        ``(indices, coefficients)``, both of shape ``(rows, sparsity)``, in the order of choice. Where a row stops early
        (at ``tol``, when nothing but rounding is left of it, or when the best atom depends on those taken) the coefficients
        that follow are zero. A row that is not finite has NaN coefficients.

    Raises:
        ValueError: If the shapes do not fit, or ``sparsity`` is out of range.

    Reference:
        Pati, Rezaiifar, Krishnaprasad, "Orthogonal Matching Pursuit", Asilomar 1993.

    Example:
        >>> atoms = torch.eye(3)
        >>> orthogonal_matching_pursuit(atoms, torch.tensor([[0.5, -2.0, 0.0]]), sparsity=2)
        (tensor([[1, 0]]), tensor([[-2.0000,  0.5000]]))
    """
    if atoms.ndim != 2 or targets.ndim != 2 or atoms.shape[1] != targets.shape[1]:
        raise ValueError(
            f"`atoms` (n, k) and `targets` (rows, k) must have the same k, got {tuple(atoms.shape)} and "
            f"{tuple(targets.shape)}."
        )
    if not 1 <= sparsity <= atoms.shape[1]:
        raise ValueError(f"`sparsity` must be in [1, k] for targets of k={atoms.shape[1]} entries, got {sparsity}.")
    if lengths is not None and len(lengths) != len(targets):
        raise ValueError(f"`lengths` must have one entry a row, got {len(lengths)} for {len(targets)} rows.")
    found = []
    for start in range(0, max(len(targets), 1), _ROWS_AT_ONCE):
        block = slice(start, start + _ROWS_AT_ONCE)
        found.append(_pursue(atoms, targets[block], sparsity, None if lengths is None else lengths[block], tol))
    return torch.cat([indices for indices, _ in found]), torch.cat([coefficients for _, coefficients in found])


def _pursue(
    atoms: Tensor, targets: Tensor, sparsity: int, lengths: Sequence[int] | None, tol: float
) -> tuple[Tensor, Tensor]:
    (rows, k), n = targets.shape, atoms.shape[0]
    dependent = 100 * torch.finfo(atoms.dtype).eps
    short = [] if lengths is None else [row for row, length in enumerate(lengths) if length < n]
    if short and lengths is not None:
        limits = torch.tensor([lengths[row] for row in short], device=atoms.device)
        beyond = torch.arange(n, device=atoms.device) >= limits[:, None]
    size = targets.norm(dim=1)
    residual = targets.clone()
    indices = torch.zeros(rows, sparsity, dtype=torch.int64, device=targets.device)
    basis = targets.new_zeros(rows, sparsity, k)
    triangle = targets.new_zeros(rows, sparsity, sparsity)  # basis^T triangle = the atoms taken
    loadings = targets.new_zeros(rows, sparsity)  # of the target on the basis
    active = torch.ones(rows, dtype=torch.bool, device=targets.device)
    score = targets.new_empty(rows, n)
    for t in range(sparsity):
        active = active & (residual.norm(dim=1) > tol * size)
        torch.matmul(residual, atoms.T, out=score).abs_()
        if short:
            score[short] = score[short].masked_fill(beyond, -1.0)
        chosen = _argmax(score)
        active = active & (score.gather(1, chosen[:, None])[:, 0] > 0)
        indices[:, t] = chosen
        new, taken = atoms[chosen][:, None], basis[:, :t]
        along = torch.bmm(new, taken.transpose(1, 2))  # row times matrix is ten times as fast as matrix times column
        new = torch.baddbmm(new, along, taken, alpha=-1)
        again = torch.bmm(new, taken.transpose(1, 2))
        new = torch.baddbmm(new, again, taken, alpha=-1)[:, 0]
        height = new.norm(dim=1)
        active = active & (height > dependent)
        new = torch.where(active[:, None], new / height[:, None], 0)
        basis[:, t] = new
        triangle[:, :t, t] = torch.where(active[:, None], (along + again)[:, 0], 0)
        triangle[:, t, t] = torch.where(active, height, 1)
        loadings[:, t] = (new * residual).sum(dim=1)
        residual = torch.addcmul(residual, loadings[:, t, None], new, value=-1)
    coefficients = torch.linalg.solve_triangular(triangle, loadings[:, :, None], upper=True)[:, :, 0]
    return indices, coefficients


def _argmax(score: Tensor) -> Tensor:
    """Place of the largest entry of each row; on the CPU NumPy finds it ten times as fast."""
    return torch.from_numpy(score.numpy().argmax(axis=1)) if score.device.type == "cpu" else score.argmax(dim=1)


def gaussian_atoms(num_atoms: int, dim: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Independent directions, uniform on the unit sphere: the columns of a Gaussian projection, normalised.

    They are drawn in float64, so that other dtypes have the same directions, rounded.

    Args:
        num_atoms: Atoms ``n``.
        dim: Entries ``k`` of each.
        generator: Source of randomness; the atoms are on its device.
        dtype: Floating dtype of the result.

    Returns:
        Shape ``(n, k)``, rows of unit norm.

    Example:
        >>> gaussian_atoms(5, 3, torch.Generator().manual_seed(0)).norm(dim=1)
        tensor([1.0000, 1.0000, 1.0000, 1.0000, 1.0000])
    """
    drawn = torch.empty(num_atoms, dim, dtype=torch.float64, device=generator.device).normal_(generator=generator)
    return F.normalize(drawn, dim=1).to(dtype)


def project_sparse(atoms: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """Combine a few atoms per row: ``sum_j values[i, j] atoms[indices[i, j]]``, without the atoms that are not named.

    Args:
        atoms: Shape ``(n, k)``.
        indices: Which atoms, shape ``(rows, s)``, int64.
        values: Their weights, shape ``(rows, s)``, dtype of ``atoms``.

    Returns:
        Shape ``(rows, k)``.

    Example:
        >>> project_sparse(torch.eye(3), torch.tensor([[2, 0]]), torch.tensor([[5.0, -1.0]]))
        tensor([[-1.,  0.,  5.]])
    """
    projected: Tensor = F.embedding_bag(indices, atoms, mode="sum", per_sample_weights=values)
    return projected


def adam_direction(
    exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, *, step: float, betas: tuple[float, float], eps: float
) -> Tensor:
    """Add a gradient to both moments, in place, and give Adam's direction ``m_hat / (sqrt(v_hat) + eps)``.

    Args:
        exp_avg: First moment, shape ``(rows, k)``.
        exp_avg_sq: Second moment, shape ``(rows, k)``, or ``(rows, 1)`` to keep only its mean over a row.
        grad: Shape ``(rows, k)``.
        step: Gradients so far, this one included, at least 1.
        betas: Decay of the two moments.
        eps: Added to the denominator.

    Returns:
        Shape ``(rows, k)``.

    Reference:
        Kingma, Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, Algorithm 1. arXiv:1412.6980

    Example:
        >>> m, v = torch.zeros(1, 2), torch.zeros(1, 2)
        >>> adam_direction(m, v, torch.tensor([[4.0, -0.5]]), step=1, betas=(0.9, 0.999), eps=0.0).round(decimals=4)
        tensor([[ 1., -1.]])
    """
    beta1, beta2 = betas
    exp_avg.lerp_(grad, 1 - beta1)
    if exp_avg_sq.shape == grad.shape:
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    else:
        exp_avg_sq.mul_(beta2).add_(grad.square().mean(dim=1, keepdim=True), alpha=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / math.sqrt(1 - beta2**step)).add_(eps)
    direction: Tensor = exp_avg / denominator / (1 - beta1**step)
    return direction


def leading_subspace(matrix: Tensor, rank: int) -> Tensor:
    """The directions in which the columns of a matrix are largest: its first left singular vectors.

    They come from the eigenvectors of ``matrix matrix^T``, which is cheaper than the decomposition of a wide matrix.
    Entries that are not finite count as zero.

    Args:
        matrix: Shape ``(m, n)``, float32 or float64; best with ``m <= n``.
        rank: Vectors, ``1 <= rank <= m``.

    Returns:
        Orthonormal columns, shape ``(m, rank)``, the largest singular value first.

    Raises:
        ValueError: If ``rank`` is out of range.

    Example:
        >>> leading_subspace(torch.tensor([[0.0, 3.0], [1.0, 0.0]]), rank=1).abs()
        tensor([[1.],
                [0.]])
    """
    if not 1 <= rank <= matrix.shape[0]:
        raise ValueError(f"`rank` must be in [1, {matrix.shape[0]}] for a matrix of that many rows, got {rank}.")
    finite = torch.where(matrix.isfinite(), matrix, 0)
    finite = finite / finite.abs().max().clamp_min(
        torch.finfo(matrix.dtype).tiny
    )  # its square neither over- nor underflows
    vectors: Tensor = torch.linalg.eigh(finite @ finite.T).eigenvectors
    return vectors[:, -rank:].flip(1).contiguous()


def random_subspace(dim: int, rank: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """An orthonormal basis of a uniformly random subspace.

    Args:
        dim: Dimension of the whole space.
        rank: Dimension of the subspace, ``1 <= rank <= dim``.
        generator: Source of randomness; the basis is on its device.
        dtype: Floating dtype of the result.

    Returns:
        Orthonormal columns, shape ``(dim, rank)``.

    Raises:
        ValueError: If ``rank`` is out of range.

    Example:
        >>> basis = random_subspace(5, 2, torch.Generator().manual_seed(0), torch.float64)
        >>> bool(torch.allclose(basis.T @ basis, torch.eye(2, dtype=torch.float64)))
        True
    """
    if not 1 <= rank <= dim:
        raise ValueError(f"`rank` must be in [1, {dim}] in a space of {dim} dimensions, got {rank}.")
    drawn = torch.empty(dim, rank, dtype=torch.float64, device=generator.device).normal_(generator=generator)
    basis: Tensor = torch.linalg.qr(drawn).Q
    return basis.to(dtype)


def optimizer_state_bytes(optimizer: Any) -> int:
    """Bytes of all tensors that an optimizer keeps between steps, beside parameters and gradients; of any optimizer.

    Tensors in the state are found in dictionaries, lists and attributes of objects, step counters included. What an
    optimizer of this package keeps for all parameters together (:attr:`shared_tensors`) counts, too.

    Args:
        optimizer: A torch optimizer, or one that Lightning has wrapped; its state appears with its first step.

    Returns:
        Bytes; a tensor that is found twice counts once.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(10, 10))
        >>> weight.grad = torch.ones(10, 10)
        >>> optimizer = torch.optim.AdamW([weight])
        >>> optimizer.step()
        >>> optimizer_state_bytes(optimizer)  # two float32 moments, and the step
        804
    """
    seen: dict[int, Any] = {}
    queue: list[Any] = [dict(optimizer.state), getattr(optimizer, "shared_tensors", ())]
    total = 0
    while queue:
        item = queue.pop()
        if id(item) in seen:
            continue
        seen[id(item)] = item  # kept, so that no other gets its id
        if isinstance(item, Tensor):
            total += item.numel() * item.element_size()
        elif isinstance(item, Mapping):
            queue += item.values()
        elif isinstance(item, list | tuple | set):
            queue += item
        elif hasattr(item, "__dict__"):
            queue += vars(item).values()
    return total
