"""Runs an unmodified ``training_step`` once per device, in a loop or vectorised, with equal numbers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from groundwire.plugins.edge.layout import ParameterLayout, Params
from groundwire.plugins.edge.local import LocalWork
from groundwire.plugins.edge.round import Round

log = logging.getLogger(__name__)

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
        logged: Values the module logged, by name, one for each row in ``logged_rows``.
        logged_rows: For each name, the rows that logged it.
        log_options: The options the module passed to ``self.log``, by name.
        extras: What else ``training_step`` returned, with a leading device dimension.
    """

    rows: Tensor
    losses: Tensor
    logged: dict[str, Tensor] = field(default_factory=dict)
    logged_rows: dict[str, Tensor] = field(default_factory=dict)
    log_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    extras: Any = None


class _StepModule(nn.Module):
    """Lets ``functional_call`` reach a LightningModule's ``training_step`` instead of its ``forward``."""

    def __init__(self, pl_module: pl.LightningModule) -> None:
        super().__init__()
        self.pl_module = pl_module

    def forward(self, *args: Any) -> Any:
        return self.pl_module.training_step(*args)


class _Logged:
    """Stands in for ``LightningModule.log`` while the devices work: keeps the values for their mean."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor]
        self.options: dict[str, dict[str, Any]]
        self.metrics: dict[str, Metric]
        self.reset()

    def __call__(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        if args:
            raise TypeError(f"self.log({name!r}, ...) takes its options by keyword, got {args}.")
        self.options[name] = options
        if isinstance(value, Metric):
            self.metrics[name] = value
            return
        value = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value))
        if value.numel() != 1:
            raise ValueError(f"self.log({name!r}, ...) takes one number, got shape {tuple(value.shape)}.")
        self.values[name] = value.reshape(())

    def reset(self) -> None:
        """Forget an attempt that failed."""
        self.values, self.options, self.metrics = {}, {}, {}

    def take(self) -> dict[str, Tensor]:
        """The values since the last call."""
        values, self.values = self.values, {}
        return values

    @contextmanager
    def installed(self, pl_module: pl.LightningModule) -> Iterator[None]:
        """Shadow ``pl_module.log`` (``log_dict`` goes through it), and put back what was there."""
        shadowed = pl_module.__dict__.get("log")
        pl_module.__dict__["log"] = self
        try:
            yield
        finally:
            if shadowed is None:
                del pl_module.__dict__["log"]
            else:
                pl_module.__dict__["log"] = shadowed


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
        self._pl_module = pl_module
        self._step = _StepModule(pl_module)
        self._metrics = [sub for sub in pl_module.modules() if isinstance(sub, Metric)]
        self._prefers_loop: bool | None = None
        self._rows: Tensor | None = None
        device = pl_module.device
        self._streams = [torch.default_generator]
        if device.type == "cuda":
            self._streams.append(torch.cuda.default_generators[device.index or 0])

    def __call__(self, batch: DeviceBatch, args: Sequence[Any], received: Tensor | None, round: Round) -> DeviceUpdates:
        """Run the round's local work.

        Args:
            batch: Data of the ``M`` devices that take part.
            args: The further arguments of ``training_step``.
            received: The model that the devices hold, ``(d,)`` or ``(M, d)``; None for the module's own parameters.
            round: The round.

        Returns:
            The updates and what the steps returned and logged.

        Raises:
            MisconfigurationException: If ``vectorize=True`` and the module does not allow it.
        """
        recorder = _Logged()
        with recorder.installed(self._pl_module), self._own_random_stream():
            if self._wants_vectorized(batch):
                try:
                    return self._vectorized(batch, args, received, recorder, round)
                except (RuntimeError, TypeError, NotImplementedError) as error:  # what torch.func refuses with
                    self._give_up_vectorizing(_cause(error), error)
                    recorder.reset()
            return self._loop(batch, args, received, recorder, round)

    def _wants_vectorized(self, batch: DeviceBatch) -> bool:
        if self.vectorize is False or self.fell_back:
            return False
        ragged = batch.lengths is not None and bool((batch.lengths != batch.batch_size).any())
        obstacle = (
            "the devices hold different numbers of samples" if ragged else vectorization_obstacle(self._pl_module)
        )
        if obstacle is not None:
            self._give_up_vectorizing(obstacle)
            return False
        if self.vectorize is True:
            return True
        if self._prefers_loop is None:
            self._prefers_loop = loop_is_faster(self._pl_module, self._pl_module.device)
            if self._prefers_loop:
                rank_zero_info("EdgeStrategy runs the devices in a loop: faster for convolutions on a CPU.")
        return len(batch) > 1 and not self._prefers_loop

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
        self, batch: DeviceBatch, args: Sequence[Any], received: Tensor | None, recorder: _Logged, round: Round
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

        self._seed(round.key.seed_of("step"))
        with self._metrics_refused():
            update, outputs = self.local(gradient, model, batch.batch_size)
        self._rows = self.layout.flatten(update, stacked=True, out=self._rows)
        every = torch.arange(len(batch))
        logged = _mean_over_steps([step[1] for step in outputs])
        return DeviceUpdates(
            rows=self._rows,
            losses=torch.stack([step[0] for step in outputs]).mean(dim=0),
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
        self, batch: DeviceBatch, args: Sequence[Any], received: Tensor | None, recorder: _Logged, round: Round
    ) -> DeviceUpdates:
        own = self._own_parameters()
        buffers = _BufferAverage(self._pl_module, round.weights) if len(batch) > 1 else None
        rows, losses, extras = [], [], []
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
                if params is own:
                    leaves: list[Tensor] = [p for p in self._pl_module.parameters() if p.requires_grad]
                    output = self._pl_module.training_step(part, *args)
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
                grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
                return dict(zip(self.layout.names, grads, strict=True)), (loss.detach(), recorder.take(), extra)

            size = batch.batch_size if batch.lengths is None else int(batch.lengths[m])
            update, outputs = self.local(gradient, model, size)
            rows.append(self.layout.flatten(update))
            losses.append(torch.stack([step[0] for step in outputs]).mean())
            for name, value in _mean_over_steps([step[1] for step in outputs]).items():
                logged.setdefault(name, []).append(value)
                logged_rows.setdefault(name, []).append(m)
            extras.append(apply_to_collection(outputs[-1][2], Tensor, torch.Tensor.detach))
            if buffers is not None:
                buffers.collect(m)
        if buffers is not None:
            buffers.write()
        updates = DeviceUpdates(
            rows=torch.stack(rows),
            losses=torch.stack(losses),
            logged={name: torch.stack(values) for name, values in logged.items()},
            logged_rows={name: torch.tensor(index) for name, index in logged_rows.items()},
            log_options=recorder.options,
            extras=_stack_extras(extras),
        )
        for name, metric in recorder.metrics.items():  # they have added up over the devices by themselves
            type(self._pl_module).log(self._pl_module, name, metric, **recorder.options.pop(name))
        return updates

    def _own_parameters(self) -> Params:
        own = {name: p.detach() for name, p in self._pl_module.named_parameters() if p.requires_grad}
        if tuple(own) != self.layout.names:
            changed = sorted(set(own) ^ set(self.layout.names))
            raise MisconfigurationException(
                f"{', '.join(changed)} changed `requires_grad` after EdgeStrategy was set up; what devices send is laid "
                "out once. Freeze and unfreeze before `fit`, in separate runs."
            )
        return own


class _BufferAverage:
    """Every device starts from the server's buffers (BatchNorm statistics); their mean is what the server keeps.

    Floating buffers take the weighted mean, others (counters) the largest value.
    """

    def __init__(self, module: nn.Module, weights: Tensor) -> None:
        self._buffers = dict(module.named_buffers())
        self._start = {name: b.clone() for name, b in self._buffers.items()}
        self._weights = weights
        self._kept: dict[str, Tensor] = {}

    def collect(self, row: int) -> None:
        """Take over what device ``row`` left, and put the server's buffers back for the next one."""
        for name, buffer in self._buffers.items():
            if buffer.is_floating_point():
                part = (buffer - self._start[name]) * self._weights[row].to(buffer.dtype)
                self._kept[name] = part if name not in self._kept else self._kept[name] + part
            else:
                self._kept[name] = buffer.clone() if row == 0 else torch.maximum(self._kept[name], buffer)
            buffer.copy_(self._start[name])

    def write(self) -> None:
        """Write the combined buffers into the module."""
        for name, buffer in self._buffers.items():
            kept = self._kept[name]
            buffer.copy_(self._start[name] + kept if buffer.is_floating_point() else kept)


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


def _mean_over_steps(steps: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    names = dict.fromkeys(name for step in steps for name in step)
    return {name: torch.stack([s[name] for s in steps if name in s]).mean(dim=0) for name in names}


def _cause(error: BaseException) -> str:
    """The first sentence of the innermost error."""
    while error.__cause__ is not None:
        error = error.__cause__
    first = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return f"{type(error).__name__}: {first}" if not isinstance(error, CannotVectorizeError) else first
