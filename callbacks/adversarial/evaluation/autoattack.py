"""AutoAttack, through the package of its authors."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from groundwire.callbacks.adversarial.attacks.base import LogitsOf, untouched
from groundwire.callbacks.adversarial.threat import ThreatModel
from groundwire.callbacks.logits import logits_in

_TARGETS = 9  # other classes that the targeted attacks of the standard version try
_NORMS = {"linf": "Linf", "l2": "L2"}


def autoattack(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    threat: ThreatModel,
    *,
    logits_of: LogitsOf | None = None,
    batch_size: int = 250,
    seed: int = 0,
    on_batch: Callable[[str, int], None] | None = None,
) -> dict[str, Tensor]:
    """Run AutoAttack's standard version: APGD on cross entropy, targeted APGD and FAB, and Square, each on what survived.

    With fewer than ten classes the targeted attacks try all others; with fewer than four, APGD on cross entropy, FAB and
    Square remain. Square needs images ``(B, C, H, W)`` and is left out elsewhere.

    Args:
        model: The network.
        x: Its inputs ``(B, ...)``.
        target: Labels ``(B,)``.
        threat: What the attacker may do.
        logits_of: From inputs to logits; by default ``model`` itself.
        batch_size: Inputs attacked together.
        seed: Of the attacks' randomness.
        on_batch: Called with the attack's name and the number of inputs after each batch.

    Returns:
        For each attack in its order, and first for ``"clean"``, which inputs are still classified right: ``(B,)`` bool.

    Raises:
        MisconfigurationException: If pyautoattack is not installed.

    Example:
        >>> found = autoattack(model, x, y, ThreatModel(eps=8 / 255))  # doctest: +SKIP
        >>> found["square"].float().mean()  # the robust accuracy  # doctest: +SKIP

    Reference:
        Croce, Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks",
        ICML 2020. arXiv:2003.01690
    """
    package = autoattack_package()
    threat.check(x)
    with untouched(model, "eval", x.device), _as_it_was():
        x, target = x.clone(), target.clone()
        pixels = threat.pixels(x)
        wide = threat.hi - threat.lo
        unit = ((pixels - threat.lo) / wide).float()  # FAB knows no other precision
        is_image = unit.ndim == 4
        shape = unit.shape[1:]
        unit = unit if is_image else unit.reshape(len(unit), 1, 1, -1)
        network = _UnitBox(
            lambda u: _logits(
                logits_of or model, threat.network_input(u.reshape(-1, *shape) * wide + threat.lo, x.dtype)
            )
        )
        with torch.no_grad():
            logits = torch.cat([network(part) for part in in_parts(unit, batch_size)])
        alive = logits.argmax(dim=1) == target
        survivors = {"clean": alive.clone()}
        for name in _attacks(logits.shape[1], is_image):
            for index in in_parts(alive.nonzero()[:, 0], batch_size):
                attack = package.AutoAttack(
                    network,
                    norm=_NORMS[threat.norm],
                    eps=threat.eps / wide,
                    seed=seed,
                    device=x.device,
                    version="standard",
                )
                attack.attacks_to_run = [name]
                attack.apgd_targeted.n_target_classes = min(_TARGETS, logits.shape[1] - 1)
                attack.fab.n_target_classes = min(_TARGETS, logits.shape[1] - 1)
                found, _ = attack.run_standard_evaluation(unit[index], target[index], batch_size=batch_size)
                with torch.no_grad():
                    alive[index] = network(found).argmax(dim=1) == target[index]
                if on_batch is not None:
                    on_batch(name, len(index))
            survivors[name] = alive.clone()
    return survivors


def in_parts(x: Tensor, size: int) -> list[Tensor]:
    """``x`` cut along its first dimension into parts of at most ``size``."""
    return [x[first : first + size] for first in range(0, len(x), size)]


def autoattack_package() -> ModuleType:
    """The package pyautoattack.

    Returns:
        The module.

    Raises:
        MisconfigurationException: If it is not installed.
    """
    try:
        import pyautoattack
    except ImportError as error:
        raise MisconfigurationException(
            "AutoAttack needs the package pyautoattack: `pip install pyautoattack` (or groundwire[attacks]), or leave it "
            "out with autoattack=0."
        ) from error
    found: ModuleType = pyautoattack
    return found


def _attacks(num_classes: int, is_image: bool) -> list[str]:
    white_box = ["apgd-ce", "apgd-t", "fab-t"] if num_classes >= 4 else ["apgd-ce", "fab"]
    return [*white_box, "square"] if is_image else white_box


def _logits(logits_of: LogitsOf, x: Tensor) -> Tensor:
    logits = logits_in(logits_of(x))
    assert logits is not None
    return logits.float()


class _UnitBox(nn.Module):
    """The network as a module on pixels in [0, 1]."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@contextmanager
def _as_it_was() -> Iterator[None]:
    """The package takes the process's trace function away, which debuggers and coverage live in, and logs every batch."""
    trace, log = sys.gettrace(), logging.getLogger("auto-attack")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        sys.settrace(trace)
        log.setLevel(level)
