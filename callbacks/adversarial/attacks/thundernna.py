"""ThunderNNA."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from groundwire.callbacks.adversarial.attacks.base import Attack, LogitsOf, Mode
from groundwire.callbacks.adversarial.functional import cross_entropy, input_gradient, thundernna_step
from groundwire.callbacks.adversarial.threat import ThreatModel


class ThunderNNA(Attack):
    """One step in which every pixel asks for the same first-order change of the loss, as far as the ball allows.

    ``delta_i = clamp(k / g_i, -eps, eps)``. With ``quantile=None``, ``k = 1`` as in public code under this name: pixels
    with ``|g_i| <= 1 / eps``, on usual networks all of them, then move as in FGSM. With a quantile ``q``,
    ``k = eps * quantile_q(|g|)`` of each sample's gradients that are not 0: pixels with larger gradients move less. By Hoelder's inequality no step
    in the ball has a larger first-order gain than FGSM's.

    Args:
        quantile: In (0, 1), or None for the published scale.
        loss: ``"nll_logit"`` (minus the logit of the label, as published) or ``"ce"``.
        zero_grad: Whether a pixel whose gradient is exactly 0 stays (``"zero"``) or moves by ``eps`` (``"eps"``).
        mode: Network mode while the gradient is taken.

    Raises:
        ValueError: If an argument is out of range, or the ball is not that of the max norm.

    Example:
        >>> x, y = torch.rand(8, 4), torch.zeros(8, dtype=torch.int64)
        >>> x_adv = ThunderNNA(quantile=0.5)(torch.nn.Linear(4, 3), x, y, ThreatModel(eps=0.1))

    Reference:
        Ye, Mohajer Hamidi, "Thundernna: a white box adversarial attack", 2021. arXiv:2111.12305
    """

    def __init__(
        self,
        quantile: float | None = None,
        loss: Literal["nll_logit", "ce"] = "nll_logit",
        zero_grad: Literal["zero", "eps"] = "zero",
        mode: Mode = "eval",
    ) -> None:
        super().__init__(mode)
        if quantile is not None and not 0 < quantile < 1:
            raise ValueError(f"`quantile` must be in (0, 1), or None for the published scale, got {quantile}.")
        if loss not in ("nll_logit", "ce"):
            raise ValueError(f"`loss` must be 'nll_logit' or 'ce', got {loss!r}.")
        if zero_grad not in ("zero", "eps"):
            raise ValueError(f"`zero_grad` must be 'zero' or 'eps', got {zero_grad!r}.")
        self.quantile = quantile
        self.loss = loss
        self.zero_grad = zero_grad

    @override
    def perturb(
        self, logits_of: LogitsOf, x: Tensor, target: Tensor, threat: ThreatModel, generator: torch.Generator | None
    ) -> Tensor:
        if threat.norm != "linf":
            raise ValueError(f"ThunderNNA confines every pixel by itself: it needs norm='linf', got {threat.norm!r}.")
        if self.loss == "nll_logit" and target.is_floating_point():
            raise ValueError(
                f"loss='nll_logit' needs class indices [B], got labels {tuple(target.shape)} {target.dtype}: use loss='ce'."
            )

        def total(u: Tensor) -> tuple[Tensor, Tensor]:
            logits = logits_of(u)
            loss = cross_entropy(logits, target) if self.loss == "ce" else -logits.gather(1, target[:, None])
            return loss.sum(), logits.detach()

        gradient, _ = input_gradient(total, x)
        self._look_at(gradient[None])
        scale: Tensor | float = 1.0
        if self.quantile is not None:
            scale = threat.eps * _quantile_of_nonzero(gradient.flatten(1).abs(), self.quantile)
            scale = scale.reshape(-1, *[1] * (x.ndim - 1))
        at_zero = threat.eps if self.zero_grad == "eps" else 0.0
        return threat.project(x + thundernna_step(gradient, threat.eps, scale, at_zero), x)


def _quantile_of_nonzero(values: Tensor, q: float) -> Tensor:
    """Of each row's entries above 0, the one at quantile ``q``; 0 where there are none."""
    ordered = values.sort(dim=1).values
    zeros = (ordered == 0).sum(dim=1)
    number = ordered.shape[1] - zeros
    position = zeros + (q * (number - 1).clamp_min(0)).round().long()
    return ordered.gather(1, position.clamp_max(ordered.shape[1] - 1)[:, None])[:, 0]
