"""What all attacks share: they look at a module and leave no trace in it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from groundwire.callbacks.adversarial.threat import ThreatModel
from groundwire.callbacks.checks import as_target, transform_is_active
from groundwire.callbacks.logits import logits_in
from groundwire.callbacks.step import unseen_by_taps
from groundwire.plugins.random import stream

Mode = Literal["eval", "train"]
LogitsOf = Callable[[Tensor], Any]
"""From network inputs ``(B, ...)`` to logits ``(B, C)``, or to a mapping or object that holds them as ``logits``."""

_ZERO_SHARE = 0.01  # of samples without a gradient, from which on it is said


class Attack(ABC):
    """Finds adversarial inputs: near the given ones, and such that a network does badly on them.

    Call it with any module that maps inputs to logits. It runs in float32, in evaluation mode (or ``mode="train"``), and
    leaves no trace: gradients and ``requires_grad`` of the parameters, buffers (BatchNorm statistics), training flags of
    every submodule and the global random streams are afterwards what they were. It works under
    ``torch.inference_mode`` and inside of ``torch.func.vmap``.

    Subclasses write :meth:`perturb`.

    Args:
        mode: Whether the network is in evaluation or training mode while its gradients are taken.

    Example:
        >>> from groundwire.callbacks.adversarial import FGSM
        >>> model, attack = torch.nn.Linear(4, 3), FGSM()
        >>> x_adv = attack(model, torch.rand(8, 4), torch.zeros(8, dtype=torch.int64), ThreatModel(eps=0.1))
    """

    def __init__(self, mode: Mode = "eval") -> None:
        if mode not in ("eval", "train"):
            raise ValueError(f"`mode` must be 'eval' or 'train', got {mode!r}.")
        self.mode: Mode = mode
        self._has_looked = False
        self._calls = 0

    @abstractmethod
    def perturb(
        self, logits_of: LogitsOf, x: Tensor, target: Tensor, threat: ThreatModel, generator: torch.Generator | None
    ) -> Tensor:
        """The search itself, in pixels.

        Args:
            logits_of: From pixels to logits.
            x: Pixels ``(B, ...)``, in the box.
            target: Labels ``(B,)``.
            threat: Where to look.
            generator: Source of randomness, on the device of ``x``.

        Returns:
            Pixels in the ball, shape ``(B, ...)`` or, of several particles, ``(N, B, ...)``.
        """

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        target: Tensor,
        threat: ThreatModel,
        *,
        logits_of: LogitsOf | None = None,
        generator: torch.Generator | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """Adversarial inputs for a network.

        Args:
            model: The network.
            x: Its inputs ``(B, ...)``, normalised if it wants them so; not changed.
            target: Labels ``(B,)``.
            threat: What the attacker may do; its ``mean`` and ``std`` are those of ``x``.
            logits_of: From inputs to logits; by default ``model`` itself.
            generator: Source of randomness, on the device of ``x``; by default one that depends on torch's initial seed and
                on how often this attack was called.
            start: Network inputs ``(B, ...)`` from which to search instead of the attack's own start, where it allows.

        Returns:
            Inputs like ``x``, without a graph.

        Raises:
            TypeError: If inputs are not floating-point numbers.
            ValueError: If inputs are outside the box, or the network does not give logits ``(B, C)``.
            RuntimeError: If a gradient is not finite.
        """
        found = self._attack(model, x, target, threat, logits_of, generator, start, self.perturb)
        return threat.network_input(found, x.dtype).detach()

    def _attack(
        self,
        model: nn.Module,
        x: Tensor,
        target: Tensor,
        threat: ThreatModel,
        logits_of: LogitsOf | None,
        generator: torch.Generator | None,
        start: Tensor | None,
        search: Callable[..., Tensor],
    ) -> Tensor:
        """Run a search in pixels on a network that is put back afterwards."""
        threat.check_dtype(x)
        if generator is None:
            generator = stream(torch.initial_seed(), purpose="attack", round=self._calls, on=x.device)
            self._calls += 1
        with untouched(model, self.mode, x.device, seed=generator.initial_seed() // 2):
            if not transform_is_active():
                threat.check(x)
                # inference tensors cannot have a gradient
                x, target = x.detach().clone(), as_target(target, len(x)).clone()
            pixels = threat.pixels(x)
            # a copy, for networks that begin with an operation in place
            victim = lambda raw: self._logits(logits_of or model, threat.network_input(raw, x.dtype).clone())
            options = {} if start is None else {"start": threat.pixels(start.clone())}
            found = search(victim, pixels, target, threat, generator, **options)
        if not transform_is_active():
            self._has_looked = True
        return found

    def _logits(self, logits_of: LogitsOf, x: Tensor) -> Tensor:
        output = logits_of(x)
        logits = logits_in(output)
        if logits is None or logits.ndim != 2 or len(logits) != len(x):
            given = f"shape {tuple(logits.shape)}" if logits is not None else f"a {type(output).__name__}"
            raise ValueError(
                f"an attack needs logits [{len(x)}, classes] for a batch of {len(x)} inputs, but the module gives {given}. "
                "Say where the logits are: logits_of= of an attack, source=LogitsSource('model.head') of a callback."
            )
        if logits.dtype not in (torch.float32, torch.float64):
            logits = logits.float()
        if not self._has_looked and not transform_is_active():
            self._warn_of_probabilities(logits.detach())
        return logits

    def _warn_of_probabilities(self, logits: Tensor) -> None:
        if len(logits) and bool((logits >= 0).all()) and bool((logits.sum(dim=-1) - 1).abs().max() < 1e-3):
            rank_zero_warn(
                "The module gives rows that are not negative and sum to 1: probabilities. Attacks need logits, and are far "
                "too weak on probabilities: return what comes before the softmax, or LogitsSource(from_probs=True)."
            )
            self._has_looked = True

    def _look_at(self, gradient: Tensor, done: Tensor | None = None) -> None:
        """Refuse gradients that are not finite; say once that many are zero.

        Args:
            gradient: Shape ``(N, B, ...)``.
            done: Where the attack has succeeded, ``(N, B)``, and losses may be flat (DLR where the label ranks third).
        """
        if transform_is_active():
            return
        if not bool(torch.isfinite(gradient.sum())) and not bool(torch.isfinite(gradient).all()):
            bad = int((~torch.isfinite(gradient.flatten(2)).all(dim=-1)).any(dim=0).sum())
            raise RuntimeError(
                f"non-finite input gradient in {bad}/{gradient.shape[1]} samples (module in fp16? loss inf? The network may "
                "have diverged: lower the learning rate)."
            )
        if self._has_looked:
            return
        is_zero = (gradient.flatten(2) == 0).all(dim=-1)
        if done is not None:
            is_zero = is_zero[~done]
        zero = float(is_zero.float().mean()) if len(is_zero) else 0.0
        if zero > _ZERO_SHARE:
            rank_zero_warn(
                f"{100 * zero:.0f} % of the samples have a zero input gradient: possible gradient masking (saturated "
                "outputs, quantised inputs), so the attack is too weak. Try loss='margin'."
            )
            self._has_looked = True


@contextmanager
def untouched(model: nn.Module, mode: Mode, device: torch.device, seed: int = 0) -> Iterator[None]:
    """Run a module in evaluation or training mode for one's own purposes, and leave it as it was.

    Args:
        model: The module.
        mode: In which it is put, with all its submodules; one that is in training keeps its submodules' modes there.
        device: On which it runs.
        seed: Of torch's global streams meanwhile, so that dropout draws other masks than the step will.

    Yields:
        Nothing. Meanwhile autocast is off, inference mode is left, and parameters ask for no gradients.
    """
    flags = [(sub, sub.training) for sub in model.modules()]
    frozen: list[nn.Parameter] = []
    with ExitStack() as stack:
        stack.enter_context(unseen_by_taps())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(seed)
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(_buffers_kept(model))
        try:
            if not (mode == "train" and model.training):  # in training, what the user keeps in evaluation mode stays so
                for sub, _ in flags:
                    sub.training = mode == "train"
            if not transform_is_active():
                frozen = [p for p in model.parameters() if p.requires_grad and p.is_leaf]
                for parameter in frozen:
                    parameter.requires_grad_(False)
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
            for sub, training in flags:
                sub.training = training


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Let copies of the buffers be written to; writing back to the originals would break graphs that hold them."""
    kept = [
        (sub, name, buffer) for sub in model.modules() for name, buffer in sub._buffers.items() if buffer is not None
    ]
    try:
        for sub, name, buffer in kept:
            sub._buffers[name] = buffer.clone()
        yield
    finally:
        for sub, name, buffer in kept:
            sub._buffers[name] = buffer
