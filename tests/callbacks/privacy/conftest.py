"""A run's seed, which ``DPSGD(reproducible=True)`` asks for."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def seed_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after ``seed_everything(0)``, but without seeding anything."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
