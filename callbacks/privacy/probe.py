"""Is a record's gradient a function of that record alone? Asked of the module's own step, on random records."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric

from groundwire.callbacks.privacy.engine import PerSampleGradients
from groundwire.callbacks.privacy.sampling import num_records_of, read_records
from groundwire.callbacks.step import loss_of

_NUM_RECORDS = 4
_SEEDS = 3
_READ = 64
_COLLATIONS = 8
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2}
_DROPOUTS = (nn.modules.dropout._DropoutNd,)


def probe_independence(
    trainer: pl.Trainer, pl_module: pl.LightningModule, gradients: PerSampleGradients, loader: Any
) -> None:
    """Run the training step on batches of random records, and compare what the first record's gradient is.

    In two batches that share the first record and differ in all others, its gradient must be the same; in a batch of
    half the size, too, which tells a mean over records from a sum. What the step writes into buffers and parameters must
    not depend on the records. Callbacks that surround the step take part. Nothing is logged; weights, buffers and metrics
    are as before. Random records have the shapes and dtypes of up to 64 of the data, numbers from their range and
    integers from those observed at the same place. Of the data themselves nothing is used, but for one question: whether
    collation leaves a record alone, whatever is beside it. A dataset that mixes records itself cannot be seen.

    Args:
        trainer: The Trainer, in training.
        pl_module: The module.
        gradients: Attached to it.
        loader: The training data, as :func:`~groundwire.callbacks.privacy.sampling.read_records` takes them.

    Raises:
        MisconfigurationException: If gradients depend on other records, or cannot be seen, or the step fails on random
            records; the message says why, and what to change.
    """
    name = type(pl_module).__name__
    with ExitStack() as stack:
        isolated = isolate_rng()
        isolated.__enter__()
        stack.callback(isolated.__exit__, None, None, None)  # it would not put back what it finds after an error
        stack.enter_context(_nothing_kept(pl_module))
        _refuse_mixing_collation(loader)
        num_records = num_records_of(loader)
        _seed(0)
        records = read_records(loader, _spread(num_records, min(_READ, num_records)))
        probe = _Probe(trainer, pl_module, gradients)
        try:
            torch.manual_seed(0)
            batch, unrelated = _random_records(records), _random_records(records)
            changed = [_with_first_of(batch, _random_records(records)) for _ in range(_SEEDS)]
            for size in (batch, _half(batch)):  # the engine learns which arguments of layers hold one row per record
                probe.loss(size, seed=0)
            # several seeds: what a step draws may happen to leave the first record alone
            firsts = [probe.first_gradient(batch, _NUM_RECORDS, seed) for seed in range(_SEEDS)]
            others = [probe.first_gradient(changed[seed], _NUM_RECORDS, seed) for seed in range(_SEEDS)]
            half, few = probe.first_gradient(_half(batch), _NUM_RECORDS // 2, seed=0), probe.written()
            _, of_others = probe.mean_gradient(unrelated, seed=0), probe.written()
            mean, written = probe.mean_gradient(batch, seed=0), probe.written()
            plain = probe.plain_gradient(batch, seed=0)
            repeated = probe.mean_gradient(batch, seed=0)
        except MisconfigurationException:
            raise
        except Exception as error:
            raise MisconfigurationException(
                f"{name}.training_step failed on the random records that DPSGD checks it with ({type(error).__name__}: "
                f"{error}). If it takes the data, it asks more of a record than shapes, dtypes and ranges: "
                "DPSGD(probe=False) skips this check, at your own risk."
            ) from error
        finally:
            probe.restore()
            for p in pl_module.parameters():
                p.grad = None
            gradients.end()
    tolerance = _tolerance(trainer)
    moved = _differing(written, of_others) | _differing(written, few)
    if moved:
        raise MisconfigurationException(
            f"The training step writes statistics of the batch into {', '.join(sorted(moved))}, which would be published with "
            "the weights. Remove that, or put the layer into evaluation mode."
        )
    if _difference(mean, repeated) > tolerance:
        rank_zero_warn(
            f"DPSGD cannot check that records are independent: {name}.training_step draws random numbers from a stream of "
            "its own (an attack's random start, say), so it cannot be run twice alike."
        )
        return
    if not all(_tells(found) for found in (*firsts, *others, half, mean, plain)):
        rank_zero_warn(
            f"DPSGD cannot check that records are independent: on random records, gradients of {name}.training_step are "
            "zero or not finite."
        )
    coupled = max(_difference(a, b) for a, b in zip(firsts, others, strict=True))
    if coupled > tolerance:
        raise MisconfigurationException(
            f"A record's gradient in {name}.training_step depends on the other records of the batch (relative difference "
            f"{coupled:.2g} on random records), so clipping it does not bound what a record does. Look for BatchNorm in "
            "training mode, class weights or ignored labels under reduction='mean' (torch divides by those of the batch), "
            "mixup, contrastive or in-batch losses, or statistics over the batch. DPSGD(probe=False) skips this check, at "
            "your own risk."
        )
    draws = max(_difference(firsts[0], again) for again in firsts[1:]) > tolerance  # a step with draws has no answer
    if not draws and _difference(firsts[0], half) > tolerance:
        raise MisconfigurationException(
            f"A record's gradient in {name}.training_step depends on the number of records in the batch (relative "
            f"difference {_difference(firsts[0], half):.2g} between {_NUM_RECORDS} and {_NUM_RECORDS // 2}): DPSGD needs "
            "a loss that is the mean over the records. Use reduction='mean'."
        )
    if _difference(mean, plain) > tolerance:
        raise MisconfigurationException(
            f"The records' gradients in {name}.training_step do not add up to the gradient of the loss (relative "
            f"difference {_difference(mean, plain):.2g} on random records): a term reaches the weights in another way than "
            "through the forward of their layers, such as a penalty on gradients. Remove it."
        )


def stray_gradient(names: list[str]) -> str:
    """What to say when a gradient reached parameters in another way than through their layers.

    Args:
        names: The parameters.

    Returns:
        A message.
    """
    return (
        f"A gradient reached {', '.join(names)} in another way than through the forward of its layer, where no record can "
        "be told apart: a penalty on the weights in `training_step` (use the optimizer's weight_decay), or a call such as "
        "`F.linear(x, self.layer.weight)` (call the layer)."
    )


def _refuse_mixing_collation(loader: Any) -> None:
    """Refuse a collation under which a record is not the same beside others."""
    collate = getattr(loader, "collate_fn", None)
    if collate is None or num_records_of(loader) < 2 * _NUM_RECORDS - 1:
        return
    _seed(0)
    record, *others = [loader.dataset[i] for i in _spread(num_records_of(loader), 2 * _NUM_RECORDS - 1)]
    for seed in range(_COLLATIONS):  # several: mixup permutes at random, and may be done now and then only
        order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed)).tolist()
        batches = []
        for company in (order[: _NUM_RECORDS - 1], order[_NUM_RECORDS - 1 :]):
            _seed(seed)
            batch = collate(copy.deepcopy([record, *(others[i] for i in company)]))
            batches.append([x for x in _tensors(batch) if x.ndim > 0 and len(x) == _NUM_RECORDS])
        # padding to the longest record of a batch is no mixing: only what has the same shape is compared
        parts = [(a, b) for a, b in zip(*batches, strict=False) if a.shape == b.shape]
        rows = range(_NUM_RECORDS)  # the record need not stay the first: collations sort, too
        if not any(all(_equal(a[i], b[j]) for a, b in parts) for i in rows for j in rows):
            raise MisconfigurationException(
                "The collation of the train loader changes a record with the records beside it (mixup or CutMix in "
                "`collate_fn`, say), so clipping its gradient does not bound what a record does. Remove it, or augment "
                "each record by itself, in the dataset. DPSGD(probe=False) skips this check, at your own risk."
            )


def _spread(num_records: int, number: int) -> list[int]:
    """Places of so many records, from the first to the last."""
    return [int(i) for i in torch.linspace(0, num_records - 1, number, dtype=torch.float64).round()]


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  what datasets and collations draw from
    torch.manual_seed(seed)


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or (a.is_floating_point() and torch.allclose(a, b, equal_nan=True))


class _Probe:
    """Runs the module's step on a batch, each time from the same weights and buffers.

    Args:
        trainer: The Trainer.
        module: The module.
        gradients: Attached to it.
    """

    def __init__(self, trainer: pl.Trainer, module: pl.LightningModule, gradients: PerSampleGradients) -> None:
        self.trainer = trainer
        self.module = module
        self.gradients = gradients
        self._before = [
            (tensors, name, f"{path}.{name}" if path else name, x, x.detach().clone())
            for path, layer in module.named_modules()
            for tensors in (layer._parameters, layer._buffers)
            for name, x in tensors.items()
            if x is not None
        ]

    def written(self) -> dict[str, Tensor]:
        """What the last run changed, by name."""
        now = ((name, tensors.get(key), before) for tensors, key, name, _, before in self._before)
        return {name: x.detach().clone() for name, x, before in now if x is not None and not _identical(x, before)}

    def restore(self) -> None:
        """Put weights and buffers back."""
        with torch.no_grad():
            for tensors, key, _, x, before in self._before:
                tensors[key] = x
                if not _identical(x, before):
                    x.copy_(before)

    def loss(self, batch: Any, seed: int) -> Tensor:
        """The loss of the step, with its graph."""
        trainer, module = self.trainer, self.module
        self.restore()
        torch.manual_seed(seed)
        batch = trainer.precision_plugin.convert_input(batch)
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        arguments = [batch, 0] if _takes_index(module) else [batch]
        with torch.enable_grad(), trainer.precision_plugin.train_step_context():
            output = trainer.strategy.training_step(*arguments)
        if output is None:
            raise MisconfigurationException(
                f"{type(module).__name__}.training_step returned None for random records. Whether a step is skipped "
                "depends on the data, which DP-SGD does not account for: return a loss for every batch."
            )
        return loss_of(output)

    def first_gradient(self, batch: Any, batch_size: int, seed: int) -> Tensor:
        """The first record's gradient, flat."""
        weights = torch.zeros(batch_size)
        weights[0] = 1
        return self._weighted(batch, weights, seed)

    def mean_gradient(self, batch: Any, seed: int) -> Tensor:
        """The mean of the records' gradients, flat."""
        return self._weighted(batch, torch.full((_NUM_RECORDS,), 1 / _NUM_RECORDS), seed)

    def plain_gradient(self, batch: Any, seed: int) -> Tensor:
        """The gradient of the loss as autograd alone finds it, flat."""
        self.gradients.begin()
        with self.gradients.paused():
            loss = self.loss(batch, seed)
            loss.backward()  # type: ignore[no-untyped-call]  # not `autograd.grad`, which re-entrant checkpoints refuse
        return _flat([p.grad for p in self.gradients.parameters.values() if p.grad is not None])

    def _weighted(self, batch: Any, weights: Tensor, seed: int) -> Tensor:
        gradients, n = self.gradients, len(weights)
        loss = self.loss(batch, seed)
        weights = weights.to(loss.device)
        gradients.begin()
        if gradients.engine == "ghost":
            gradients.first_pass(loss)
            self._refuse_unseen()
            sums = self._sums(weights)
            gradients.second_pass_with(weights, n)
        loss.backward()  # type: ignore[no-untyped-call]
        if gradients.engine == "ghost":
            self._refuse_bypass(sums)
        else:
            self._refuse_unseen()
            sums = self._sums(weights)
        gradients.end()
        return _flat(list(sums.values()))

    def _sums(self, weights: Tensor) -> dict[Tensor, Tensor]:
        """The weighted sums of what the layers reported."""
        gradients, n = self.gradients, len(weights)
        with torch.no_grad():
            gradients.squared_norms(n)
            sums = gradients.weighted_sum(dict.fromkeys(gradients.parameters.values(), weights), n)
        return {p: sums[p] for p in gradients.parameters.values()}

    def _refuse_bypass(self, sums: dict[Tensor, Tensor]) -> None:
        """Refuse (ghost) gradients of the second pass that the layers, and so the norms, know nothing of."""
        named = self.gradients.parameters
        found = {p: torch.zeros_like(p) if p.grad is None else p.grad for p in named.values()}
        off = _tolerance(self.trainer) * float(_flat(list(found.values())).norm())
        names = [name for name, p in named.items() if float((sums[p] - found[p]).double().norm()) > off]
        if names:
            raise MisconfigurationException(stray_gradient(names))

    def _refuse_unseen(self) -> None:
        gradients = self.gradients
        if gradients.stray():
            raise MisconfigurationException(stray_gradient(gradients.stray()))
        if gradients.unreached():
            raise MisconfigurationException(
                f"No gradient reaches {', '.join(gradients.unreached())} in the training step: its layer is not called, or "
                "its parameters are used elsewhere than in its forward. Freeze what is not used "
                "(`requires_grad_(False)`)."
            )


def _takes_index(module: pl.LightningModule) -> bool:
    return is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)


def _random_records(records: Any) -> Any:
    """Records of the same shapes and dtypes, in the ranges of those given; integers are some of theirs."""

    def random(x: Tensor) -> Tensor:
        if x.ndim == 0:
            return x
        if x.is_floating_point():
            low, high = x.min(), x.max()
            spread = (high - low) if high > low else torch.ones_like(low)
            return low + spread * torch.rand((_NUM_RECORDS, *x.shape[1:]), dtype=x.dtype)
        # each value that is there at a place is as likely as any other, so that rare ones come up
        ordered = x.sort(0).values
        is_repeated = torch.zeros_like(ordered, dtype=torch.bool)
        is_repeated[1:] = ordered[1:] == ordered[:-1]
        draws = [torch.rand(x.shape).masked_fill_(is_repeated, -1).argmax(0, keepdim=True) for _ in range(_NUM_RECORDS)]
        return ordered.gather(0, torch.cat(draws))

    return apply_to_collection(records, Tensor, random)


def _with_first_of(batch: Any, others: Any) -> Any:
    """``others`` with the first record of ``batch``."""
    flat = iter(_tensors(batch))

    def swap(x: Tensor) -> Tensor:
        kept = next(flat)
        return x if x.ndim == 0 else torch.cat([kept[:1], x[1:]])

    return apply_to_collection(others, Tensor, swap)


def _half(batch: Any) -> Any:
    return apply_to_collection(batch, Tensor, lambda x: x if x.ndim == 0 else x[: _NUM_RECORDS // 2])


def _tensors(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []
    apply_to_collection(batch, Tensor, found.append)
    return found


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.detach().flatten().double().cpu() for x in tensors])


def _identical(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)


def _differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    """Names of what two runs left behind differently."""
    return {name for name in a.keys() | b.keys() if name not in a or name not in b or not _identical(a[name], b[name])}


def _tells(gradient: Tensor) -> bool:
    return bool(torch.isfinite(gradient).all() and gradient.any())


def _difference(a: Tensor, b: Tensor) -> float:
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        return 0.0  # random records may be beyond what the module takes; then nothing can be said
    scale = max(float(a.norm()), float(b.norm()))
    return float((a - b).norm()) / scale if scale > 0 else 0.0


def _tolerance(trainer: pl.Trainer) -> float:
    precision = str(trainer.precision)
    if precision.startswith("bf16"):
        return _TOLERANCE[torch.bfloat16]
    return _TOLERANCE[torch.float64 if precision.startswith("64") else torch.float32]


@contextmanager
def _nothing_kept(module: pl.LightningModule) -> Iterator[None]:
    """Silence logging, switch dropout off, and put metrics back as they were afterwards."""
    metrics = [m for m in module.modules() if isinstance(m, Metric)]
    before = [{name: copy.deepcopy(value) for name, value in vars(m).items() if _is_state(m, name)} for m in metrics]
    dropouts = [m for m in module.modules() if isinstance(m, _DROPOUTS) and m.training]
    for name in ("log", "log_dict"):
        module.__dict__[name] = lambda *_, **__: None
    for dropout in dropouts:
        dropout.eval()
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            del module.__dict__[name]
        for dropout in dropouts:
            dropout.train()
        for metric, state in zip(metrics, before, strict=True):
            vars(metric).update(state)


def _is_state(metric: Metric, name: str) -> bool:
    return name in metric._defaults or name in ("_update_count", "_computed", "_forward_cache", "_update_called")
