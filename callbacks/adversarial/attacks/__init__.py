"""Attacks on any module that gives logits."""

from groundwire.callbacks.adversarial.attacks.base import Attack
from groundwire.callbacks.adversarial.attacks.pgd import FGSM, PGD, SVGD, RandomFGSM
from groundwire.callbacks.adversarial.attacks.thundernna import ThunderNNA

__all__ = ["FGSM", "PGD", "SVGD", "Attack", "RandomFGSM", "ThunderNNA"]
