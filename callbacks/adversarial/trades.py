"""TRADES."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import override

from groundwire.callbacks.adversarial.attacks import PGD, Attack
from groundwire.callbacks.adversarial.callback import AdversarialCallback
from groundwire.callbacks.adversarial.functional import kl_divergence
from groundwire.callbacks.adversarial.threat import ThreatModel
from groundwire.callbacks.logits import LogitsSource
from groundwire.callbacks.step import is_logging_step


class TRADES(AdversarialCallback):
    """Adds to the module's own loss how far an attack can move the output: accuracy against robustness, by ``beta``.

    ``L = own loss + beta * mean D(p(x) || p(x_adv))``, where ``x_adv`` maximises that divergence in evaluation mode, and the
    gradient flows through both outputs. Costs ``num_steps + 2`` forward and backward passes a step.

    Logs ``trades/kl`` (nats, unweighted) and ``trades/robust_acc``, the share of the batch that the attack leaves right.

    Args:
        threat: What the attacker may do.
        beta: Weight of the divergence, at least 0; 1 to 6 in the paper. 0 leaves training as it is.
        attack: How ``x_adv`` is found; by default ``PGD(num_steps=10, loss="kl", start="gaussian", track="last")``.
        warmup_epochs: Epochs in which the radius grows from 0.
        source: Where logits and labels are found.
        seed: Of random starts; by default that of ``seed_everything``.
        name: Under which it logs and keeps its state.

    Raises:
        ValueError: If ``beta`` is negative.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> callback = TRADES(ThreatModel(eps=8 / 255), beta=6.0)
        >>> trainer = Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)

    Reference:
        Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", ICML 2019. arXiv:1901.08573
    """

    def __init__(
        self,
        threat: ThreatModel,
        beta: float = 6.0,
        attack: Attack | None = None,
        warmup_epochs: float = 0.0,
        source: LogitsSource | None = None,
        seed: int | None = None,
        name: str = "trades",
    ) -> None:
        super().__init__(threat, warmup_epochs, source, seed, name)
        if not beta >= 0:
            raise ValueError(f"`beta` must be at least 0, got {beta}.")
        self.beta = beta
        self.attack = attack or PGD(num_steps=10, loss="kl", start="gaussian", track="last")

    @override
    def total_loss(self, own_loss: Tensor, logits: Tensor, target: Tensor, inputs: Any) -> Tensor:
        if self.beta == 0:
            return own_loss
        adversarial = self.logits_at(self.run_attack(self.attack, inputs, target))
        kl = kl_divergence(logits, adversarial).mean()
        if is_logging_step(self.trainer):
            right = (adversarial.argmax(dim=1) == target).to(kl.dtype).mean()
            self.log_terms({"kl": kl, "robust_acc": right})
        return own_loss + self.beta * kl
