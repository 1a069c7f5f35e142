"""Another optimizer for a module that is left as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from groundwire.plugins.optimizers import optimizer_state_bytes

_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
"""Learning rates in a parameter group; all but the first are put there by schedulers."""
_RATES_OF_SCHEDULERS = ("base_lrs", "max_lrs", "_last_lr")
_HOOK = "configure_optimizers"


class OptimizerSwap(pl.Callback):
    """Replaces the optimizer that a module's ``configure_optimizers`` returns by another, before training.

    So optimizers can be compared on any module. The new optimizer gets the same parameter groups, with names, and has its
    own settings. Of the old groups, only what sets one apart is kept: an option that differs from the old optimizer's
    default, if the new one has it too (no weight decay on biases, say), and learning rates relative to that default.

    A learning-rate scheduler goes on with the new optimizer: its rates are multiplied by the ratio of the two optimizers'
    default learning rates. Floors that were given as numbers (``eta_min``, ``min_lr`` of a plateau) stay as they are.
    State and schedule are saved and resumed as always, and a checkpoint of another optimizer is refused. The size of the
    state is logged at the end of each epoch, as ``optimizer/state_bytes``.

    Args:
        optimizer: Builds the new optimizer from parameter groups. In YAML: a class and its settings.

    Raises:
        MisconfigurationException: For manual optimization, no or several optimizers, an optimizer that does not take the
            groups as they are, a scheduler that cannot go on with it, or a checkpoint that was written with another one.

    Example:
        >>> from groundwire.plugins.optimizers import FRUGAL
        >>> swap = OptimizerSwap(lambda params: FRUGAL(params, lr=1e-3, density=0.25))
        >>> trainer = pl.Trainer(callbacks=[swap], accelerator="cpu", logger=False, enable_checkpointing=False)
    """

    def __init__(self, optimizer: Callable[[Iterable[Any]], Optimizer]) -> None:
        self.optimizer = optimizer
        self._name: str | None = None
        self._saved: str | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"OptimizerSwap replaces one optimizer that Lightning steps, but {type(pl_module).__name__} sets "
                "`automatic_optimization = False`. Return the loss and let Lightning step the optimizer."
            )
        self._name = self._saved = None
        pl_module.__dict__[_HOOK] = _Swapped(self, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.log("optimizer/state_bytes", float(optimizer_state_bytes(trainer.optimizers[0])), sync_dist=True)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._put_back(pl_module)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._put_back(pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self._name}

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == TrainerFn.FITTING and "optimizer_states" in checkpoint:
            saved = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("optimizer")
            self._saved = saved if saved is not None else "the module's own optimizer"
            self._compare()

    def _compare(self) -> None:
        """Strategies differ in whether the optimizer or the checkpoint is there first."""
        if self._saved is not None and self._name is not None and self._saved != self._name:
            raise MisconfigurationException(
                f"The checkpoint's optimizer state is of {self._saved}, not of {self._name}. Resume with the optimizer that "
                "it was written with, or start anew from its weights alone."
            )

    def _put_back(self, pl_module: pl.LightningModule) -> None:
        current = pl_module.__dict__.get(_HOOK)
        if isinstance(current, _Swapped) and current.callback is self:
            current.put_back()

    def _configured(self, configured: Any, pl_module: pl.LightningModule) -> Any:
        """What the module's hook returned, with the new optimizer in it."""
        leaves = list(_leaves(configured))
        optimizers = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Optimizer)}
        if len(optimizers) != 1:
            raise MisconfigurationException(
                f"OptimizerSwap replaces one optimizer, but {type(pl_module).__name__}.configure_optimizers returned "
                f"{len(optimizers) or 'none'}. Let it return one, with all parameters in its groups."
            )
        (old,) = optimizers.values()
        new = self._built(old, pl_module)
        schedulers = [leaf for leaf in leaves if hasattr(leaf, "step") and not isinstance(leaf, Optimizer)]
        _move_groups(old, new, has_schedule=bool(schedulers))
        for scheduler in schedulers:
            _move_schedule(scheduler, old, new)
        self._name = type(new).__name__
        self._compare()
        rank_zero_info(f"OptimizerSwap: {self._name} takes the place of {type(old).__name__}.")
        return _replaced(configured, old, new)

    def _built(self, old: Optimizer, pl_module: pl.LightningModule) -> Optimizer:
        names = {p: name for name, p in pl_module.named_parameters()}
        groups = [group["params"] for group in old.param_groups]
        named = all(p in names for params in groups for p in params)
        new = self.optimizer([{"params": [(names[p], p) if named else p for p in params]} for params in groups])
        if not isinstance(new, Optimizer):
            raise MisconfigurationException(
                f"`optimizer` of OptimizerSwap must build a torch optimizer from parameter groups, got a {type(new).__name__}."
            )
        if [[*map(id, group["params"])] for group in new.param_groups] != [[*map(id, params)] for params in groups]:
            raise MisconfigurationException(
                f"{type(new).__name__} was given the module's {len(groups)} parameter group(s) and has others: OptimizerSwap "
                "needs one that takes them as they are. Build this one in the module's `configure_optimizers`."
            )
        return new


class _Swapped:
    """Stands in for a module's ``configure_optimizers``, as an instance attribute, until it is called."""

    def __init__(self, callback: OptimizerSwap, pl_module: pl.LightningModule) -> None:
        self.callback = callback
        self.pl_module = pl_module
        self.before = pl_module.__dict__.get(_HOOK)  # the instance attribute that was there, if any
        self.found = pl_module.configure_optimizers
        self.__code__ = _overridden.__code__  # Lightning looks whether the module's is its own

    def __call__(self) -> Any:
        self.put_back()
        return self.callback._configured(self.found(), self.pl_module)

    def put_back(self) -> None:
        if self.before is None:
            del self.pl_module.__dict__[_HOOK]
        else:
            self.pl_module.__dict__[_HOOK] = self.before

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self.before is not None:
            return copy.deepcopy(self.before, memo)
        return _own_hook(copy.deepcopy(self.pl_module, memo))

    def __reduce__(self) -> Any:
        return _own_hook, (self.pl_module,)


def _overridden() -> None:
    """Has other code than LightningModule's hook."""


def _own_hook(pl_module: pl.LightningModule) -> Any:
    return getattr(type(pl_module), _HOOK).__get__(pl_module)


def _leaves(configured: Any) -> Iterator[Any]:
    if isinstance(configured, dict):
        configured = list(configured.values())
    if isinstance(configured, list | tuple):
        for item in configured:
            yield from _leaves(item)
    else:
        yield configured


def _replaced(configured: Any, old: Optimizer, new: Optimizer) -> Any:
    if isinstance(configured, dict):
        return {key: _replaced(value, old, new) for key, value in configured.items()}
    if isinstance(configured, list | tuple):
        return type(configured)([_replaced(item, old, new) for item in configured])
    return new if configured is old else configured


def _move_groups(old: Optimizer, new: Optimizer, *, has_schedule: bool) -> None:
    """Give the new groups what sets the old ones apart, and what a schedule has put there."""
    if has_schedule:
        LambdaLR(new, lambda _: 1.0)  # changes nothing, but makes the optimizer count its steps, as all schedulers do
    for before, after in zip(old.param_groups, new.param_groups, strict=True):
        cycled = ("betas", "momentum") if "max_momentum" in before else ()
        special = [k for k in old.defaults if k != "lr" and k not in cycled and before[k] != old.defaults[k]]
        lost = [k for k in special if k not in new.defaults]
        if lost:
            rank_zero_warn(
                f"{type(new).__name__} has no {', '.join(lost)}, which a parameter group set: this is left out."
            )
        after.update({k: before[k] for k in special if k in new.defaults})
        scheduled = before.keys() - old.defaults.keys() - {"params", "param_names"}
        after.update({k: before[k] for k in scheduled})
        own_rate = {"lr"} if before.get("lr") != old.defaults.get("lr") else set()
        for k in (scheduled | own_rate) & {*_RATES}:
            after[k] = _rescaled(before[k], old, new)
        if cycled:
            momentum = before["betas"][0] if "betas" in before else before["momentum"]
            if "betas" in after:
                after["betas"] = (momentum, *after["betas"][1:])
            elif "momentum" in after:
                after["momentum"] = momentum


def _move_schedule(scheduler: Any, old: Optimizer, new: Optimizer) -> None:
    """Point a scheduler, and those within, to the new optimizer."""
    name = type(scheduler).__name__
    if getattr(scheduler, "optimizer", None) is not old:
        raise MisconfigurationException(
            f"{name} does not keep its optimizer as `optimizer`, so OptimizerSwap cannot point it to {type(new).__name__}. Use a "
            "torch.optim.lr_scheduler.LRScheduler."
        )
    if getattr(scheduler, "cycle_momentum", False):
        if not {"betas", "momentum"} & new.defaults.keys():
            raise MisconfigurationException(
                f"{name} cycles the momentum, which {type(new).__name__} does not have. Set cycle_momentum=False."
            )
        scheduler.use_beta1 = "betas" in new.defaults
    scheduler.optimizer = new
    for attribute in _RATES_OF_SCHEDULERS:
        if hasattr(scheduler, attribute):
            setattr(scheduler, attribute, [_rescaled(rate, old, new) for rate in getattr(scheduler, attribute)])
    for inner in getattr(scheduler, "_schedulers", ()):
        _move_schedule(inner, old, new)


def _rescaled(rate: Any, old: Optimizer, new: Optimizer) -> Any:
    """A learning rate of the old optimizer, relative to its default, as one of the new optimizer."""
    before, after = old.defaults.get("lr"), new.defaults.get("lr")
    if not before or not isinstance(after, float | int):
        raise MisconfigurationException(
            f"The learning rates of {type(old).__name__} (default {before}) cannot be carried over to {type(new).__name__} "
            f"(default {after}), as a schedule or a parameter group's own rate needs. Give both a number as `lr`, not 0."
        )
    return after if rate == before else rate * (after / before)
