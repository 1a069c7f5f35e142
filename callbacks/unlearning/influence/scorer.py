"""Influence functions of any module, with compressed gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from groundwire.callbacks.logits import LogitsSource
from groundwire.callbacks.unlearning.influence.compression import GradientCompressor
from groundwire.callbacks.unlearning.influence.functional import damped_factor, default_damping, self_influence, solved
from groundwire.callbacks.unlearning.records import OutputLoss, Records
from groundwire.callbacks.weights import fingerprint
from groundwire.plugins.layout import ParameterLayout

MOST_COORDINATES = 4096
"""Of a compressed gradient, for a dense solve: 128 MiB of curvature, and as much for its factor."""

_CHUNK_BYTES = 128 * 2**20


class InfluenceScorer:
    """Which training records helped a test record, and which harmed it, by influence functions.

    ``fit`` goes over the training data once and keeps the compressed gradient of each record, shape ``(n, k)``, and the
    compressed curvature ``P G P^T``, of which one Cholesky factor is made. Gradients and curvature are those of the
    evaluation mode, at the weights that the module has then. The module is left as it was.

    Positive scores: removing the training record raises the test record's loss (to first order, and times ``n``).

    Args:
        module: Its ``forward`` takes the inputs of a batch; rows are independent.
        compressor: Of gradients; None keeps them whole, for exact influence of small models.
        damping: Added to the curvature's diagonal, at least 0; by default a tenth of the mean of that diagonal. Where the
            loss has a weight decay, it belongs here.
        curvature: ``"ggn"`` for the generalised Gauss-Newton matrix, or ``"fisher"`` for the empirical Fisher matrix, the
            mean outer product of the gradients: cheaper, and less like the Hessian.
        loss: Of one record, from its outputs and label; by default cross-entropy of class indices, else squared error.
        source: Where inputs and labels of a batch are found.
        store: File that compressed gradients are written to, and mapped into memory from; None keeps them in memory. It is
            overwritten, and has to stay as long as this scorer is used. Gradients tell of the records that they belong to:
            keep it as safe as the training data, and delete it after use.
        draws: Labels drawn from the model's prediction that stand in for a record's output Hessian, for modules of very
            many outputs; None for the exact one.

    Attributes:
        num_records: Training records ``n``.
        num_parameters: Trainable parameters ``p``.
        k: Entries of a compressed gradient.
        excluded: Names of the parameters that are frozen, and so have no part in this.
        damping_used: The damping.
        ids: Numbers of the training records, shape ``(n,)``, int64.

    Raises:
        ValueError: If an argument is out of range.

    Reference:
        Zhang, Amiri, "Toward Efficient Influence Function: Dropout as a Compression Tool", 2025. arXiv:2509.15651

    Example:
        >>> from groundwire.callbacks.unlearning.influence import Dropout
        >>> x, y = torch.randn(40, 5), torch.randint(3, (40,))
        >>> scorer = InfluenceScorer(nn.Linear(5, 3), Dropout(density=0.5))
        >>> scorer.fit([(x, y)])
        >>> scorer.score((x[:2], y[:2])).shape, scorer.self_influence().shape
        (torch.Size([2, 40]), torch.Size([40]))
    """

    def __init__(
        self,
        module: nn.Module,
        compressor: GradientCompressor | None = None,
        damping: float | None = None,
        curvature: Literal["ggn", "fisher"] = "ggn",
        loss: OutputLoss | None = None,
        source: LogitsSource | None = None,
        store: str | Path | None = None,
        draws: int | None = None,
    ) -> None:
        if curvature not in ("ggn", "fisher"):
            raise ValueError(f"`curvature` must be 'ggn' or 'fisher', got {curvature!r}.")
        if damping is not None and not damping >= 0:
            raise ValueError(f"`damping` must be at least 0, got {damping}.")
        self.module = module
        self.compressor = compressor
        self.damping = damping
        self.curvature_kind = curvature
        self.loss = loss
        self.source = source or LogitsSource()
        self.store = None if store is None else Path(store)
        self.draws = draws
        self.num_records = self.num_parameters = self.k = 0
        self.excluded: tuple[str, ...] = ()
        self.damping_used = 0.0
        self.ids = torch.zeros(0, dtype=torch.int64)
        self._digest: str | None = None

    # ---------------------------------------------------------------- training records

    def fit(self, batches: Iterable[Any], ids: Tensor | None = None) -> None:
        """Go over the training records.

        Args:
            batches: Of all training records, each once, in an order that is that of the scores.
            ids: Numbers of the records, shape ``(n,)``; by default from 0 on. ``draws`` depend on them.

        Raises:
            ValueError: If gradients are too long for a dense solve, a gradient is not finite, there is no record,
                ``ids`` are not as many, or there are fewer records than coordinates and no damping.
        """
        self._digest = None
        records = plain_records(self.module, self.loss, self.source, self.draws)
        layout = records.layout
        self.num_parameters = layout.numel
        self.excluded = tuple(name for name, _ in self.module.named_parameters() if name not in set(layout.names))
        self.k = num_coordinates(self.compressor, layout)
        curvature, number = torch.zeros(self.k, self.k, dtype=torch.float64), 0
        curvature = curvature.to(next(self.module.parameters()).device)
        with _Store(self.store, self.k) as store:
            for batch in batches:
                inputs, labels = self.source.inputs_and_labels(batch)
                some = torch.arange(number, number + len(labels)) if ids is None else ids[number : number + len(labels)]
                if len(some) != len(labels):
                    raise ValueError(
                        f"There are {number + len(some)} `ids`, and more records: give one to each record."
                    )
                for gradients in gradients_in_parts(records, inputs, labels):
                    compressed = self._compressed(gradients)
                    self._refuse_nonfinite(compressed, number)
                    store.add(compressed)
                    number += len(compressed)
                    if self.curvature_kind == "fisher":
                        curvature += compressed.T @ compressed
                if self.curvature_kind == "ggn":
                    for rows in records.chunks((inputs, labels), some):
                        compressed = self._compressed(rows)
                        curvature += compressed.T @ compressed
        if not number:
            raise ValueError("There is no training record: `batches` is empty.")
        if ids is not None and len(ids) != number:
            raise ValueError(f"There are {len(ids)} `ids` and {number} records: give one to each record.")
        self.train = store.rows()
        self.ids = torch.arange(number) if ids is None else ids
        self.num_records = number
        self.curvature = curvature / number
        if self.damping == 0 and number < self.k:
            raise ValueError(
                f"There are {number} records and {self.k} coordinates, so the curvature may be singular: give a positive "
                "`damping`, or a compressor that keeps fewer."
            )
        self.damping_used = default_damping(self.curvature) if self.damping is None else self.damping
        self._factor = damped_factor(self.curvature, self.damping_used)
        self._digest = fingerprint(self.module.state_dict())

    def _compressed(self, rows: Tensor) -> Tensor:
        return rows if self.compressor is None else self.compressor(rows)

    def _refuse_nonfinite(self, compressed: Tensor, before: int) -> None:
        finite = torch.isfinite(compressed).all(dim=1)
        if not bool(finite.all()):
            first = before + int((~finite).nonzero()[0])
            raise ValueError(
                f"The gradient of training record {first} is not finite: the network has diverged, or that record's input "
                "is not finite. Lower the learning rate, or take the record out."
            )

    # ---------------------------------------------------------------- scores

    def score(self, batch: Any) -> Tensor:
        """Influence of each training record on each record of a batch.

        Args:
            batch: Test records.

        Returns:
            Shape ``(T, n)``, float64, on the CPU; columns in the order in which the training records came.

        Raises:
            RuntimeError: Before :meth:`fit`, or if the module's weights have changed since.
            ValueError: If a gradient is not finite.
        """
        self._check_weights()
        records = plain_records(self.module, self.loss, self.source, self.draws)
        inputs, labels = self.source.inputs_and_labels(batch)
        rows = torch.cat([self._compressed(part) for part in gradients_in_parts(records, inputs, labels)])
        if not bool(torch.isfinite(rows).all()):
            raise ValueError("The gradient of a test record is not finite: is its input finite?")
        directions = solved(rows.double(), self._factor).T
        return torch.cat([(part @ directions).T.cpu() for part in self._blocks()], dim=1)

    def self_influence(self) -> Tensor:
        """Influence of each training record on its own loss: large where a record is learned by heart.

        Returns:
            Shape ``(n,)``, float64, on the CPU, at least 0. Mislabelled records tend to come first.

        Raises:
            RuntimeError: Before :meth:`fit`, or if the module's weights have changed since.
        """
        self._check_weights()
        return torch.cat([self_influence(part, self._factor).cpu() for part in self._blocks()])

    @property
    def store_bytes(self) -> int:
        """Size of the compressed gradients of all training records."""
        return self.train.numel() * self.train.element_size()

    def _blocks(self) -> Iterator[Tensor]:
        """The stored gradients, in float64, some at a time."""
        size = max(1, _CHUNK_BYTES // (8 * self.k))
        for start in range(0, len(self.train), size):
            yield self.train[start : start + size].to(self._factor)

    def _check_weights(self) -> None:
        if self._digest is None:
            raise RuntimeError("There are no training records yet: call `fit` first.")
        if fingerprint(self.module.state_dict()) != self._digest:
            raise RuntimeError(
                "The module's weights have changed since `fit`, and the stored gradients belong to the old ones: call "
                "`fit` again."
            )


def num_coordinates(compressor: GradientCompressor | None, layout: ParameterLayout) -> int:
    """Fit the compressor to a layout, and see that a dense solve is possible.

    Args:
        compressor: Of gradients; None keeps them whole.
        layout: Of the parameters.

    Returns:
        Entries of a compressed gradient.

    Raises:
        ValueError: If they are too many.
    """
    if compressor is not None:
        compressor.fit(layout)
    k = layout.numel if compressor is None else compressor.k
    if k > MOST_COORDINATES:
        raise ValueError(
            f"Gradients of {k} entries are too long for a dense solve (the most is {MOST_COORDINATES}): give a "
            "compressor that keeps fewer, such as Dropout(k=1024), or freeze parameters."
        )
    return k


def plain_records(
    module: nn.Module, loss: OutputLoss | None, source: LogitsSource, draws: int | None = None
) -> Records:
    """Derivatives of records that come as pairs of inputs and labels, which ``source`` has taken from a batch."""
    return Records(module, loss, LogitsSource.of_pairs(source), draws=draws)


def gradients_in_parts(records: Records, inputs: Any, labels: Tensor) -> Iterator[Tensor]:
    """The gradients of a batch's records, rows ``(b, p)`` of some at a time, so that they fit into memory."""
    size = max(1, _CHUNK_BYTES // (records.layout.numel * torch.finfo(records.dtype).bits // 8))
    for start in range(0, len(labels), size):
        some, chosen = pytree.tree_map(itemgetter(slice(start, start + size)), (inputs, labels))
        yield records.gradients((some, chosen))


class _Store:
    """Rows that are added one after the other, in memory or in a file."""

    def __init__(self, path: Path | None, k: int) -> None:
        self.path, self.k = path, k
        self._parts: list[Tensor] = []
        self._dtype: torch.dtype | None = None
        self._number = 0

    def __enter__(self) -> Self:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = None if self.path is None else self.path.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, rows: Tensor) -> None:
        rows = rows.detach().cpu().contiguous()
        self._dtype, self._number = rows.dtype, self._number + len(rows)
        if self._file is None:
            self._parts.append(rows)
        else:
            self._file.write(rows.numpy().data)

    def rows(self) -> Tensor:
        if self.path is None:
            return torch.cat(self._parts)
        return torch.from_file(str(self.path), size=self._number * self.k, dtype=self._dtype).view(self._number, self.k)
