"""What every record contributes to the gradient of a layer: per-sample gradients, and ways around building them.

A layer is seen through its inputs ``a`` and the gradient ``b`` of the summed loss at its output, both with the records
in the first dimension. All that clipping needs are the norms of the records' gradients and their weighted sum; for a
linear map both follow from ``a`` and ``b`` without the gradients themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from opacus.grad_sample import GradSampleHooks
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight
from torch.utils._pytree import tree_flatten, tree_unflatten
from typing_extensions import override

Inputs = tuple[Tensor, ...]
GradSamples = dict[Tensor, Tensor]
"""Per-sample gradients, shape ``(n, *parameter.shape)``, of the parameters that require gradients."""


@dataclass(frozen=True)
class Call:
    """How a layer was called.

    Args:
        leaves: All arguments, flat, tensors detached.
        spec: How they lie in ``(args, kwargs)``.
    """

    leaves: tuple[Any, ...]
    spec: Any

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The call ``layer(*args, **kwargs)``."""
        leaves, spec = tree_flatten((args, kwargs))
        return cls(tuple(x.detach() if isinstance(x, Tensor) else x for x in leaves), spec)

    @property
    def tensors(self) -> Inputs:
        """The arguments that are tensors."""
        return tuple(x for x in self.leaves if isinstance(x, Tensor))

    def map(self, change: Callable[[Tensor], Tensor], only: Collection[int] | None = None) -> Call:
        """The same call with other tensors, of all leaves or of ``only`` those at these places."""
        places = range(len(self.leaves)) if only is None else only
        leaves = (change(x) if isinstance(x, Tensor) and i in places else x for i, x in enumerate(self.leaves))
        return Call(tuple(leaves), self.spec)

    def with_rows(self, num_rows: int) -> list[int]:
        """Places of the leaves that are tensors of so many rows."""
        return [i for i, x in enumerate(self.leaves) if isinstance(x, Tensor) and x.ndim > 0 and len(x) == num_rows]


def opacus_grad_samples(
    layer: nn.Module, call: Call, backprops: Tensor, of_records: Collection[int] | None = None
) -> GradSamples:
    """Per-sample gradients by Opacus's rule for the layer's type, or by ``torch.func`` where it has none that is right.

    Args:
        layer: The layer.
        call: Its arguments, records first.
        backprops: Gradient of the summed loss at its output, records first.
        of_records: As in :func:`functorch_grad_samples`.

    Returns:
        The gradients.
    """
    sampler = GradSampleHooks.GRAD_SAMPLERS.get(type(layer))
    if sampler is None or not _opacus_is_right(layer, call):
        return functorch_grad_samples(layer, call, backprops, of_records)
    samples: GradSamples = sampler(layer, list(call.tensors), backprops)
    return samples


def _opacus_is_right(layer: nn.Module, call: Call) -> bool:
    """Opacus's rules ignore padding tokens, repeated ones in a bag, padding other than by zeros, norms without bias."""
    if isinstance(layer, nn.EmbeddingBag):
        return False
    if isinstance(layer, nn.Embedding):
        return layer.padding_idx is None
    if isinstance(layer, nn.modules.conv._ConvNd):
        return layer.padding_mode == "zeros"
    if isinstance(layer, nn.LayerNorm):
        return layer.bias is not None
    return len(call.leaves) == 1


def functorch_grad_samples(
    layer: nn.Module, call: Call, backprops: Tensor, of_records: Collection[int] | None = None
) -> GradSamples:
    """Per-sample gradients by ``vmap`` over the layer's own forward, whatever it computes.

    Args:
        layer: A layer whose forward acts on each record alone.
        call: Its arguments.
        backprops: Gradient of the summed loss at its output, records first.
        of_records: Places of the leaves that are taken apart by record, others are the same for all; by default, all
            tensors with as many rows as there are records.

    Returns:
        The gradients, of the parameters of submodules as well.

    Raises:
        MisconfigurationException: If one record alone does not give one row of output.
    """
    params = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    if of_records is None:
        of_records = call.with_rows(len(backprops))

    def weighted(values: dict[str, Tensor], one: Inputs, backprop: Tensor) -> Tensor:
        leaves = list(call.leaves)
        for i, x in zip(of_records, one, strict=True):
            leaves[i] = x.unsqueeze(0)
        args, kwargs = tree_unflatten(leaves, call.spec)
        output = torch.func.functional_call(layer, values, args, kwargs)
        if output.shape != (1, *backprop.shape):  # a product would broadcast
            raise MisconfigurationException(
                f"A {type(layer).__name__} made an output of shape {list(output.shape)} of one record, and of "
                f"{list(backprops.shape)} of the batch: which of its arguments hold one row per record cannot be told. Give "
                "it the same arguments in each call, with the records in the first dimension."
            )
        total: Tensor = (output * backprop.unsqueeze(0)).sum()
        return total

    detached = {name: p.detach() for name, p in params.items()}
    rows = tuple(call.leaves[i] for i in of_records)
    samples = torch.func.vmap(torch.func.grad(weighted), in_dims=(None, 0, 0))(detached, rows, backprops)
    return {p: samples[name] for name, p in params.items()}


class LayerGradients(ABC):
    """The records' gradients of one layer in one step.

    Args:
        layer: The layer.
        inputs: Its inputs, records first.
        backprops: Gradient of the summed loss at its output, records first.
    """

    def __init__(self, layer: nn.Module, inputs: Inputs, backprops: Tensor) -> None:
        self.layer = layer
        self.inputs = inputs
        self.backprops = backprops

    @abstractmethod
    def squared_norms(self) -> dict[Tensor, Tensor]:
        """Squared norm of each record's gradient, shape ``(n,)``, for each parameter."""

    @abstractmethod
    def weighted_sum(self, weights: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """``sum_i weights[p][i] * gradient_i`` for each parameter, from weights of shape ``(n,)``."""


class Instantiated(LayerGradients):
    """Builds the per-sample gradients, and keeps them.

    Args:
        samples: The gradients.
    """

    def __init__(self, samples: GradSamples) -> None:
        self.samples = samples

    @override
    def squared_norms(self) -> dict[Tensor, Tensor]:
        return {p: _squared_norms(samples) for p, samples in self.samples.items()}

    @override
    def weighted_sum(self, weights: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        return {p: (weights[p].to(s.dtype) @ s.flatten(1)).view(p.shape) for p, s in self.samples.items()}


class LinearMap(LayerGradients, ABC):
    """A layer whose weight gradient is ``sum_t b_t a_t^T`` over ``T`` positions: book-keeping.

    With few positions the norm comes from the Gram matrices of the positions, ``sum_ts (a_t.a_s)(b_t.b_s)``, at
    ``T^2 (d_in + d_out)`` products in double precision and ``T^2`` numbers a record; else from the gradients, which cost
    ``T d_in d_out`` and ``d_in d_out`` numbers. These are kept where they are at most four times what was recorded, and
    otherwise one matrix product makes the weighted sum.

    Reference:
        Bu, Wang, Zha, Karypis, "Differentially Private Optimization on Large Model at Small Cost", ICML 2023,
        Section 2. arXiv:2210.00038
    """

    weight: Tensor
    bias: Tensor | None
    _samples: Tensor | None = None

    @abstractmethod
    def positions(self) -> tuple[Tensor, Tensor]:
        """``a`` of shape ``(n, T, d_in)`` and ``b`` of shape ``(n, T, d_out)``."""

    @abstractmethod
    def weight_sum(self, weights: Tensor) -> Tensor:
        """The weighted sum of the weight's gradients, in the weight's shape."""

    def weight_samples(self) -> Tensor:
        """The gradients of the weight themselves, shape ``(n, d_out, d_in)``."""
        a, b = self.positions()
        return b.transpose(1, 2) @ a

    def summed_backprops(self) -> Tensor:
        """The gradients of the bias, shape ``(n, d_out)``."""
        return self.positions()[1].sum(1)

    @property
    def _samples_are_small(self) -> bool:
        recorded = self.inputs[0].numel() + self.backprops.numel()
        return len(self.backprops) * self.weight.numel() <= 4 * recorded

    def _gram_is_cheaper(self) -> bool:
        positions, d_out, entries = self.num_positions, self.weight.shape[0], self.weight.numel()
        in_time = 2 * positions * (entries // d_out + d_out) < entries  # doubles count twice
        return in_time or (not self._samples_are_small and 2 * positions**2 < entries)

    @property
    def num_positions(self) -> int:
        """``T``."""
        return self.backprops.shape[1:].numel() // self.weight.shape[0]

    @override
    def squared_norms(self) -> dict[Tensor, Tensor]:
        norms: dict[Tensor, Tensor] = {}
        if self.weight.requires_grad:
            if self.num_positions == 1:
                a, b = self.positions()
                norms[self.weight] = _squared_norms(a) * _squared_norms(b)
            elif self._gram_is_cheaper():
                a, b = self.positions()
                norms[self.weight] = _gram_norms(a, b)
            else:
                samples = self.weight_samples()
                norms[self.weight] = _squared_norms(samples)
                self._samples = samples if self._samples_are_small else None
        if self.bias is not None and self.bias.requires_grad:
            norms[self.bias] = _squared_norms(self.summed_backprops())
        return norms

    @override
    def weighted_sum(self, weights: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        sums: dict[Tensor, Tensor] = {}
        if self.weight.requires_grad:
            w = weights[self.weight].to(self.backprops.dtype)
            if self._samples is not None:
                sums[self.weight] = (w @ self._samples.flatten(1)).view(self.weight.shape)
            else:
                sums[self.weight] = self.weight_sum(w)
        if self.bias is not None and self.bias.requires_grad:
            sums[self.bias] = weights[self.bias].to(self.backprops.dtype) @ self.summed_backprops()
        return sums


class LinearGradients(LinearMap):
    """``nn.Linear``, on vectors or on sequences."""

    def __init__(self, layer: nn.Linear, inputs: Inputs, backprops: Tensor) -> None:
        super().__init__(layer, inputs, backprops)
        self.weight, self.bias = layer.weight, layer.bias

    @override
    def positions(self) -> tuple[Tensor, Tensor]:
        n = len(self.backprops)
        a, b = self.inputs[0], self.backprops
        return a.reshape(n, -1, a.shape[-1]), b.reshape(n, -1, b.shape[-1])

    @override
    def weight_sum(self, weights: Tensor) -> Tensor:
        a, b = self.positions()
        return (b * weights[:, None, None]).flatten(0, 1).T @ a.flatten(0, 1)


class Conv2dGradients(LinearMap):
    """``nn.Conv2d`` with one group: a linear map on patches."""

    def __init__(self, layer: nn.Conv2d, inputs: Inputs, backprops: Tensor) -> None:
        super().__init__(layer, inputs, backprops)
        self.conv, self.weight, self.bias = layer, layer.weight, layer.bias

    @staticmethod
    def takes(layer: nn.Module) -> bool:
        """Whether this class knows the layer."""
        return (
            type(layer) is nn.Conv2d
            and layer.groups == 1
            and layer.padding_mode == "zeros"
            and not isinstance(layer.padding, str)
        )

    def _patches(self) -> Tensor:
        conv = self.conv
        assert not isinstance(conv.padding, str)
        return F.unfold(self.inputs[0], conv.kernel_size, conv.dilation, conv.padding, conv.stride)

    @override
    def positions(self) -> tuple[Tensor, Tensor]:
        return self._patches().transpose(1, 2), self.backprops.flatten(2).transpose(1, 2)

    @override
    def summed_backprops(self) -> Tensor:
        return self.backprops.flatten(2).sum(2)

    @override
    def weight_samples(self) -> Tensor:
        conv, (a, b) = self.conv, (self.inputs[0], self.backprops)
        n = len(b)
        if b.is_cuda or self.num_positions < 32:  # copying patches pays where a grouped convolution has little to do
            return b.flatten(2) @ self._patches().transpose(1, 2)
        per_record = (n * conv.out_channels, *conv.weight.shape[1:])
        samples: Tensor = conv2d_weight(  # type: ignore[no-untyped-call]  # one convolution whose groups are the records
            a.reshape(1, -1, *a.shape[2:]),
            per_record,
            b.reshape(1, -1, *b.shape[2:]),
            conv.stride,
            conv.padding,
            conv.dilation,
            groups=n,
        )
        return samples.view(n, *conv.weight.shape)

    @override
    def weight_sum(self, weights: Tensor) -> Tensor:
        conv = self.conv
        total: Tensor = conv2d_weight(  # type: ignore[no-untyped-call]
            self.inputs[0],
            conv.weight.shape,
            self.backprops * weights[:, None, None, None],
            conv.stride,
            conv.padding,
            conv.dilation,
        )
        return total


class EmbeddingGradients(LayerGradients):
    """``nn.Embedding``: rows of the table that a record looked up more than once add before the norm is taken."""

    def __init__(self, layer: nn.Embedding, inputs: Inputs, backprops: Tensor) -> None:
        super().__init__(layer, inputs, backprops)
        self.embedding = layer

    def _lookups(self) -> tuple[Tensor, Tensor]:
        n = len(self.backprops)
        ids, b = self.inputs[0].reshape(n, -1), self.backprops.reshape(n, -1, self.backprops.shape[-1])
        if self.embedding.padding_idx is not None:
            b = b.masked_fill((ids == self.embedding.padding_idx).unsqueeze(-1), 0)
        return ids, b

    @override
    def squared_norms(self) -> dict[Tensor, Tensor]:
        ids, b = self._lookups()
        return {self.embedding.weight: _gram_norms(None, b, (ids.unsqueeze(1) == ids.unsqueeze(2)).double())}

    @override
    def weighted_sum(self, weights: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        ids, b = self._lookups()
        table = self.embedding.weight
        rows = (b * weights[table].to(b.dtype)[:, None, None]).flatten(0, 1)
        return {table: torch.zeros_like(table, dtype=b.dtype).index_add_(0, ids.flatten(), rows)}


def bookkeeping(layer: nn.Module) -> Callable[[Any, Inputs, Tensor], LayerGradients] | None:
    """The way around per-sample gradients that a layer's type allows, if there is one.

    Args:
        layer: The layer.

    Returns:
        What takes the layer, its inputs and its backprops; None where the gradients have to be built.
    """
    if type(layer) is nn.Linear:
        return LinearGradients
    if Conv2dGradients.takes(layer):
        return Conv2dGradients
    if type(layer) is nn.Embedding:
        return EmbeddingGradients
    return None


def _gram_norms(a: Tensor | None, b: Tensor, gram: Tensor | None = None) -> Tensor:
    """``sum_ts (a_t.a_s)(b_t.b_s)`` of each record, never below its true value.

    Gradients of positions may cancel, and what rounding leaves of them would let a record through that should be
    clipped: so double precision, and its largest possible error on top.
    """
    b = b.double()
    if gram is None:
        assert a is not None
        gram = a.double() @ a.double().transpose(1, 2)
    of_b = b @ b.transpose(1, 2)
    scale = gram.diagonal(dim1=1, dim2=2).sum(1) * of_b.diagonal(dim1=1, dim2=2).sum(1)
    error = 8 * torch.finfo(torch.float64).eps * b.shape[2] * scale
    return gram.mul(of_b).sum((1, 2)).clamp_min_(0) + error


def _squared_norms(x: Tensor) -> Tensor:
    """Of each row, in single precision at least."""
    norms: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.promote_types(x.dtype, torch.float32))
    return norms.square()
