"""Runs an unmodified ``training_step`` once per device, in a loop or vectorised, with equal numbers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torchmetrics import Metric

from groundwire.plugins.edge.batch import DeviceBatch
from groundwire.plugins.edge.buffers import DeviceBuffers
from groundwire.plugins.edge.local import LocalWork
from groundwire.plugins.edge.logged import LogRecorder
from groundwire.plugins.edge.round import Round
from groundwire.plugins.layout import ParameterLayout, Params

_TRACKS_STATISTICS = (nn.modules.batchnorm._NormBase,)
_SLOW_UNDER_VMAP = (nn.modules.conv._ConvNd,)


class CannotVectorizeError(RuntimeError):
    """The module's ``training_step`` cannot run for all devices at once."""


@dataclass(eq=False)
class DeviceUpdates:
    """What the devices computed in one round.

    Args:
        rows: One update a device, shape ``(M, d)``; the memory is used again in the next round.
        losses: Mean loss of each device's local steps, shape ``(M,)``.
        first_losses: That of the first of them, at the model that the device received.
        logged: Values the module logged, by name, one for each row in ``logged_rows``.
        logged_rows: For each name, the rows that logged it.
        log_options: The options the module passed to ``self.log``, by name.
        metrics: Paths, in the module, of the torchmetrics objects that it logged, by the name it gave them.
        extras: What else ``training_step`` returned, with a leading device dimension.
        buffers: What the devices left in the module's buffers; not written yet.
        unused: Parameters that no device's loss depends on, as far as is known.
    """

    rows: Tensor
    losses: Tensor
    first_losses: Tensor
    logged: dict[str, Tensor] = field(default_factory=dict)
    logged_rows: dict[str, Tensor] = field(default_factory=dict)
    log_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)
    extras: Any = None
    buffers: DeviceBuffers | None = None
    unused: frozenset[str] = frozenset()

    def select(self, rows: list[int]) -> DeviceUpdates:
        """Only some devices, by their rows; ``buffers`` aside, of which all stay."""
        position = {row: new for new, row in enumerate(rows)}
        index = torch.tensor(rows, device=self.rows.device)
        kept = replace(
            self,
            rows=self.rows[index],
            losses=self.losses[index],
            first_losses=self.first_losses[index],
            extras=self._extras_of(rows, index),
            logged={},
            logged_rows={},
        )
        for name, values in self.logged.items():
            here = [i for i, row in enumerate(self.logged_rows[name].tolist()) if row in position]
            if here:
                kept.logged[name] = values[here]
                kept.logged_rows[name] = torch.tensor([position[int(self.logged_rows[name][i])] for i in here])
        return kept

    def _extras_of(self, rows: list[int], index: Tensor) -> Any:
        by_device = self.extras.get("devices") if isinstance(self.extras, dict) else None
        if isinstance(by_device, list):  # their shapes differ
            return {"devices": [by_device[row] for row in rows]}
        return apply_to_collection(self.extras, Tensor, lambda leaf: leaf[index])


class _StepModule(nn.Module):
    """Lets ``functional_call`` reach a LightningModule's ``training_step`` instead of its ``forward``."""

    def __init__(self, pl_module: pl.LightningModule) -> None:
        super().__init__()
        self.pl_module = pl_module

    def forward(self, *args: Any) -> Any:
        return self.pl_module.training_step(*args)


def vectorization_obstacle(module: nn.Module) -> str | None:
    """Why ``training_step`` cannot run for all devices at once, as far as the modules tell; None if they do not.

    Args:
        module: The LightningModule.

    Returns:
        The reason in words, naming the submodule.
    """
    for name, sub in module.named_modules():
        if isinstance(sub, _TRACKS_STATISTICS) and sub.training and sub.track_running_stats:
            return (
                f"`{name}` is a {type(sub).__name__}, whose running statistics would be written by all devices at "
                "once (GroupNorm and LayerNorm have none)"
            )
    return None


def loop_is_faster(module: nn.Module, device: torch.device) -> bool:
    """Whether a loop over devices beats ``vmap``: convolutions become grouped ones, which are slower on a CPU.

    Args:
        module: The LightningModule.
        device: Where it runs.

    Returns:
        True on a CPU if the module has a convolution. Measured in ``benchmarks/edge.py``.
    """
    return device.type == "cpu" and any(isinstance(sub, _SLOW_UNDER_VMAP) for sub in module.modules())


class DeviceWorker:
    """Computes one update per device with the module's own ``training_step``.

    Args:
        pl_module: The user's module; it is not modified.
        layout: Layout of its trainable parameters.
        local: What each device does.
        vectorize: Run all devices at once with ``torch.func``, in a loop, or choose.
    """

    def __init__(
        self,
        pl_module: pl.LightningModule,
        layout: ParameterLayout,
        local: LocalWork,
        vectorize: Literal["auto"] | bool,
    ) -> None:
        self.layout = layout
        self.local = local
        self.vectorize = vectorize
        self.fell_back = False
        self.pl_module = pl_module
        self._step = _StepModule(pl_module)
        self._metrics = [sub for sub in pl_module.modules() if isinstance(sub, Metric)]
        self._prefers_loop: bool | None = None
        self._proven = False  # a round has run vectorised
        self._warned_of_ragged = False
        self._rows: Tensor | None = None
        device = pl_module.device
        self._streams = [torch.default_generator]
        if device.type == "cuda":
            self._streams.append(torch.cuda.default_generators[device.index or 0])

    def __call__(
        self,
        batch: DeviceBatch,
        args: Sequence[Any],
        received: Tensor | None,
        round: Round,
        *,
        at_once: bool | None = None,
    ) -> DeviceUpdates:
        """Run the round's local work.

        Args:
            batch: Data of the ``M`` devices that take part.
            args: The further arguments of ``training_step``.
            received: The model that the devices hold, ``(d,)`` or ``(M, d)``; None for the module's own parameters.
            round: The round.
            at_once: What :meth:`wants_vectorized` said, where the batch is a part of the round's.

        Returns:
            The updates and what the steps returned and logged.

        Raises:
            MisconfigurationException: If ``vectorize=True`` and the module does not allow it.
        """
        recorder = LogRecorder(self.pl_module)
        with recorder.installed(), self._own_random_stream():
            if self.wants_vectorized(batch) if at_once is None else at_once:
                try:
                    with nullcontext() if self._proven else _attributes_kept(self.pl_module):
                        updates = self._vectorized(batch, args, received, recorder, round)
                    self._proven = True
                    return updates
                except (RuntimeError, TypeError, NotImplementedError) as error:  # what torch.func refuses with
                    self._give_up_vectorizing(_cause(error), error)
                    recorder.reset()
            return self._loop(batch, args, received, recorder, round)

    def wants_vectorized(self, batch: DeviceBatch) -> bool:
        """Whether a round with this batch runs all devices at once, if the module allows it."""
        if self.vectorize is False or self.fell_back:
            return False
        obstacle = vectorization_obstacle(self.pl_module)
        if obstacle is not None:
            self._give_up_vectorizing(obstacle)
            return False
        if batch.lengths is not None and bool((batch.lengths != batch.batch_size).any()):
            return self._loops_this_round("the devices hold different numbers of samples")
        if self.vectorize is True:
            return True
        if self._prefers_loop is None:
            self._prefers_loop = loop_is_faster(self.pl_module, self.pl_module.device)
            if self._prefers_loop:
                rank_zero_info("EdgeStrategy runs the devices in a loop: faster for convolutions on a CPU.")
        return len(batch) > 1 and not self._prefers_loop

    def _loops_this_round(self, cause: str) -> bool:
        if self.vectorize is True:
            self._give_up_vectorizing(cause)
        if not self._warned_of_ragged:
            self._warned_of_ragged = True
            rank_zero_warn(f"EdgeStrategy runs the devices in a loop where it cannot run them at once: {cause}.")
        return False

    def _give_up_vectorizing(self, cause: str, error: Exception | None = None) -> None:
        if self.vectorize is True:
            raise MisconfigurationException(
                f"EdgeStrategy(vectorize=True) cannot run all devices at once: {cause}. Use vectorize='auto' or False "
                "to run them in a loop, with the same numbers."
            ) from error
        self.fell_back = True
        rank_zero_warn(f"EdgeStrategy runs the devices in a loop, because it cannot run them at once: {cause}.")

    @contextmanager
    def _own_random_stream(self) -> Iterator[None]:
        """Leave torch's global streams, which the step's own randomness (dropout) uses, as they were."""
        states = [stream.get_state() for stream in self._streams]
        try:
            yield
        finally:
            for stream, state in zip(self._streams, states, strict=True):
                stream.set_state(state)

    def _seed(self, seed: int) -> None:
        """Give the step counter-based draws (``torch.manual_seed`` visits every backend, which takes a millisecond)."""
        for stream in self._streams:
            stream.manual_seed(seed)

    # ---------------------------------------------------------------- all devices at once

    def _vectorized(
        self, batch: DeviceBatch, args: Sequence[Any], received: Tensor | None, recorder: LogRecorder, round: Round
    ) -> DeviceUpdates:
        own = self._own_parameters()
        model = own if received is None else self.layout.unflatten(received)
        structure: dict[str, Any] = {}

        def loss_of_one(params: Params, leaves: list[Tensor]) -> tuple[Tensor, tuple[dict[str, Tensor], list[Tensor]]]:
            remaining = iter(leaves)
            data = batch.map(lambda _: next(remaining))
            output = functional_call(self._step, {f"pl_module.{n}": p for n, p in params.items()}, (data, *args))
            loss, extras = _split_output(output)
            if recorder.metrics:
                raise CannotVectorizeError(f"it logs the torchmetrics object {next(iter(recorder.metrics))!r}")
            structure["extras"] = extras
            return loss, (recorder.take(), _tensors(extras))

        def gradient(params: Params, samples: slice) -> tuple[Params, Any]:
            first = self.layout.names[0]
            stacked = params[first].ndim > len(self.layout.shapes[0])
            run = vmap(
                grad_and_value(loss_of_one, has_aux=True),
                in_dims=(0 if stacked else None, 0),
                randomness="different",
            )
            leaves = [leaf[:, samples] for leaf in batch.leaves()]
            grads, (loss, (logged, extras)) = run(params, leaves)
            return grads, (loss, logged, extras)

        self._seed(round.key.seed_of("step", row=0))
        with self._metrics_refused():
            update, outputs = self.local(gradient, model, batch.batch_size)
        self._rows = self.layout.flatten(update, stacked=True, out=self._rows)
        every = torch.arange(len(batch))
        logged = _mean_over_steps([step[1] for step in outputs])
        return DeviceUpdates(
            rows=self._rows,
            losses=torch.stack([step[0] for step in outputs]).mean(dim=0),
            first_losses=outputs[0][0],
            logged=logged,
            logged_rows=dict.fromkeys(logged, every),
            log_options=recorder.options,
            extras=_rebuild(structure["extras"], outputs[-1][2]),
        )

    @contextmanager
    def _metrics_refused(self) -> Iterator[None]:
        """Stop torchmetrics objects from swallowing values of all devices at once, before they change."""

        def refuse(*_: Any, **__: Any) -> None:
            raise CannotVectorizeError("`training_step` updates a torchmetrics object, which adds up over devices")

        updates = [metric.__dict__.get("update") for metric in self._metrics]
        for metric in self._metrics:
            metric.__dict__["update"] = metric.__dict__["forward"] = refuse
        try:
            yield
        finally:
            for metric, update in zip(self._metrics, updates, strict=True):
                del metric.__dict__["forward"]
                if update is None:
                    del metric.__dict__["update"]
                else:
                    metric.__dict__["update"] = update

    # ---------------------------------------------------------------- one device after the other

    def _loop(
        self, batch: DeviceBatch, args: Sequence[Any], received: Tensor | None, recorder: LogRecorder, round: Round
    ) -> DeviceUpdates:
        own = self._own_parameters()
        buffers = DeviceBuffers(self.pl_module)
        # Hooks on parameters are for the server's gradient, not for each device's: then compute at copies of them.
        hooked = any(p._backward_hooks for p in self.pl_module.parameters())
        unused = set(self.layout.names)
        losses, first_losses, extras = [], [], []
        if self._rows is None or len(self._rows) < len(batch) or self._rows.device != self.pl_module.device:
            self._rows = torch.empty(
                (len(batch), self.layout.numel), dtype=self.layout.dtype, device=self.pl_module.device
            )
        rows = self._rows[: len(batch)]
        logged: dict[str, list[Tensor]] = {}
        logged_rows: dict[str, list[int]] = {}
        for m, device in enumerate(round.devices):
            self._seed(round.key.seed_of("step", row=m))
            held = received[m] if received is not None and received.ndim == 2 else received
            model = own if held is None else self.layout.unflatten(held)
            data = batch.row(m)

            def gradient(params: Params, samples: slice, data: Any = data, device: int = device) -> tuple[Params, Any]:
                part = data
                if samples != slice(None):
                    part = apply_to_collection(data, Tensor, lambda leaf: leaf[samples])
                if params is own and not hooked:
                    leaves: list[Tensor] = [p for p in self.pl_module.parameters() if p.requires_grad]
                    output = self.pl_module.training_step(part, *args)
                else:
                    given = {name: p.detach().requires_grad_() for name, p in params.items()}
                    leaves = list(given.values())
                    named = {f"pl_module.{name}": p for name, p in given.items()}
                    output = functional_call(self._step, named, (part, *args))
                loss, extra = _split_output(output)
                if not loss.requires_grad:
                    raise MisconfigurationException(
                        f"`training_step` returned a loss without a graph for device {device}: it must depend on the "
                        "module's trainable parameters."
                    )
                found = torch.autograd.grad(loss, leaves, allow_unused=True)
                unused.difference_update(n for n, g in zip(self.layout.names, found, strict=True) if g is not None)
                grads = {
                    name: torch.zeros_like(leaf) if grad is None else grad
                    for name, leaf, grad in zip(self.layout.names, leaves, found, strict=True)
                }
                return grads, (loss.detach(), recorder.take(), extra)

            size = batch.batch_size if batch.lengths is None else int(batch.lengths[m])
            update, outputs = self.local(gradient, model, size)
            self.layout.flatten(update, out=rows[m])
            losses.append(torch.stack([step[0] for step in outputs]).mean())
            first_losses.append(outputs[0][0])
            for name, value in _mean_over_steps([step[1] for step in outputs]).items():
                logged.setdefault(name, []).append(value)
                logged_rows.setdefault(name, []).append(m)
            extras.append(apply_to_collection(outputs[-1][2], Tensor, torch.Tensor.detach))
            buffers.collect()
        return DeviceUpdates(
            rows=rows,
            losses=torch.stack(losses),
            first_losses=torch.stack(first_losses),
            logged={name: torch.stack(values) for name, values in logged.items()},
            logged_rows={name: torch.tensor(index) for name, index in logged_rows.items()},
            log_options=recorder.options,
            metrics={name: self._path_of(metric) for name, metric in recorder.metrics.items()},
            extras=_stack_extras(extras),
            buffers=buffers,
            unused=frozenset(unused),
        )

    def _path_of(self, metric: Metric) -> str:
        paths: list[str] = [path for path, sub in self.pl_module.named_modules() if sub is metric]
        if not paths:
            raise MisconfigurationException(
                f"`training_step` logs the torchmetrics object {metric!r}, which is no attribute of "
                f"{type(self.pl_module).__name__}. Assign it to `self` in `__init__`."
            )
        return paths[0]

    def _own_parameters(self) -> Params:
        own = {name: p.detach() for name, p in self.pl_module.named_parameters() if p.requires_grad}
        if tuple(own) != self.layout.names:
            changed = sorted(set(own) ^ set(self.layout.names))
            raise MisconfigurationException(
                f"{', '.join(changed)} changed `requires_grad` after EdgeStrategy was set up; what devices send is laid "
                "out once. Freeze and unfreeze before `fit`, in separate runs."
            )
        return own


@contextmanager
def _attributes_kept(pl_module: pl.LightningModule) -> Iterator[None]:
    """Try something: undo what it does to plain attributes if it fails, or if a tensor of all devices escapes into one.

    Such a tensor is dead outside ``vmap``; code that keeps losses in a list would find out at the end of the epoch.
    """
    attributes = pl_module.__dict__
    before = dict(attributes)
    contents = {
        name: copy.copy(value)
        for name, value in before.items()
        if isinstance(value, list | dict) and name not in ("_modules", "_parameters")
    }
    buffers = [(sub, dict(sub._buffers)) for sub in pl_module.modules()]
    try:
        yield
        for name, value in [*attributes.items(), *((n, b) for n, b in pl_module.named_buffers())]:
            if any(torch._C._functorch.is_functorch_wrapped_tensor(leaf) for leaf in _leaves_of(value)):
                raise CannotVectorizeError(f"`training_step` keeps a tensor of one device in `self.{name}`")
    except BaseException:
        for name in attributes.keys() - before.keys():
            del attributes[name]
        attributes.update(before)
        for name, content in contents.items():
            value = before[name]
            value.clear()
            value.extend(content) if isinstance(value, list) else value.update(content)
        for sub, held in buffers:
            sub._buffers.update(held)
        raise


def _leaves_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [leaf for item in value if isinstance(item, Tensor | list | tuple | dict) for leaf in _leaves_of(item)]
    return [leaf for item in value.values() for leaf in _leaves_of(item)] if isinstance(value, dict) else []


def _split_output(output: Any) -> tuple[Tensor, Any]:
    """The loss, and what else ``training_step`` returned."""
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor):
        raise MisconfigurationException(
            f"`training_step` must return a loss tensor, or a dict with one under 'loss', for every device; got "
            f"{type(output).__name__}. A device that skips a round is chosen by the scheduler instead."
        )
    return loss, {k: v for k, v in output.items() if k != "loss"} if isinstance(output, dict) else {}


def _tensors(collection: Any) -> list[Tensor]:
    found: list[Tensor] = []
    apply_to_collection(collection, Tensor, lambda t: found.append(t.detach()))
    return found


def _rebuild(collection: Any, leaves: Sequence[Tensor]) -> Any:
    remaining = iter(leaves)
    return apply_to_collection(collection, Tensor, lambda _: next(remaining))


def _stack_extras(extras: list[Any]) -> Any:
    """One collection with a leading device dimension; a list with one collection a device if shapes differ."""
    if not extras[0]:
        return {}
    leaves = [_tensors(extra) for extra in extras]
    if len({tuple(leaf.shape for leaf in device) for device in leaves}) > 1:
        return {"devices": extras}
    return _rebuild(extras[0], [torch.stack(group) for group in zip(*leaves, strict=True)])


def join_extras(parts: list[tuple[int, Any]]) -> Any:
    """The extras of several groups of devices as those of one.

    Args:
        parts: How many devices each group has, and its ``DeviceUpdates.extras``.

    Returns:
        One collection with a leading device dimension, or a list with one collection a device, as in a single group.
    """
    devices: list[Any] = []
    for number, extras in parts:
        by_device = extras.get("devices") if isinstance(extras, dict) else None
        if not isinstance(by_device, list):
            by_device = [apply_to_collection(extras, Tensor, lambda leaf, m=m: leaf[m]) for m in range(number)]
        devices += by_device
    return _stack_extras(devices)


def _mean_over_steps(steps: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    names = dict.fromkeys(name for step in steps for name in step)
    return {name: torch.stack([s[name] for s in steps if name in s]).mean(dim=0) for name in names}


def _cause(error: BaseException) -> str:
    """The first sentence of the innermost error."""
    while error.__cause__ is not None:
        error = error.__cause__
    first = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return f"{type(error).__name__}: {first}" if not isinstance(error, CannotVectorizeError) else first
