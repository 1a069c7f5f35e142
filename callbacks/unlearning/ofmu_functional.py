"""OFMU's objective ``Phi = L_f - beta cos(grad L_f, grad L_r)``: its gradient, and Hessian-vector products of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_TINY = 1e-30  # only where a gradient is exactly zero
_NOT_TWICE = ("derivative for", "twice", "ouble backward")


@dataclass(frozen=True)
class PhiGradient:
    """The gradient of Phi at some weights, and what it was made from.

    Args:
        vector: The gradient, flat, shape ``(p,)``.
        norm: Its Euclidean norm.
        forget_loss: ``L_f``.
        cosine: The smoothed cosine of both gradients; None where ``beta`` is 0, as the retain loss is then not needed.
    """

    vector: Tensor
    norm: float
    forget_loss: float
    cosine: float | None


def smoothed_cosine(a: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``s = <a, b> / ((|a| + eps) (|b| + eps))``, and its derivatives with respect to ``a`` and ``b``.

    With ``eps = 0`` it is the cosine, whose derivative grows like ``1 / |a|`` where ``a`` vanishes: as the gradient of a
    trained model's loss does. ``eps`` bounds the derivatives by ``2 / eps``.

    Args:
        a: A vector, shape ``(p,)``; where it is zero, so is ``s``.
        b: Another one, of the same shape.
        eps: At least 0, in units of the norms.

    Returns:
        ``(s, ds/da, ds/db)``; ``s`` is a scalar, the others have shape ``(p,)``.

    Raises:
        ValueError: If the shapes differ, or ``eps`` is negative.

    Example:
        >>> s, by_a, _ = smoothed_cosine(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 3.0]), eps=0.0)
        >>> s, by_a
        (tensor(0.), tensor([0.0000, 0.5000]))
    """
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"`a` and `b` must be vectors of one length, got {tuple(a.shape)} and {tuple(b.shape)}.")
    if eps < 0:
        raise ValueError(f"`eps` must be at least 0, got {eps}.")
    norm_a, norm_b = a.norm(), b.norm()
    smooth_a, smooth_b = (norm_a + eps).clamp_min(_TINY), (norm_b + eps).clamp_min(_TINY)
    unit_a, unit_b = a / norm_a.clamp_min(_TINY), b / norm_b.clamp_min(_TINY)
    s = (a / smooth_a) @ (b / smooth_b)
    return s, (b / smooth_b - s * unit_a) / smooth_a, (a / smooth_a - s * unit_b) / smooth_b


def grad_phi(
    forget_loss: Callable[[], Tensor],
    retain_loss: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    beta: float,
    eps: float = 1e-2,
    average: Callable[[Tensor], Tensor] = lambda vector: vector,
) -> PhiGradient:
    """``grad Phi = grad L_f - beta grad s``, where ``s`` is the smoothed cosine of the gradients of both losses.

    By the chain rule ``grad s = H_f u_f + H_r u_r`` with the Hessians of the losses and the derivatives ``u`` of ``s``
    with respect to the gradients: two backward passes, and one through both of them. Nothing is added to ``p.grad``.

    Args:
        forget_loss: Computes ``L_f``, a scalar, from the parameters.
        retain_loss: Computes ``L_r``; it is not called where ``beta`` is 0.
        parameters: Leaves that require gradients, with ``p`` entries together. One that a loss does not depend on counts
            as one with gradient zero.
        beta: Weight of the similarity.
        eps: Of :func:`smoothed_cosine`.
        average: From a vector of this process to its mean over all processes (it may be changed in place), so that
            the losses are means over all of them. Every process makes the same calls.

    Returns:
        The gradient.

    Raises:
        RuntimeError: If an operation of a loss can be differentiated only once, and ``beta`` is not 0.

    Reference:
        Asif, Amiri, "OFMU: Optimization-Driven Framework for Machine Unlearning", 2025. arXiv:2509.22483

    Example:
        >>> theta = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> found = grad_phi(lambda: theta.square().sum() / 2, lambda: theta.sum(), [theta], beta=0.0)
        >>> found.vector, found.forget_loss
        (tensor([1., 2.]), 2.5)
    """
    with torch.enable_grad():
        if not beta:
            loss = forget_loss()
            gradient = _gradient(loss, parameters)
            both = average(torch.cat([_flat(gradient), _as_row(loss, gradient)]))
            return _found(both[:-1], both[-1], None)
        loss = forget_loss()
        of_forget = _gradient(loss, parameters, create_graph=True)
        of_retain = _gradient(retain_loss(), parameters, create_graph=True)
        both = average(torch.cat([_flat(of_forget), _flat(of_retain), _as_row(loss, of_forget)]))
        g_f, g_r = both[:-1].chunk(2)
        cosine, u_f, u_r = smoothed_cosine(g_f, g_r, eps)
        by_cosine = average(
            _flat(
                _pulled_back([*of_forget, *of_retain], [*_parts(u_f, parameters), *_parts(u_r, parameters)], parameters)
            )
        )
        return _found(g_f - beta * by_cosine, both[-1], cosine)


def hessian_vector(
    gradient: Callable[[], Tensor], parameters: Sequence[Tensor], direction: Tensor, length: float
) -> Tensor:
    """The Hessian of a function times a vector, by the central difference of its gradient.

    The parameters are moved by ``length`` (a Euclidean norm) along the direction and against it, and put back exactly,
    also after an error. The error is of order ``length^2`` plus the rounding of the gradients over ``length``.

    Args:
        gradient: Computes the gradient, shape ``(p,)``, at the parameters' current values.
        parameters: Leaves with ``p`` entries together; changed in place meanwhile.
        direction: The vector, shape ``(p,)``; of the zero vector the product is zero, and nothing is computed.
        length: Positive: 1e-2 in float32, 1e-3 in float64.

    Returns:
        Shape ``(p,)``.

    Raises:
        ValueError: If ``length`` is not positive.

    Example:
        >>> theta = torch.tensor([1.0, 2.0])
        >>> hessian_vector(lambda: 3 * theta, [theta], torch.tensor([0.0, 1.0]), length=0.5)
        tensor([0., 3.])
    """
    if not length > 0:
        raise ValueError(f"`length` must be positive, got {length}.")
    norm = float(direction.norm())
    if norm == 0:
        return torch.zeros_like(direction)
    before = [p.detach().clone() for p in parameters]
    try:
        add_(parameters, direction, length / norm)
        above = gradient()
        copy_(parameters, before)
        add_(parameters, direction, -length / norm)
        below = gradient()
    finally:
        copy_(parameters, before)
    return (above - below) * (norm / (2 * length))


@torch.no_grad()
def add_(parameters: Sequence[Tensor], vector: Tensor, scale: float) -> None:
    """Add ``scale`` times a flat vector ``(p,)`` to parameters, in place."""
    for p, part in zip(parameters, _parts(vector, parameters), strict=True):
        p.add_(part, alpha=scale)


@torch.no_grad()
def copy_(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values into parameters, in place."""
    for p, value in zip(parameters, values, strict=True):
        p.copy_(value)


def add_to_gradients_(parameters: Sequence[Tensor], vector: Tensor) -> None:
    """Add a flat vector ``(p,)`` to the ``.grad`` of parameters, in place; those without one get one."""
    for p, part in zip(parameters, _parts(vector, parameters), strict=True):
        if p.grad is None:
            p.grad = part.clone()
        else:
            p.grad.add_(part)


def _gradient(loss: Tensor, parameters: Sequence[Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        loss, tuple(parameters), create_graph=create_graph, allow_unused=True, materialize_grads=True
    )


def _pulled_back(outputs: list[Tensor], vectors: list[Tensor], parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradient of the inner product of outputs and vectors; outputs may be constants."""
    pairs = [(o, v) for o, v in zip(outputs, vectors, strict=True) if o.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(p) for p in parameters)
    try:
        return torch.autograd.grad(
            [o for o, _ in pairs],
            tuple(parameters),
            [v for _, v in pairs],
            allow_unused=True,
            materialize_grads=True,
        )
    except RuntimeError as error:
        if not any(word in str(error) for word in _NOT_TWICE):
            raise
        raise RuntimeError(
            f"An operation of the module cannot be differentiated twice, which beta > 0 needs: {error}. For attention, "
            "use the math attention kernel: call `trainer.fit` within "
            "`torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)`. Replace other operations, leave out "
            "torch.compile, or set beta=0, which needs first derivatives only."
        ) from error


def _found(vector: Tensor, forget_loss: Tensor, cosine: Tensor | None) -> PhiGradient:
    numbers = [vector.norm(), forget_loss, *([] if cosine is None else [cosine])]
    norm, loss, *rest = torch.stack(numbers).tolist()  # waits for the device once
    return PhiGradient(vector, norm, loss, rest[0] if rest else None)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def _as_row(loss: Tensor, like: Sequence[Tensor]) -> Tensor:
    return loss.detach().reshape(1).to(like[0].dtype)


def _parts(vector: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Views of a flat vector in the shapes (and dtypes) of parameters."""
    chunks = torch.split(vector, [p.numel() for p in parameters])
    return [chunk.view(p.shape).to(p.dtype) for chunk, p in zip(chunks, parameters, strict=True)]
