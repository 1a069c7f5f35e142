"""The mathematics of attacks and robust training: plain functions on tensors.

Losses of attacks give one number a sample, to be maximised. They take logits ``(..., B, C)`` and labels ``(B,)``, so that
several points around an input (restarts, particles) are one call. Everything differentiates and runs under
``torch.func.vmap``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from groundwire.callbacks.adversarial.threat import ThreatModel, unit
from groundwire.callbacks.checks import transform_is_active

AttackLoss = Literal["ce", "margin", "dlr", "kl"]
Distance = Literal["l2sq", "l2", "linf", "kl"]
OutputMap = Literal["logits", "log_probs", "probs"]
TeacherWeights = Literal["loss", "margin", "entropy", "uniform"]


# ---------------------------------------------------------------- losses of attacks


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of each sample, nats.

    Args:
        logits: Shape ``(..., B, C)``.
        target: Labels ``(B,)``, or distributions ``(B, C)``.

    Returns:
        Shape ``(..., B)``.

    Example:
        >>> cross_entropy(torch.zeros(1, 4), torch.tensor([2]))
        tensor([1.3863])
    """
    log_p = F.log_softmax(logits, dim=-1)
    if target.is_floating_point():
        return -(target * log_p).sum(dim=-1)
    return -_entry(log_p, target)


def margin(logits: Tensor, target: Tensor) -> Tensor:
    """By how much the best wrong logit exceeds the right one: positive where the sample is misclassified.

    Unlike cross entropy it does not saturate where logits are large.

    Args:
        logits: Shape ``(..., B, C)``.
        target: Labels ``(B,)``.

    Returns:
        Shape ``(..., B)``.

    Example:
        >>> margin(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([1]))
        tensor([-1.])

    Reference:
        Carlini, Wagner, "Towards Evaluating the Robustness of Neural Networks", 2017. arXiv:1608.04644
    """
    return _best_other(logits, target) - _entry(logits, target)


def dlr(logits: Tensor, target: Tensor) -> Tensor:
    """Difference of logits ratio: the margin over the distance of the largest logit from the third, so free of scale.

    Args:
        logits: Shape ``(..., B, C)`` with at least 3 classes.
        target: Labels ``(B,)``.

    Returns:
        Shape ``(..., B)``.

    Raises:
        ValueError: If there are fewer than 3 classes.

    Example:
        >>> dlr(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([1]))
        tensor([-0.5000])

    Reference:
        Croce, Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks",
        ICML 2020. arXiv:2003.01690
    """
    if logits.shape[-1] < 3:
        raise ValueError(f"the DLR loss needs at least 3 classes, got {logits.shape[-1]}: use loss='margin'.")
    ordered = logits.topk(3, dim=-1).values
    return margin(logits, target) / (ordered[..., 0] - ordered[..., 2] + 1e-12)


def kl_divergence(logits: Tensor, other_logits: Tensor) -> Tensor:
    """``D(p || q)`` of each sample, nats, for ``p = softmax(logits)`` and ``q = softmax(other_logits)``.

    Args:
        logits: Shape ``(..., C)``.
        other_logits: Broadcasts against it.

    Returns:
        Shape ``(...)``.

    Example:
        >>> kl_divergence(torch.zeros(1, 3), torch.zeros(1, 3))
        tensor([0.])
    """
    log_p, log_q = F.log_softmax(logits, dim=-1), F.log_softmax(other_logits, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def attack_loss(kind: AttackLoss, logits: Tensor, target: Tensor, clean_logits: Tensor | None) -> Tensor:
    """The loss that an attack maximises, by name.

    Args:
        kind: ``"ce"``, ``"margin"``, ``"dlr"``, or ``"kl"``, the divergence from the outputs at the clean input.
        logits: Shape ``(..., B, C)``.
        target: Labels ``(B,)``; distributions ``(B, C)`` for ``"ce"`` and ``"kl"``.
        clean_logits: Shape ``(B, C)``; only for ``"kl"``.

    Returns:
        Shape ``(..., B)``.

    Raises:
        ValueError: If labels are distributions and the loss needs hard ones.
    """
    if kind == "kl":
        assert clean_logits is not None
        return kl_divergence(clean_logits, logits)
    if kind == "ce":
        return cross_entropy(logits, target)
    if target.is_floating_point():
        raise ValueError(f"loss={kind!r} needs class indices [B], got labels {tuple(target.shape)} {target.dtype}.")
    return margin(logits, target) if kind == "margin" else dlr(logits, target)


# ---------------------------------------------------------------- gradients and steps


def input_gradient(function: Callable[[Tensor], tuple[Tensor, Any]], x: Tensor) -> tuple[Tensor, Any]:
    """Gradient of a function at a point, and what else the function gives; no graph is kept, no ``.grad`` touched.

    Args:
        function: From ``x`` to a scalar and a tensor or nest of tensors; also inside of ``torch.func.vmap`` and ``grad``.
        x: The point.

    Returns:
        The gradient, shaped like ``x``, and the other output as the function gave it.
    """
    if transform_is_active():
        with torch.no_grad():  # of the outer transforms; the inner gradient is taken all the same
            found: tuple[Tensor, Any] = torch.func.grad(function, has_aux=True)(x)
            return found
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        value, aux = function(point)
        (gradient,) = torch.autograd.grad(value, point)
    return gradient, aux


def svgd_direction(particles: Tensor, gradients: Tensor, repulsion: float) -> Tensor:
    """Stein variational direction: gradients shared between near particles, and a push away from each other.

    ``phi(u_i) = 1/N sum_j [k(u_j, u_i) g_j + repulsion * grad_{u_j} k(u_j, u_i)]`` for each sample, with an RBF kernel whose
    width is the median squared distance over ``log(N + 1)``, and ``g_j`` scaled to unit length.

    Args:
        particles: Shape ``(N, B, ...)``.
        gradients: Of the attack's loss, the same shape.
        repulsion: Weight of the push, at least 0.

    Returns:
        The same shape; the unit gradient itself for one particle.

    Example:
        >>> svgd_direction(torch.zeros(1, 1, 2), torch.tensor([[[3.0, 4.0]]]), repulsion=0.5)
        tensor([[[0.6000, 0.8000]]])

    Reference:
        Liu, Wang, "Stein Variational Gradient Descent: A General Purpose Bayesian Inference Algorithm", 2016.
        arXiv:1608.04471
    """
    number = particles.shape[0]
    u = particles.flatten(2).transpose(0, 1)  # (B, N, d)
    g = unit(gradients.flatten(2).transpose(0, 1), 1)
    squared = torch.stack([(u - u[:, j, None]).square().sum(dim=-1) for j in range(number)], dim=-1)
    ordered = squared.flatten(1).sort(dim=-1).values
    middle = ordered.shape[-1] // 2
    median = (ordered[:, middle] + ordered[:, (ordered.shape[-1] - 1) // 2]) / 2
    width = (median / math.log(number + 1)).clamp_min(1e-8)[:, None, None]
    kernel = (-squared / width).exp()  # (B, N, N), symmetric
    # by differences: `u * kernel.sum() - kernel @ u` leaves rounding errors, which 1 / width makes huge where points meet
    away = torch.zeros_like(u)
    for j in range(number):
        away = away + kernel[:, :, j, None] * (u - u[:, j, None])
    push = 2 / width * away
    phi = (kernel @ g + repulsion * push) / number
    return phi.transpose(0, 1).reshape(particles.shape)


def thundernna_step(gradient: Tensor, eps: float, scale: Tensor | float = 1.0, at_zero: float = 0.0) -> Tensor:
    """``clamp(scale / gradient, -eps, eps)``: every pixel asks for the same first-order change of the loss, up to ``eps``.

    It equals FGSM's step where ``0 < |gradient| <= scale / eps``.

    Args:
        gradient: Any shape.
        eps: Largest change of a pixel.
        scale: Broadcasts against the gradient.
        at_zero: The step where the gradient is exactly 0.

    Returns:
        Like ``gradient``.

    Example:
        >>> thundernna_step(torch.tensor([0.5, 20.0, -100.0, 0.0]), eps=0.1)
        tensor([ 0.1000,  0.0500, -0.0100,  0.0000])

    Reference:
        Ye, Mohajer Hamidi, "Thundernna: a white box adversarial attack", 2021. arXiv:2111.12305
    """
    step = (scale / gradient).clamp(-eps, eps)
    return torch.where(gradient == 0, torch.full_like(gradient, at_zero), step)


# ---------------------------------------------------------------- closed forms


def linear_worst_case_margin(weight: Tensor, bias: Tensor, x: Tensor, target: Tensor, threat: ThreatModel) -> Tensor:
    """The smallest margin of the right class that any attack can reach on a linear model, if no box confines it.

    ``min_{k != y} [f_y(x) - f_k(x) - eps ||w_y - w_k||_*]``, with the dual norm: l1 for linf, l2 for l2.

    Args:
        weight: Shape ``(C, d)``, acting on pixels.
        bias: Shape ``(C,)``.
        x: Pixels ``(B, d)``.
        target: Labels ``(B,)``.
        threat: Ball; its box is not looked at.

    Returns:
        Shape ``(B,)``; negative where an attack can succeed.

    Example:
        >>> linear_worst_case_margin(torch.eye(2), torch.zeros(2), torch.tensor([[0.6, 0.2]]), torch.tensor([0]),
        ...                          ThreatModel(eps=0.1))
        tensor([0.2000])
    """
    logits = x @ weight.T + bias
    differences = weight[target][:, None] - weight[None]  # (B, C, d)
    dual = differences.abs().sum(-1) if threat.norm == "linf" else differences.square().sum(-1).sqrt()
    margins = logits.gather(1, target[:, None]) - logits - threat.eps * dual
    return margins.scatter(1, target[:, None], math.inf).amin(dim=1)


def wilson_interval(successes: int, trials: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a proportion.

    Args:
        successes: Number of successes.
        trials: Number of trials.
        z: Quantile of the normal distribution; by default for 95 %.

    Returns:
        Lower and upper end; ``(0, 1)`` without a trial.

    Example:
        >>> tuple(round(end, 3) for end in wilson_interval(50, 100))
        (0.404, 0.596)

    Reference:
        Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", 1927.
    """
    if trials == 0:
        return 0.0, 1.0
    p = successes / trials
    if p in (0.0, 1.0):  # where the formula is exact, but not in floating point
        other = z * z / (trials + z * z)
        return (0.0, other) if p == 0 else (1 - other, 1.0)
    centre = p + z * z / (2 * trials)
    half = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    total = 1 + z * z / trials
    return (centre - half) / total, (centre + half) / total


# ---------------------------------------------------------------- losses of robust training


def mart_terms(clean_logits: Tensor, adversarial_logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The two terms of MART, means over the samples.

    Args:
        clean_logits: Shape ``(B, C)``; ``p`` is their softmax.
        adversarial_logits: The same at the adversarial inputs, ``q``.
        target: Labels ``(B,)``.

    Returns:
        The boosted cross entropy ``-log q_y - log(1.0001 - max_{k != y} q_k)``, and ``D(p || q) (1 - p_y)``.

    Reference:
        Wang et al., "Improving Adversarial Robustness Requires Revisiting Misclassified Examples", ICLR 2020.
    """
    log_q = F.log_softmax(adversarial_logits, dim=-1)
    best_wrong = _best_other(log_q, target).exp()
    boosted = -_entry(log_q, target) - torch.log(1.0001 - best_wrong + 1e-12)
    p_right = _entry(F.softmax(clean_logits, dim=-1), target)
    return boosted.mean(), (kl_divergence(clean_logits, adversarial_logits) * (1 - p_right)).mean()


def output_map(logits: Tensor, kind: OutputMap) -> Tensor:
    """Logits, log-probabilities or probabilities, of the same shape."""
    if kind == "logits":
        return logits
    return F.log_softmax(logits, dim=-1) if kind == "log_probs" else F.softmax(logits, dim=-1)


def polytope_distance(corners: Tensor, center: Tensor, distance: Distance, outputs: OutputMap = "logits") -> Tensor:
    """How far outputs at perturbed inputs lie from the centre of a sample's adversarial polytope.

    Args:
        corners: Logits ``(..., B, C)``.
        center: Logits ``(B, C)``, or as many as there are corners.
        distance: ``"l2sq"`` (squared, summed over classes), ``"l2"``, ``"linf"``, or ``"kl"``, ``D(center || corner)``.
        outputs: What of the logits is compared; ``"kl"`` compares probabilities whatever it is.

    Returns:
        Shape ``(..., B)``.

    Example:
        >>> polytope_distance(torch.tensor([[[3.0, 4.0]]]), torch.zeros(1, 2), "l2sq")
        tensor([[25.]])

    Reference:
        Mohajer Hamidi, Ye, "Robustness Against Adversarial Attacks via Learning Confined Adversarial Polytopes", ICASSP
        2024. arXiv:2401.07991
    """
    if distance == "kl":
        return kl_divergence(center, corners)
    difference = output_map(corners, outputs) - output_map(center, outputs)
    if distance == "linf":
        return difference.abs().amax(dim=-1)
    squared = difference.square().sum(dim=-1)
    return squared if distance == "l2sq" else (squared + 1e-12).sqrt()


def teacher_weights(teacher_logits: Tensor, target: Tensor, kind: TeacherWeights, temperature: float = 1.0) -> Tensor:
    """How much each teacher counts for each sample; they sum to 1 over the teachers.

    Args:
        teacher_logits: Shape ``(M, B, C)``, each teacher's on its own adversarial input.
        target: Labels ``(B,)``.
        kind: Softmax over the teachers of minus their cross entropy (``"loss"``), of the margin of the right class
            (``"margin"``), of minus the entropy of their output (``"entropy"``), or ``"uniform"``.
        temperature: Of that softmax, positive; small makes it choose.

    Returns:
        Shape ``(M, B)``.

    Example:
        >>> teacher_weights(torch.tensor([[[9.0, -9.0]], [[-9.0, 9.0]]]), torch.tensor([0]), "loss").round()
        tensor([[1.],
                [0.]])

    Reference:
        Mohajer Hamidi, Ye, "Adversarial Training via Adaptive Knowledge Amalgamation of an Ensemble of Teachers", 2024.
        arXiv:2405.13324
    """
    if kind == "uniform":
        return torch.full_like(teacher_logits[..., 0], 1 / len(teacher_logits))
    if kind == "loss":
        score = -cross_entropy(teacher_logits, target)
    elif kind == "margin":
        score = -margin(teacher_logits, target)
    else:
        log_p = F.log_softmax(teacher_logits, dim=-1)
        score = (log_p.exp() * log_p).sum(dim=-1)
    return F.softmax(score / temperature, dim=0)


def amalgamate(teacher_logits: Tensor, weights: Tensor, standardize: bool = False) -> Tensor:
    """The teachers' logits as one, each weighed sample by sample.

    Args:
        teacher_logits: Shape ``(M, B, C)``.
        weights: Shape ``(M, B)``, summing to 1 over the teachers.
        standardize: Bring each row of logits to mean 0 and variance 1 first, where scales differ between teachers.

    Returns:
        Shape ``(B, C)``.

    Example:
        >>> amalgamate(torch.tensor([[[4.0, 0.0]], [[0.0, 4.0]]]), torch.tensor([[0.75], [0.25]]))
        tensor([[3., 1.]])

    Reference:
        Mohajer Hamidi, Ye, 2024. arXiv:2405.13324
    """
    if standardize:
        centered = teacher_logits - teacher_logits.mean(dim=-1, keepdim=True)
        teacher_logits = centered / (centered.square().mean(dim=-1, keepdim=True).sqrt() + 1e-12)
    return (weights[..., None] * teacher_logits).sum(dim=0)


def _is_class(logits: Tensor, target: Tensor) -> Tensor:
    return target[:, None] == torch.arange(logits.shape[-1], device=logits.device)


def _entry(values: Tensor, target: Tensor) -> Tensor:
    """``values[..., b, target[b]]``, shape ``(..., B)``."""
    index = target.expand(values.shape[:-1])
    return values.gather(-1, index[..., None])[..., 0]


def _best_other(values: Tensor, target: Tensor) -> Tensor:
    """The largest entry of another class than ``target``, shape ``(..., B)``."""
    return values.masked_fill(_is_class(values, target), -math.inf).amax(dim=-1)
