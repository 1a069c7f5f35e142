"""DP-SGD for unmodified LightningModules: Poisson batches, clipped gradients, noise, and a budget that is kept."""

from __future__ import annotations

import os
import secrets
import weakref
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from groundwire.callbacks.privacy.clipping import ClippingName, make_clipping
from groundwire.callbacks.privacy.engine import EngineName, PerSampleGradients
from groundwire.callbacks.privacy.fixes import fix_layers
from groundwire.callbacks.privacy.probe import probe_independence, stray_gradient
from groundwire.callbacks.privacy.refusals import (
    refuse_layers,
    refuse_optimizer,
    refuse_rounding,
    refuse_trainer,
    warn_of_raw_metrics,
)
from groundwire.callbacks.privacy.sampling import (
    PoissonLoader,
    PoissonSampler,
    batch_size_of,
    chunks_within,
    num_records_of,
    with_sampler,
)
from groundwire.callbacks.privacy.train_loader import replace_train_loader
from groundwire.callbacks.step import is_logging_step
from groundwire.plugins.errors import CheckpointMismatchError, NonFiniteUpdateError
from groundwire.plugins.privacy import Accounting, PrivacyStatement, noise_multiplier_for, spent_epsilon, steps_within
from groundwire.plugins.privacy.accounting import check_accounting, check_budget, warn_of_delta, warn_of_gdp
from groundwire.plugins.random import root_seed, secret_generator, secret_stream

_QUERIES = 20  # how often a run asks the accountant, which takes a hundredth to a third of a second


class PrivacyBudgetExhausted(RuntimeError):
    """A further step would cost more than the budget; the weights are those of the last step within it."""


class DPSGD(pl.Callback):
    """Trains with differential privacy for each record of the training set.

    Add it to the Trainer's callbacks; module, optimizer, schedulers and data stay as they are. A step then draws its
    records by Poisson sampling (the user's ``batch_size`` times accumulated batches times processes is the expected
    number), computes each record's gradient in one backward pass, clips it to ``max_grad_norm``, adds Gaussian noise
    to the sum and divides by the expected number. That happens right after ``backward``: whatever comes later in a step
    (gradient clipping, gradient logging, the optimizer, EMA) sees the private gradient only.

    The guarantee covers the weights, and all that follows from them without the data. It does not cover what the
    module logs about training batches (loss, accuracy), nor model selection on a private validation set. A learning
    rate that follows a training metric (ReduceLROnPlateau), or a run that such a metric ends (EarlyStopping), makes the
    weights depend on the raw data, and is warned of. Where a crashed run is resumed with fresh noise, its steps after
    the checkpoint are not counted: they were published if its logs or other checkpoints were.

    Batches vary in size around ``batch_size``; an empty one, which is possible with small batches, still makes a step,
    for which the module sees one record in its place whose gradient does not count (what the module logs then is of
    that record). A record whose gradient is not finite is left out of the sum, without any sign of it (with ghost
    clipping, the step is refused instead).

    Args:
        target_epsilon: Budget. The noise is chosen so that all planned steps use it up; with ``noise_multiplier`` given
            as well, training stops before the step that would exceed it.
        noise_multiplier: Standard deviation of the noise over ``max_grad_norm``; 0 clips without privacy.
        target_delta: Probability with which the guarantee may fail; ``1 / N^1.1`` for ``N`` records by default.
        max_grad_norm: Bound ``C`` on the norm of a record's gradient over all trainable parameters.
        clipping: ``"flat"``, ``"per_layer"`` (each of ``P`` parameter tensors to ``C / sqrt(P)``), or ``"adaptive"``,
            where ``C`` follows the quantile ``target_quantile`` of the norms, at no additional cost.
        target_quantile: For ``"adaptive"``.
        engine: See :class:`~groundwire.callbacks.privacy.PerSampleGradients`; ``"auto"`` is book-keeping. With
            ``"ghost"``, callbacks that come before this one see the clipped sum without noise in ``on_after_backward``.
        ghost_output: See there; for ``"ghost"``.
        accountant: ``"prv"`` (tight), ``"rdp"``, or ``"gdp"`` (an approximation, not a guarantee).
        max_physical_batch_size: Records that fit into memory: a step's records are processed in as many batches as that
            takes, instead of ``accumulate_grad_batches``. None leaves the Trainer's setting.
        probe: Check before the first step, on random records, that a record's gradient depends on that record alone.
        fix: Replace layers that cannot be trained privately (BatchNorm by GroupNorm, LSTM by Opacus's, ...) instead of
            refusing them; before ``configure_optimizers``.
        reproducible: Draw batches and noise from the seed of ``seed_everything``, so that a resumed run equals an
            uninterrupted one bit for bit. Whoever knows that seed can take the noise away: for experiments. Checkpoints
            hold the seed, and a second run with the same seed on other data repeats the noise. Otherwise they come from
            the operating system's entropy, and are never stored.

    Attributes:
        epsilon: Spent as of the last query, or None before the first step.
        steps: Noisy steps taken, over all runs of the checkpoint.

    Raises:
        ValueError: If an argument is out of range, or neither budget nor noise is given.
        MisconfigurationException: At setup or before the first step, for what cannot be trained privately; the message
            says what to change.
        CheckpointMismatchError: If the steps so far, of this run or of a checkpoint, were made with other settings or
            with another number of records.
        PrivacyBudgetExhausted: If the Trainer goes on beyond the budget (``min_epochs``, ``min_steps``, or more epochs
            than were planned).

    Example:
        >>> trainer = pl.Trainer(callbacks=[DPSGD(target_epsilon=3.0, target_delta=1e-5)], logger=False)

    Reference:
        Abadi et al., "Deep Learning with Differential Privacy", CCS 2016. arXiv:1607.00133
    """

    def __init__(
        self,
        target_epsilon: float | None = None,
        noise_multiplier: float | None = None,
        target_delta: float | None = None,
        max_grad_norm: float = 1.0,
        clipping: ClippingName = "flat",
        target_quantile: float = 0.5,
        engine: EngineName = "auto",
        ghost_output: str = "",
        accountant: Accounting = "prv",
        max_physical_batch_size: int | None = None,
        probe: bool = True,
        fix: bool = False,
        reproducible: bool = False,
    ) -> None:
        check_budget(target_epsilon, noise_multiplier, target_delta)
        if max_physical_batch_size is not None and max_physical_batch_size < 1:
            raise ValueError(f"`max_physical_batch_size` must be at least 1, got {max_physical_batch_size}.")
        if engine not in ("auto", "bookkeeping", "ghost", "hooks", "functorch"):
            raise ValueError(
                f"`engine` must be 'auto', 'bookkeeping', 'ghost', 'hooks' or 'functorch', got {engine!r}."
            )
        check_accounting(accountant)
        self.target_epsilon = target_epsilon
        self.noise_multiplier = noise_multiplier
        self.target_delta = target_delta
        self.max_grad_norm = max_grad_norm
        self.clipping = clipping
        self.engine = engine
        self.ghost_output = ghost_output
        self.accountant = accountant
        self.max_physical_batch_size = max_physical_batch_size
        self.probe = probe
        self.fix = fix
        self.reproducible = reproducible
        self._clipping = make_clipping(clipping, max_grad_norm, target_quantile)
        if self._clipping.needs_parameters_apart and engine == "ghost":
            raise ValueError("engine='ghost' has one weight a record, clipping='per_layer' several: use 'bookkeeping'.")
        self.steps = 0
        self.epsilon: float | None = None
        self._given_noise, self._given_delta = noise_multiplier, target_delta
        self._restored: dict[str, Any] | None = None
        self._counted: dict[str, Any] | None = None  # the settings of the steps so far
        self._is_fitting = False
        self._trained: weakref.ref[pl.LightningModule] | None = None  # by the last run
        self._earlier_epsilon = 0.0  # of earlier runs on that module
        self._undo: list[Callable[[], None]] = []
        self._sampler: PoissonSampler | None = None
        self._loader: Any = None
        self._gradients: PerSampleGradients | None = None
        self._budget: float = float("inf")  # steps that it is known to pay for
        self._looked_at: float = 0  # steps up to which that was asked
        self._planned: float = float("inf")  # steps of the run
        self._query_every = 1
        self._queried_at = -1  # steps at the last query
        self._seed = 0
        self._sums: dict[Tensor, Tensor] = {}
        self._count: Tensor | None = None
        self._size: int | None = None  # records of the running physical batch
        self._is_clipped = False
        self._is_last = True
        self._probed = False

    # ---------------------------------------------------------------- set-up

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot be trained privately, and take hold of the train loader."""
        self._is_fitting = stage == "fit"
        if not self._is_fitting:
            return
        self._put_back()
        refuse_trainer(trainer, pl_module, self)
        refuse_rounding(trainer, self.engine)
        warn_of_gdp(self.accountant)
        if self.fix:
            fix_layers(pl_module)
        if trainer.global_step == 0:
            self._note_earlier_run(pl_module)
            self.steps, self.epsilon, self._restored, self._counted, self._queried_at = 0, None, None, None, -1
            self.noise_multiplier, self.target_delta = self._given_noise, self._given_delta
            self._clipping.max_grad_norm = self.max_grad_norm
        secret = root_seed(None) if self.reproducible else secrets.randbits(128)
        self._seed = trainer.strategy.broadcast(secret)
        self._sampler, self._probed = None, False
        accumulated = trainer.accumulate_grad_batches
        self._undo += [
            replace_train_loader(trainer, lambda loader: self._private_loader(trainer, accumulated, loader)),
            lambda: setattr(trainer, "accumulate_grad_batches", accumulated),
        ]

    def _note_earlier_run(self, pl_module: pl.LightningModule) -> None:
        """Keep what earlier runs on this module spent, as a run that starts anew is about to forget it."""
        if self._trained is None or self._trained() is not pl_module:
            self._earlier_epsilon = 0.0
        elif self.steps:
            self._earlier_epsilon += self._query() if self._sampler is not None else self.epsilon or 0.0

    def _private_loader(self, trainer: pl.Trainer, accumulated: int, loader: Any) -> Any:
        ranks = trainer.world_size
        self._loader = loader
        logical = batch_size_of(loader) * accumulated * ranks
        records = num_records_of(loader)
        if logical > records:
            raise MisconfigurationException(
                f"The expected batch ({batch_size_of(loader)} records x {accumulated} accumulated batches x {ranks} "
                f"processes = {logical}) exceeds the {records} records: the sample rate would be above 1. Lower "
                "`batch_size`, or set it to the number of records for full batches."
            )
        chunks = accumulated
        if self.max_physical_batch_size is not None:
            chunks = chunks_within(records, logical, self.max_physical_batch_size, ranks)
            trainer.accumulate_grad_batches = chunks

        def next_batch() -> tuple[int, int]:
            done: Any = trainer.fit_loop.epoch_loop.batch_progress.current
            return (
                trainer.global_step,
                done.ready % chunks,
            )  # in the middle of a step, if a checkpoint was written there

        sampler = PoissonSampler(
            records,
            logical,
            chunks,
            seed=self._seed,
            next_batch=next_batch,
            rank=trainer.global_rank,
            num_ranks=ranks,
        )
        self._sampler = sampler
        self._refuse_other_settings(self._counted, "The steps so far were made")
        private = with_sampler(loader, sampler)
        self._undo.append(private.shutdown)
        return private

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse layers, now that other callbacks have frozen what they freeze."""
        refuse_layers(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the noise, count what the budget pays for, and observe the module's layers."""
        sampler = self._sampler
        if sampler is None:
            raise MisconfigurationException("DPSGD saw no train loader: it trains with one loader of its own batches.")
        chunks = sampler.num_chunks
        if not isinstance(trainer.train_dataloader, PoissonLoader):
            raise MisconfigurationException(
                f"DPSGD trains with one loader, got a {type(trainer.train_dataloader).__name__} of loaders: a record's chance "
                "to take part would differ between them. Join the datasets with torch.utils.data.ConcatDataset."
            )
        if trainer.num_training_batches % chunks:
            below = int(trainer.num_training_batches) // chunks * chunks
            raise MisconfigurationException(
                f"limit_train_batches leaves {trainer.num_training_batches} batches an epoch, which cuts a step of "
                f"{chunks} accumulated batches. Use a multiple, such as {below} or {below + chunks}."
            )
        self._gradients = PerSampleGradients(pl_module, self.engine, self.ghost_output)
        self._gradients.attach()
        self._clipping.num_parameters = len(self._gradients.parameters)
        refuse_optimizer(trainer, self._gradients.parameters)
        self._refuse_default_seed()
        warn_of_raw_metrics(trainer)
        self._settle_privacy(trainer, sampler)
        self._trained = weakref.ref(pl_module)
        if isinstance(trainer.strategy, DDPStrategy):  # its all-reduce of gradients that are thrown away
            wrapped: Any = trainer.strategy.model
            wrapped.require_backward_grad_sync = False
            self._undo.append(lambda: setattr(wrapped, "require_backward_grad_sync", True))

    def _refuse_default_seed(self) -> None:
        if not self.reproducible:
            return
        if "PL_GLOBAL_SEED" not in os.environ and "seed" not in (self._restored or {}):
            raise MisconfigurationException(
                "DPSGD(reproducible=True) draws batches and noise from the run's seed, and there is none. Call "
                "`seed_everything(...)` first, or leave `reproducible` out."
            )
        rank_zero_info("DPSGD: the noise comes from the run's seed (reproducible=True) and is no secret.")

    def _settle_privacy(self, trainer: pl.Trainer, sampler: PoissonSampler) -> None:
        """Delta, noise and the number of steps that the budget pays for."""
        records = sampler.num_records
        if self.target_delta is None:
            self.target_delta = records**-1.1
        warn_of_delta(self.target_delta, records, "records")
        planned = trainer.estimated_stepping_batches
        endless = planned == float("inf")
        if self._restored is not None:
            self._resume()
        elif trainer.global_step > 0 and self.steps == 0:
            rank_zero_warn(
                f"The checkpoint was trained for {trainer.global_step} steps without DPSGD: the guarantee covers the "
                "steps from here on, not what the weights know already."
            )
        elif self._earlier_epsilon > 0 and self.steps == 0:
            rank_zero_warn(
                "This module was trained by this callback before, for epsilon "
                f"{self._earlier_epsilon:.4g}: the guarantee of this run does not cover that. Both compose (at worst, "
                "epsilons and deltas add up)."
            )
        self._planned = planned - trainer.global_step + self.steps
        if self.noise_multiplier is None:
            assert self.target_epsilon is not None
            if endless:
                raise MisconfigurationException(
                    "DPSGD cannot choose the noise for a run without an end. Set Trainer(max_steps=...) or "
                    "max_epochs, or give `noise_multiplier`: then training stops when the budget is spent."
                )
            self.noise_multiplier = noise_multiplier_for(
                self.target_epsilon, sampler.sample_rate, max(int(self._planned), 1), self.target_delta, self.accountant
            )
        if self.noise_multiplier == 0:
            rank_zero_warn("DPSGD with noise_multiplier=0 clips gradients, but promises nothing: epsilon is infinite.")
        try:
            self._clipping.gradient_noise(self.noise_multiplier, sampler.logical_batch)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        self._refuse_other_settings(self._counted, "The steps so far were made")
        self._counted = self._settings()
        limit = 10**7 if endless else int(self._planned)
        self._budget = float("inf")
        if self.target_epsilon is not None:
            self._look_ahead(limit)
            if self._budget == 0:
                raise MisconfigurationException(
                    f"The budget of epsilon {self.target_epsilon} does not pay for one step with noise multiplier "
                    f"{self.noise_multiplier:.4g} at sample rate {sampler.sample_rate:.4g}. Raise the noise."
                )
        self._query_every = max(1, limit // _QUERIES) if not endless else 1000
        if self._is_spent():
            trainer.should_stop = True
        rank_zero_info(
            f"DPSGD: noise multiplier {self.noise_multiplier:.4g}, {records} records, {sampler.logical_batch} a step "
            f"(sample rate {sampler.sample_rate:.4g}), clipping norm {self._clipping.max_grad_norm:.4g} "
            f"({self.clipping}), delta {self.target_delta:.3g}"
            + (f", budget epsilon {self.target_epsilon:.4g}" if self.target_epsilon is not None else "")
        )

    def _look_ahead(self, steps: int) -> None:
        """Ask how many of so many steps the budget pays for."""
        assert self._sampler is not None
        assert self.target_epsilon is not None
        assert self.noise_multiplier is not None
        assert self.target_delta is not None
        self._looked_at = steps
        self._budget = steps_within(
            self.target_epsilon,
            self.noise_multiplier,
            self._sampler.sample_rate,
            self.target_delta,
            steps,
            self.accountant,
        )

    def _is_spent(self) -> bool:
        """Whether a further step would exceed the budget; asks once more where the run goes beyond its plan."""
        if self.steps >= self._budget == self._looked_at:
            self._look_ahead(2 * self.steps)
        return self.steps >= self._budget

    # ---------------------------------------------------------------- a step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Look up how many records the batch has, unless the budget is spent; before the first one, probe the step."""
        assert self._sampler is not None
        assert self._gradients is not None
        self._observe_unfrozen(trainer, pl_module)
        if self.probe and not self._probed:  # here, all callbacks have put layers into the modes that they want
            self._probed = True
            probe_independence(trainer, pl_module, self._gradients, self._loader)
        chunks = self._sampler.num_chunks
        index = batch_idx % chunks
        if self._is_spent():
            raise PrivacyBudgetExhausted(
                f"{self.steps} steps have spent the budget of epsilon {self.target_epsilon}, and the Trainer goes on "
                "(min_epochs, min_steps, or more epochs than were planned). The weights are those of the last step "
                "within the budget."
            )
        if index == 0:  # a step that was given up half-way must leave nothing behind: its records are drawn again
            self._sums, self._count = {}, None
        self._is_last = index == chunks - 1
        self._is_clipped = False
        self._size = self._sampler.size_of(trainer.global_step, index)

    def _observe_unfrozen(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Observe what was frozen or unfrozen since the last step."""
        assert self._gradients is not None
        trainable = {id(p) for p in pl_module.parameters() if p.requires_grad}
        if trainable != {id(p) for p in self._gradients.parameters.values()}:
            refuse_layers(pl_module)
            self._gradients.attach()
            self._clipping.num_parameters = len(trainable)
            refuse_optimizer(trainer, self._gradients.parameters)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Start to observe; with ghost clipping, run the first of the two backward passes."""
        if self._gradients is None:
            return
        if self._size is None:
            self._refuse_stray_backward(trainer)
            return
        self._gradients.begin()
        if self.engine == "ghost":
            self._gradients.first_pass(loss)
            self._gradients.second_pass_with(self._weights(), max(self._size, 1), self._num_chunks)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Clip the records' gradients and add them up; at the end of a step, replace the gradient by the private one."""
        gradients = self._gradients
        if gradients is None:
            return
        if self._size is None:
            self._refuse_stray_backward(trainer)
            return
        if self._is_clipped:
            raise MisconfigurationException(
                "The optimizer computed the loss of one batch more than once, which DP-SGD does not account for. Use an "
                "optimizer that evaluates it once."
            )
        self._is_clipped = True
        stray = gradients.stray()
        if stray:
            raise MisconfigurationException(stray_gradient(stray))
        with torch.no_grad():
            sums = self._clipped_sums()
            for p, total in sums.items():
                self._sums[p] = self._sums[p] + total if p in self._sums else total
            for p in gradients.parameters.values():
                p.grad = None
            gradients.end()
            if self._is_last:
                self._release(trainer)

    def _refuse_stray_backward(self, trainer: pl.Trainer) -> None:
        if trainer.training and not trainer.sanity_checking:
            raise MisconfigurationException(
                "A backward pass ran outside of a training step, whose gradients DPSGD would not make private. Take "
                "gradients that are not meant for the optimizer by `torch.autograd.grad`."
            )

    @property
    def _num_chunks(self) -> int:
        assert self._sampler is not None
        return self._sampler.num_chunks

    def _norms_and_weights(self) -> tuple[dict[Tensor, Tensor], dict[Tensor, Tensor]]:
        assert self._gradients is not None
        assert self._size is not None
        norms = self._gradients.squared_norms(max(self._size, 1), self._num_chunks)
        if not norms:
            return {}, {}
        weights = self._clipping.weights(norms)
        if self._size == 0:
            weights = {p: torch.zeros_like(w) for p, w in weights.items()}
        elif self._clipping.count_noise(1.0) is not None:
            count = self._clipping.count(norms)
            self._count = count if self._count is None else self._count + count
        return norms, weights

    def _weights(self) -> Tensor:
        """One weight a record (ghost clipping)."""
        with torch.no_grad():
            _, weights = self._norms_and_weights()
        return next(iter(weights.values()))

    def _clipped_sums(self) -> dict[Tensor, Tensor]:
        gradients = self._gradients
        assert gradients is not None
        assert self._size is not None
        if self.engine == "ghost":
            return {p: p.grad for p in gradients.parameters.values() if p.grad is not None}
        norms, weights = self._norms_and_weights()
        if not norms:
            return {}
        on = next(iter(norms.values())).device
        broken = ~torch.isfinite(torch.stack([norm.to(on) for norm in norms.values()]).sum(0))
        if bool(broken.any()):
            gradients.discard(broken)
        return gradients.weighted_sum(weights, max(self._size, 1), self._num_chunks)

    def _release(self, trainer: pl.Trainer) -> None:
        """The sum over all processes, with noise, over the expected number of records, into ``p.grad``."""
        assert self._gradients is not None
        assert self._sampler is not None
        assert self.noise_multiplier is not None
        parameters = list(self._gradients.parameters.values())
        sums, self._sums = self._sums, {}
        expected = self._sampler.logical_batch
        sigma = self._clipping.gradient_noise(self.noise_multiplier, expected)
        totals = [sums[p] if p in sums else torch.zeros_like(p) for p in parameters]
        count = self._count
        self._count = None
        if trainer.world_size > 1:
            _all_reduce(totals)
            if count is not None or self._clipping.count_noise(1.0) is not None:
                count = count if count is not None else torch.zeros((), device=parameters[0].device)
                dist.all_reduce(count)
        finite = torch.stack([total.sum() for total in totals if total.numel()]).sum()
        if not bool(torch.isfinite(finite)):
            raise NonFiniteUpdateError(
                f"The sum of clipped gradients of step {self.steps} is not finite although each record's was bounded: "
                "a layer overflowed. The weights were not changed. Lower the learning rate, or use 32-bit precision."
            )
        std = sigma * self._clipping.max_grad_norm
        noise_of = _GaussianNoise(self._seed, "privacy/gradient", trainer.global_step)
        for p, total in zip(parameters, totals, strict=True):
            if std > 0:
                total.add_(noise_of(total), alpha=std)
            p.grad = total.div_(expected).view_as(p)
        count_noise = self._clipping.count_noise(expected)
        if count_noise is not None:
            generator = secret_stream(self._seed, purpose="privacy/count", round=trainer.global_step)
            noise = float(generator.standard_normal()) * (count_noise if self.noise_multiplier > 0 else 0.0)
            self._clipping.update(float(count if count is not None else 0.0) + noise, expected)
        self.steps += 1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what is spent, and stop when the budget is."""
        if not self._is_clipped:
            raise MisconfigurationException(
                f"{type(pl_module).__name__}.training_step returned None. Whether a step is skipped depends on the data, "
                "which DP-SGD does not account for: return a loss for every batch."
            )
        self._size = None
        if not self._is_last:
            return
        if self._budget < self._looked_at and self._is_spent():
            trainer.should_stop = True
        enough = trainer.global_step >= (trainer.min_steps or 0) and trainer.current_epoch >= (trainer.min_epochs or 0)
        is_end = self.steps in (self._budget, self._planned) or (trainer.should_stop and enough)
        is_epoch_end = batch_idx + 1 >= trainer.num_training_batches
        due = self.steps // self._query_every > self._queried_at // self._query_every
        if is_end or self.epsilon is None or (due and (is_epoch_end or is_logging_step(trainer))):
            self._query()
            pl_module.log("privacy/epsilon", self.epsilon or 0.0, prog_bar=True, on_step=True, on_epoch=False)
            if self.clipping == "adaptive":
                pl_module.log("privacy/max_grad_norm", self._clipping.max_grad_norm, on_step=True, on_epoch=False)
        if self.steps == 1:
            assert self._sampler is not None
            constants = {
                "privacy/noise_multiplier": float(self.noise_multiplier or 0.0),
                "privacy/sample_rate": self._sampler.sample_rate,
            }
            pl_module.log_dict(constants, on_step=True, on_epoch=False)

    def _query(self) -> float:
        if self.epsilon is None or self._queried_at != self.steps:
            assert self._sampler is not None
            assert self.noise_multiplier is not None
            assert self.target_delta is not None
            self.epsilon = spent_epsilon(
                self.noise_multiplier, self._sampler.sample_rate, self.steps, self.target_delta, self.accountant
            )
            self._queried_at = self.steps
        return self.epsilon

    def privacy_spent(self) -> PrivacyStatement:
        """What the steps so far guarantee.

        Returns:
            The statement.

        Raises:
            RuntimeError: Before training has begun.
        """
        if self._sampler is None or self.noise_multiplier is None or self.target_delta is None:
            raise RuntimeError("There is nothing to say before the first step: call `trainer.fit` first.")
        assumptions = [
            "Batches are drawn by Poisson sampling and the noise is Gaussian, both from generators that stay secret."
        ]
        if self.reproducible:
            assumptions.append("They come from the run's seed (reproducible=True), which must not be published.")
        if self.accountant == "gdp":
            assumptions.append("The GDP accountant approximates; epsilon may be larger.")
        return PrivacyStatement(
            mechanism=f"Poisson-subsampled Gaussian (noise multiplier {self.noise_multiplier:.4g}, sample rate "
            f"{self._sampler.sample_rate:.4g}, {self.steps} steps)",
            unit="one record",
            adjacency="add-remove",
            epsilon=self._query(),
            delta=self.target_delta,
            assumptions=tuple(assumptions),
        )

    # ---------------------------------------------------------------- the end

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what was spent, also where the run ended between two queries of the accountant."""
        if self.steps and self._queried_at != self.steps:
            for logger in trainer.loggers:
                logger.log_metrics({"privacy/epsilon": self._query()}, step=trainer.global_step)
            trainer.callback_metrics["privacy/epsilon"] = torch.tensor(self._query())
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_info("DPSGD: a dry run; what it spent is not reported.")
        elif self.steps:
            rank_zero_info(f"DPSGD: the weights are {self.privacy_spent()}")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the module and the Trainer as they were."""
        self._put_back()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the module and the Trainer as they were."""
        self._put_back()

    def _put_back(self) -> None:
        undo, self._undo = self._undo, []
        for one in reversed(undo):
            one()
        if self._gradients is not None:
            self._gradients.detach()
        self._gradients = self._loader = self._size = self._count = None
        self._sums = {}

    # ---------------------------------------------------------------- checkpoints

    def _settings(self) -> dict[str, Any]:
        assert self._sampler is not None
        return {
            "num_records": self._sampler.num_records,
            "logical_batch": self._sampler.logical_batch,
            "num_chunks": self._sampler.num_chunks,
            "noise_multiplier": self.noise_multiplier,
            "target_delta": self.target_delta,
            "max_grad_norm": self.max_grad_norm,
            "clipping": self.clipping,
            "accountant": self.accountant,
        }

    def state_dict(self) -> dict[str, Any]:
        """The accountant's state, and the settings that a resumed run must share; never a secret seed."""
        if self._sampler is None or self._restored is not None:
            return dict(self._restored or {})
        state = self._settings() | {"steps": self.steps, "current_max_grad_norm": self._clipping.max_grad_norm}
        return state | ({"seed": self._seed} if self.reproducible else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what is to be gone on from until training starts; a checkpoint that is only evaluated takes nothing back."""
        if state_dict and (self._is_fitting or not self.steps):
            self._counted = None
            self._restored = dict(state_dict)
            self.steps = state_dict["steps"]
            if self.reproducible and "seed" in state_dict:
                self._seed = state_dict["seed"]
                if self._sampler is not None:
                    self._sampler.seed = self._seed

    def _resume(self) -> None:
        state, self._restored = self._restored, None
        assert state is not None
        if self.noise_multiplier is None:
            self.noise_multiplier = state["noise_multiplier"]
        if self._given_delta is None:
            self.target_delta = state["target_delta"]
        self._refuse_other_settings(state, "The checkpoint was trained")
        self.steps = state["steps"]
        self._clipping.max_grad_norm = state["current_max_grad_norm"]
        self._earlier_epsilon = 0.0

    def _refuse_other_settings(self, before: dict[str, Any] | None, what: str) -> None:
        """Refuse settings by which the steps so far would be counted wrongly."""
        here = self._settings()
        differing = [name for name, value in here.items() if before is not None and value != before[name]]
        if self.steps and before is not None and differing:
            raise CheckpointMismatchError(
                f"{what} with other privacy settings: "
                + "; ".join(f"{name} was {before[name]!r} and is now {here[name]!r}" for name in differing)
                + ". Its guarantee cannot be continued: go on with the same settings, or start a new run."
            )


class _GaussianNoise:
    """Standard normal numbers, the same in all processes, from one stream a device.

    Args:
        seed: The run's secret.
        purpose: What they are for.
        step: Of the run.
    """

    def __init__(self, seed: int, purpose: str, step: int) -> None:
        self._seed, self._purpose, self._step = seed, purpose, step
        self._generators: dict[torch.device, torch.Generator] = {}

    def __call__(self, like: Tensor) -> Tensor:
        if like.device not in self._generators:
            # devices are counted in the parameters' order: their own indices differ between processes
            purpose = f"{self._purpose}/{len(self._generators)}"
            self._generators[like.device] = secret_generator(
                self._seed, purpose=purpose, round=self._step, on=like.device
            )
        return torch.randn(like.shape, generator=self._generators[like.device], dtype=like.dtype, device=like.device)


def _all_reduce(tensors: list[Tensor]) -> None:
    """Sum over all processes, in one message per dtype."""
    for dtype in {t.dtype for t in tensors}:
        of_dtype = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.flatten() for t in of_dtype])
        dist.all_reduce(flat)
        for t, part in zip(of_dtype, torch.split(flat, [t.numel() for t in of_dtype]), strict=True):
            t.copy_(part.view_as(t))
