"""DDP whose gradients travel compressed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from groundwire.plugins.compression import Compressor, Feedback, Granularity, Sender
from groundwire.plugins.ddp.exchange import GradientExchange, compressed_allreduce
from groundwire.plugins.ddp.group import CountedGroup
from groundwire.plugins.errors import NonFiniteUpdateError, check_same_settings
from groundwire.plugins.layout import ParameterLayout
from groundwire.plugins.ledger import Cost, Ledger, is_logging_step, log_costs
from groundwire.plugins.random import root_seed

_CHECKPOINT_KEY = "groundwire.ddp"


class CompressedDDPStrategy(DDPStrategy):
    """DDP whose gradient all-reduce goes through a compressor, with or without error feedback.

    What travels between the processes are the compressor's packed messages: values that add (RandK, PowerSGD, sketches)
    in an all-reduce, all others in an all-gather, after which every rank decodes the messages of all. The module's own
    optimizer then steps on the mean, the same on every rank. It is tested on gloo (CPU); NCCL has not been tried.
    :class:`groundwire.plugins.edge.Digital` with as many simulated devices as there are processes, the same settings and
    the same data gives the same model, up to the rounding of sums.

    Logged are ``uplink/bits``, the bits of all tensors that all ranks handed to collectives in the step, and
    ``uplink/bits_cumulative``. Gradients that are accumulated (``accumulate_grad_batches``) travel once, in the last
    backward pass, and only then the memory changes. Every rank's memory is in the checkpoint, and a run that was killed
    and resumed equals one that was not, bit for bit; from three processes on, only if all is sent together
    (``granularity="model"``, PowerSGD, or a model that fits into one bucket): DDP cuts its buckets anew after the first
    step, in plain DDP, too, and sums of three depend on where they lie. Resumed with another number of processes, it starts
    with empty memories, and warns.

    With ``granularity="layer"`` a bucket (``bucket_cap_mb`` of parameters) is sent as soon as its gradients are there,
    while the backward pass goes on; PowerSGD and ``granularity="model"`` wait for its end.

    Args:
        compressor: Any compressor that promises no privacy, or error feedback around one.
        granularity: ``"layer"`` compresses every parameter by itself and sends those of fewer than two dimensions or
            fewer than ``min_numel`` entries, and those that would not become smaller, as they are; ``"model"``
            compresses the gradient as one vector.
        min_numel: Fewest entries of a parameter that is compressed.
        warmup_steps: Steps at the beginning that send everything as it is.
        on_nonfinite: What every rank does, all in the same step, when the mean has NaN or infinite entries:
            ``"raise"`` ends the run, ``"skip"`` leaves out the step and keeps error memories as they were. With loss scaling
            (``precision="16-mixed"``), the scaler skips.
        seed: Root seed of all random draws; by default that of ``seed_everything``, else 0.
        **kwargs: Of :class:`lightning.pytorch.strategies.DDPStrategy`, and through it of DistributedDataParallel
            (``bucket_cap_mb``, ``find_unused_parameters``, ...).

    Raises:
        ValueError: If an argument is out of range; at set-up if the compressor does not fit the model.
        MisconfigurationException: If a communication hook is given, too, or the compressor promises privacy; at set-up
            if the ranks are configured differently, or no parameter would be compressed.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from groundwire.plugins.compression import ErrorFeedback, TopK
        >>> strategy = CompressedDDPStrategy(ErrorFeedback(TopK(density=0.01)))
        >>> trainer = Trainer(strategy=strategy, accelerator="cpu", devices=2, logger=False, enable_checkpointing=False)

    Reference:
        Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", VLDB 2020.
        arXiv:2006.15704 (the buckets and hooks of DDP); the compressors name their own.
    """

    strategy_name = "groundwire_compressed_ddp"

    def __init__(
        self,
        compressor: Compressor | Feedback,
        granularity: Granularity = "layer",
        min_numel: int = 1024,
        warmup_steps: int = 0,
        on_nonfinite: Literal["raise", "skip"] = "raise",
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("ddp_comm_hook") is not None or kwargs.get("ddp_comm_state") is not None:
            raise MisconfigurationException(
                "DDP takes one communication hook, which CompressedDDPStrategy is: give `compressor` alone. For half "
                "precision on the wire use LowPrecision, for PyTorch's PowerSGD hook PowerSGD."
            )
        super().__init__(**kwargs)
        if on_nonfinite not in ("raise", "skip"):
            raise ValueError(f"`on_nonfinite` must be 'raise' or 'skip', got {on_nonfinite!r}.")
        self.sender = Sender(compressor, granularity, min_numel, warmup_steps)
        inner = self.sender.compressor
        if inner.promises_privacy or inner.num_shares > 1:
            raise MisconfigurationException(
                f"CompressedDDPStrategy would send the messages of {type(inner).__name__} without the secure sums and the "
                "accounting that its guarantee counts on. Use it in EdgeStrategy(uplink=Digital(...))."
            )
        self.on_nonfinite = on_nonfinite
        self.seed = seed
        self.ledger = Ledger(1)
        self._exchange: GradientExchange | None = None
        self._layout: ParameterLayout | None = None
        self._root_seed = 0
        self._to_restore: dict[str, Any] | None = None
        self._is_fitting = False

    @property
    def round_index(self) -> int:
        """Exchanges of gradients so far."""
        return 0 if self._exchange is None else self._exchange.round

    # ---------------------------------------------------------------- set-up

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        super().setup(trainer)
        to_restore, self._to_restore = self._to_restore, None
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if to_restore is not None:
            self._restore(to_restore)
        self._is_fitting = True

    @override
    def _register_ddp_hooks(self) -> None:
        # Lightning 2.6 hands hooks to DDP only when the root device is CUDA; DDP itself takes them on gloo, too
        module, group = self.lightning_module, CountedGroup()
        assert module is not None
        assert isinstance(self.model, DistributedDataParallel)
        self._layout = ParameterLayout.of(module)
        self._root_seed = root_seed(self.seed)
        if self._to_restore is not None and self.seed is None:
            self._root_seed = self._to_restore["seed"]
        self._refuse_different_ranks()
        self.sender.setup(self._layout, group.size, range(group.rank, group.rank + 1))
        self.sender.to(self.root_device)
        self.ledger = Ledger(group.size)
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        self._exchange = GradientExchange(self.sender, self._layout, names, self._root_seed, group)
        self.model.register_comm_hook(self._exchange, compressed_allreduce)

    def configuration(self) -> dict[str, str]:
        """What all ranks must share, and two runs so that one can go on from the other's checkpoint."""
        return {"model": str(self._layout), "sender": " ".join(repr(self.sender).split()), "seed": str(self._root_seed)}

    def _refuse_different_ranks(self) -> None:
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, self.configuration() | {"on_nonfinite": self.on_nonfinite})
        for name, value in everyone[0].items():
            others = {rank: one[name] for rank, one in enumerate(everyone) if one[name] != value}
            if others:
                rank, other = next(iter(others.items()))
                raise MisconfigurationException(
                    f"The compression configuration differs between ranks: {name} is {value!r} on rank 0 and {other!r} on "
                    f"rank {rank} ({len(others)} of {self.world_size} ranks differ). Give all ranks the same."
                )

    # ---------------------------------------------------------------- a step

    @override
    def pre_backward(self, closure_loss: Tensor) -> None:
        super().pre_backward(closure_loss)
        if self._exchange is not None:
            scaler = getattr(self.precision_plugin, "scaler", None)
            self._exchange.loss_scale = 1.0 if scaler is None else float(scaler.get_scale())

    @override
    def post_backward(self, closure_loss: Tensor) -> None:
        super().post_backward(closure_loss)
        exchange, module = self._exchange, self.lightning_module
        if exchange is None or module is None or not exchange.is_over:
            return
        index, is_sound = exchange.round, exchange.end_round()
        bits = 8 * exchange.group.take_bytes()
        entries = self.ledger.add(uplink=Cost(bits=bits, bits_ideal=bits), downlink=Cost(), devices=())
        if is_logging_step(module.trainer, index, self._planned_rounds(module.trainer)):
            sent = {name: value for name, value in entries.items() if name.startswith("uplink")}
            log_costs(module, sent, self.ledger)
        if is_sound or getattr(self.precision_plugin, "scaler", None) is not None:
            return
        what = f"The mean gradient of step {index} is not finite: a rank's gradient has NaN or infinite entries"
        if self.on_nonfinite == "raise":
            raise NonFiniteUpdateError(
                f"{what}. The weights were not changed. Lower the learning rate or fix the loss, or leave such steps out "
                "with on_nonfinite='skip'."
            )
        rank_zero_warn(f"{what}; on_nonfinite='skip' leaves the step out.")
        for parameter in module.parameters():
            parameter.grad = None  # what an optimizer takes for nothing to do

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        before = self.round_index
        output = super().optimizer_step(*args, **kwargs)
        if self._exchange is not None and self.round_index == before:
            raise MisconfigurationException(
                "The optimizer stepped on gradients that did not go through the compressor: something keeps DDP from "
                "synchronising them (`no_sync`, or a callback that adds them up itself, such as DPSGD). Leave that out, or "
                "use another strategy."
            )
        return output

    @staticmethod
    def _planned_rounds(trainer: pl.Trainer) -> int | None:
        planned = trainer.estimated_stepping_batches
        return int(planned) if 0 < planned < float("inf") else None

    # ---------------------------------------------------------------- checkpoints

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        if self._exchange is not None and "optimizer_states" in checkpoint:  # a weights-only checkpoint stays one
            own = apply_to_collection(self.sender.state_dict(), Tensor, lambda tensor: tensor.cpu())
            by_rank: list[Any] | None = [None] * self.world_size if self.global_rank == 0 else None
            dist.gather_object(own, by_rank)  # every rank gets here, and rank 0 writes
            checkpoint = checkpoint | {
                _CHECKPOINT_KEY: {
                    "configuration": self.configuration(),
                    "seed": self._root_seed,
                    "round": self._exchange.round,
                    "ledger": self.ledger.state_dict(),
                    "sender_by_rank": by_rank,
                }
            }
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
                f"{checkpoint_path} was not written by a CompressedDDPStrategy: the weights and the optimizer are "
                "restored, error memories and the ledger start anew."
            )
        return checkpoint

    def _restore(self, state: dict[str, Any]) -> None:
        assert self._exchange is not None
        here, there = self.configuration(), state["configuration"]
        check_same_settings(here, there, "a CompressedDDPStrategy")
        self._exchange.round = state["round"]
        self.ledger.load_state_dict(state["ledger"])
        by_rank = state["sender_by_rank"]
        if len(by_rank) == self.world_size:
            self.sender.load_state_dict(by_rank[self.global_rank])
            self.sender.to(self.root_device)
            return
        rank_zero_warn(
            f"The checkpoint holds the memories of {len(by_rank)} processes, and there are {self.world_size} now: error "
            "memories start empty. What the devices had not sent yet is lost; weights, optimizer and counters are restored."
        )

    @override
    def teardown(self) -> None:
        self._is_fitting = False
        super().teardown()
