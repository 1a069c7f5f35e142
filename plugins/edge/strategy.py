"""One training step is one communication round over simulated devices."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override

from groundwire.plugins.edge.aggregator import Aggregator, WeightedMean
from groundwire.plugins.edge.batch import DeviceBatch
from groundwire.plugins.edge.downlink import Downlink, PerfectDownlink
from groundwire.plugins.edge.local import LocalGradient, LocalWork
from groundwire.plugins.edge.logged import over_devices
from groundwire.plugins.edge.processes import ReplicatedStrategy
from groundwire.plugins.edge.round import Round
from groundwire.plugins.edge.scheduler import AllDevices, Scheduler
from groundwire.plugins.edge.spread import DeviceSpread
from groundwire.plugins.edge.updates import DeviceUpdates, DeviceWorker
from groundwire.plugins.edge.uplinks.base import Received, Uplink
from groundwire.plugins.edge.uplinks.error_free import ErrorFree
from groundwire.plugins.errors import NonFiniteUpdateError, check_same_settings
from groundwire.plugins.layout import ParameterLayout
from groundwire.plugins.ledger import Cost, Ledger, is_logging_step, log_costs
from groundwire.plugins.privacy import PrivacyStatement
from groundwire.plugins.privacy.refusals import refuse_tuners
from groundwire.plugins.random import Key, root_seed

_CHECKPOINT_KEY = "groundwire.edge"
_WHAT_IS_PUBLISHED = (
    (
        "Only the weights are published: neither what training logs of its rounds (losses, bits, energy, devices) nor its "
        "checkpoints, which hold more."
    ),
    "Coins and noise come from the run's seed: it stays secret, and none of its rounds is run again in another way.",
)
_PRIVACY_QUERIES = 20  # of a privacy accountant, in a run


class EdgeStrategy(ReplicatedStrategy):
    """Trains an unmodified LightningModule on simulated devices that share one server.

    Every training step is one round: each device computes an update with the module's own ``training_step`` on its
    shard of the batch, the uplink carries the updates to the server, the aggregator combines them, and the combined
    update lands in ``p.grad``, from where the module's own optimizer goes on. Gradient clipping, learning-rate
    schedules, callbacks and loggers work on it as they do in any Trainer. Values given to ``self.log`` are averaged
    over the devices with the aggregation weights. What communication costs is in :attr:`ledger`, and logged as
    ``uplink/bits``, ``uplink/channel_uses``, ``uplink/energy`` and ``downlink/bits``, each for the round and as
    ``..._cumulative``, on the Trainer's logging steps.

    A round that nobody takes part in is skipped: nothing is sent or logged but ``round/empty``, and the optimizer gets no
    gradients (from a private uplink it gets the noise).

    With several processes (``Trainer(devices=4, num_nodes=2)``, started by Lightning or torchrun), each works for a block of the round's devices and gets the updates of all; the rest of the round, every process does alike. The run
    equals that of one process: bit for bit where the devices work one after the other, and at once up to the rounding
    of batched products and to numbers drawn inside the step. To modules and callbacks each looks like the only process
    (``trainer.world_size`` is 1); validation runs on each, whole. Tested with gloo; NCCL and SLURM
    have not been tried.

    A batch is a :class:`DeviceBatch` (from ``groundwire.datamodules.Federated``) or any ordinary batch, which is split
    evenly over the devices; hooks that get the batch, such as ``on_after_batch_transfer``, get it whole. All state is
    in the Lightning checkpoint: with a loader that resumes, a run that was killed and resumed equals one that was not,
    bit for bit, from any checkpoint written between two steps. With one device, :class:`ErrorFree` and a module that draws no random numbers in its
    step, the run equals that of a plain Trainer, bit for bit. Random draws inside the step (dropout) depend on the
    seed, round and device, not on the global stream; in the loop and at once they differ. Buffers that the step changes
    (BatchNorm statistics) are averaged over the devices. In a vectorised round, parameters that the loss does not
    depend on get zero gradients.

    Args:
        num_devices: Simulated devices in the population, at least 1.
        scheduler: Which of the devices that have data take part in a round; by default all.
        local: What a device does; by default one gradient, else :class:`LocalSGD`.
        uplink: How updates reach the server; by default error-free.
        aggregator: How received rows become one update; by default their weighted mean.
        downlink: What each device sees of the model; by default exactly the server's.
        vectorize: ``True`` computes all devices at once (``torch.func``), ``False`` one after the other, ``"auto"``
            takes the faster one and falls back to the loop, with one warning that names the cause, where a module
            does not allow the former.
        on_nonfinite: ``"raise"`` ends the run when a device's update has NaN or infinite entries; ``"drop"`` leaves
            that device out of the round, logs ``round/dropped_devices``, and goes on.
        seed: Root seed of all draws (schedule, channel noise, quantisers); by default that of ``seed_everything``,
            else 0.
        device: Where to run, in one process; by default what the Trainer's ``accelerator`` and ``devices`` give.
        accelerator: Filled in by the Trainer.
        checkpoint_io: Filled in by the Trainer.
        precision_plugin: Filled in by the Trainer.

    Raises:
        ValueError: If an argument is out of range.
        MisconfigurationException: At setup, for manual optimization, several optimizers, gradient accumulation
            or 16-bit mixed precision with loss scaling.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from groundwire.plugins.edge import EdgeStrategy, UniformSample
        >>> strategy = EdgeStrategy(num_devices=100, scheduler=UniformSample(10))
        >>> trainer = Trainer(strategy=strategy, logger=False, enable_checkpointing=False)

    Reference:
        McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017.
        arXiv:1602.05629
    """

    strategy_name = "groundwire_edge"

    def __init__(
        self,
        num_devices: int,
        scheduler: Scheduler | None = None,
        local: LocalWork | None = None,
        uplink: Uplink | None = None,
        aggregator: Aggregator | None = None,
        downlink: Downlink | None = None,
        vectorize: Literal["auto"] | bool = "auto",
        on_nonfinite: Literal["raise", "drop"] = "raise",
        seed: int | None = None,
        device: str | None = None,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(device, accelerator, checkpoint_io, precision_plugin)
        if num_devices < 1:
            raise ValueError(f"`num_devices` must be at least 1, got {num_devices}.")
        if vectorize not in ("auto", True, False):
            raise ValueError(f"`vectorize` must be 'auto', True or False, got {vectorize!r}.")
        if on_nonfinite not in ("raise", "drop"):
            raise ValueError(f"`on_nonfinite` must be 'raise' or 'drop', got {on_nonfinite!r}.")
        self.num_devices = num_devices
        self.scheduler = scheduler or AllDevices()
        self.local = local or LocalGradient()
        self.uplink = uplink or ErrorFree()
        self.aggregator = aggregator or WeightedMean()
        self.downlink = downlink or PerfectDownlink()
        self.vectorize: Literal["auto"] | bool = vectorize
        self.on_nonfinite = on_nonfinite
        self.seed = seed
        self.round_index = 0
        self.ledger = Ledger(num_devices)
        self.layout: ParameterLayout | None = None
        self._worker: DeviceWorker | DeviceSpread | None = None
        self._to_restore: dict[str, Any] | None = None
        self._root_seed = 0
        self._is_fitting = False
        self._planned_rounds: float | None = None
        self._accounted = 0  # round of the last answer of an accountant

    # ---------------------------------------------------------------- set-up

    @property
    def parts(self) -> nn.ModuleDict:
        """The replaceable parts of a round, by name."""
        return nn.ModuleDict(
            {
                "scheduler": self.scheduler,
                "local": self.local,
                "uplink": self.uplink,
                "aggregator": self.aggregator,
                "downlink": self.downlink,
            }
        )

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        super().setup(trainer)
        to_restore, self._to_restore = self._to_restore, None
        if trainer.state.fn != TrainerFn.FITTING:
            return
        module = self.lightning_module
        assert module is not None
        self._refuse_what_does_not_fit(trainer, module)
        self.layout = ParameterLayout.of(module)
        self._root_seed = root_seed(self.seed)
        if to_restore is not None and self.seed is None:
            self._root_seed = to_restore["seed"]
        self.uplink.setup(layout=self.layout, num_devices=self.num_devices, seed=self._root_seed)
        self.downlink.setup(numel=self.layout.numel, num_devices=self.num_devices)
        self.parts.to(self.root_device)
        worker = DeviceWorker(module, self.layout, self.local, self.vectorize)
        self._worker = worker if self.num_ranks == 1 else DeviceSpread(worker, self.rank, self.num_ranks)
        if trainer.global_step == 0:
            self.round_index, self.ledger = 0, Ledger(self.num_devices)
        if to_restore is not None:
            self._restore(to_restore)
        self._is_fitting = True
        self._planned_rounds = None

    def _refuse_what_does_not_fit(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        name = type(module).__name__
        if not module.automatic_optimization:
            raise MisconfigurationException(
                f"EdgeStrategy needs automatic optimization, but {name} sets `automatic_optimization = False`. Return "
                "the loss from `training_step` and let Lightning step the optimizer."
            )
        if trainer.accumulate_grad_batches != 1:
            self._refuse_accumulation(trainer)
        if isinstance(self.optimizers[0], torch.optim.LBFGS):
            raise MisconfigurationException(
                "EdgeStrategy makes one round of every step, but LBFGS evaluates the loss several times a step. Use an "
                "optimizer that evaluates it once."
            )
        self._refuse_what_the_server_cannot_see()
        if self.uplink.promises_privacy:
            refuse_tuners(trainer, type(self.uplink).__name__)
        if getattr(self.precision_plugin, "scaler", None) is not None:
            raise MisconfigurationException(
                "EdgeStrategy does not scale the devices' losses, so precision='16-mixed' would lose small gradients. "
                "Use 'bf16-mixed' or '32-true'."
            )

    def _refuse_what_the_server_cannot_see(self) -> None:
        uplink, aggregator = type(self.uplink).__name__, type(self.aggregator).__name__
        if "rows" in self.aggregator.needs and self.uplink.superposes:
            raise MisconfigurationException(
                f"{aggregator} looks at each device's update, but {uplink} brings the server their sum. Use a digital uplink, "
                "or WeightedMean."
            )
        if self.uplink.promises_privacy and (self.aggregator.needs or self.uplink.needs_losses):
            raise MisconfigurationException(
                f"{aggregator if self.aggregator.needs else uplink} looks at single devices' updates or losses, which the "
                f"guarantee of {uplink} does not cover. Use WeightedMean."
            )

    @staticmethod
    def _refuse_accumulation(trainer: pl.Trainer) -> None:
        raise MisconfigurationException(
            "EdgeStrategy makes one round of every batch, so accumulate_grad_batches="
            f"{trainer.accumulate_grad_batches} has no meaning. Set it to 1 and give each device a larger batch."
        )

    # ---------------------------------------------------------------- a round

    @override
    def training_step(self, batch: Any, *args: Any) -> Any:
        """One round: returns a loss whose ``backward`` writes the server's estimate into ``p.grad``.

        Args:
            batch: A :class:`DeviceBatch`, or any ordinary batch.
            *args: The further arguments of the module's ``training_step``.

        Returns:
            The weighted mean of the devices' losses; in a dict with what else the module's step returned.

        Raises:
            NonFiniteUpdateError: If an update is not finite, according to ``on_nonfinite``.
            ValueError: If the batch cannot be split or names unknown devices.
        """
        module, layout, worker = self.lightning_module, self.layout, self._worker
        assert module is not None
        assert layout is not None
        assert worker is not None
        if module.trainer.accumulate_grad_batches != 1:  # a callback may have changed it since setup
            self._refuse_accumulation(module.trainer)
        devices = batch if isinstance(batch, DeviceBatch) else DeviceBatch.split(batch, self.num_devices)
        devices, plan = self._plan(devices)

        received_model = None
        if not self.downlink.exact:
            received_model = self.downlink(layout.flatten(dict(module.named_parameters())), plan)
        with self.precision_plugin.train_step_context(), _metrics_kept(module) if plan.is_empty else nullcontext():
            updates = worker(devices, args, received_model, plan)
        plan = replace(plan, losses=updates.first_losses.detach())
        if self.uplink.promises_privacy and updates.buffers is not None and updates.buffers.changed():
            raise MisconfigurationException(
                f"{type(module).__name__} changes buffers in its step (BatchNorm statistics), which reach the server "
                f"beside the private updates of {type(self.uplink).__name__}. Use layers without statistics, such as "
                "GroupNorm."
            )
        with torch.no_grad():
            if plan.is_empty:
                updates.rows.zero_()
            if self.uplink.promises_privacy:  # a device that could end the run, or be missed, would be told from others
                broken = ~torch.isfinite(updates.rows).all(dim=1)
                updates.rows.masked_fill_(broken.unsqueeze(1), 0)
                kept = list(range(len(plan.devices)))
            else:
                updates, plan, kept = self._only_finite(updates, plan)
            received = self._send(updates.rows, plan)
            estimate = self.aggregator(received, plan)
            if not torch.isfinite(estimate.sum()) and not torch.isfinite(estimate).all():
                raise NonFiniteUpdateError(
                    f"The server's estimate in round {plan.index} is not finite although every device's update was: "
                    f"the uplink or aggregator overflowed ({type(self.uplink).__name__}, "
                    f"{type(self.aggregator).__name__}). The weights were not changed."
                )
            loss = updates.losses @ plan.weights.to(updates.losses.dtype)
            if updates.buffers is not None and not plan.is_empty:
                updates.buffers.write(kept, plan.weights)
            if self.downlink.moves_server and received_model is not None:
                self._take_over(received_model)
        downlink_cost = Cost() if plan.is_empty else self.downlink.cost(layout.numel, plan)
        metrics = {**self.downlink.metrics(plan), **received.metrics, **self.aggregator.metrics}
        if plan.is_empty or (self.scheduler.sample_rate is not None and self.scheduler.sample_rate < 1):
            metrics["round/empty"] = float(plan.is_empty)
        if self.on_nonfinite == "drop":
            metrics["round/dropped_devices"] = len(devices) - len(plan.devices)
        sizes = [devices.batch_size] * len(devices) if devices.lengths is None else devices.lengths.tolist()
        batch_size = sum(sizes[row] for row in kept)
        self._log(module, updates, plan, metrics, received.cost, downlink_cost, batch_size)
        self.round_index += 1
        if self.uplink.is_spent(plan.num_rounds):
            module.trainer.should_stop = True

        is_skipped = plan.is_empty and not self.uplink.promises_privacy  # then the optimizer has nothing to do
        gradients = tuple(
            None if is_skipped or (name in updates.unused and not bool(gradient.any())) else gradient
            for name, gradient in layout.unflatten(estimate).items()
        )
        trainable = (p for p in module.parameters() if p.requires_grad)
        loss = _GradientInjection.apply(loss, gradients, *trainable)  # type: ignore[no-untyped-call]
        return {"loss": loss, **updates.extras} if updates.extras else loss

    def _send(self, rows: Tensor, plan: Round) -> Received:
        if plan.is_empty and not self.uplink.promises_privacy:  # nobody sends, nor what it remembers
            return Received(rows=rows, weights=plan.weights, cost=Cost())
        received: Received = self.uplink(rows, plan)
        return received

    def _plan(self, batch: DeviceBatch) -> tuple[DeviceBatch, Round]:
        largest = int(batch.device_ids.max())
        if largest >= self.num_devices:
            raise ValueError(
                f"The batch names device {largest}, but EdgeStrategy(num_devices={self.num_devices}) knows devices 0 "
                f"to {self.num_devices - 1}. Give both the datamodule and the strategy the same `num_devices`."
            )
        chosen = self.scheduler(batch.device_ids, round_index=self.round_index, seed=self._root_seed)
        # coins are accounted for only if every device tossed one
        sample_rate = self.scheduler.sample_rate if len(batch) == self.num_devices else None
        is_empty = len(chosen) == 0
        if is_empty:  # a device computes in the others' place; what it computes is not sent
            chosen = torch.zeros(1, dtype=torch.int64)
        if len(chosen) < len(batch):
            batch = batch.select(chosen)
        weights = batch.num_samples.to(torch.float64)
        if self._planned_rounds is None:
            assert self.lightning_module is not None
            self._planned_rounds = self.lightning_module.trainer.estimated_stepping_batches
        planned = self._planned_rounds
        plan = Round(
            index=self.round_index,
            num_rounds=int(planned) if 0 < planned < float("inf") else None,
            key=Key(seed=self._root_seed, round=self.round_index, devices=tuple(batch.device_ids.tolist())),
            weights=(weights / weights.sum()).to(self.root_device, self.layout.dtype if self.layout else torch.float32),
            sample_rate=sample_rate,
            is_empty=is_empty,
        )
        reached = None if is_empty else self.downlink.choose(plan)
        if reached is not None and len(reached) < len(batch):
            batch, plan = batch.select(reached), replace(plan.select(reached.tolist()), sample_rate=None)
        return batch, plan

    def _take_over(self, model: Tensor) -> None:
        """Go on from what the devices hold."""
        assert self.lightning_module is not None
        assert self.layout is not None
        own = dict(self.lightning_module.named_parameters())
        for name, value in self.layout.unflatten(model).items():
            own[name].copy_(value)

    def _only_finite(self, updates: DeviceUpdates, plan: Round) -> tuple[DeviceUpdates, Round, list[int]]:
        finite = torch.isfinite(updates.rows.sum(dim=1))  # one pass: NaN and infinity survive a sum
        if not bool(finite.all()):
            finite = torch.isfinite(updates.rows).all(dim=1)  # a sum may also have overflowed
        if bool(finite.all()):
            return updates, plan, list(range(len(plan.devices)))
        bad = [plan.devices[row] for row in (~finite).nonzero().flatten().tolist()]
        first = updates.rows[int((~finite).nonzero()[0])]
        what = (
            f"Device {bad[0]} produced {int((~torch.isfinite(first)).sum())} non-finite entries in round {plan.index}"
            + (f" ({len(bad)} devices in all)" if len(bad) > 1 else "")
        )
        if self.on_nonfinite == "raise" or len(bad) == len(plan.devices):
            raise NonFiniteUpdateError(
                f"{what}. The weights were not changed. Lower the learning rate or fix the loss"
                + (", or leave such devices out with on_nonfinite='drop'." if self.on_nonfinite == "raise" else ".")
            )
        rank_zero_warn(f"{what}; on_nonfinite='drop' leaves it out of this round.")
        rows: list[int] = finite.nonzero().flatten().tolist()
        return updates.select(rows), plan.select(rows), rows

    def _log(
        self,
        module: pl.LightningModule,
        updates: DeviceUpdates,
        plan: Round,
        metrics: dict[str, Tensor | float],
        uplink: Cost,
        downlink: Cost,
        batch_size: int,
    ) -> None:
        for name, values in () if plan.is_empty else updates.logged.items():
            options = {"batch_size": batch_size} | updates.log_options[name]
            weights = plan.weights[updates.logged_rows[name].to(plan.weights.device)]
            module.log(name, over_devices(values, weights, options.get("reduce_fx", "mean")), **options)
        for name, path in (
            () if plan.is_empty else updates.metrics.items()
        ):  # they have added up over the devices by themselves
            metric = cast(Metric, module.get_submodule(path))
            module.log(name, metric, **updates.log_options[name])
        entries: dict[str, Any] = self.ledger.add(uplink=uplink, downlink=downlink, devices=plan.devices)
        if not is_logging_step(module.trainer, plan.index, plan.num_rounds):
            return
        every = max(1, (plan.num_rounds or 0) // _PRIVACY_QUERIES)  # a numerical accountant takes its time
        if plan.index // every > self._accounted // every or plan.index + 1 == plan.num_rounds or plan.index == 0:
            self._accounted = plan.index
            spent = self.privacy_spent(plan.index + 1)
            if spent is not None:
                metrics["privacy/epsilon"] = spent.epsilon
        log_costs(module, entries, self.ledger, metrics)

    def privacy_spent(self, rounds: int | None = None) -> PrivacyStatement | None:
        """What the uplink guarantees the devices.

        Args:
            rounds: Of the first so many rounds; by default of all so far.

        Returns:
            The guarantee, or None where the uplink promises nothing.
        """
        spent = self.uplink.privacy(rounds=self.round_index if rounds is None else rounds)
        return None if spent is None else replace(spent, assumptions=(*spent.assumptions, *_WHAT_IS_PUBLISHED))

    # ---------------------------------------------------------------- checkpoints

    def configuration(self) -> dict[str, str]:
        """What two runs must share so that one can go on from the other's checkpoint."""
        assert self.layout is not None
        settings = {name: " ".join(repr(part).split()) for name, part in self.parts.items()}
        return {"num_devices": str(self.num_devices), "model": str(self.layout), **settings}

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        if self._worker is not None and "optimizer_states" in checkpoint:  # a weights-only checkpoint stays one
            checkpoint = checkpoint | {_CHECKPOINT_KEY: self._state()}
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        state = checkpoint.get(_CHECKPOINT_KEY)
        if state is not None and self._is_fitting:  # within a fit, as a learning-rate finder does
            self._restore(state)
        else:
            self._to_restore = state
        if state is None and "optimizer_states" in checkpoint:
            rank_zero_warn(
                f"{checkpoint_path} was not written by an EdgeStrategy: the weights and the optimizer are restored, "
                "rounds, error memories and the ledger start anew."
            )
        return checkpoint

    @override
    def teardown(self) -> None:
        self._is_fitting = False
        super().teardown()

    def _state(self) -> dict[str, Any]:
        assert self._worker is not None
        return {
            "configuration": self.configuration(),
            "seed": self._root_seed,
            "round": self.round_index,
            "fell_back": self._worker.fell_back,
            "ledger": self.ledger.state_dict(),
            "parts": self.parts.state_dict(),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        assert self._worker is not None
        here = self.configuration() | {"seed": str(self._root_seed)}
        there = state["configuration"] | {"seed": str(state["seed"])}
        check_same_settings(here, there, "an EdgeStrategy")
        self.round_index = state["round"]
        self._worker.fell_back = state["fell_back"]
        self.ledger.load_state_dict(state["ledger"])
        self.parts.load_state_dict(state["parts"])


@contextmanager
def _metrics_kept(module: nn.Module) -> Iterator[None]:
    """Let torchmetrics objects forget what they see meanwhile."""
    metrics = [sub for sub in module.modules() if isinstance(sub, Metric)]
    names = ("_update_count", "_computed", "_forward_cache")
    kept = [{name: copy.deepcopy(getattr(metric, name)) for name in (*metric._defaults, *names)} for metric in metrics]
    yield
    for metric, state in zip(metrics, kept, strict=True):
        for name, value in state.items():
            setattr(metric, name, value)


class _GradientInjection(torch.autograd.Function):
    """The loss, with a backward pass that yields given gradients instead of its own.

    So the server's estimate takes the ordinary way into ``p.grad``: hooks before and after ``backward``, a module's
    own ``backward``, and clipping see nothing unusual.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: tuple[Tensor | None, ...], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        return None, None, *(None if g is None else scale.to(g.dtype) * g for g in ctx.gradients)
