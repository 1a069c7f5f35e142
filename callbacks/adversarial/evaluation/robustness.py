"""The evaluation of robustness: many attacks, one answer."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from groundwire.callbacks.adversarial.attacks import FGSM, PGD, Attack
from groundwire.callbacks.adversarial.attacks.base import LogitsOf, untouched
from groundwire.callbacks.adversarial.evaluation.autoattack import autoattack as run_autoattack
from groundwire.callbacks.adversarial.evaluation.autoattack import autoattack_package, in_parts
from groundwire.callbacks.adversarial.evaluation.checks import WEAKENED, huge_radius
from groundwire.callbacks.adversarial.evaluation.result import AUTOATTACK, Examples, RobustnessResult
from groundwire.callbacks.adversarial.functional import cross_entropy, input_gradient
from groundwire.callbacks.adversarial.threat import ThreatModel
from groundwire.callbacks.checks import as_target
from groundwire.callbacks.logits import logits_in
from groundwire.plugins.random import stream

SWEEP = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Radii of the sweep, in units of eps."""

Progress = Callable[[str, float], None]
"""Told what runs, and which share of the whole is done."""

_SHOWN = 8
_OUTSIDE = 1e-3  # of the box's width, by which rounding may leave the ball


def standard_attacks() -> dict[str, Attack]:
    """FGSM, PGD-20 and PGD-50 with five restarts, the latter two with cross entropy and with the margin."""
    return {
        "fgsm": FGSM(),
        "pgd20_ce": PGD(20, loss="ce", early_stop=True),
        "pgd20_margin": PGD(20, loss="margin", early_stop=True),
        "pgd50x5_ce": PGD(50, loss="ce", num_restarts=5, early_stop=True),
        "pgd50x5_margin": PGD(50, loss="margin", num_restarts=5, early_stop=True),
    }


def evaluate_robustness(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    threat: ThreatModel,
    *,
    attacks: Mapping[str, Attack] | None = None,
    autoattack: int = 0,
    sweep: Sequence[float] = SWEEP,
    probes: int = 500,
    surrogate: nn.Module | None = None,
    logits_of: LogitsOf | None = None,
    batch_size: int = 100,
    seed: int = 0,
    progress: Progress | None = None,
) -> RobustnessResult:
    """Attack a network in many ways and count, sample by sample, what it withstands.

    A sample that is misclassified without an attack counts as broken. The headline is the share of samples that withstand
    every attack. The module is left as it was.

    Args:
        model: The network.
        x: Its inputs ``(n, ...)``; at least 1,000 for a claim (95 % of such results are within 3 points).
        target: Labels ``(n,)``.
        threat: What the attacker may do.
        attacks: By name; by default :func:`standard_attacks`.
        autoattack: Samples, the first, on which AutoAttack runs; 0 for none. It needs the package pyautoattack.
        sweep: Radii in units of eps at which PGD-20 on the margin runs, each from what it found at the last; empty for none.
        probes: Samples, the first, on which the runs for the checks of masked gradients are made; 0 for none.
        surrogate: Another network for the same inputs: PGD-20 on it is tried on ``model`` (transfer).
        logits_of: From inputs to logits; by default ``model`` itself.
        batch_size: Inputs attacked together; a restart counts as an input of its own.
        seed: Of the attacks' randomness.
        progress: Told how far it is.

    Returns:
        The result.

    Raises:
        ValueError: If there is no sample, inputs are outside of the box, the network does not give logits ``(n, C)``, or
            an attack has a name that is taken.
        MisconfigurationException: If AutoAttack is wanted and not installed.

    Example:
        >>> x, y = torch.rand(20, 4), torch.randint(3, (20,))
        >>> result = evaluate_robustness(nn.Linear(4, 3), x, y, ThreatModel(eps=0.1), sweep=(), probes=0)
        >>> result.robust_acc <= result.accuracies()["clean"][0]
        True

    Reference:
        Carlini et al., "On Evaluating Adversarial Robustness", 2019. arXiv:1902.06705
    """
    if len(x) == 0:
        raise ValueError("Inputs and labels of at least one sample are needed, got none.")
    if any(not 0 <= factor < math.inf for factor in sweep):
        raise ValueError(f"`sweep` must hold radii of at least 0, in units of eps, got {list(sweep)}.")
    attacks = standard_attacks() if attacks is None else attacks
    if aimed := [name for name, attack in attacks.items() if getattr(attack, "targeted", False)]:
        raise ValueError(f"Attacks {aimed} are targeted: at the right labels they would break nothing.")
    if taken := sorted(_TAKEN & set(attacks)):
        raise ValueError(f"Attacks cannot be named {taken}: these names mean something else in a result.")
    if autoattack:
        autoattack_package()  # whether it is there is said before the other attacks have run
    hard = as_target(target, len(x))
    target = hard.argmax(dim=1) if hard.is_floating_point() else hard
    run = _Evaluation(model, x, target, threat, logits_of, batch_size, seed)
    stages = _stages(run, attacks, sweep, probes, surrogate)
    weights = {name: weight * samples for name, (_, weight, samples) in stages.items()}
    whole = sum(weights.values()) + (autoattack * _AUTOATTACK_GRADIENTS)
    done = 0.0
    survived, probed, swept = {"clean": run.clean.cpu()}, {}, {}
    examples = None
    for name, (stage, _, _) in stages.items():
        if progress is not None:
            progress(name, done / whole)
        found = stage().cpu()
        done += weights[name]
        kind, _, label = name.partition(" ")
        if kind == "attack":
            survived[label] = found
        elif kind == "probe":
            probed[label] = found
        else:
            swept[float(label)] = found
    if sweep:
        examples = run.examples
    parts: dict[str, Tensor] = {}
    if autoattack:

        def on_batch(name: str, samples: int) -> None:
            nonlocal done
            done += samples * _AUTOATTACK_SHARES.get(name, 0.25) * _AUTOATTACK_GRADIENTS
            if progress is not None:
                progress(f"{AUTOATTACK} {name}", min(done / whole, 1.0))

        first = x[:autoattack], target[:autoattack]
        found_by = run_autoattack(
            model, *first, threat, logits_of=logits_of, batch_size=batch_size, seed=seed, on_batch=on_batch
        )
        parts = {name: alive.cpu() for name, alive in found_by.items()}
    if progress is not None:
        progress("done", 1.0)
    return RobustnessResult(
        threat=threat,
        num_classes=run.num_classes,
        input_size=x[0].numel(),
        seed=seed,
        worst_case=run.worst_case(parts).cpu(),
        survived=survived,
        autoattack=parts,
        sweep=dict(sorted(swept.items())),
        probes=probed,
        examples=examples,
    )


_TAKEN = {"clean", "noise", "transfer", AUTOATTACK, "worst_case"}
_AUTOATTACK_GRADIENTS = 4000.0  # forward and backward passes, roughly, that AutoAttack needs for a sample
_AUTOATTACK_SHARES = {"apgd-ce": 0.05, "apgd-t": 0.25, "fab-t": 0.35, "square": 0.35}


class _Evaluation:
    """One network under several attacks."""

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        target: Tensor,
        threat: ThreatModel,
        logits_of: LogitsOf | None,
        batch_size: int,
        seed: int,
    ) -> None:
        self.model = model
        self.logits_of = logits_of or model
        self.threat = threat
        self.batch_size = batch_size
        self.seed = seed
        threat.check(x)
        self.x, self.target = x, target
        logits = self.logits(x)
        self.num_classes = logits.shape[1]
        if int(target.min()) < 0 or int(target.max()) >= self.num_classes:
            raise ValueError(
                f"labels {int(target.min())} to {int(target.max())}, but the module gives {self.num_classes} logits: count "
                "them from 0."
            )
        if not torch.equal(self.logits(x[:batch_size]), logits[:batch_size]):
            rank_zero_warn(
                "The module gives other outputs for the same inputs a second time: a random network is evaluated with one "
                "draw an attack, and looks more robust than it is. Average over draws inside of it."
            )
        self.clean = logits.argmax(dim=1) == target
        self._broken = ~self.clean  # by anything in the ball
        self.examples: Examples | None = None
        self._swept: Tensor | None = None  # what the sweep has found so far
        self._swept_alive = self.clean

    def logits(self, x: Tensor) -> Tensor:
        """Of any number of inputs, in evaluation mode."""
        with untouched(self.model, "eval", x.device), torch.no_grad():
            found = []
            for part in in_parts(x, self.batch_size):
                logits = _tensor(self.logits_of(part.clone()))
                if logits.ndim != 2 or len(logits) != len(part):
                    raise ValueError(
                        f"An evaluation needs logits [{len(part)}, classes] for {len(part)} inputs, but the module gives "
                        f"shape {tuple(logits.shape)}. Say where the logits are: logits_of=."
                    )
                found.append(logits)
        return torch.cat(found)

    def withstood(
        self,
        attack: Attack,
        name: str,
        threat: ThreatModel | None = None,
        samples: int | None = None,
        logits_of: LogitsOf | None = None,
        victim: nn.Module | None = None,
        start: Tensor | None = None,
        alive: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Which of the first samples stay right, and what the attack made of them; those that were wrong are left alone."""
        x, target = self.x[:samples], self.target[:samples]
        alive = (self.clean if alive is None else alive)[:samples].clone()
        adversarial = x.clone() if start is None else start.clone()
        ball = self.threat if threat is None else threat
        at_once = max(1, self.batch_size // getattr(attack, "num_restarts", 1))
        parts = _without_loners if attack.mode == "train" else in_parts
        for number, index in enumerate(parts(alive.nonzero()[:, 0], at_once)):
            generator = stream(self.seed, purpose=f"robustness/{name}", round=number, on=x.device)
            options = {} if start is None else {"start": start[index]}
            found = attack(
                victim or self.model,
                x[index],
                target[index],
                ball,
                logits_of=logits_of or (None if victim is not None else self.logits_of),
                generator=generator,
                **options,
            )
            self._refuse_cheating(attack, found, x[index], ball)
            adversarial[index] = found
            alive[index] = self.logits(found).argmax(dim=1) == target[index]
        if ball.eps <= self.threat.eps:
            self._broken[: len(alive)] |= ~alive
        return alive, adversarial

    def worst_case(self, autoattack: Mapping[str, Tensor]) -> Tensor:
        """What withstood everything that has run, and AutoAttack on its first samples."""
        for alive in autoattack.values():
            self._broken[: len(alive)] |= ~alive.to(self._broken.device)
        return ~self._broken

    def _refuse_cheating(self, attack: Attack, found: Tensor, x: Tensor, ball: ThreatModel) -> None:
        moved = self.threat.pixels(found, clamp=False)
        outside = (moved - ball.project(moved, ball.pixels(x))).abs().max()
        rounding = max(_OUTSIDE, 2 * torch.finfo(x.dtype).eps)
        if not float(outside) <= rounding * (ball.hi - ball.lo):
            raise ValueError(
                f"{type(attack).__name__} gives inputs that are {float(outside):.3g} outside of the ball of eps={ball.eps:g} "
                "and the box: it does not keep to the threat model."
            )

    def attack(
        self, attack: Attack, name: str, threat: ThreatModel | None = None, samples: int | None = None
    ) -> Tensor:
        return self.withstood(attack, name, threat, samples)[0]

    def transfer(self, surrogate: nn.Module) -> Tensor:
        return self.withstood(PGD(20, track="last"), "transfer", victim=surrogate)[0]

    def noise(self) -> Tensor:
        generator = stream(self.seed, purpose="robustness/noise", on=self.x.device)
        moved = self.threat.uniform(self.threat.pixels(self.x), generator)
        noisy = self.threat.network_input(moved, self.x.dtype)
        alive = self.clean & (self.logits(noisy).argmax(dim=1) == self.target)
        self._broken |= ~alive
        return alive

    def swept(self, factor: float) -> Tensor:
        """At a radius not below the last one: samples that fell stay fallen, the others go on from where they were."""
        if factor > 0:
            start = self._swept
            attack = PGD(20, loss="margin", early_stop=True)
            self._swept_alive, self._swept = self.withstood(
                attack, "sweep", self.threat.scaled(factor), start=start, alive=self._swept_alive
            )
            if factor == 1 or self.examples is None:
                self.examples = self._examples(self._swept)
        return self._swept_alive

    def weakened(self, divisor: float, samples: int) -> Tensor:
        """CE-PGD that sees the logits divided by a number."""
        divided = lambda x: _tensor(self.logits_of(x)) / divisor
        name = "pgd20_ce"  # the same starts
        return self.withstood(PGD(20, early_stop=True), name, samples=samples, logits_of=divided)[0]

    def has_gradient(self, samples: int) -> Tensor:
        found = []
        inputs, targets = (in_parts(t[:samples], self.batch_size) for t in (self.x, self.target))
        for x, target in zip(inputs, targets, strict=True):
            with untouched(self.model, "eval", x.device):
                pixels = self.threat.pixels(x.clone())

                def total(u: Tensor, x: Tensor = x, target: Tensor = target) -> tuple[Tensor, Tensor]:
                    loss = cross_entropy(_tensor(self.logits_of(self.threat.network_input(u, x.dtype))), target.clone())
                    return loss.sum(), loss.detach()

                gradient, _ = input_gradient(total, pixels)
            found.append((gradient.flatten(1) != 0).any(dim=1))
        return torch.cat(found)

    def _examples(self, adversarial: Tensor) -> Examples:
        shown = self.clean.nonzero()[:_SHOWN, 0]
        return Examples(
            clean=self.threat.pixels(self.x[shown]).cpu(),
            adversarial=self.threat.pixels(adversarial[shown]).cpu(),
            target=self.target[shown].cpu(),
            clean_label=self.logits(self.x[shown]).argmax(dim=1).cpu() if len(shown) else self.target[shown].cpu(),
            adversarial_label=self.logits(adversarial[shown]).argmax(dim=1).cpu() if len(shown) else self.target[shown],
            lo=self.threat.lo,
            hi=self.threat.hi,
        )


def _stages(
    run: _Evaluation,
    attacks: Mapping[str, Attack],
    sweep: Sequence[float],
    probes: int,
    surrogate: nn.Module | None,
) -> dict[str, tuple[Callable[[], Tensor], float, int]]:
    """By name what to run, the gradients it needs for a sample, and the samples."""
    n = len(run.x)
    stages: dict[str, tuple[Callable[[], Tensor], float, int]] = {}
    for name, attack in attacks.items():
        stages[f"attack {name}"] = (functools.partial(run.attack, attack, name), getattr(attack, "gradients", 1), n)
    stages["attack noise"] = (run.noise, 1, n)
    if surrogate is not None:
        stages["attack transfer"] = (functools.partial(run.transfer, surrogate), 20, n)
    for factor in sorted(set(sweep)):
        stages[f"sweep {float(factor * run.threat.eps)!r}"] = (functools.partial(run.swept, factor), 20, n)
    if probes:
        samples = min(probes, n)
        huge = run.threat.scaled(huge_radius(run.threat, run.x[0].numel()) / run.threat.eps)
        kinds: dict[str, tuple[Attack, ThreatModel | None]] = {
            "fgsm": (FGSM(), None),
            "pgd20_ce": (PGD(20, early_stop=True), None),
            "pgd20_margin": (PGD(20, loss="margin", early_stop=True), None),
            "pgd200_margin": (PGD(200, loss="margin", early_stop=True), None),
            "huge": (PGD(20, loss="margin", early_stop=True), huge),
        }
        for name, (attack, threat) in kinds.items():
            weight = getattr(attack, "gradients", 1)
            stages[f"probe {name}"] = (functools.partial(run.attack, attack, name, threat, samples), weight, samples)
        in_training = PGD(20, mode="train")
        stages["probe train_mode"] = (
            functools.partial(run.attack, in_training, "pgd20_ce", None, samples),
            20,
            samples,
        )
        for name in WEAKENED:
            divisor = float(name.removeprefix("logits/"))
            stages[f"probe {name}"] = (functools.partial(run.weakened, divisor, samples), 20, samples)
        stages["probe has_gradient"] = (functools.partial(run.has_gradient, samples), 1, samples)
    return stages


def _tensor(output: object) -> Tensor:
    logits = logits_in(output)
    if logits is None:
        raise ValueError(
            f"An evaluation needs logits, but the module gives a {type(output).__name__}. Say where they are: logits_of=."
        )
    return logits


def _without_loners(x: Tensor, size: int) -> list[Tensor]:
    """``x`` in parts of at least two: in training mode BatchNorm cannot normalise a single sample."""
    parts = in_parts(x, max(size, 2))
    if parts and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])] if len(parts) > 1 else [parts[0].repeat(2)]
    return parts
