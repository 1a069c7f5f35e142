"""MART."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import override

from groundwire.callbacks.adversarial.attacks import PGD, Attack
from groundwire.callbacks.adversarial.callback import AdversarialCallback
from groundwire.callbacks.adversarial.functional import mart_terms
from groundwire.callbacks.adversarial.threat import ThreatModel
from groundwire.callbacks.logits import LogitsSource
from groundwire.callbacks.step import is_logging_step


class MART(AdversarialCallback):
    """Misclassification-aware adversarial training: what the network gets wrong anyway counts for more.

    Replaces the module's own loss by ``BCE(q, y) + lam * mean D(p || q) (1 - p_y)``, with ``p`` and ``q`` the outputs at the
    clean and the adversarial input, and the boosted cross entropy
    ``BCE = -log q_y - log(1.0001 - max_{k != y} q_k)``. Costs ``num_steps + 2`` forward and backward passes a step.

    Logs ``mart/boosted_ce``, ``mart/weighted_kl`` (nats) and ``mart/robust_acc``.

    Args:
        threat: What the attacker may do.
        lam: Weight of the divergence, at least 0; 5 in the paper, 6 in the authors' script.
        attack: How adversarial inputs are found; by default ``PGD(num_steps=10, start="gaussian", track="last")``.
        warmup_epochs: Epochs in which the radius grows from 0.
        source: Where logits and labels are found.
        seed: Of random starts; by default that of ``seed_everything``.
        name: Under which it logs and keeps its state.

    Raises:
        ValueError: If ``lam`` is negative.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[MART(ThreatModel(eps=8 / 255))], logger=False, enable_checkpointing=False)

    Reference:
        Wang et al., "Improving Adversarial Robustness Requires Revisiting Misclassified Examples", ICLR 2020.
    """

    own_loss_weight = 0.0

    def __init__(
        self,
        threat: ThreatModel,
        lam: float = 5.0,
        attack: Attack | None = None,
        warmup_epochs: float = 0.0,
        source: LogitsSource | None = None,
        seed: int | None = None,
        name: str = "mart",
    ) -> None:
        super().__init__(threat, warmup_epochs, source, seed, name)
        if not lam >= 0:
            raise ValueError(f"`lam` must be at least 0, got {lam}.")
        self.lam = lam
        self.attack = attack or PGD(num_steps=10, start="gaussian", track="last")

    @override
    def total_loss(self, own_loss: Tensor, logits: Tensor, target: Tensor, inputs: Any) -> Tensor:
        adversarial = self.logits_at(self.run_attack(self.attack, inputs, target))
        boosted, weighted_kl = mart_terms(logits, adversarial, target)
        if is_logging_step(self.trainer):
            right = (adversarial.argmax(dim=1) == target).to(boosted.dtype).mean()
            self.log_terms({"boosted_ce": boosted, "weighted_kl": weighted_kl, "robust_acc": right})
        return boosted + self.lam * weighted_kl + 0.0 * own_loss
