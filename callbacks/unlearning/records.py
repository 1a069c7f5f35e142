"""Derivatives of single records: losses, gradients, and the columns of the generalised Gauss-Newton matrix."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, vjp, vmap
from torch.utils import _pytree as pytree

from groundwire.callbacks.logits import LogitsSource, logits_in
from groundwire.callbacks.step import loss_of
from groundwire.plugins.layout import ParameterLayout
from groundwire.plugins.random import stream

OutputLoss = Callable[[Tensor, Tensor], Tensor]
"""The loss of ONE record from its outputs and its label: a scalar, convex in the outputs."""

_IGNORED = -100  # a label that cross-entropy leaves out
_MOST_OUTPUTS = 256  # of a record, for an exact output Hessian
_CHUNK_BYTES = 128 * 2**20


def default_output_loss(outputs: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy where the label is a class index (the mean over positions), else the mean squared error.

    Args:
        outputs: Of one record: logits ``(C,)``, logits of a sequence ``(T, C)``, or values of any shape.
        label: A class index ``()``, indices ``(T,)``, or values of the shape of ``outputs``.

    Returns:
        A scalar, in nats for cross-entropy.

    Example:
        >>> default_output_loss(torch.zeros(4), torch.tensor(1))
        tensor(1.3863)
        >>> default_output_loss(torch.ones(2), torch.tensor([1.0, 3.0]))
        tensor(2.)
    """
    if not label.is_floating_point():
        return F.cross_entropy(outputs.reshape(-1, outputs.shape[-1]), label.reshape(-1))
    return F.mse_loss(outputs, label.reshape(outputs.shape))


class Records:
    """Per-record derivatives of a module with respect to its trainable parameters, as flat vectors.

    Everything is computed in evaluation mode (no dropout, BatchNorm on its running statistics), whatever the module's
    mode, which is left as it was. The order of the entries is that of ``layout``.

    Args:
        module: Its ``forward`` takes the inputs of a batch; rows are independent.
        loss: Of one record, from its outputs; by default :func:`default_output_loss`.
        source: Where inputs and labels of a batch are found; outputs are those of the module's ``forward``.
        dtype: In which to compute; by default that of the parameters.
        draws: None for the exact output Hessian of a record, or the number of labels drawn from the model's own
            prediction that stand in for it (cross-entropy only): for vocabularies.
        seed: Root seed of these draws; a record's draws depend on it and on the record's id alone.
        at: Weights at which to differentiate, shape ``(p,)``; by default the module's own.

    Raises:
        ValueError: If ``draws`` is below 1, or given together with a loss of one's own, or no parameter is trainable.
        MisconfigurationException: If ``source`` names a submodule or a call.

    Example:
        >>> records = Records(nn.Linear(3, 2))
        >>> batch = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
        >>> records.gradients(batch).shape, records.columns(batch).shape
        (torch.Size([5, 8]), torch.Size([5, 2, 8]))
    """

    def __init__(
        self,
        module: nn.Module,
        loss: OutputLoss | None = None,
        source: LogitsSource | None = None,
        dtype: torch.dtype | None = None,
        draws: int | None = None,
        seed: int = 0,
        at: Tensor | None = None,
    ) -> None:
        if draws is not None and draws < 1:
            raise ValueError(f"`draws` must be at least 1, got {draws}; None computes the output Hessian exactly.")
        if draws is not None and loss is not None:
            raise ValueError("`draws` are labels of a cross-entropy: leave `loss` at its default, or `draws` at None.")
        if source is not None and (source.submodule or source.call != "last"):
            raise MisconfigurationException(
                "Derivatives of single records are those of the outputs of `forward`: leave `submodule` and `call` of the "
                "LogitsSource at their defaults, and let `forward` give the logits."
            )
        self.module = module
        self.loss = loss or default_output_loss
        self.source = source or LogitsSource()
        self.layout = ParameterLayout.of(module)
        self.dtype = dtype or self.layout.dtype
        self.draws = draws
        self.seed = seed
        self.at = at
        self._is_convex = True

    # ---------------------------------------------------------------- parts of the module

    def parameters(self) -> dict[str, Tensor]:
        """The trainable parameters, detached, in ``dtype``: the module's, or those of ``at``."""
        if self.at is not None:
            parts = torch.split(self.at.to(next(self.module.parameters()).device, self.dtype), self.layout.sizes)
            return {n: part.view(s) for n, s, part in zip(self.layout.names, self.layout.shapes, parts, strict=True)}
        named = dict(self.module.named_parameters())
        return {name: named[name].detach().to(self.dtype) for name in self.layout.names}

    def vector(self) -> Tensor:
        """The trainable parameters as one vector ``(p,)``."""
        return torch.cat([value.flatten() for value in self.parameters().values()])

    @torch.no_grad()
    def write(self, vector: Tensor) -> None:
        """Copy a vector ``(p,)`` into the module's parameters, in place."""
        named = dict(self.module.named_parameters())
        for name, value in self.layout.unflatten(vector).items():
            named[name].copy_(value)

    def _rest(self) -> dict[str, Tensor]:
        """Buffers and frozen parameters."""
        kept = set(self.layout.names)
        rest = {n: p.detach() for n, p in self.module.named_parameters() if n not in kept}
        rest |= dict(self.module.named_buffers())
        return {n: t.to(self.dtype) if t.is_floating_point() else t for n, t in rest.items()}

    def inputs_and_labels(self, batch: Any) -> tuple[Any, Tensor]:
        """Inputs and labels of a batch, where the module is, in ``dtype`` where they are floating."""
        inputs, labels = self.source.inputs_and_labels(batch)
        device = next(self.module.parameters()).device

        def move(value: Tensor) -> Tensor:
            return value.to(device, self.dtype if value.is_floating_point() else None)

        return apply_to_collection(inputs, Tensor, move), move(labels)

    def _outputs(self, parameters: dict[str, Tensor], rest: dict[str, Tensor], inputs: Any) -> Tensor:
        """Outputs of one record, without the batch's dimension."""
        batch = pytree.tree_map(lambda t: t.unsqueeze(0), inputs)
        found = logits_in(functional_call(self.module, (parameters, rest), (batch,)))
        if found is None:
            raise MisconfigurationException(
                f"{type(self.module).__name__}.forward gives no tensor and nothing with `logits`: wrap it in a module "
                "that gives its outputs."
            )
        return self.source.as_logits(found).squeeze(0)

    # ---------------------------------------------------------------- derivatives

    @torch.no_grad()
    def losses(self, batch: Any) -> Tensor:
        """The loss of each record, shape ``(B,)``."""
        inputs, labels = self.inputs_and_labels(batch)
        parameters, rest = self.parameters(), self._rest()
        with evaluating(self.module):
            return vmap(lambda x, y: self.loss(self._outputs(parameters, rest, x), y))(inputs, labels)

    def gradients(self, batch: Any) -> Tensor:
        """The gradient of each record's loss, shape ``(B, p)``."""
        inputs, labels = self.inputs_and_labels(batch)
        parameters, rest = self.parameters(), self._rest()

        def one(x: Any, y: Tensor) -> dict[str, Tensor]:
            found: dict[str, Tensor] = grad(lambda p: self.loss(self._outputs(p, rest, x), y))(parameters)
            return found

        with evaluating(self.module):
            return self._flat(vmap(one)(inputs, labels), 1)

    def gradient(self, batch: Any) -> Tensor:
        """The sum of the gradients of all records of a batch, shape ``(p,)``, without one for each."""
        inputs, labels = self.inputs_and_labels(batch)
        parameters, rest = self.parameters(), self._rest()

        def total(p: dict[str, Tensor]) -> Tensor:
            return vmap(lambda x, y: self.loss(self._outputs(p, rest, x), y))(inputs, labels).sum()

        with evaluating(self.module):
            return self._flat(grad(total)(parameters), 0)

    def columns(self, batch: Any, ids: Tensor | None = None) -> Tensor:
        """Columns ``U_i = J_i^T S_i`` whose outer products are each record's Gauss-Newton matrix.

        ``J_i`` is the Jacobian of the record's outputs, and ``S_i S_i^T`` the Hessian of its loss in the outputs (or its
        estimate from ``draws``).

        Args:
            batch: Records.
            ids: Numbers of the records, shape ``(B,)``: what ``draws`` depend on.

        Returns:
            Shape ``(B, s, p)``; ``s`` is the number of outputs, or ``draws``. ``sum_s`` of the outer products of a
            record's rows is its matrix.

        Raises:
            MisconfigurationException: If a record has too many outputs for an exact Hessian.
            ValueError: If the loss is not convex in the outputs, or ``draws`` lack ``ids``.
        """
        inputs, labels = self.inputs_and_labels(batch)
        parameters, rest = self.parameters(), self._rest()
        with evaluating(self.module), torch.no_grad():
            outputs = vmap(lambda x: self._outputs(parameters, rest, x))(inputs)
        factors = self._factors(outputs, labels, ids)

        def one(x: Any, s: Tensor) -> dict[str, Tensor]:
            pull = vjp(lambda p: self._outputs(p, rest, x), parameters)[1]
            found: dict[str, Tensor] = vmap(pull)(s)[0]
            return found

        with evaluating(self.module):
            return self._flat(vmap(one)(inputs, factors), 2)

    def chunks(self, batch: Any, ids: Tensor | None = None) -> Iterator[Tensor]:
        """:meth:`columns` of a batch, as rows ``(b s, p)`` of few records at a time, so that they fit into memory."""
        inputs, labels = self.inputs_and_labels(batch)
        rows = self.draws if self.draws is not None else self._outputs_of_a_record(inputs)
        size = max(1, _CHUNK_BYTES // (rows * self.layout.numel * torch.finfo(self.dtype).bits // 8))
        for start in range(0, len(labels), size):
            part = slice(start, start + size)
            some = pytree.tree_map(operator.itemgetter(part), inputs)
            yield self._columns_of(some, labels[part], None if ids is None else ids[part]).flatten(0, 1)

    def gradient_chunks(self, batch: Any) -> Iterator[Tensor]:
        """:meth:`gradients` of a batch, as rows ``(b, p)`` of few records at a time, so that they fit into memory."""
        inputs, labels = self.inputs_and_labels(batch)
        size = max(1, _CHUNK_BYTES // (self.layout.numel * torch.finfo(self.dtype).bits // 8))
        pairs = self._of_pairs()
        for start in range(0, len(labels), size):
            part = slice(start, start + size)
            yield pairs.gradients((pytree.tree_map(operator.itemgetter(part), inputs), labels[part]))

    def _of_pairs(self) -> Records:
        """The same, for batches that are pairs of inputs and labels."""
        pairs = copy.copy(self)
        pairs.source = LogitsSource.of_pairs(self.source)
        return pairs

    def _columns_of(self, inputs: Any, labels: Tensor, ids: Tensor | None) -> Tensor:
        plain = self._of_pairs()
        found = plain.columns((inputs, labels), ids)
        self._is_convex = plain._is_convex
        return found

    @torch.no_grad()
    def _outputs_of_a_record(self, inputs: Any) -> int:
        first = pytree.tree_map(lambda t: t[0], inputs)
        with evaluating(self.module):
            return self._outputs(self.parameters(), self._rest(), first).numel()

    def _flat(self, found: dict[str, Tensor], batch_dims: int) -> Tensor:
        return torch.cat([found[name].flatten(batch_dims) for name in self.layout.names], dim=-1)

    # ---------------------------------------------------------------- the Hessian of the loss in the outputs

    def _factors(self, outputs: Tensor, labels: Tensor, ids: Tensor | None) -> Tensor:
        """``S_i^T``, shape ``(B, s, *outputs)``."""
        if self.draws is not None:
            return self._drawn(outputs, labels, ids)
        number = outputs[0].numel()
        if number > _MOST_OUTPUTS:
            raise MisconfigurationException(
                f"A record has {number} outputs: its exact output Hessian is too large (the most is {_MOST_OUTPUTS}). "
                "Let labels drawn from the model's prediction stand in for it: draws=16."
            )
        loss = lambda z, y: self.loss(z.reshape(outputs.shape[1:]), y)
        curvature = vmap(hessian(loss))(outputs.flatten(1), labels)
        values, vectors = torch.linalg.eigh(curvature)
        largest = values.abs().max()
        if bool(values.min() < -1e-5 * largest) and self._is_convex:
            self._is_convex = False
            rank_zero_warn(
                "The loss is not convex in the outputs (its Hessian has an eigenvalue of "
                f"{float(values.min()):.3g} beside {float(largest):.3g}): negative ones are taken as 0. Use a convex "
                "output loss, such as cross-entropy or squared error."
            )
        roots = vectors * values.clamp_min(0).sqrt().unsqueeze(1)
        factors: Tensor = roots.transpose(1, 2).reshape(len(outputs), number, *outputs.shape[1:])
        return factors

    def _drawn(self, outputs: Tensor, labels: Tensor, ids: Tensor | None) -> Tensor:
        assert self.draws is not None
        if labels.is_floating_point():
            raise ValueError(
                "`draws` are labels of a cross-entropy, but these labels are values: leave `draws` at None."
            )
        if ids is None:
            raise ValueError("`draws` depend on the number of each record: give `ids`.")
        positions = labels[0].numel()
        uniform = torch.stack(
            [
                torch.rand(self.draws, positions, generator=stream(self.seed, purpose="unlearning/draws", round=i))
                for i in ids.tolist()
            ]
        ).to(outputs)
        probs = outputs.reshape(len(outputs), 1, positions, -1).softmax(dim=-1)
        label = (probs.cumsum(dim=-1) < uniform.unsqueeze(-1)).sum(dim=-1).clamp_max(probs.shape[-1] - 1)
        residual = probs - F.one_hot(label, probs.shape[-1])
        counted = (labels.reshape(len(outputs), positions) != _IGNORED).to(outputs)  # cross-entropy is their mean
        weight = (counted / (counted.sum(dim=1, keepdim=True).clamp_min(1) * self.draws)).sqrt()
        scaled = residual * weight.reshape(len(outputs), 1, positions, 1)
        factors: Tensor = scaled.reshape(len(outputs), self.draws, *outputs.shape[1:])
        return factors


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every submodule is put back into its own mode afterwards."""
    modes = [(sub, sub.training) for sub in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for sub, mode in modes:
            sub.training = mode


@torch.no_grad()
def loss_of_step(pl_module: pl.LightningModule, batch: Any) -> float:
    """What the module's own ``training_step`` gives for a batch, in evaluation mode, without logging.

    Args:
        pl_module: The module.
        batch: What its step takes.

    Returns:
        The loss.

    Raises:
        MisconfigurationException: If the step returns none.
    """
    step = type(pl_module).training_step.__get__(pl_module)
    takes_index = len(inspect.signature(step).parameters) > 1
    batch = apply_to_collection(batch, Tensor, lambda t: t.to(pl_module.device))
    precision = None if pl_module._trainer is None else pl_module.trainer.precision_plugin
    if precision is not None:
        batch = precision.convert_input(batch)
    own = {name: pl_module.__dict__.get(name) for name in ("log", "log_dict")}
    pl_module.__dict__.update(dict.fromkeys(own, lambda *_, **__: None))
    try:
        with evaluating(pl_module), nullcontext() if precision is None else precision.train_step_context():
            return float(loss_of(step(batch, 0) if takes_index else step(batch)))
    finally:
        for name, value in own.items():
            del pl_module.__dict__[name]
            if value is not None:
                pl_module.__dict__[name] = value


def warn_of_batchnorm(module: nn.Module) -> None:
    """Say that running statistics remember the forget set."""
    if any(isinstance(sub, nn.modules.batchnorm._NormBase) and sub.track_running_stats for sub in module.modules()):
        rank_zero_warn(
            f"{type(module).__name__} has BatchNorm: its running statistics hold traces of every training sample, and a "
            "one-shot method leaves them. Use GroupNorm (see groundwire.callbacks.privacy.DPSGD(fix=True))."
        )
