"""Counter-based randomness: a draw depends on what it is for, never on how many draws came before it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_STATE = slice(24, 24 + 8 * 624)  # the words of the Mersenne Twister in torch's state of a generator on the CPU
_SHARED = -1  # device id of a draw that all devices and the server make alike


def root_seed(seed: int | None) -> int:
    """``seed``, or by default that of ``seed_everything``, else 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed


def stream(
    seed: int, *, purpose: str, round: int = 0, device_id: int = _SHARED, on: torch.device | str = "cpu"
) -> torch.Generator:
    """The random stream of one (seed, purpose, round, device).

    Nothing has to be saved to resume it, it does not move when another part is added, and it does not depend on how
    the devices are spread over processes. Streams on the CPU and on an accelerator differ for the same arguments.

    Args:
        seed: Root seed of the run.
        purpose: What the numbers are for, for example ``"uplink/noise"``.
        round: Round (step) index; leave it at 0 for what is drawn once a run.
        device_id: The simulated device that draws; by default a stream that all devices and the server share.
        on: Torch device on which the numbers will be drawn.

    Returns:
        A fresh generator.

    Example:
        >>> a = torch.rand(2, generator=stream(1, purpose="noise", round=3, device_id=7))
        >>> b = torch.rand(2, generator=stream(1, purpose="noise", round=3, device_id=7))
        >>> bool((a == b).all())
        True
    """
    return torch.Generator(device=on).manual_seed(_hash(seed, purpose, device_id, round))


def secret_stream(seed: int, *, purpose: str, round: int = 0) -> np.random.Generator:
    """The random stream of one (seed, purpose, round) where nobody may guess it: its key has 128 bits.

    On the CPU, torch's generator has 32: whole streams repeat after some ten thousand, and all of them can be tried.

    Args:
        seed: Root seed of the run, with as many bits as the numbers are to have; 128 are used.
        purpose: What the numbers are for, for example ``"privacy/gradient"``.
        round: Round (step) index.

    Returns:
        A fresh generator.

    Example:
        >>> a = secret_stream(1, purpose="noise", round=3).standard_normal(2)
        >>> b = secret_stream(1, purpose="noise", round=3).standard_normal(2)
        >>> bool((a == b).all())
        True
    """
    return np.random.Generator(np.random.Philox(key=_digest(seed, purpose, _SHARED, round, num_bytes=16)))


def secret_generator(seed: int, *, purpose: str, round: int = 0, on: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator of one (seed, purpose, round) that nobody may guess; see :func:`secret_stream`.

    On the CPU all words of its state come from 128 bits, on an accelerator its seed has 64.

    Args:
        seed: As in :func:`secret_stream`.
        purpose: As there.
        round: As there.
        on: Torch device on which the numbers will be drawn.

    Returns:
        A fresh generator.

    Raises:
        RuntimeError: If this version of torch keeps the generator's state in another way.

    Example:
        >>> torch.rand(2, generator=secret_generator(2**100, purpose="noise")).shape
        torch.Size([2])
    """
    if torch.device(on).type != "cpu":
        return torch.Generator(on).manual_seed(_digest(seed, purpose, _SHARED, round, num_bytes=8))
    _check_state()
    sequence = np.random.SeedSequence(_digest(seed, purpose, _SHARED, round, num_bytes=16))
    generator = torch.Generator().manual_seed(0)  # before its first number
    state = generator.get_state()
    state.numpy()[_STATE].view(np.uint64)[:] = np.random.MT19937(sequence).state["state"]["key"]
    generator.set_state(state)
    return generator


@lru_cache(1)
def _check_state() -> None:
    """The words of a Mersenne Twister lie where they are looked for: those of a seed that NumPy expands alike."""
    words = torch.Generator().manual_seed(5).get_state().numpy()[_STATE].view(np.uint64)
    if not np.array_equal(words, np.random.RandomState(5).get_state(legacy=False)["state"]["key"]):
        raise RuntimeError(f"torch {torch.__version__} keeps its generator's state in another way than was expected.")


def _hash(seed: int, purpose: str, device_id: int, round: int) -> int:
    return _digest(seed, purpose, device_id, round, num_bytes=8) >> 1


def _digest(seed: int, purpose: str, device_id: int, round: int, num_bytes: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{purpose}/{device_id}/{round}".encode(), digest_size=num_bytes).digest()
    return int.from_bytes(digest, "big")


@dataclass(frozen=True, kw_only=True)
class Key:
    """Names the random draws of one round for the rows of a matrix, one device a row.

    Args:
        seed: Root seed of the run.
        round: Round (step) index, from 0.
        devices: Device id of each row. Rows drawn together equal rows drawn one by one.
        name: Which segment of the vector the draws are for, for example a parameter's name.

    Example:
        >>> key = Key(seed=0, round=4, devices=(3, 8))
        >>> both = key.rows("dither", lambda g: torch.rand(5, generator=g))
        >>> alone = key.row(1).rows("dither", lambda g: torch.rand(5, generator=g))
        >>> both.shape, bool((both[1:] == alone).all())
        (torch.Size([2, 5]), True)
    """

    seed: int
    round: int = 0
    devices: tuple[int, ...] = (0,)
    name: str = ""

    def __len__(self) -> int:
        return len(self.devices)

    def row(self, index: int) -> Key:
        """The key of one row alone."""
        return Key(seed=self.seed, round=self.round, devices=(self.devices[index],), name=self.name)

    def seed_of(self, purpose: str, row: int | None = None) -> int:
        """The seed behind a stream, for code that takes no generator; of one row's device, or the shared one."""
        return _hash(self.seed, self._named(purpose), _SHARED if row is None else self.devices[row], self.round)

    def shared(self, purpose: str, *, on: torch.device | str = "cpu") -> torch.Generator:
        """The stream of this round that every device and the server draw alike."""
        return stream(self.seed, purpose=self._named(purpose), round=self.round, on=on)

    def rows(
        self, purpose: str, draw: Callable[[torch.Generator], Tensor], *, on: torch.device | str = "cpu"
    ) -> Tensor:
        """Stack ``draw(generator)`` over the devices, each with its own stream: shape ``(rows, ...)``."""
        named = self._named(purpose)
        drawn = [draw(stream(self.seed, purpose=named, round=self.round, device_id=m, on=on)) for m in self.devices]
        return torch.stack(drawn) if len(drawn) != 1 else drawn[0].unsqueeze(0)

    def _named(self, purpose: str) -> str:
        return f"{purpose}/{self.name}" if self.name else purpose
