"""Networks trained once a session, with the family's own callbacks."""

from __future__ import annotations

import pytest
from torch import nn

from helpers.adversarial import trained


@pytest.fixture(scope="session")
def robust_net() -> nn.Module:
    """Adversarially trained on the digits; do not change it."""
    return trained(robust=True, epochs=8)


@pytest.fixture(scope="session")
def plain_net() -> nn.Module:
    """Trained on the digits with cross entropy alone; do not change it."""
    return trained(robust=False, epochs=5)
