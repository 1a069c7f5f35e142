"""Guards that fail a test which leaves something behind, and fixtures that clean up after themselves."""

from __future__ import annotations

import multiprocessing
import os
import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import settings
from lightning.pytorch import seed_everything
from torch import nn

from helpers.adversarial import trained

# written on import or first use by libraries, and harmless
_ALLOWED_ENV = {
    "CUBLAS_WORKSPACE_CONFIG",
    "KMP_DUPLICATE_LIB_OK",
    "KMP_INIT_AT_FORK",
    "TORCHINDUCTOR_CACHE_DIR",
    "COLUMNS",
}

settings.register_profile("repeatable", derandomize=True, deadline=None)  # the same examples in every run
settings.load_profile("repeatable")
torch.set_num_threads(1)  # small tensors: a second thread costs more than it gives


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fail a test that leaks environment variables, processes, a process group, or a reseeded random stream.

    Drawing from torch's global stream is no leak (building a module does); reseeding it is, since it makes the tests
    that follow repeat themselves. Use the ``seeded`` fixture to seed.
    """
    environment, seed = dict(os.environ), torch.initial_seed()
    python_state, numpy_state = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002  # the legacy stream is what may leak
    children = {child.pid for child in multiprocessing.active_children()}
    yield
    leaks = []
    changed = {
        name
        for name in environment.keys() | os.environ.keys()
        if name not in _ALLOWED_ENV and not name.startswith("PYTEST_") and environment.get(name) != os.environ.get(name)
    }
    if changed:
        leaks.append(f"environment variables {sorted(changed)}")
        for name in changed:
            os.environ.pop(name, None)
            if name in environment:
                os.environ[name] = environment[name]
    left = [child for child in multiprocessing.active_children() if child.pid not in children]
    if left:
        leaks.append(f"processes {left}")
        for child in left:
            child.kill()
    if dist.is_available() and dist.is_initialized():
        leaks.append("a torch.distributed process group")
        dist.destroy_process_group()
    if torch.initial_seed() != seed:
        leaks.append("torch's global seed")
        torch.seed()
    if random.getstate() != python_state:
        leaks.append("the state of `random`")
    if not np.array_equal(np.random.get_state()[1], numpy_state):  # noqa: NPY002
        leaks.append("the state of `numpy.random`")
    assert not leaks, f"the test leaks {'; '.join(leaks)}"


@pytest.fixture
def seeded() -> Iterator[Callable[[int], None]]:
    """``seeded(1)`` is ``seed_everything(1)``, undone after the test."""
    environment = {name: os.environ.get(name) for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")}
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    yield lambda seed: seed_everything(seed, verbose=False)
    for name, value in environment.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    random.setstate(python_state)
    np.random.set_state(numpy_state)  # noqa: NPY002
    torch.set_rng_state(torch_state)


@pytest.fixture
def seed_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after ``seed_everything(0)``, which ``DPSGD(reproducible=True)`` asks for, but without seeding anything."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


@pytest.fixture(scope="session")
def robust_net() -> nn.Module:
    """Adversarially trained on the digits; do not change it."""
    return trained(robust=True, epochs=8)


@pytest.fixture(scope="session")
def plain_net() -> nn.Module:
    """Trained on the digits with cross entropy alone; do not change it."""
    return trained(robust=False, epochs=5)
