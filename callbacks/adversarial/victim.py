"""A LightningModule as an attack sees it: from what the network is given to logits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from groundwire.callbacks.logits import LogitsSource, logits_in
from groundwire.callbacks.step import taps_look_away


class Victim:
    """Finds out in a step where the network begins, and runs it on other inputs.

    It begins at the module's own ``forward``, if the step calls it; else at the outermost of the submodule that ``source``
    names and those around it that the step calls. What a step does before (normalising, augmenting) comes before an attack.

    Args:
        source: Where logits are found.
    """

    def __init__(self, source: LogitsSource) -> None:
        self.source = source
        parts = source.submodule.split(".") if source.submodule else []
        self._places = ["", *(".".join(parts[: n + 1]) for n in range(len(parts)))]  # from outside to inside
        self._begins_at: str | None = None
        self._call = _Call(None, None, (), {})

    def check(self, pl_module: pl.LightningModule) -> None:
        """Refuse a module in which there is nothing to attack.

        Args:
            pl_module: The module.

        Raises:
            MisconfigurationException: If it has no such submodule, or neither a ``forward`` nor a submodule is named.
        """
        known = dict(pl_module.named_modules())
        if self.source.submodule not in known:
            raise MisconfigurationException(
                f"{type(pl_module).__name__} has no submodule {self.source.submodule!r}; it has "
                f"{', '.join(name for name in known if name)}."
            )
        if not self.source.submodule and not is_overridden("forward", pl_module):
            raise MisconfigurationException(
                f"{type(pl_module).__name__} has no `forward`, so it is not clear what gives the logits of an input: name the "
                "submodule that does, LogitsSource('net')."
            )

    @contextmanager
    def watch(
        self, pl_module: pl.LightningModule, batch_inputs: Any, replace: Callable[[Any], Any] | None = None
    ) -> Iterator[list[Any]]:
        """See what the network is given while a step runs, and give it something else if wanted.

        Args:
            pl_module: The module; hooks are removed afterwards.
            batch_inputs: Inputs of the batch: what a submodule is given must have their shape.
            replace: From what the network was to see to what it sees instead.

        Yields:
            A list that grows by the network's input (before ``replace``) with every call.

        Raises:
            MisconfigurationException: If a submodule is given something else than inputs: features, say.
        """
        seen: list[Any] = []
        inside: list[str] = []  # of the watched, those that run

        def enter(place: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
            if taps_look_away():
                return None
            inside.append(place)
            if len(inside) > 1:
                return None
            self._begins_at = place
            call = _Call.of(args, kwargs)
            self._call = dataclasses.replace(call, given=None)  # outlives the step, and must not keep its graph
            if place:
                _refuse_features(place, call.given, batch_inputs)
            seen.append(call.given)
            return None if replace is None else call.on(replace(call.given))

        def leave(*_: Any) -> None:
            if not taps_look_away() and inside:
                inside.pop()

        handles = []
        for place in self._places:
            module = pl_module.get_submodule(place)
            before = functools.partial(lambda place, _, args, kwargs: enter(place, args, kwargs), place)
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, always_call=True))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def chosen(self, seen: list[Any]) -> Any:
        """Of several calls of a step, the input of the one that ``source`` looks at."""
        call = self.source.call
        return seen[min(call, len(seen) - 1) if isinstance(call, int) else 0 if call == "first" else -1]

    def logits(self, pl_module: pl.LightningModule, inputs: Tensor) -> Tensor:
        """The network's logits at given inputs.

        Args:
            pl_module: The module.
            inputs: What the network sees, ``(n, ...)``.

        Returns:
            Shape ``(n, C)``.

        Raises:
            MisconfigurationException: If the output holds no logits, or the named submodule was not called.
        """
        place = self._begins_at
        if place is None:
            place = "" if is_overridden("forward", pl_module) else self.source.submodule
        network = pl_module.get_submodule(place)
        if place == self.source.submodule:
            output = self._call.run(network, inputs)
        else:
            output = self._output_within(network, pl_module.get_submodule(self.source.submodule), inputs)
        logits = logits_in(output)
        if logits is None:
            raise MisconfigurationException(
                f"The output of {self.source.submodule or 'forward'!r} is a {type(output).__name__} without `logits`. Name "
                "the submodule that gives the logits, e.g. LogitsSource('model.head')."
            )
        return self.source.as_logits(logits)

    def _output_within(self, network: nn.Module, submodule: nn.Module, inputs: Tensor) -> Any:
        """What a submodule puts out while the network around it runs."""
        outputs: list[Any] = []
        handle = submodule.register_forward_hook(lambda _, __, found: outputs.append(found))
        try:
            self._call.run(network, inputs)
        finally:
            handle.remove()
        if not outputs:
            raise MisconfigurationException(
                f"{self.source.submodule!r} is not called by the forward of {type(network).__name__}, so an attack cannot "
                "reach it."
            )
        return outputs[-1]


def _refuse_features(place: str, given: Any, batch_inputs: Any) -> None:
    tensors = isinstance(given, Tensor) and isinstance(batch_inputs, Tensor)
    if tensors and given.shape != batch_inputs.shape:
        raise MisconfigurationException(
            f"{place!r} is given {tuple(given.shape)} and the batch holds {tuple(batch_inputs.shape)}: features, not inputs? "
            "An attack has to begin where the inputs enter: call the whole network through `self(x)`, or name the submodule "
            "that takes the inputs and gives the logits."
        )


@dataclass(frozen=True)
class _Call:
    """How a step calls its network: what is given first, and everything else."""

    given: Any
    keyword: str | None
    rest: tuple[Any, ...]
    options: dict[str, Any]

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: dict[str, Any]) -> _Call:
        if args:
            call = cls(args[0], None, tuple(args[1:]), kwargs)
        else:
            keyword = next(iter(kwargs), None)
            call = cls(kwargs.get(keyword or ""), keyword, (), {k: v for k, v in kwargs.items() if k != keyword})
        others = [*call.rest, *call.options.values()]
        if any(isinstance(other, Tensor) for other in others):
            raise MisconfigurationException(
                "The network takes a second tensor beside its inputs; an attack moves the inputs alone, of any number, and "
                "cannot know what to give it then. Let the network find it by itself."
            )
        return call

    def on(self, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments with other inputs."""
        if self.keyword is not None:
            return (), {self.keyword: inputs} | self.options
        return (inputs, *self.rest), self.options

    def run(self, network: nn.Module, inputs: Any) -> Any:
        """The network's output for other inputs."""
        args, kwargs = self.on(inputs)
        return network(*args, **kwargs)
