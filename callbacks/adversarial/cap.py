"""CAP: confined adversarial polytopes."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from typing_extensions import override

from groundwire.callbacks.adversarial.attacks import PGD
from groundwire.callbacks.adversarial.attacks.pgd import Start
from groundwire.callbacks.adversarial.callback import AdversarialCallback
from groundwire.callbacks.adversarial.functional import Distance, OutputMap, polytope_distance, svgd_direction
from groundwire.callbacks.adversarial.threat import ThreatModel
from groundwire.callbacks.logits import LogitsSource
from groundwire.callbacks.step import is_logging_step

Center = Literal["clean", "mean"]


class CornerSearch(PGD):
    """Particles that climb away from the centre of a sample's adversarial polytope, towards its corners.

    Args:
        num_particles: ``N``, for each sample.
        num_steps: Gradients for each particle.
        step_size: In pixel units; by default ``2.5 eps / num_steps``.
        center: The output at the clean input, or the mean of the particles' outputs.
        distance: See :func:`polytope_distance`.
        outputs: What of the logits is compared.
        start: Where particles start; not at the clean input, where the distance has no gradient.
        repulsion: Weight with which particles push each other away, as in :class:`SVGD`; None lets each climb alone.

    Raises:
        ValueError: If an argument is out of range, or one particle is its own centre.

    Example:
        >>> import torch
        >>> x, y = torch.rand(8, 4), torch.zeros(8, dtype=torch.int64)
        >>> CornerSearch(2).particles(torch.nn.Linear(4, 3), x, y, ThreatModel(eps=0.1)).shape
        torch.Size([2, 8, 4])
    """

    def __init__(
        self,
        num_particles: int = 2,
        num_steps: int = 5,
        step_size: float | None = None,
        center: Center = "clean",
        distance: Distance = "kl",
        outputs: OutputMap = "logits",
        start: Start = "uniform",
        repulsion: float | None = None,
    ) -> None:
        if start == "clean":
            raise ValueError(
                "`start` must be 'uniform' or 'gaussian': at the clean input the distance has no gradient."
            )
        super().__init__(num_steps, step_size, start=start, num_restarts=num_particles, track="last")
        if center not in ("clean", "mean"):
            raise ValueError(f"`center` must be 'clean' or 'mean', got {center!r}.")
        if distance not in ("l2sq", "l2", "linf", "kl"):
            raise ValueError(f"`distance` must be 'l2sq', 'l2', 'linf' or 'kl', got {distance!r}.")
        if outputs not in ("logits", "log_probs", "probs"):
            raise ValueError(f"`outputs` must be 'logits', 'log_probs' or 'probs', got {outputs!r}.")
        if center == "mean" and num_particles == 1:
            raise ValueError("center='mean' needs at least 2 particles: the only one would be its own centre.")
        if repulsion is not None and not repulsion >= 0:
            raise ValueError(f"`repulsion` must be at least 0, or None, got {repulsion}.")
        self.center: Center = center
        self.distance: Distance = distance
        self.outputs: OutputMap = outputs
        self.repulsion = repulsion

    @property
    @override
    def needs_clean_logits(self) -> bool:
        return self.center == "clean"

    @override
    def objective(self, logits: Tensor, target: Tensor, clean_logits: Tensor | None) -> Tensor:
        center = logits.detach().mean(dim=0) if clean_logits is None else clean_logits
        return polytope_distance(logits, center, self.distance, self.outputs)

    @override
    def direction(self, points: Tensor, gradient: Tensor) -> Tensor:
        return gradient if self.repulsion is None else svgd_direction(points, gradient, self.repulsion)


class ConfinedPolytopes(AdversarialCallback):
    """Adds to the module's own loss how far the outputs at perturbed inputs lie from the centre of their polytope.

    The adversarial polytope of an input is the set of outputs that an attacker can reach. Particles look for its corners
    (:class:`CornerSearch`), and training pulls them to the centre:
    ``L = own loss + lam * mean_{n, i} d(f(x_n,i), c_i)``. With one particle, the clean centre, ``distance="kl"`` and
    ``start="gaussian"`` it is TRADES with ``beta = lam``; with one particle and ``"l2sq"`` it is adversarial logit pairing.
    Costs ``N num_steps + N + 1`` forward and backward passes a step. The defaults are the best of 33 designs that were compared
    on validation images (docs/adversarial.md); for ``"l2sq"`` on logits, weights of 0.3 to 3 are in place, for ``"kl"`` 6 to 12.

    Logs ``cap/distance`` (the unweighted term), ``cap/radius`` (the farthest corner of a sample, mean over the batch), and
    ``cap/robust_acc``, the share of the batch of which all corners are classified right.

    Args:
        threat: What the attacker may do.
        lam: Weight of the distance, at least 0; 0 leaves training as it is.
        search: How corners are found, and what centre and distance are; by default :class:`CornerSearch` as it is.
        detach_center: Pull corners to the centre without pulling the centre to them.
        warmup_epochs: Epochs in which the radius grows from 0.
        source: Where logits and labels are found.
        seed: Of random starts; by default that of ``seed_everything``.
        name: Under which it logs and keeps its state.

    Raises:
        ValueError: If ``lam`` is negative.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> callback = ConfinedPolytopes(ThreatModel(eps=0.1), lam=12.0, search=CornerSearch(num_particles=2))
        >>> trainer = Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)

    Reference:
        Mohajer Hamidi, Ye, "Robustness Against Adversarial Attacks via Learning Confined Adversarial Polytopes", ICASSP
        2024. arXiv:2401.07991
    """

    def __init__(
        self,
        threat: ThreatModel,
        lam: float = 12.0,
        search: CornerSearch | None = None,
        detach_center: bool = False,
        warmup_epochs: float = 0.0,
        source: LogitsSource | None = None,
        seed: int | None = None,
        name: str = "cap",
    ) -> None:
        super().__init__(threat, warmup_epochs, source, seed, name)
        if not lam >= 0:
            raise ValueError(f"`lam` must be at least 0, got {lam}.")
        self.lam = lam
        self.search = search or CornerSearch()
        self.detach_center = detach_center

    @override
    def total_loss(self, own_loss: Tensor, logits: Tensor, target: Tensor, inputs: Any) -> Tensor:
        if self.lam == 0:
            return own_loss
        corners = self.particle_logits(self.run_search(self.search, inputs, target))
        center = logits if self.search.center == "clean" else corners.mean(dim=0)
        if self.detach_center:
            center = center.detach()
        distance = polytope_distance(corners, center, self.search.distance, self.search.outputs)
        if is_logging_step(self.trainer):
            right = (corners.argmax(dim=-1) == target).all(dim=0).to(distance.dtype).mean()
            radius = distance.amax(dim=0).mean()
            self.log_terms({"distance": distance.mean(), "radius": radius, "robust_acc": right})
        return own_loss + self.lam * distance.mean()
