"""FRUGAL: Adam in a subspace that changes, and signSGD in the rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.optimizers.base import CompressedStateOptimizer, Group
from groundwire.plugins.optimizers.functional import leading_subspace, random_subspace
from groundwire.plugins.random import stream

Selection = Literal["columns", "rows", "randk", "blocks", "svd", "random"]
BlockOrder = Literal["random", "ascending", "descending", "mirror"]
Rule = Literal["sign", "identity", "none"]


class FRUGAL(CompressedStateOptimizer):
    """Adam on a share of each gradient, signSGD on the rest: updates of full rank from a small state.

    Every ``update_gap`` steps another subspace is selected, and Adam starts in it with fresh moments. A gradient is split
    into its projection to the subspace and what remains; the two are orthogonal. At ``density=1`` this is exactly AdamW
    (nothing is selected), at ``density=0`` exactly signSGD.

    A matrix is a parameter's first dimension times all others. For a share ``density`` of it the state is:

    ============ ============================================================= =========================================
    ``selection`` the subspace                                                 numbers beside ``2 density numel`` moments
    ============ ============================================================= =========================================
    ``columns``  random columns, ``int(density * columns)`` of them            their indices
    ``rows``     random rows; faster than columns, by the memory               their indices
    ``randk``    random entries                                                one index for each (int32)
    ``blocks``   ``round(density * number)`` of a group's matrices, as a whole  none
    ``svd``      leading singular directions of the gradient's shorter side,   the directions: their number times the
                 ``round(density * side)`` of them                             shorter side
    ``random``   random directions of the shorter side                         the same
    ============ ============================================================= =========================================

    Selections depend on the seed and on how many there have been, so that all ranks of DDP make the same, and a resumed
    run makes those of an uninterrupted one. In the paper, output head, embeddings and normalisation keep their full state:
    leave the first two out with ``exclude``, or put them in a group with ``density=1``.

    Args:
        params: Parameters, or groups of them; with names (``module.named_parameters()``) for ``exclude``.
        lr: Learning rate, of both parts.
        betas: Decay of the moments.
        eps: Added to Adam's denominator.
        weight_decay: Decoupled weight decay, of the whole parameter.
        density: Share of a matrix (with ``blocks``: of the matrices) that has moments, in [0, 1].
        selection: What is selected, as in the table.
        rule: What is done with the rest: ``"sign"`` (signSGD), ``"identity"`` (SGD), or ``"none"``.
        inactive_lr_scale: Learning rate of the rest, relative to ``lr``. The authors take 1 to train from scratch, 0.1 to
            fine-tune.
        update_gap: Steps between two selections.
        block_order: In which order ``blocks`` takes the matrices: in the group's order (``"ascending"``), backwards, from
            both ends (``"mirror"``), or at random.
        seed: Of the selections; by default that of ``seed_everything``.
        exclude: Regular expressions; parameters in whose name one is found keep their full state.

    Raises:
        ValueError: If a setting is out of range, or there is nothing to select from.

    Reference:
        Zmushko, Beznosikov, Takáč, Horváth, "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for
        Scalable Training", ICML 2025. arXiv:2411.07837. With ``rule="none"``, ``selection="blocks"`` and
        without weight decay it is BAdam.

    Example:
        >>> layer = torch.nn.Linear(8, 4)
        >>> optimizer = FRUGAL(layer.parameters(), density=0.25, selection="columns")
        >>> layer(torch.ones(1, 8)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[layer.weight]["exp_avg"].shape, optimizer.state[layer.bias]["exp_avg"].shape
        (torch.Size([4, 2]), torch.Size([4]))
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        density: float = 0.25,
        selection: Selection = "columns",
        rule: Rule = "sign",
        inactive_lr_scale: float = 1.0,
        update_gap: int = 200,
        block_order: BlockOrder = "random",
        seed: int | None = None,
        exclude: Sequence[str] = (),
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "density": density,
            "selection": selection,
            "rule": rule,
            "inactive_lr_scale": inactive_lr_scale,
            "update_gap": update_gap,
            "block_order": block_order,
            "seed": seed,
            "exclude": exclude,
            "num_steps": 0,
        }
        super().__init__(params, defaults)

    @override
    def _check(self, group: Group) -> None:
        if not 0 <= group["density"] <= 1:
            raise ValueError(f"FRUGAL: `density` must be in [0, 1], got {group['density']}.")
        if group["update_gap"] < 1:
            raise ValueError(f"FRUGAL: `update_gap` must be at least 1 step, got {group['update_gap']}.")
        if not group["inactive_lr_scale"] >= 0:
            raise ValueError(f"FRUGAL: `inactive_lr_scale` must be at least 0, got {group['inactive_lr_scale']}.")
        for name, choices in (("selection", Selection), ("rule", Rule), ("block_order", BlockOrder)):
            if group[name] not in get_args(choices):
                raise ValueError(f"FRUGAL: `{name}` must be one of {get_args(choices)}, got {group[name]!r}.")
        active = self._num_active_blocks(group)
        if group["selection"] == "blocks" and group["block_order"] == "mirror" and active % 2:
            raise ValueError(
                f"FRUGAL: block_order='mirror' takes pairs from both ends, but density={group['density']} of "
                f"{len(self._compressed(group))} matrices makes {active}, an odd number."
            )

    @override
    def _why_nothing(self) -> str:
        return "all have one dimension, are excluded, or have density=1. Check `exclude`, or use torch.optim.AdamW."

    @override
    def _keeps_full_state(self, group: Group, parameter: Tensor) -> bool:
        return bool(group["density"] == 1)

    @override
    def _step_compressed(self, group: Group, items: list[tuple[int, Tensor]]) -> None:
        number = group["num_steps"] // group["update_gap"]
        group["num_steps"] += 1
        parts: dict[Tensor, tuple[Tensor, Tensor]] = {}  # weights and gradients in the subspace
        for place, p in items:
            self._select(group, place, p, number)
            state, weight, grad = self.state[p], _matrix(p, group), _matrix(p.grad, group)
            if "indices" in state:
                dim, indices = _dim(group), state["indices"]
                parts[p] = weight.index_select(dim, indices), grad.index_select(dim, indices)
            elif "basis" in state:
                coordinates = _down(state["basis"], grad)
                parts[p] = torch.zeros_like(coordinates), coordinates
            elif state["active"]:
                parts[p] = p, p.grad  # type: ignore[assignment]
        self._adamw(group, list(parts), [weight for weight, _ in parts.values()], [grad for _, grad in parts.values()])
        for _, p in items:
            part = parts.get(p, (None, None))
            if part[0] is not p:
                self._update(group, p, *part)

    def _update(self, group: Group, p: Tensor, weight: Tensor | None, grad: Tensor | None) -> None:
        """Decay, the rule for the rest, and the active part as Adam has left it (None where there is none)."""
        state = self.state[p]
        whole = p.contiguous()
        matrix, rest = _matrix(whole, group), _matrix(p.grad, group)
        matrix.mul_(1 - group["lr"] * group["weight_decay"])
        if "basis" in state and grad is not None and group["rule"] != "none":
            rest = rest - _up(state["basis"], grad, rest)
        lr = group["lr"] * group["inactive_lr_scale"]
        if group["rule"] == "sign":
            matrix.sub_(rest.sign().add_(rest, alpha=0) * lr)  # the sign of NaN is 0, which would hide it
        elif group["rule"] == "identity":
            matrix.sub_(rest * lr)
        if weight is not None and "basis" in state:
            matrix.add_(_up(state["basis"], weight, matrix))
        elif weight is not None:
            matrix.index_copy_(_dim(group), state["indices"].long(), weight)
        if whole is not p:
            p.copy_(whole)

    def _select(self, group: Group, place: int, p: Tensor, number: int) -> None:
        """Give a parameter its ``number``-th subspace, without moments, if it has not got it yet."""
        state, kind = self.state[p], group["selection"]
        if state.get("selection") == number:
            return
        state.clear()
        state["selection"] = number
        if kind == "blocks":
            state["active"] = place in self._active_blocks(group, number)
            return
        grad = _matrix(p.grad, group)
        total = min(grad.shape) if kind in ("svd", "random") else grad.shape[_dim(group)]
        count = (round if kind in ("svd", "random") else int)(group["density"] * total)
        state["active"] = count > 0
        if not count:
            return
        source = stream(group["seed"], purpose=f"frugal/{self._place_of(group)}/{place}", round=number)
        wide = torch.promote_types(grad.dtype, torch.float32)
        if kind == "svd":
            state["basis"] = leading_subspace((grad.T if _is_tall(grad) else grad).to(wide), count)
        elif kind == "random":
            state["basis"] = random_subspace(total, count, source, wide).to(p.device)
        else:  # sorted: gathering is several times as fast
            chosen = torch.randperm(total, generator=source)[:count].sort().values
            state["indices"] = chosen.to(p.device, torch.int32 if total < 2**31 else torch.int64)

    def _active_blocks(self, group: Group, number: int) -> set[int]:
        """Places of the matrices that are active in the ``number``-th selection."""
        places, order = self._compressed(group), group["block_order"]
        active = self._num_active_blocks(group)
        if order == "random":
            source = stream(group["seed"], purpose=f"frugal/{self._place_of(group)}/blocks", round=number)
            chosen = torch.randperm(len(places), generator=source)[:active].tolist()
        elif order == "mirror":
            half = (len(places) + 1) // 2
            first = [(number * (active // 2) + i) % half for i in range(active // 2)]
            chosen = first + [len(places) - 1 - i for i in first]
        else:
            chosen = [(number * active + i) % len(places) for i in range(active)]
            if order == "descending":
                chosen = [len(places) - 1 - i for i in chosen]
        return {places[i] for i in chosen}

    def _num_active_blocks(self, group: Group) -> int:
        return round(float(group["density"]) * len(self._compressed(group)))

    def _place_of(self, group: Group) -> int:
        return next(i for i, other in enumerate(self.param_groups) if other is group)


def _matrix(tensor: Tensor | None, group: Group) -> Tensor:
    """A tensor as the matrix whose columns or rows are selected; one row of entries for ``randk``."""
    assert tensor is not None
    return tensor.reshape(1, -1) if group["selection"] == "randk" else tensor.flatten(1)


def _dim(group: Group) -> int:
    """The dimension along which entries are selected."""
    return 0 if group["selection"] == "rows" else 1


def _is_tall(matrix: Tensor) -> bool:
    return matrix.shape[0] > matrix.shape[1]


def _down(basis: Tensor, matrix: Tensor) -> Tensor:
    """Coordinates of a matrix on a basis of its shorter side, in the dtype of the basis."""
    matrix_ = matrix.to(basis.dtype)
    return matrix_ @ basis if _is_tall(matrix) else basis.T @ matrix_


def _up(basis: Tensor, coordinates: Tensor, like: Tensor) -> Tensor:
    """A matrix of the shape and dtype of ``like`` from its coordinates."""
    return (coordinates @ basis.T if _is_tall(like) else basis @ coordinates).to(like.dtype)
