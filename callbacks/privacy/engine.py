"""Clips every record's gradient, in one or two backward passes of an unmodified module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from opacus.layers.dp_rnn import DPRNNBase
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from groundwire.callbacks.privacy.grad_samples import (
    Call,
    GradSamples,
    Instantiated,
    LayerGradients,
    bookkeeping,
    functorch_grad_samples,
    opacus_grad_samples,
)

_TRANSPARENT = (DPRNNBase,)  # its cells' parameters are registered on it as well

EngineName = Literal["auto", "bookkeeping", "ghost", "hooks", "functorch"]
"""How per-sample gradients are handled; ``"auto"`` is book-keeping, which builds them only where a layer needs it."""


class PerSampleGradients:
    """Observes the layers of a module, so that after a backward pass the records' gradients can be weighed and summed.

    Nothing is wrapped or renamed: layers that own parameters get forward hooks, which note the inputs, and have autograd
    report the gradient at the output. Only what the backward pass of the loss itself reaches counts, so forward passes
    made on the side (an attack's, a teacher's) do not disturb. While a layer runs, its parameters do not require
    gradients: autograd skips the sum over the records, which would be thrown away, and a gradient that reaches a
    parameter in another way than through its layer shows up in ``p.grad`` and is refused.

    Of the arguments of a layer, the first tensor has one row per record. Another one has, too, if its rows are as many as
    the records in every call so far: calls with different numbers of records tell it from, say, a mask of positions.

    Args:
        module: The module; its trainable parameters are those that require gradients when :meth:`attach` is called.
        engine: ``"hooks"`` builds all per-sample gradients by Opacus's rules, ``"functorch"`` by ``vmap``;
            ``"bookkeeping"`` derives norms and sums of linear layers, convolutions and embeddings from inputs and
            backprops; ``"ghost"`` takes norms likewise, and makes the sum by a second backward pass.
        ghost_output: With ``"ghost"``, the dotted name of the submodule (by default the module itself) whose output,
            one tensor with the records first, is all that the loss depends on.

    Raises:
        MisconfigurationException: In :meth:`attach`, if a parameter cannot be seen through a layer; in a forward pass, if
            a norm uses or keeps the statistics of the batch.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 1))
        >>> engine = PerSampleGradients(net)
        >>> with engine.attached():
        ...     engine.begin()
        ...     net(torch.ones(4, 3)).mean().backward()
        ...     norms = engine.squared_norms(batch_size=4)
        >>> norms[net[0].weight]
        tensor([3., 3., 3., 3.])

    Reference:
        Yousefpour et al., "Opacus: User-Friendly Differential Privacy Library in PyTorch", 2021. arXiv:2109.12298
        Bu et al., "Differentially Private Optimization on Large Model at Small Cost", ICML 2023. arXiv:2210.00038
        Li et al., "Large Language Models Can Be Strong Differentially Private Learners", ICLR 2022. arXiv:2110.05679
    """

    def __init__(self, module: nn.Module, engine: EngineName = "auto", ghost_output: str = "") -> None:
        self.module = module
        self.engine = engine
        self.ghost_output = ghost_output
        self.parameters: dict[str, Tensor] = {}
        self._records: dict[nn.Module, list[tuple[Call, Tensor]]] = {}
        self._names: dict[nn.Module, str] = {}
        self._handles: list[RemovableHandle] = []
        self._anchor: Tensor | None = None
        self._paused = False
        self._frozen_for_call: list[Tensor] = []
        self._row_scale: Tensor | None = None  # ghost: what the second pass multiplies the rows of the output by
        self._first: dict[nn.Module, list[Tensor]] = {}  # ghost: what the first pass reported
        self._is_first_pass = False
        self._gradients: list[LayerGradients] | None = None
        self._same_for_all: dict[nn.Module, set[int]] = {}  # places of arguments that do not hold one row per record

    # ---------------------------------------------------------------- attach

    def attach(self) -> None:
        """Put hooks on all layers that own trainable parameters.

        Raises:
            MisconfigurationException: If a parameter belongs to no layer that can be observed.
        """
        self.detach()
        self.parameters = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise MisconfigurationException(
                f"{type(self.module).__name__} has no parameter that requires a gradient: nothing to train privately."
            )
        owners = {
            layer: name
            for name, layer in self.module.named_modules()
            if any(p.requires_grad for p in layer.parameters(recurse=False)) and not isinstance(layer, _TRANSPARENT)
        }
        inside = {part for layer in owners for part in layer.modules() if part is not layer}
        for layer, name in owners.items():
            if layer in inside:  # of a layer with parameters and submodules, the whole is one layer
                continue
            self._refuse(name, layer)
            self._names[layer] = name
            self._handles += [
                layer.register_forward_pre_hook(self._before_forward),
                layer.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True),
            ]
        for name, layer in self.module.named_modules():
            if isinstance(layer, nn.modules.batchnorm._NormBase):
                self._handles.append(layer.register_forward_pre_hook(partial(_refuse_statistics, name)))
        if self.engine == "ghost":
            output_of = self.module.get_submodule(self.ghost_output)
            self._handles.append(output_of.register_forward_hook(self._note_output))
        # on the first parameter's device; it lets autograd report at outputs of layers whose input needs no gradient
        self._anchor = torch.zeros((), device=next(iter(self.parameters.values())).device, requires_grad=True)

    def _refuse(self, name: str, layer: nn.Module) -> None:
        own = ", ".join(f"`{n}`" for n, p in layer.named_parameters(recurse=False) if p.requires_grad)
        if layer is self.module:
            raise MisconfigurationException(
                f"{own} belongs to {type(layer).__name__} itself, whose forward cannot be told apart from the step. Put "
                "it into a submodule of its own, whose forward uses it."
            )
        if self.engine == "ghost" and any(True for _ in layer.children()):
            raise MisconfigurationException(
                f"Ghost clipping cannot tell {own} of `{name}` from the parameters of its submodules. Use "
                "engine='bookkeeping', or put them into a submodule of their own."
            )
        dropouts = [
            m for m in layer.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.training and m.p > 0
        ]
        if dropouts and any(True for _ in layer.children()):
            raise MisconfigurationException(
                f"`{name}` has {own} of its own beside submodules, so its records are run one by one, where an active "
                f"{type(dropouts[0]).__name__} inside cannot draw the same again. Put {own} into a submodule of its own, "
                "or set the dropout to 0."
            )
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.scale_grad_by_freq:
            raise MisconfigurationException(
                f"`{name}` scales gradients by how often the batch has a token, which mixes records. Set "
                "scale_grad_by_freq=False."
            )

    def detach(self) -> None:
        """Take all hooks away; calling it again does nothing."""
        for handle in self._handles:
            handle.remove()
        self._thaw()
        self._handles.clear()
        self._records.clear()
        self._names.clear()
        self._same_for_all.clear()
        self._gradients = self._row_scale = None
        self.parameters = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attach for the time of a context."""
        self.attach()
        try:
            yield
        finally:
            self.detach()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Observe nothing for the time of a context."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def _before_forward(self, layer: nn.Module, inputs: Any) -> None:
        if self._paused or not torch.is_grad_enabled() or self.engine == "ghost":
            return
        for p in layer.parameters():
            if p.requires_grad:
                p.requires_grad_(False)
                self._frozen_for_call.append(p)

    def _thaw(self) -> None:
        for p in self._frozen_for_call:
            p.requires_grad_(True)
        self._frozen_for_call.clear()

    def _after_forward(self, layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        self._thaw()
        if self._paused or not torch.is_grad_enabled():
            return None
        if output is None:  # the forward failed: its own error is the one to see
            return None
        if not isinstance(output, Tensor):
            raise MisconfigurationException(
                f"`{self._names[layer]}` ({type(layer).__name__}) returns a {type(output).__name__}: per-sample "
                "gradients need layers that return one tensor. Opacus has DPLSTM, DPGRU and DPMultiheadAttention."
            )
        call = Call.of(args, kwargs)
        if output.ndim > 0:
            self._learn_arguments(layer, call, len(output))
        held: list[Call] = [call]
        versions = [x._version for x in call.tensors]

        def report(gradient: Tensor) -> None:
            if self._paused or not held:
                return
            # the last pass through the graph lets go of the activations, as autograd does of its own
            seen = held[0] if self._is_first_pass else held.pop()
            if [x._version for x in seen.tensors] != versions:
                raise RuntimeError(
                    f"An input of `{self._names.get(layer, type(layer).__name__)}` was changed in place after the layer "
                    "had used it. Replace the in-place operation."
                )
            self._report(layer, seen, gradient.detach())

        if output.requires_grad:
            output.register_hook(report)  # type: ignore[no-untyped-call]
            return None
        output = output.clone() if output._is_view() else output
        return _Observed.apply(output, self._anchor, report)  # type: ignore[no-untyped-call]

    def _learn_arguments(self, layer: nn.Module, call: Call, num_records: int) -> None:
        """Note which arguments do not follow the number of records; one row may be there for all, and says nothing."""
        different = {
            i
            for i, x in enumerate(call.leaves)
            if isinstance(x, Tensor) and x.ndim > 0 and len(x) not in (1, num_records)
        }
        self._same_for_all.setdefault(layer, set()).update(different)

    def _of_records(self, layer: nn.Module, call: Call, num_records: int) -> list[int]:
        """Places of the arguments that hold one row per record."""
        same = self._same_for_all.get(layer, set())
        first = next((i for i, x in enumerate(call.leaves) if isinstance(x, Tensor)), None)
        return [i for i in call.with_rows(num_records) if i == first or i not in same]

    def _note_output(self, layer: nn.Module, inputs: Any, output: Any) -> Any:
        if self._paused or not torch.is_grad_enabled() or output is None:
            return None
        if layer is self.module and _is_of_a_step(output):  # which Lightning runs in place of the forward under DDP
            return None
        if not isinstance(output, Tensor):
            raise MisconfigurationException(
                f"Ghost clipping needs one tensor as the output of `{self.ghost_output or type(layer).__name__}`, got a "
                f"{type(output).__name__}. Name another submodule as `ghost_output`, or use engine='bookkeeping'."
            )
        output = output.clone()  # so that the rows are weighed before a layer that made the output hears of them
        if output.requires_grad:
            output.register_hook(self._scale_rows)
        return output

    def _scale_rows(self, gradient: Tensor) -> Tensor:
        if self._paused or self._row_scale is None:
            return gradient
        scale = self._row_scale.to(gradient.dtype).view(-1, *[1] * (gradient.ndim - 1))
        return torch.where(scale == 0, 0, gradient * scale)

    def _report(self, layer: nn.Module, call: Call, backprops: Tensor) -> None:
        if self._row_scale is None:
            self._records.setdefault(layer, []).append((call, backprops))
            return
        first = self._first.get(layer)  # ghost: what comes by a second time must be what came first, weighted
        expected = None if not first else first.pop(0)
        if expected is not None:
            scale = self._row_scale.to(backprops.dtype).view(-1, *[1] * (backprops.ndim - 1))
            expected = torch.where(scale == 0, 0, expected * scale)
            tolerance = 1e-3 if backprops.dtype != torch.float64 else 1e-9
            off = (backprops - expected).norm() > tolerance * expected.norm() + 1e-30
        if expected is None or bool(off):
            raise MisconfigurationException(
                f"Ghost clipping weighs the records at the output of `{self.ghost_output or type(self.module).__name__}`, "
                f"but the loss reaches `{self._names[layer]}` in another way, too. Name as `ghost_output` the submodule "
                "whose output is all that the loss depends on, or use engine='bookkeeping'."
            )

    # ---------------------------------------------------------------- a step

    def begin(self) -> None:
        """Forget what backward passes before the one of the loss have reported, and gradients that are there."""
        for p in self.module.parameters():
            p.grad = None
        self._records.clear()
        self._first.clear()
        self._gradients = self._row_scale = None

    def stray(self) -> list[str]:
        """Names of parameters that a gradient reached in another way than through their layer."""
        known = set(self.parameters.values()) if self.engine == "ghost" else set()
        return [name for name, p in self.module.named_parameters() if p.grad is not None and p not in known]

    def unreached(self) -> list[str]:
        """Names of parameters whose layer no gradient reached."""
        reached = {p for layer in self._records for p in layer.parameters()}
        return [name for name, p in self.parameters.items() if p not in reached]

    def squared_norms(self, batch_size: int, scale: float = 1.0) -> dict[Tensor, Tensor]:
        """Squared norms of the records' gradients, for each parameter that was reached.

        Args:
            batch_size: Records ``n`` of the batch.
            scale: What the gradient of the mean loss has to be multiplied by; the steps whose losses Lightning averages.

        Returns:
            Tensors of shape ``(n,)``, by parameter.

        Raises:
            MisconfigurationException: If a layer saw another number of rows than the batch has records.
        """
        norms: dict[Tensor, Tensor] = {}
        for gradients in self._layer_gradients(batch_size):
            for p, norm in gradients.squared_norms().items():
                norms[p] = norm * (scale * batch_size) ** 2
        return norms

    def weighted_sum(self, weights: dict[Tensor, Tensor], batch_size: int, scale: float = 1.0) -> dict[Tensor, Tensor]:
        """The sum of the records' gradients with these weights, in the parameters' dtypes.

        Args:
            weights: Shape ``(n,)``, by parameter.
            batch_size: As in :meth:`squared_norms`.
            scale: As there.

        Returns:
            Tensors of the parameters' shapes, by parameter that was reached.
        """
        scaled = {p: w * (scale * batch_size) for p, w in weights.items()}
        sums: dict[Tensor, Tensor] = {}
        for gradients in self._layer_gradients(batch_size):
            sums |= {p: total.to(p.dtype) for p, total in gradients.weighted_sum(scaled).items()}
        return sums

    def discard(self, records: Tensor) -> None:
        """Take records out of the step, whose gradients are not finite: a weight of 0 would make NaN of them.

        Args:
            records: Which, bool, shape ``(n,)``.
        """
        self._gradients = None
        for layer, calls in self._records.items():
            for i, (call, backprops) in enumerate(calls):
                of_records = self._of_records(layer, call, len(records))
                calls[i] = (call.map(lambda x: _without(x, records), of_records), _without(backprops, records))

    def first_pass(self, loss: Tensor) -> None:
        """With ``"ghost"``: have autograd report the gradients at the layers' outputs, and keep the graph.

        Args:
            loss: The loss that is about to be differentiated.
        """
        smallest = {
            min((p for p in layer.parameters() if p.requires_grad), key=Tensor.numel): None for layer in self._names
        }
        self._is_first_pass = True
        try:  # one small parameter a layer: autograd passes all layers, and skips most sums over the records
            torch.autograd.grad(loss, list(smallest), retain_graph=True, allow_unused=True)
        finally:
            self._is_first_pass = False

    def second_pass_with(self, weights: Tensor, batch_size: int, scale: float = 1.0) -> None:
        """With ``"ghost"``: have the backward pass that follows make the weighted sum.

        Args:
            weights: One weight a record, shape ``(n,)``, for all parameters.
            batch_size: As in :meth:`squared_norms`.
            scale: As there.
        """
        self._row_scale = weights * (scale * batch_size)
        self._gradients = None
        self._first = {layer: [backprops for _, backprops in calls] for layer, calls in self._records.items()}
        self._records.clear()

    def end(self) -> None:
        """Let go of the step's tensors."""
        self._records.clear()
        self._first.clear()
        self._gradients = self._row_scale = None

    def _layer_gradients(self, batch_size: int) -> list[LayerGradients]:
        if self._gradients is None:
            with self.paused(), torch.no_grad():
                self._gradients = list(self._by_layer(batch_size))
        return self._gradients

    def _by_layer(self, batch_size: int) -> Iterator[LayerGradients]:
        users: dict[Tensor, int] = {}  # calls that a parameter took part in
        for layer, calls in self._records.items():
            for p in set(layer.parameters()):
                users[p] = users.get(p, 0) + len(calls)
        shared: GradSamples = {}
        for layer, calls in self._records.items():
            for call, backprops in calls:
                self._check_rows(layer, call, backprops, batch_size)
            # the caller's precision may be lower than the parameters'; sums over records belong in the latter
            own = [p for p in layer.parameters() if p.requires_grad]
            dtype = own[0].dtype
            calls = [(call.map(lambda x: _as(x, dtype)), b.to(dtype)) for call, b in calls]  # noqa: B023  used at once
            once = all(users[p] == 1 for p in own)
            known = bookkeeping(layer) if self.engine in ("auto", "bookkeeping", "ghost") else None
            if once and known is not None and len(calls[0][0].leaves) == 1:
                call, backprops = calls[0]
                yield known(layer, call.tensors, backprops)
                continue
            build = functorch_grad_samples if self.engine == "functorch" else opacus_grad_samples
            if any(True for _ in layer.children()):  # no rule of Opacus's sees the whole of it
                build = functorch_grad_samples
            for call, backprops in calls:
                of_records = self._of_records(layer, call, batch_size)
                samples = {p: s for p, s in build(layer, call, backprops, of_records).items() if p.requires_grad}
                if once:
                    yield Instantiated(samples)
                    continue
                for param, sample in samples.items():  # gradients of several uses add before a norm is taken
                    shared[param] = shared[param] + sample if param in shared else sample
        if shared:
            yield Instantiated(shared)

    def _check_rows(self, layer: nn.Module, call: Call, backprops: Tensor, batch_size: int) -> None:
        first = next(iter(call.tensors), backprops)
        is_flat = isinstance(layer, nn.EmbeddingBag) and first.ndim == 1  # tokens of all records in a row
        for what, x in (("input", first), ("output", backprops)):
            if x.ndim == 0 or len(x) != batch_size or is_flat:
                raise MisconfigurationException(
                    f"`{self._names[layer]}` ({type(layer).__name__}) has an {what} of shape {list(x.shape)}, but the "
                    f"batch has {batch_size} records: the first dimension must be the records. Keep it through the "
                    "network (batch first; no merging of records and positions)."
                )


class _Observed(torch.autograd.Function):
    """The output of a layer, which needs no gradient for itself, made to report the gradient that comes by.

    With its parameters frozen for the call, the output of the first layer has no graph to hook; and a leaf that
    ``requires_grad_()`` would not take an in-place activation.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, report: Callable[[Tensor], None]) -> Tensor:
        ctx.report = report
        ctx.mark_dirty(output)  # in place, so that an in-place activation may follow
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        ctx.report(grad_outputs[0])
        return grad_outputs[0], None, None


def _refuse_statistics(name: str, layer: nn.modules.batchnorm._NormBase, inputs: Any) -> None:
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        is_refused = layer.training or layer.running_mean is None
    else:
        is_refused = layer.training and layer.track_running_stats
    if is_refused:
        raise MisconfigurationException(
            f"`{name}` ({type(layer).__name__}) uses or keeps statistics of the batch, which mixes its records, also with "
            "frozen parameters. Put it into evaluation mode (`.eval()`, with track_running_stats=True), or replace it "
            "(BatchNorm by GroupNorm: DPSGD(fix=True))."
        )


def _is_of_a_step(output: Any) -> bool:
    return "loss" in output if isinstance(output, Mapping) else isinstance(output, Tensor) and output.ndim == 0


def _without(x: Tensor, records: Tensor) -> Tensor:
    return x.masked_fill(records.to(x.device).view(-1, *[1] * (x.ndim - 1)), 0)


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x
