"""Few-shot fine-tuning of few parameters: a new head, and scales and shifts after the normalisation layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from groundwire.callbacks.weights import find_checkpoint, read_weights

_FILM = "film"  # the attribute of the LightningModule under which the adapters are found
_STARTED = "_few_shot_started"  # a plain attribute of a module whose fine-tuning has begun; goes along with copies
_TRACKS_STATISTICS = nn.modules.batchnorm._NormBase  # BatchNorm, SyncBatchNorm and InstanceNorm
_NORMS = (_TRACKS_STATISTICS, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


class FiLMLayer(nn.Module):
    """Scales and shifts each channel: ``out = x * (1 + gamma) + beta``, the identity at first.

    A leaf with parameters of its own, used in its own ``forward`` alone and out of place, so that per-sample gradients
    (``torch.func``, Opacus) can be taken through it.

    Args:
        num_channels: Channels ``C``.
        channel_dim: Dimension of ``x`` that holds them.

    Raises:
        ValueError: If there is no channel; in ``forward``, if ``x`` has another number of them.

    Example:
        >>> layer = FiLMLayer(3, channel_dim=1)
        >>> layer(torch.ones(2, 3, 4, 4)).shape, sum(p.numel() for p in layer.parameters())
        (torch.Size([2, 3, 4, 4]), 6)

    Reference:
        Perez et al., "FiLM: Visual Reasoning with a General Conditioning Layer", AAAI 2018, Section 2.
        arXiv:1709.07871
    """

    def __init__(self, num_channels: int, channel_dim: int) -> None:
        super().__init__()
        if num_channels < 1:
            raise ValueError(f"`num_channels` must be at least 1, got {num_channels}.")
        self.num_channels = num_channels
        self.channel_dim = channel_dim
        self.gamma = nn.Parameter(torch.zeros(num_channels))
        self.beta = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Activations to activations of the same shape and dtype."""
        if not -x.ndim <= self.channel_dim < x.ndim or x.shape[self.channel_dim] != self.num_channels:
            raise ValueError(
                f"FiLM expects {self.num_channels} channels in dimension {self.channel_dim}, got {tuple(x.shape)}."
            )
        shape = [1] * x.ndim
        shape[self.channel_dim] = self.num_channels
        gamma, beta = self.gamma.to(x.dtype).view(shape), self.beta.to(x.dtype).view(shape)
        return x * (1 + gamma) + beta

    @override
    def extra_repr(self) -> str:
        return f"{self.num_channels}, channel_dim={self.channel_dim}"


class _Adapt:
    """The forward hook: a class, so that a copy of the module has its own layer in its own hook, and can be pickled."""

    def __init__(self, layer: FiLMLayer) -> None:
        self.layer = layer

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        adapted: Tensor = self.layer(output)
        return adapted


def insert_film(module: nn.Module, after: Sequence[str | type[nn.Module]] | None = None) -> nn.ModuleDict:
    """Put a :class:`FiLMLayer` behind layers of a module; they are part of the module from then on.

    The adapters are registered as ``module.film``, so ``module.parameters()`` and ``module.state_dict()`` have them, as
    do copies of the module. A module that has them already is left alone. Call it before ``load_state_dict`` on a fresh
    module, to use an adapted checkpoint without the callback.

    Channels are found in dimension 1 behind BatchNorm and GroupNorm, in the last one behind LayerNorm and RMSNorm (the
    first of those normalised, if they are several; of the layers called ``LayerNorm2d``, which work on images, the
    third from the end), and where convolutions and linear layers put them.

    Args:
        module: Is changed.
        after: Which layers, by dotted name, type or name of a type; all normalisation layers if None.

    Returns:
        ``module.film``, a :class:`FiLMLayer` per layer, keyed by the layer's name with ``-`` for each dot.

    Raises:
        MisconfigurationException: If there is no such layer, the channels of one are not known, ``module.film`` is
            something else, it has adapters elsewhere, or the module is a container, whose content ``film`` would become.

    Example:
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        >>> insert_film(Net())
        ModuleDict(
          (layers-1): FiLMLayer(4, channel_dim=1)
        )
    """
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        raise MisconfigurationException(
            f"A {type(module).__name__} would take `{_FILM}` for one more of its layers: give the module that holds it."
        )
    adapted = _layers_to_adapt(module, after)
    keys = dict(zip(_keys(adapted), adapted, strict=True))
    found = getattr(module, _FILM, None)
    if isinstance(found, nn.ModuleDict) and all(isinstance(layer, FiLMLayer) for layer in found.values()):
        if set(found) != set(keys):
            raise MisconfigurationException(
                f"{type(module).__name__} has adapters after {', '.join(found)} already, and `after` asks for "
                f"{', '.join(keys)}: start from a fresh module, or give the `after` that it was adapted with."
            )
        return found
    if found is not None:
        raise MisconfigurationException(
            f"{type(module).__name__}.{_FILM} is a {type(found).__name__}, and the adapters would go there: rename it."
        )
    film = nn.ModuleDict()
    for key, name in keys.items():
        layer = module.get_submodule(name)
        channels, dim = _channels(name, layer)
        like = next(layer.parameters(), next(module.parameters(), None))
        film[key] = adapter = FiLMLayer(channels, dim)
        if like is not None and like.is_floating_point():
            adapter.to(like.device, like.dtype)
        layer.register_forward_hook(_Adapt(adapter))
    setattr(module, _FILM, film)
    return film


class HeadOnly(pl.Callback):
    """Trains the last layer alone: everything else is frozen while the fit lasts.

    A pretrained network is adapted to a new task with little data, or privately: few trained parameters take little
    noise. With ``DPSGD(fix=True)``, list it before that: frozen layers need no fix.

    Frozen means that ``requires_grad`` is False and that frozen normalisation layers with running statistics work in
    evaluation mode, since in training mode they would mix the samples of a batch and drift. Flags and modes are put back
    at the end of the fit. A module that such a callback has begun to fine-tune goes on from where it is in a second fit:
    nothing is loaded, and the head is not reset.

    Args:
        head: Dotted name of the submodule that is trained; the last ``Linear`` if None.
        zero_head: Whether the head starts at zero (its last layer, if it has several).
        pretrained: A Lightning checkpoint, or the folder of a run, whose weights are loaded before. The head's may be
            missing or have another shape (those are left as they are), all others must match.

    Raises:
        MisconfigurationException: At setup, if there is no such head or it has no parameters, if another callback of
            this kind is there, or at the start of the fit, if the optimizer lacks what is to be trained.
        FileNotFoundError: At setup, if there is no checkpoint.
        ValueError: At setup, if the checkpoint belongs to another network.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[HeadOnly(head="net.11")], logger=False, enable_checkpointing=False)

    Reference:
        Tobaben et al., "On the Efficacy of Differentially Private Few-shot Image Classification", TMLR 2023, Section 3.
        arXiv:2302.01190
    """

    def __init__(self, head: str | None = None, zero_head: bool = True, pretrained: str | Path | None = None) -> None:
        self.head = head
        self.zero_head = zero_head
        self.pretrained = pretrained
        self._before: list[tuple[Any, str, bool]] = []
        self._in_eval: list[nn.Module] = []

    def insert(self, module: nn.Module) -> None:
        """Add what is trained besides the head; here nothing."""

    def trained(self, module: nn.Module) -> Iterator[nn.Module]:
        """The submodules that are trained.

        Args:
            module: The LightningModule.

        Yields:
            Submodules, here the head.
        """
        yield module.get_submodule(self._head_of(module))

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        others = [c for c in trainer.callbacks if isinstance(c, HeadOnly) and c is not self]  # type: ignore[attr-defined]
        if others:
            raise MisconfigurationException(
                f"{type(self).__name__} and {type(others[0]).__name__} would each freeze what the other trains: keep one."
            )
        self.insert(pl_module)  # also for an evaluation: the checkpoint is restored after this hook
        if stage != "fit":
            return
        head = self._head_of(pl_module)
        if not getattr(pl_module, _STARTED, False):
            if self.pretrained is not None:
                _load_pretrained(pl_module, self.pretrained, head)
            if self.zero_head:
                _zero_last_layer(pl_module.get_submodule(head))
            setattr(pl_module, _STARTED, True)
        self._freeze(pl_module)
        number = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        total = sum(p.numel() for p in pl_module.parameters())
        rank_zero_info(f"{type(self).__name__} trains {number:,} of {total:,} parameters; the head is `{head}`.")

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_in_place(pl_module)
        given = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        missing = [name for name, p in pl_module.named_parameters() if p.requires_grad and id(p) not in given]
        if missing:
            raise MisconfigurationException(
                f"The optimizer does not have {_some(missing)}, which {type(self).__name__} trains: let "
                "`configure_optimizers` take all of `self.parameters()`."
            )
        self._hold_in_eval()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._hold_in_eval()

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._hold_in_eval()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._hold_in_eval()  # a validation, or a module that calls `self.train()` after it, may have come between

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._release()

    def _head_of(self, module: nn.Module) -> str:
        named = {name: sub for name, sub in module.named_modules() if name and name.split(".")[0] != _FILM}
        if self.head is None:
            linear: list[str] = [name for name, sub in named.items() if isinstance(sub, nn.Linear)]
            if not linear:
                raise MisconfigurationException(
                    f"{type(module).__name__} has no Linear layer to take as the head; it has {_types(module)}. Name "
                    f"the head: head=..., one of {', '.join(named) or 'none, as it has no submodule yet'}. Layers must "
                    "be built in `__init__`."
                )
            return linear[-1]
        if self.head not in named:
            raise MisconfigurationException(
                f"{type(module).__name__} has no submodule {self.head!r} to take as the head; it has {', '.join(named)}."
            )
        if next(named[self.head].parameters(), None) is None:
            raise MisconfigurationException(
                f"The head {self.head!r} is a {type(named[self.head]).__name__} without parameters: there is nothing to "
                "train."
            )
        return self.head

    def _freeze(self, module: nn.Module) -> None:
        self._release()
        trained = list(self.trained(module))
        trains = {id(p) for sub in trained for p in sub.parameters()}
        inside = {id(sub) for root in trained for sub in root.modules()}
        for parameter in module.parameters():
            self._before.append((parameter, "requires_grad", parameter.requires_grad))
            parameter.requires_grad_(id(parameter) in trains)
        for sub in module.modules():
            if isinstance(sub, _TRACKS_STATISTICS) and id(sub) not in inside:
                self._before.append((sub, "training", sub.training))
                self._in_eval.append(sub)
        self._hold_in_eval()

    def _hold_in_eval(self) -> None:
        for norm in self._in_eval:
            if norm.training:
                norm.training = False

    def _release(self) -> None:
        for holder, name, value in self._before:
            setattr(holder, name, value)
        self._before, self._in_eval = [], []

    def _check_in_place(self, module: nn.Module) -> None:
        """Refuse a module whose layers were replaced after setup."""
        present = {id(sub) for sub in module.modules()}
        if any(id(sub) not in present for sub in self._in_eval):
            raise MisconfigurationException(
                f"Normalisation layers that {type(self).__name__} froze were replaced by others. Use "
                "Trainer(sync_batchnorm=False), frozen layers have no statistics to synchronise; and let no other "
                "callback replace them (DPSGD(fix=False): frozen BatchNorm needs no fix)."
            )


class FiLM(HeadOnly):
    """Trains a scale and a shift per channel behind the normalisation layers, and the head; the rest is frozen.

    Two parameters a channel (see :class:`FiLMLayer`) adapt the features of a pretrained network, at a small part of the
    parameters of full fine-tuning. They are offsets that start at zero: before the first step the network is what it was.
    They live in ``pl_module.film``, are saved with the module's weights and stay after the fit. The callback inserts them
    in every stage, so that ``trainer.test(module, ckpt_path=...)`` works with a fresh module;
    :func:`insert_film` does so without a Trainer. All other behaviour is that of :class:`HeadOnly`.

    Args:
        head: Dotted name of the submodule that is trained; the last ``Linear`` if None.
        zero_head: Whether the head starts at zero (its last layer, if it has several).
        pretrained: A Lightning checkpoint, or the folder of a run, whose weights are loaded before. The head's may be
            missing or have another shape (those are left as they are), all others must match.
        after: Which layers get an adapter, by dotted name, type or name of a type; all normalisation layers if None.

    Raises:
        MisconfigurationException: At setup, as in :class:`HeadOnly` and :func:`insert_film`; or later, if the layers were
            replaced.
        FileNotFoundError: At setup, if there is no checkpoint.
        ValueError: At setup, if the checkpoint belongs to another network.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[FiLM(after=["BatchNorm2d"])], logger=False, enable_checkpointing=False)

    Reference:
        Perez et al., "FiLM: Visual Reasoning with a General Conditioning Layer", AAAI 2018, Section 2.
        arXiv:1709.07871. Tobaben et al., "On the Efficacy of Differentially Private Few-shot Image Classification",
        TMLR 2023, Section 3. arXiv:2302.01190
    """

    def __init__(
        self,
        head: str | None = None,
        zero_head: bool = True,
        pretrained: str | Path | None = None,
        after: list[str | type[nn.Module]] | None = None,
    ) -> None:
        super().__init__(head, zero_head, pretrained)
        self.after = after

    @override
    def insert(self, module: nn.Module) -> None:
        insert_film(module, self.after)

    @override
    def trained(self, module: nn.Module) -> Iterator[nn.Module]:
        yield from super().trained(module)
        yield getattr(module, _FILM)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_in_place(pl_module)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_in_place(pl_module)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check_in_place(pl_module)

    @override
    def _check_in_place(self, module: nn.Module) -> None:
        super()._check_in_place(module)
        hooked = {
            id(hook.layer)
            for sub in module.modules()
            for hook in sub._forward_hooks.values()
            if isinstance(hook, _Adapt)
        }
        lost = [key for key, layer in getattr(module, _FILM).items() if id(layer) not in hooked]
        if lost:
            raise MisconfigurationException(
                f"The adapters after {_some(lost)} are no longer attached: the layers were replaced after setup. Use "
                "Trainer(sync_batchnorm=False) and DPSGD(fix=False), and replace layers before the fit, not in a callback."
            )


def _layers_to_adapt(module: nn.Module, after: Sequence[str | type[nn.Module]] | None) -> list[str]:
    """Dotted names, in the module's order."""
    named = {name: sub for name, sub in module.named_modules() if name and name.split(".")[0] != _FILM}
    if after is None:
        found = [name for name, sub in named.items() if isinstance(sub, _NORMS)]
        if not found:
            raise MisconfigurationException(
                f"{type(module).__name__} has no normalisation layer to put FiLM behind; it has {_types(module)}. Name "
                "layers or types: after=['Conv2d'], or use HeadOnly. Layers must be built in `__init__`."
            )
        return found
    chosen: set[str] = set()
    for wanted in after:
        if isinstance(wanted, str):
            of_type = [n for n, sub in named.items() if wanted in (cls.__name__ for cls in type(sub).__mro__)]
            here = [wanted] if wanted in named else of_type
        else:
            here = [name for name, sub in named.items() if isinstance(sub, wanted)]
        if not here:
            shown = wanted if isinstance(wanted, str) else wanted.__name__
            raise MisconfigurationException(
                f"{type(module).__name__} has no layer of the name or type {shown!r} to put FiLM behind; it has the types "
                f"{_types(module)} and the names {', '.join(named) or 'none'}."
            )
        chosen.update(here)
    if not chosen:
        raise MisconfigurationException("`after` names no layer: leave it at None for all normalisation layers.")
    return [name for name in named if name in chosen]


def _keys(names: list[str]) -> list[str]:
    """Names that a ModuleDict takes: without a dot, no attribute of its own, each once."""
    keys: list[str] = []
    taken = nn.ModuleDict()
    for name in names:
        key = name.replace(".", "-")
        while key in keys or hasattr(taken, key):
            key += "_"
        keys.append(key)
    return keys


def _channels(name: str, layer: nn.Module) -> tuple[int, int]:
    """Number of channels, and the dimension of the layer's output that holds them."""
    match layer:
        case nn.InstanceNorm1d():  # takes inputs with and without a batch dimension, hence counted from the end
            return layer.num_features, -2
        case nn.InstanceNorm2d():
            return layer.num_features, -3
        case nn.InstanceNorm3d():
            return layer.num_features, -4
        case nn.modules.batchnorm._NormBase():
            return layer.num_features, 1
        case nn.GroupNorm():
            return layer.num_channels, 1
        case nn.LayerNorm() if type(layer).__name__ == "LayerNorm2d":
            return layer.normalized_shape[-1], -3
        case nn.LayerNorm() | nn.RMSNorm():
            return layer.normalized_shape[0], -len(layer.normalized_shape)
        case nn.modules.conv._ConvNd():
            return layer.out_channels, -1 - len(layer.kernel_size)
        case nn.Linear():
            return layer.out_features, -1
    raise MisconfigurationException(
        f"`{name}` is a {type(layer).__name__}: FiLM does not know its channels. Put it behind normalisation layers, "
        "convolutions or linear layers."
    )


def _load_pretrained(module: nn.Module, path: str | Path, head: str) -> None:
    """Load all weights but those of the head that do not fit; adapters that the file lacks stay as they are."""
    file = find_checkpoint(path)
    state, own = read_weights(file), module.state_dict()
    fits = {name: value for name, value in state.items() if name in own and _shape(value) == _shape(own[name])}
    unfit = [name for name in sorted(state.keys() | own.keys()) if name not in fits]
    in_head = [name for name in unfit if name.startswith(f"{head}.")]
    wrong = [
        f"`{name}` {_shape(state[name]) if name in state else 'missing'} in the file, "
        f"{_shape(own[name]) if name in own else 'missing'} in the model"
        for name in unfit
        if name not in in_head and not (name.startswith(f"{_FILM}.") and name not in state)
    ]
    if wrong:
        raise ValueError(
            f"{file} does not fit {type(module).__name__} outside of the head `{head}`: {_some(wrong, '; ')}. Build the "
            "network that the checkpoint was written with, or name the head that is new: head=..."
        )
    module.load_state_dict(fits, strict=False)
    new = f"; not loaded, as the head is new: {', '.join(in_head)}" if in_head else ""
    rank_zero_info(f"Loaded {len(fits)} entries from {file}{new}.")


def _shape(value: Any) -> list[int] | str:
    return list(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _zero_last_layer(head: nn.Module) -> None:
    last = [sub for sub in head.modules() if next(sub.parameters(recurse=False), None) is not None][-1]
    for parameter in last.parameters(recurse=False):
        nn.init.zeros_(parameter)


def _some(names: list[str], separator: str = ", ") -> str:
    return separator.join(names[:3]) + (f"{separator}and {len(names) - 3} more" if len(names) > 3 else "")


def _types(module: nn.Module) -> str:
    leaves = {type(sub).__name__ for sub in module.modules() if next(sub.children(), None) is None}
    return ", ".join(sorted(leaves))
