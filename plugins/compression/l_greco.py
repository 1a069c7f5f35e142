"""L-GreCo: every layer gets the compression that it can bear."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from groundwire.plugins.compression.base import Compressor, Message, Payload
from groundwire.plugins.compression.error_feedback import finite_rows
from groundwire.plugins.random import Key

_OPTION = "l_greco/option"


def allocate(
    errors: Sequence[Sequence[float]], sizes: Sequence[Sequence[float]], budget: float, num_buckets: int = 10_000
) -> list[int] | None:
    """One option for each layer: the smallest total size whose total error stays within a budget.

    A knapsack solved by dynamic programming over errors rounded up to multiples of ``budget / num_buckets``. Rounding up
    could make every assignment that uses the whole budget infeasible, the uniform one included; so one further bucket a
    layer is allowed, and the total error may exceed the budget by a share of ``layers / num_buckets``.

    Args:
        errors: Of every layer's options, non-negative; ``inf`` for an option that may not be taken.
        sizes: Of the same.
        budget: Of the total error.
        num_buckets: Resolution of the errors.

    Returns:
        The index of each layer's option; None if no assignment stays within the budget.

    Raises:
        ValueError: If a layer has no option, or there are no layers.

    Reference:
        Alimohammadi, Markov, Frantar, Alistarh, "L-GreCo: Layerwise-Adaptive Gradient Compression for Efficient and
        Accurate Deep Learning", MLSys 2024. arXiv:2210.17357

    Example:
        >>> allocate(errors=[[0.0, 1.0], [0.0, 3.0]], sizes=[[10, 1], [10, 1]], budget=2.0)
        [1, 0]
    """
    if not errors or not all(len(row) for row in errors):
        raise ValueError("Every layer needs at least one option to choose from, and there must be a layer.")
    capacity = num_buckets + len(errors)
    best = np.zeros(capacity + 1)  # least size of the layers so far, for each number of buckets used at most
    choices = np.empty((len(errors), capacity + 1), dtype=np.int64)
    costs = [[_buckets(error, budget, num_buckets) for error in row] for row in errors]
    for layer, row in enumerate(costs):
        candidates = np.full((len(row), capacity + 1), math.inf)
        for option, used in enumerate(row):
            if used is not None and used <= capacity:
                candidates[option, used:] = best[: capacity + 1 - used] + sizes[layer][option]
        choices[layer] = candidates.argmin(axis=0)
        best = candidates.min(axis=0)
    if math.isinf(best[capacity]):
        return None
    left, chosen = capacity, []
    for layer in reversed(range(len(errors))):
        option = int(choices[layer, left])
        used = costs[layer][option]
        assert used is not None
        chosen.append(option)
        left -= used
    return chosen[::-1]


def _buckets(error: float, budget: float, num_buckets: int) -> int | None:
    """Buckets that an error takes, rounded up; None if it is beyond any budget."""
    if error == 0:
        return 0
    share = error / budget * num_buckets if budget > 0 else math.inf
    return None if not share <= 2 * num_buckets else math.ceil(share)


class LGreCo(Compressor):
    """L-GreCo: chooses, layer by layer and period by period, among options of one family.

    In the last ``num_observed`` rounds of every period, device 0 adds up what it compresses; then it finds the options
    that send the least while the total error on the mean, ``sum |C(x) - x|_2`` over the layers, is at most ``slack``
    times that of the reference everywhere, and tells the other devices (a byte a layer). Until then, every layer has the
    reference. Use it with ``granularity="layer"``.

    Args:
        options: Compressors to choose from, for example TopK at several densities, QSGD at several numbers of levels, or
            PowerSGD at several ranks.
        reference: Index of the option that everybody has at first, and whose error is the budget.
        period: Rounds between choices.
        num_observed: Rounds, at the end of each period, over which the update is averaged.
        slack: How many times the error of the reference is allowed.

    Raises:
        ValueError: If an argument is out of range, or PowerSGD is mixed with another family; at set-up if there are no
            layers.

    Reference:
        Alimohammadi, Markov, Frantar, Alistarh, "L-GreCo: Layerwise-Adaptive Gradient Compression for Efficient and
        Accurate Deep Learning", MLSys 2024. arXiv:2210.17357

    Example:
        >>> from groundwire.plugins.compression import TopK
        >>> compressor = LGreCo([TopK(density=0.5), TopK(density=0.25)], reference=1, period=1, num_observed=1)
        >>> compressor.setup({"a": torch.Size((2, 2)), "b": torch.Size((2, 2))})
        >>> for name, x in {"a": [[9.0, 8.0, 0.0, 0.0]], "b": [[1.0, 1.0, 1.0, 1.0]]}.items():
        ...     message = compressor.roundtrip(torch.tensor(x), Key(seed=0, name=name))
        >>> compressor.adopt(compressor.decide())
        >>> compressor.choice
        {'a': 1, 'b': 1}
    """

    def __init__(
        self,
        options: Sequence[Compressor],
        reference: int,
        period: int = 1000,
        num_observed: int = 10,
        slack: float = 1.0,
    ) -> None:
        super().__init__()
        if not 1 <= len(options) <= 256:
            raise ValueError(f"`options` must be 1 to 256 compressors, got {len(options)}.")
        if not 0 <= reference < len(options):
            raise ValueError(f"`reference` must be the index of one of {len(options)} options, got {reference}.")
        if period < 1:
            raise ValueError(f"`period` must be at least 1, got {period}.")
        if not 1 <= num_observed <= period:
            raise ValueError(f"`num_observed` must be in [1, period={period}], got {num_observed}.")
        if not slack > 0:
            raise ValueError(f"`slack` must be > 0, got {slack}.")
        self.options = nn.ModuleList(options)
        self.reference = reference
        self.period = period
        self.num_observed = num_observed
        self.slack = slack
        self.unbiased = all(option.unbiased for option in options)
        self.linear = all(option.linear for option in options)
        self.carries_nan = all(option.carries_nan for option in options)
        self.negotiates = any(option.negotiates for option in options)
        self.ragged = any(option.ragged for option in options)
        if self.negotiates and not self.linear:
            raise ValueError(
                "`options` that agree on their messages (PowerSGD) do not mix with options whose messages do not add: give "
                f"options of one family, got {', '.join(sorted({type(option).__name__ for option in options}))}."
            )
        self.choice: dict[str, int] = {}
        """The index of each layer's option."""
        self._allowed: dict[str, list[int]] = {}
        self._sums: dict[str, Tensor] = {}
        self._observed: dict[str, int] = {}

    @override
    def is_worthwhile(self, shape: torch.Size) -> bool:
        return self._option(self.reference).is_worthwhile(shape)

    @override
    def setup(self, shapes: Mapping[str, torch.Size]) -> None:
        if "" in shapes:
            raise ValueError("L-GreCo gives every layer an option of its own: set granularity='layer'.")
        for index in range(len(self.options)):
            option = self._option(index)
            option.setup({name: shape for name, shape in shapes.items() if option.is_worthwhile(shape)})
        self._allowed = {
            name: [i for i in range(len(self.options)) if self._option(i).is_worthwhile(shape)]
            for name, shape in shapes.items()
        }
        self.choice = dict.fromkeys(shapes, self.reference)
        self._forget()

    @override
    def reset_state(self) -> None:
        self.choice = dict.fromkeys(self.choice, self.reference)
        self._forget()
        for index in range(len(self.options)):
            self._option(index).reset_state()

    def _forget(self) -> None:
        self._sums, self._observed = {}, {}

    def _option(self, index: int) -> Compressor:
        option = self.options[index]
        assert isinstance(option, Compressor)
        return option

    def _of(self, key: Key) -> int:
        return self.choice.get(key.name, self.reference)

    # ---------------------------------------------------------------- sending

    @override
    def encode(self, x: Tensor, key: Key) -> Payload:
        self._observe(x, key)
        index = self._of(key)
        return _marked(self._option(index).encode(x, key), index)

    @override
    def propose(self, x: Tensor, key: Key) -> Tensor | None:
        return self._option(self._of(key)).propose(x, key)

    @override
    def encode_agreed(self, x: Tensor, key: Key, agreed: Tensor) -> Payload:
        self._observe(x, key)
        index = self._of(key)
        return _marked(self._option(index).encode_agreed(x, key, agreed), index)

    @override
    def settle(self, total: Payload, key: Key, num_devices: int) -> None:
        self._option(_option_of(total)).settle(total, key, num_devices)

    @override
    def decode(self, payload: Payload) -> Tensor:
        return self._option(_option_of(payload)).decode(payload)

    @override
    def decode_sum(self, payload: Payload) -> Tensor:
        return self._option(_option_of(payload)).decode_sum(payload)

    @override
    def roundtrip(self, x: Tensor, key: Key) -> Message:
        self._observe(x, key)
        return self._option(self._of(key)).roundtrip(x, key)

    # ---------------------------------------------------------------- choosing

    def _observe(self, x: Tensor, key: Key) -> None:
        if key.round % self.period < self.period - self.num_observed or 0 not in key.devices:
            return
        row = x[key.devices.index(0)].detach().to(torch.promote_types(x.dtype, torch.float32))
        if not bool(finite_rows(row.unsqueeze(0))):
            return
        old = self._sums.get(key.name)
        self._sums[key.name] = row.clone() if old is None else old.to(row.device).add_(row)
        self._observed[key.name] = self._observed.get(key.name, 0) + 1

    @override
    def decides(self, round: int) -> bool:
        return round > 0 and round % self.period == 0

    @override
    def decide(self) -> Tensor:
        names = [name for name in self.choice if name in self._sums]
        found = dict(self.choice)
        if names:
            found |= dict(zip(names, self._solve(names), strict=True))
        return torch.tensor(list(found.values()), dtype=torch.uint8)

    @override
    def adopt(self, decision: Tensor) -> None:
        self.choice = dict(zip(self.choice, decision.tolist(), strict=True))
        self._forget()

    def _solve(self, names: Sequence[str]) -> list[int]:
        errors, sizes = [], []
        for name in names:
            x = (self._sums[name] / self._observed[name]).unsqueeze(0)
            prices = {i: self._option(i).price(x, Key(seed=0, name=name)) for i in self._allowed[name]}
            broken = [i for i, (error, _) in prices.items() if not math.isfinite(error)]
            if broken:
                rank_zero_warn(f"L-GreCo leaves out options {broken} of {name!r}: their error is not finite.")
            infinite = (math.inf, 0)
            row = [prices.get(i, infinite) for i in range(len(self.options))]
            errors.append([error if math.isfinite(error) else math.inf for error, _ in row])
            sizes.append([bits for _, bits in row])
        budget = self.slack * sum(row[self.reference] for row in errors)
        chosen = allocate(errors, sizes, budget) if math.isfinite(budget) else None
        uniform = [self.reference] * len(names)
        if chosen is None or _total(sizes, chosen) >= _total(sizes, uniform) * (1 if self.slack >= 1 else math.inf):
            return uniform
        return chosen

    # ---------------------------------------------------------------- state

    @override
    def get_extra_state(self) -> dict[str, Any]:
        return {"choice": dict(self.choice), "sums": dict(self._sums), "observed": dict(self._observed)}

    @override
    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.choice = dict(state["choice"])
        self._sums = {name: total.clone() for name, total in state["sums"].items()}
        self._observed = dict(state["observed"])

    @override
    def extra_repr(self) -> str:
        return f"reference={self.reference}, period={self.period}, num_observed={self.num_observed}, slack={self.slack}"


def _total(sizes: Sequence[Sequence[float]], chosen: Sequence[int]) -> float:
    return sum(row[option] for row, option in zip(sizes, chosen, strict=True))


def _marked(payload: Payload, index: int) -> Payload:
    return replace(payload, meta=payload.meta | {_OPTION: index})


def _option_of(payload: Payload) -> int:
    index = payload.meta[_OPTION]
    assert isinstance(index, int)
    return index
