"""Projected gradient ascent and what is built on it."""

from __future__ import annotations

import math
from typing import Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from groundwire.callbacks.adversarial.attacks.base import Attack, LogitsOf, Mode
from groundwire.callbacks.adversarial.functional import AttackLoss, attack_loss, input_gradient, svgd_direction
from groundwire.callbacks.adversarial.threat import ThreatModel, gaussian

Start = Literal["uniform", "gaussian", "clean"]

_NEAR = 1e-3  # standard deviation of the Gaussian start, in pixel units


class PGD(Attack):
    """Projected gradient ascent on the attack's loss; all restarts in one batch.

    Args:
        num_steps: Gradients ``K``.
        step_size: In pixel units, at the full radius; by default ``2.5 eps / num_steps``, which can reach the other end
            of the ball.
        loss: What is maximised: ``"ce"``, ``"margin"`` (does not saturate), ``"dlr"`` (free of scale), or ``"kl"``, the
            divergence from the output at the clean input.
        start: ``"uniform"`` in the ball, ``"gaussian"`` (0.001 away, as TRADES and MART have it), or ``"clean"``, the
            input itself.
        num_restarts: Independent starts, side by side.
        track: ``"best"`` keeps the first point that is misclassified, else the one of largest loss, which costs one more
            forward; ``"last"`` keeps the last (of several restarts that of largest loss).
        early_stop: Leave samples alone once a point is misclassified: faster, the same success; not inside
            ``torch.func.vmap``.
        targeted: The labels are those to reach.
        mode: Network mode while gradients are taken.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> attack = PGD(num_steps=20, loss="margin", num_restarts=5)
        >>> x_adv = attack(nn.Linear(4, 3), torch.rand(8, 4), torch.zeros(8, dtype=torch.int64), ThreatModel(eps=0.1))

    Reference:
        Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018. arXiv:1706.06083
    """

    def __init__(
        self,
        num_steps: int = 20,
        step_size: float | None = None,
        loss: AttackLoss = "ce",
        start: Start = "uniform",
        num_restarts: int = 1,
        track: Literal["best", "last"] = "best",
        early_stop: bool = False,
        targeted: bool = False,
        mode: Mode = "eval",
    ) -> None:
        super().__init__(mode)
        if num_steps < 1:
            raise ValueError(f"`num_steps` must be at least 1, got {num_steps}.")
        if step_size is not None and not step_size > 0:
            raise ValueError(f"`step_size` must be positive, got {step_size}.")
        if loss not in ("ce", "margin", "dlr", "kl"):
            raise ValueError(f"`loss` must be 'ce', 'margin', 'dlr' or 'kl', got {loss!r}.")
        if start not in ("uniform", "gaussian", "clean"):
            raise ValueError(f"`start` must be 'uniform', 'gaussian' or 'clean', got {start!r}.")
        if start == "clean" and (loss == "kl" or num_restarts > 1):
            raise ValueError(
                "start='clean' finds the same point every time, and where loss='kl' has no gradient: use 'uniform'."
            )
        if loss == "kl" and targeted:
            raise ValueError("loss='kl' looks at no labels, so it cannot be targeted: use 'ce' or 'margin'.")
        if loss == "dlr" and targeted:  # it is 1 there, whatever the logits
            raise ValueError("loss='dlr' has no gradient where the label to reach ranks third: use 'ce' or 'margin'.")
        if num_restarts < 1:
            raise ValueError(f"`num_restarts` must be at least 1, got {num_restarts}.")
        if track not in ("best", "last"):
            raise ValueError(f"`track` must be 'best' or 'last', got {track!r}.")
        if early_stop and track == "last":
            raise ValueError("early_stop=True keeps the first misclassified point: it needs track='best'.")
        self.num_steps = num_steps
        self.step_size = step_size
        self.loss: AttackLoss = loss
        self.start: Start = start
        self.num_restarts = num_restarts
        self.track = track
        self.early_stop = early_stop
        self.targeted = targeted

    @property
    def gradients(self) -> int:
        """Forward and backward passes for each input."""
        return self.num_steps * self.num_restarts

    def step_of(self, threat: ThreatModel) -> float:
        """Length of a step, in pixel units."""
        if self.step_size is None:
            return 2.5 * threat.eps / self.num_steps
        size = self.step_size * threat.step_scale
        if size > 2 * threat.eps and self.num_steps > 1 and not self._has_looked:
            rank_zero_warn(
                f"step_size={size:g} is more than twice eps={threat.eps:g}: {self.num_steps} steps jump from one end of the "
                "ball to the other. Leave it out for 2.5 eps / num_steps."
            )
        return size

    def particles(
        self,
        model: nn.Module,
        x: Tensor,
        target: Tensor,
        threat: ThreatModel,
        *,
        logits_of: LogitsOf | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """All the points that the restarts end at.

        Args:
            model: The network.
            x: Its inputs ``(B, ...)``.
            target: Labels ``(B,)``.
            threat: What the attacker may do.
            logits_of: From inputs to logits; by default ``model`` itself.
            generator: Source of randomness.

        Returns:
            Network inputs ``(N, B, ...)``, without a graph.
        """
        found = self._attack(model, x, target, threat, logits_of, generator, None, self._last_points)
        flat = threat.network_input(found.flatten(0, 1), x.dtype)
        return flat.reshape(found.shape).detach()

    @override
    def perturb(
        self,
        logits_of: LogitsOf,
        x: Tensor,
        target: Tensor,
        threat: ThreatModel,
        generator: torch.Generator | None,
        start: Tensor | None = None,
    ) -> Tensor:
        if self.track == "best":
            return self._best_points(logits_of, x, target, threat, generator, start)
        points = self._last_points(logits_of, x, target, threat, generator, start)
        if len(points) == 1:
            return points[0]
        with torch.no_grad():
            loss, _ = self._loss_at(points, logits_of, target, self._reference(logits_of, x))
        return _of_each_sample(points, loss.argmax(dim=0))

    def objective(self, logits: Tensor, target: Tensor, clean_logits: Tensor | None) -> Tensor:
        """What is maximised.

        Args:
            logits: Shape ``(N, B, C)``.
            target: Labels ``(B,)``.
            clean_logits: Shape ``(B, C)``, where :attr:`needs_clean_logits`.

        Returns:
            Shape ``(N, B)``.
        """
        loss = attack_loss(self.loss, logits, target, clean_logits)
        return -loss if self.targeted else loss

    @property
    def needs_clean_logits(self) -> bool:
        """Whether the objective compares with the output at the clean input."""
        return self.loss == "kl"

    def direction(self, points: Tensor, gradient: Tensor) -> Tensor:
        """In which the points move, before it is brought to unit norm; all of shape ``(N, B, ...)``."""
        return gradient

    def _starts(
        self, x: Tensor, threat: ThreatModel, generator: torch.Generator | None, start: Tensor | None
    ) -> Tensor:
        """First points, shape ``(N, B, ...)``."""
        repeated = (x if start is None else start).expand(self.num_restarts, *x.shape).flatten(0, 1)
        if start is None and self.start == "uniform":
            repeated = threat.uniform(repeated, generator)
        elif start is None and self.start == "gaussian":
            repeated = repeated + _NEAR * gaussian(repeated, generator)
        return threat.project(repeated.reshape(self.num_restarts, *x.shape), x)

    def _reference(self, logits_of: LogitsOf, x: Tensor) -> Tensor | None:
        if not self.needs_clean_logits:
            return None
        with torch.no_grad():
            found: Tensor = logits_of(x)
        return found

    def _loss_at(
        self, points: Tensor, logits_of: LogitsOf, target: Tensor, clean_logits: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        flat = logits_of(points.flatten(0, 1))
        logits = flat.reshape(*points.shape[:2], flat.shape[-1])
        return self.objective(logits, target, clean_logits), logits

    def _gradient_at(
        self, points: Tensor, logits_of: LogitsOf, target: Tensor, clean_logits: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        def total(u: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            loss, logits = self._loss_at(u, logits_of, target, clean_logits)
            return loss.sum(), (loss.detach(), logits.detach())

        gradient, (loss, logits) = input_gradient(total, points)
        self._look_at(gradient, None if self._has_looked else self._fooled(logits, target))
        return gradient, loss, logits

    def _moved(self, points: Tensor, gradient: Tensor, x: Tensor, threat: ThreatModel) -> Tensor:
        unit = threat.steepest(self.direction(points, gradient), x.ndim - 1)
        return threat.project(points + self.step_of(threat) * unit, x)

    def _last_points(
        self,
        logits_of: LogitsOf,
        x: Tensor,
        target: Tensor,
        threat: ThreatModel,
        generator: torch.Generator | None,
        start: Tensor | None = None,
    ) -> Tensor:
        points = self._starts(x, threat, generator, start)
        clean_logits = self._reference(logits_of, x)
        for _ in range(self.num_steps):
            gradient, _, _ = self._gradient_at(points, logits_of, target, clean_logits)
            points = self._moved(points, gradient, x, threat)
        return points

    def _best_points(
        self,
        logits_of: LogitsOf,
        x: Tensor,
        target: Tensor,
        threat: ThreatModel,
        generator: torch.Generator | None,
        start: Tensor | None,
    ) -> Tensor:
        points = self._starts(x, threat, generator, start)
        clean_logits = self._reference(logits_of, x)
        best, score = points.clone(), points.new_full(points.shape[:2], -math.inf)
        running = torch.arange(len(x), device=x.device)  # samples that are still attacked
        for step in range(self.num_steps + 1):
            if step < self.num_steps:
                gradient, loss, logits = self._gradient_at(points, logits_of, target, clean_logits)
            else:
                with torch.no_grad():
                    loss, logits = self._loss_at(points, logits_of, target, clean_logits)
            fooled = self._fooled(logits, target)
            new = torch.where(fooled, math.inf, loss.to(score.dtype))
            better = new > (score[:, running] if self.early_stop else score)
            kept = _like(better, points)
            if not self.early_stop:
                best, score = torch.where(kept, points, best), torch.where(better, new, score)
            else:
                best[:, running] = torch.where(kept, points, best[:, running])
                score[:, running] = torch.where(better, new, score[:, running])
                rest = ~fooled.any(dim=0)
                if not bool(rest.any()):
                    break
                if not bool(rest.all()):
                    running, x, target, points = running[rest], x[rest], target[rest], points[:, rest]
                    clean_logits = None if clean_logits is None else clean_logits[rest]
                    if step < self.num_steps:
                        gradient = gradient[:, rest]
            if step < self.num_steps:
                points = self._moved(points, gradient, x, threat)
        return _of_each_sample(best, score.argmax(dim=0))

    def _fooled(self, logits: Tensor, target: Tensor) -> Tensor:
        if target.is_floating_point():
            target = target.argmax(dim=-1)
        right = logits.argmax(dim=-1) == target
        return right if self.targeted else ~right


class FGSM(PGD):
    """One step to the edge of the ball, in the direction in which the loss rises fastest.

    Args:
        loss: What is maximised, ``"ce"``, ``"margin"`` or ``"dlr"``.
        targeted: The labels are those to reach.
        mode: Network mode while the gradient is taken.

    Example:
        >>> x_adv = FGSM()(nn.Linear(4, 3), torch.rand(8, 4), torch.zeros(8, dtype=torch.int64), ThreatModel(eps=0.1))

    Reference:
        Goodfellow et al., "Explaining and Harnessing Adversarial Examples", ICLR 2015. arXiv:1412.6572
    """

    def __init__(self, loss: AttackLoss = "ce", targeted: bool = False, mode: Mode = "eval") -> None:
        super().__init__(num_steps=1, loss=loss, start="clean", track="last", targeted=targeted, mode=mode)


class RandomFGSM(PGD):
    """One step of ``1.25 eps`` from a uniform start, the network in training mode: the attack of fast adversarial training.

    Args:
        loss: What is maximised.
        mode: Network mode while the gradient is taken.

    Example:
        >>> x_adv = RandomFGSM()(nn.Linear(4, 3), torch.rand(8, 4), torch.zeros(8, dtype=torch.int64), ThreatModel(eps=0.1))

    Reference:
        Wong, Rice, Kolter, "Fast is better than free: Revisiting adversarial training", ICLR 2020. arXiv:2001.03994
    """

    def __init__(self, loss: AttackLoss = "ce", mode: Mode = "train") -> None:
        super().__init__(num_steps=1, loss=loss, track="last", mode=mode)

    @override
    def step_of(self, threat: ThreatModel) -> float:
        return 1.25 * threat.eps


class SVGD(PGD):
    """Particles that climb the loss together and keep apart: Stein variational gradient ascent.

    The particles' gradients are shared through a kernel, and the particles pushed away from each other; then each makes
    the step of PGD. :meth:`particles` gives all of them; called as an attack, it gives the most successful one. With one
    particle it is PGD. Sharing gradients without repulsion makes particles more alike than independent ones.

    Args:
        num_particles: ``N``, for each sample.
        repulsion: Weight of the push; 0.1 to 1 buys diversity at little loss.
        num_steps: Gradients for each particle.
        step_size: In pixel units; by default ``2.5 eps / num_steps``.
        loss: What is maximised.
        mode: Network mode while gradients are taken.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> attack = SVGD(num_particles=3, num_steps=2)
        >>> x, y = torch.rand(8, 4), torch.zeros(8, dtype=torch.int64)
        >>> attack.particles(nn.Linear(4, 3), x, y, ThreatModel(eps=0.1)).shape
        torch.Size([3, 8, 4])

    Reference:
        Liu, Wang, "Stein Variational Gradient Descent: A General Purpose Bayesian Inference Algorithm", 2016.
        arXiv:1608.04471
    """

    def __init__(
        self,
        num_particles: int = 4,
        repulsion: float = 0.5,
        num_steps: int = 10,
        step_size: float | None = None,
        loss: AttackLoss = "ce",
        mode: Mode = "eval",
    ) -> None:
        super().__init__(num_steps, step_size, loss, num_restarts=num_particles, track="last", mode=mode)
        if not repulsion >= 0:
            raise ValueError(f"`repulsion` must be at least 0, got {repulsion}.")
        self.repulsion = repulsion

    @override
    def direction(self, points: Tensor, gradient: Tensor) -> Tensor:
        return svgd_direction(points, gradient, self.repulsion)


def _like(flags: Tensor, points: Tensor) -> Tensor:
    """Flags ``(N, B)`` that broadcast against ``(N, B, ...)``."""
    return flags.reshape(*flags.shape, *[1] * (points.ndim - 2))


def _of_each_sample(points: Tensor, which: Tensor) -> Tensor:
    """``points[which[b], b]`` of ``(N, B, ...)``."""
    if len(points) == 1:
        return points[0]
    index = which.reshape(1, -1, *[1] * (points.ndim - 2)).expand(1, *points.shape[1:])
    return points.gather(0, index)[0]
