"""Sparse gradient compression of the optimizer's state, in its two variants: MESGC and CESGC."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.compression.functional import topk_indices
from groundwire.plugins.optimizers.base import CompressedStateOptimizer, Group
from groundwire.plugins.optimizers.functional import (
    adam_direction,
    gaussian_atoms,
    leading_subspace,
    orthogonal_matching_pursuit,
    project_sparse,
)
from groundwire.plugins.random import stream

Moment = Literal["elementwise", "scalar"]


class MESGC(CompressedStateOptimizer):
    """Memory-efficient sparse gradient compression: Adam on random projections of sparsified chunks of a gradient.

    A parameter is flattened and cut into chunks of ``n = chunk_size`` entries. Of each chunk's gradient, the ``sparsity``
    largest entries are projected to ``k = subspace_dim`` numbers by a fixed random matrix, Adam keeps its moments and
    takes its direction there, and orthogonal matching pursuit lifts the direction back, to ``sparsity`` entries of the
    chunk. All chunks of all parameters are lifted together.

    The state of a parameter of ``c`` chunks is ``2 c k`` numbers (``c (k + 1)`` with ``moment="scalar"``) instead of
    AdamW's two per entry, and the matrix of ``n k`` numbers is kept once for all of them. A parameter is compressed if it
    has at least two dimensions and ``c k`` entries; the others go by AdamW. A step costs ``2 k sparsity`` operations an
    entry, so this trades time for memory: with the defaults it takes about twelve times as long as AdamW's on a CPU. Of
    settings in the same proportions, those with smaller chunks cost less, in proportion to ``k^2``.

    Sparse vectors are recovered if ``k`` is about ``2 sparsity ln n``, which is 12 to 16 times the sparsity. Adam's
    division by the root of the second moment, entry by entry, takes the direction out of their image, and what is lifted
    is then only the nearest that matching pursuit finds. ``moment="scalar"`` divides a chunk by the root of its mean second
    moment: it keeps the image and half of the state, but is not the paper's.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate.
        betas: Decay of the moments.
        eps: Added to Adam's denominator.
        weight_decay: Decoupled weight decay.
        chunk_size: Entries ``n`` of a chunk; None takes each parameter as one chunk, which is plain SGC with a matrix of
            ``k`` times its size.
        sparsity: Entries ``s`` of a chunk that are kept of a gradient, and that a step changes.
        subspace_dim: Numbers ``k`` to which a chunk is projected; at least ``sparsity``.
        moment: ``"elementwise"`` is Adam in the subspace; ``"scalar"`` divides by one number a chunk.
        seed: Of the matrix; by default that of ``seed_everything``.
        exclude: Regular expressions; parameters in whose name one is found go by AdamW.

    Raises:
        ValueError: If a setting is out of range, or no parameter is large enough to be compressed.

    Reference:
        Yang, Mohammadi Amiri, Pedapati, Chaudhury, Chen, "Sparse Gradient Compression for Fine-Tuning Large Language
        Models", 2025. arXiv:2502.00311. The law of the matrix, the defaults and the scalar moment are choices made here.

    Example:
        >>> from groundwire.plugins.optimizers import optimizer_state_bytes
        >>> layer = torch.nn.Linear(128, 64)
        >>> optimizer = MESGC(layer.parameters(), chunk_size=512, sparsity=4, subspace_dim=64)
        >>> layer(torch.ones(1, 128)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[layer.weight]["exp_avg"].shape  # 8,192 entries are 16 chunks
        torch.Size([16, 64])
        >>> optimizer_state_bytes(optimizer) == 4 * (2 * 16 * 64 + 1 + 512 * 64 + 2 * 64 + 1)  # with the matrix, and the bias
        True
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        chunk_size: int | None = 512,
        sparsity: int = 4,
        subspace_dim: int = 64,
        moment: Moment = "elementwise",
        seed: int | None = None,
        exclude: Sequence[str] = (),
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "chunk_size": chunk_size,
            "sparsity": sparsity,
            "subspace_dim": subspace_dim,
            "moment": moment,
            "seed": seed,
            "exclude": exclude,
        }
        super().__init__(params, defaults)

    @property
    @override
    def shared_tensors(self) -> tuple[Tensor, ...]:
        """The random matrices, transposed: one atom a row. They are drawn with the first step, also of a copy."""
        return tuple(self.__dict__.get("_matrices", {}).values())

    @override
    def _check(self, group: Group) -> None:
        name, n, s, k = type(self).__name__, group["chunk_size"], group["sparsity"], group["subspace_dim"]
        if n is not None and n < 1:
            raise ValueError(f"{name}: `chunk_size` must be at least 1, or None for whole parameters, got {n}.")
        if n is not None and k > n:
            rank_zero_warn(f"{name}: subspace_dim={k} exceeds chunk_size={n} and is set to it: nothing is compressed.")
            group["subspace_dim"] = k = n
        if not 1 <= s <= k:
            raise ValueError(f"{name}: `sparsity` must be at least 1 and not exceed `subspace_dim`={k}, got {s}.")
        if group["moment"] not in ("elementwise", "scalar"):
            raise ValueError(f"{name}: `moment` must be 'elementwise' or 'scalar', got {group['moment']!r}.")

    @override
    def _why_nothing(self) -> str:
        return (
            "each has one dimension, is excluded, or has fewer entries than `subspace_dim` for each of its chunks. Use "
            "torch.optim.AdamW, or a smaller `subspace_dim`."
        )

    @override
    def _keeps_full_state(self, group: Group, parameter: Tensor) -> bool:
        return self._num_chunks(group, parameter.numel()) * int(group["subspace_dim"]) > parameter.numel()

    @override
    def _step_compressed(self, group: Group, items: list[tuple[int, Tensor]]) -> None:
        by_length: dict[tuple[Any, ...], list[tuple[Tensor, int, Tensor]]] = {}
        for _, p in items:
            grad = self._reduced(group, p)
            n = min(group["chunk_size"] or grad.numel(), grad.numel())
            found = by_length.setdefault((n, grad.dtype, grad.device), [])
            found.append((p, grad.numel(), self._direction(group, p, grad.flatten(), n)))
        for (n, _, _), entries in by_length.items():
            lengths = [min(n, numel - start) for _, numel, _ in entries for start in range(0, numel, n)]
            directions = torch.cat([direction for _, _, direction in entries])
            atoms = self._atoms(group, n, directions)
            chosen, coefficients = orthogonal_matching_pursuit(atoms, directions, group["sparsity"], lengths=lengths)
            chunks = [len(direction) for _, _, direction in entries]
            for (p, numel, _), where, what in zip(
                entries, torch.split(chosen, chunks), torch.split(coefficients, chunks), strict=True
            ):
                update = what.new_zeros(len(what), n).scatter_add_(1, where, what).flatten()[:numel]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(self._lifted(p, update).to(p.dtype) * group["lr"])

    def _direction(self, group: Group, parameter: Tensor, grad: Tensor, n: int) -> Tensor:
        """Adam's direction in the subspace, shape ``(chunks, k)``, after this gradient."""
        chunks = F.pad(grad, (0, -grad.numel() % n)).view(-1, n)
        largest = topk_indices(chunks, group["sparsity"])
        projected = project_sparse(self._atoms(group, n, grad), largest, chunks.gather(1, largest))
        state = self.state[parameter]
        if "exp_avg" not in state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(projected)
            state["exp_avg_sq"] = torch.zeros_like(projected if group["moment"] == "elementwise" else projected[:, :1])
        state["step"] += 1
        return adam_direction(
            state["exp_avg"],
            state["exp_avg_sq"],
            projected,
            step=state["step"].item(),
            betas=group["betas"],
            eps=group["eps"],
        )

    def _atoms(self, group: Group, n: int, like: Tensor) -> Tensor:
        """The matrix for chunks of ``n`` entries; those of shorter ones are the first rows of that of full chunks."""
        size = group["chunk_size"] or n
        key = (size, group["subspace_dim"], group["seed"], like.dtype, like.device)
        matrices: dict[Any, Tensor] = self.__dict__.setdefault("_matrices", {})
        if key not in matrices:
            source = stream(group["seed"], purpose="sgc/atoms")
            matrices[key] = gaussian_atoms(size, group["subspace_dim"], source, like.dtype).to(like.device)
        return matrices[key][:n]

    @staticmethod
    def _num_chunks(group: Group, numel: int) -> int:
        return 1 if group["chunk_size"] is None else -(-numel // group["chunk_size"])

    def _reduced(self, group: Group, parameter: Tensor) -> Tensor:
        """The gradient that is cut into chunks, in float32 at least."""
        assert parameter.grad is not None
        return parameter.grad.to(torch.promote_types(parameter.grad.dtype, torch.float32))

    def _lifted(self, parameter: Tensor, update: Tensor) -> Tensor:
        """An update of what :meth:`_reduced` gave, flat, as one of the parameter."""
        return update.view(parameter.shape)


class CESGC(MESGC):
    """Compute-efficient sparse gradient compression: MESGC on the gradient's projection to a few directions.

    A parameter's gradient, as a matrix of ``m`` times ``m'`` entries with ``m <= m'``, is projected to its ``rank``
    leading singular directions, found every ``update_gap`` steps; the ``rank m'`` numbers that remain then go through
    :class:`MESGC`. So matching pursuit works on ``rank / m`` of the entries, and changes all rows of the matrix at once.
    The moments go on when the directions change, as in GaLore.

    The state of a parameter is ``2 c k`` numbers for ``c`` chunks of the projected gradient, and the ``rank m`` of the
    directions. A parameter is compressed if that is not more than AdamW's two per entry; the others go by AdamW.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate.
        betas: Decay of the moments.
        eps: Added to Adam's denominator.
        weight_decay: Decoupled weight decay.
        rank: Directions that are kept; of smaller matrices, all.
        update_gap: Steps between two decompositions of the gradient.
        chunk_size: Entries ``n`` of a chunk of the projected gradient; None takes all of it as one chunk.
        sparsity: Entries of a chunk that are kept of a gradient, and that a step changes.
        subspace_dim: Numbers ``k`` to which a chunk is projected; at least ``sparsity``.
        moment: ``"elementwise"`` is Adam in the subspace; ``"scalar"`` divides by one number a chunk.
        seed: Of the random matrix; by default that of ``seed_everything``.
        exclude: Regular expressions; parameters in whose name one is found go by AdamW.

    Raises:
        ValueError: If a setting is out of range, or no parameter is large enough to be compressed.

    Reference:
        Yang, Mohammadi Amiri, Pedapati, Chaudhury, Chen, "Sparse Gradient Compression for Fine-Tuning Large Language
        Models", 2025. arXiv:2502.00311; Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank
        Projection", ICML 2024. arXiv:2403.03507

    Example:
        >>> layer = torch.nn.Linear(256, 64)
        >>> optimizer = CESGC(layer.parameters(), rank=8)
        >>> layer(torch.ones(1, 256)).sum().backward()
        >>> optimizer.step()
        >>> {name: tuple(value.shape) for name, value in optimizer.state[layer.weight].items() if value.ndim}
        {'basis': (64, 8), 'exp_avg': (4, 64), 'exp_avg_sq': (4, 64)}
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        rank: int = 32,
        update_gap: int = 200,
        chunk_size: int | None = 512,
        sparsity: int = 4,
        subspace_dim: int = 64,
        moment: Moment = "elementwise",
        seed: int | None = None,
        exclude: Sequence[str] = (),
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": rank,
            "update_gap": update_gap,
            "chunk_size": chunk_size,
            "sparsity": sparsity,
            "subspace_dim": subspace_dim,
            "moment": moment,
            "seed": seed,
            "exclude": exclude,
        }
        CompressedStateOptimizer.__init__(self, params, defaults)

    @override
    def _check(self, group: Group) -> None:
        super()._check(group)
        for name in ("rank", "update_gap"):
            if group[name] < 1:
                raise ValueError(f"CESGC: `{name}` must be at least 1, got {group[name]}.")

    @override
    def _keeps_full_state(self, group: Group, parameter: Tensor) -> bool:
        shorter, longer = sorted((parameter.shape[0], parameter.numel() // parameter.shape[0]))
        rank = min(int(group["rank"]), shorter)
        if rank * longer < group["subspace_dim"]:
            return True
        numbers = int(group["subspace_dim"])
        moments = self._num_chunks(group, rank * longer) * (numbers + 1 if group["moment"] == "scalar" else 2 * numbers)
        return moments + rank * shorter > 2 * parameter.numel()

    @override
    def _reduced(self, group: Group, parameter: Tensor) -> Tensor:
        state, matrix = self.state[parameter], _wide(super()._reduced(group, parameter))
        if "basis" not in state or int(state["step"]) % group["update_gap"] == 0:
            state["basis"] = leading_subspace(matrix, min(group["rank"], len(matrix)))
        reduced: Tensor = state["basis"].T @ matrix
        return reduced

    @override
    def _lifted(self, parameter: Tensor, update: Tensor) -> Tensor:
        basis: Tensor = self.state[parameter]["basis"]
        matrix = basis @ update.view(basis.shape[1], -1)
        tall = parameter.shape[0] > parameter.numel() // parameter.shape[0]
        return (matrix.T if tall else matrix).reshape(parameter.shape)


def _wide(grad: Tensor) -> Tensor:
    """A gradient as a matrix with no more rows than columns."""
    matrix = grad.flatten(1)
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
