"""The evaluation of unlearning: every figure of every model in one pass over the data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from groundwire.callbacks.logits import LogitsSource
from groundwire.callbacks.reporting.progress import ShowProgress
from groundwire.callbacks.unlearning.evaluation.batches import Records, hashes_of, outputs_of, records_in
from groundwire.callbacks.unlearning.evaluation.functional import (
    disagreements,
    kl_divergences,
    mia_auc,
    mia_efficacy,
    output_distances,
    record_accuracies,
    record_losses,
    weight_distance,
)
from groundwire.callbacks.unlearning.evaluation.relearning import relearning_curve
from groundwire.callbacks.unlearning.evaluation.result import UnlearningResult
from groundwire.callbacks.unlearning.records import OutputLoss, evaluating

_Part = Literal["forget", "retain", "test", "earlier"]
_RELEARNED_ACC = 0.9  # of the original's
_SLACK = 1e-3  # of the original's loss, and a thousandth of that in its unit: what differs in rounding only is known
_SHARE_MEASURED = 0.5  # of the progress; the rest is relearning


def evaluate_unlearning(
    module: nn.Module,
    forget: Iterable[Any],
    retain: Iterable[Any] | None,
    test: Iterable[Any],
    *,
    earlier: Iterable[Any] | None = None,
    reference: nn.Module | None = None,
    original: nn.Module | None = None,
    output_loss: OutputLoss | None = None,
    source: LogitsSource | None = None,
    relearn: bool = True,
    relearn_steps: int = 60,
    relearn_lr: float = 1e-3,
    relearn_fraction: float = 1.0,
    batch_size: int = 500,
    seed: int = 0,
    progress: ShowProgress | None = None,
) -> UnlearningResult:
    """Measure how well a model has forgotten; :func:`compare_unlearning` measures several.

    Args:
        module: The model after unlearning. It is left as it is, its mode too.
        forget: Batches ``(x, y)`` of the records to forget: a loader, or a list.
        retain: Batches of the records to retain; None if they are gone.
        test: Batches of records that no model was trained on.
        earlier: Batches of the records that earlier requests have removed; None if there are none.
        reference: The same model, retrained without the forget set; None if there is none.
        original: The model before unlearning, whose knowledge relearning aims at. Without it, relearning has succeeded at
            a forget accuracy of 0.9.
        output_loss: Of one record, from its outputs and its label; by default cross-entropy, or the squared error for
            labels that are values.
        source: Where inputs, labels and outputs are found.
        relearn: Whether to try to relearn the forget set; see :func:`relearning_curve`.
        relearn_steps: Steps after which to give up.
        relearn_lr: Learning rate of Adam.
        relearn_fraction: Share of the forget set that the attacker has, in (0, 1].
        batch_size: Records given to a model at once; larger batches are split.
        seed: Of the attacker's choices.
        progress: Called with what is being done, and the share of the work that is done.

    Returns:
        All figures.

    Raises:
        ValueError: If a part is empty, a forget record is in the test data, the reference has another architecture, or
            outputs and labels do not fit.
        RuntimeError: If a model's loss is not finite.

    Example:
        >>> x, y = torch.eye(3), torch.arange(3)
        >>> net = nn.Linear(3, 3, bias=False)
        >>> _ = net.weight.data.copy_(torch.tensor([[0.0, 0, 0], [0, 1, 0], [0, 0, 1]]))
        >>> found = evaluate_unlearning(net, [(x[:1], y[:1] + 1)], [(x[1:2], y[1:2])], [(x[2:], y[2:])], relearn=False)
        >>> found.forget_acc, found.retain_acc, found.test_acc
        (0.0, 1.0, 1.0)
    """
    models = {"model": module}
    models |= {} if original is None else {"original": original}
    models |= {} if reference is None else {"reference": reference}
    found = compare_unlearning(
        models,
        forget,
        retain,
        test,
        earlier=earlier,
        reference=None if reference is None else "reference",
        original=None if original is None else "original",
        output_loss=output_loss,
        source=source,
        relearn=["model"] if relearn else [],
        relearn_steps=relearn_steps,
        relearn_lr=relearn_lr,
        relearn_fraction=relearn_fraction,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    return found["model"]


def compare_unlearning(
    models: Mapping[str, nn.Module],
    forget: Iterable[Any],
    retain: Iterable[Any] | None,
    test: Iterable[Any],
    *,
    earlier: Iterable[Any] | None = None,
    reference: str | None = None,
    original: str | None = None,
    output_loss: OutputLoss | None = None,
    source: LogitsSource | None = None,
    relearn: bool | Iterable[str] = True,
    relearn_steps: int = 60,
    relearn_lr: float = 1e-3,
    relearn_fraction: float = 1.0,
    batch_size: int = 500,
    seed: int = 0,
    progress: ShowProgress | None = None,
) -> dict[str, UnlearningResult]:
    """Measure several models; the data is read once.

    Args:
        models: By name, at least one; they are left as they are, their modes too.
        forget: As for :func:`evaluate_unlearning`, as all that follows.
        retain: As there.
        test: As there.
        earlier: As there.
        reference: Name of the model that was retrained without the forget set.
        original: Name of the model before unlearning.
        output_loss: As there.
        source: As there.
        relearn: Whether to try, or the names of the models of which.
        relearn_steps: As there.
        relearn_lr: As there.
        relearn_fraction: As there.
        batch_size: As there.
        seed: As there.
        progress: As there.

    Returns:
        All figures of each model, in the order of ``models``.

    Raises:
        ValueError: As there; or if there is no model, or none of the name.
        RuntimeError: If a model's loss is not finite.
    """
    if not models:
        raise ValueError("There is no model to evaluate.")
    attacked = set(models) if relearn is True else set() if relearn is False else set(relearn)
    unknown = sorted({*attacked, *(name for name in (reference, original) if name is not None)} - set(models))
    if unknown:
        raise ValueError(f"There is no model named {unknown[0]!r} among {', '.join(models)}.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    show = progress or (lambda _, __: None)
    measure = _Measurement(models, reference, source or LogitsSource(), output_loss, batch_size)
    whole = _SHARE_MEASURED if attacked else 1.0
    show("Forget set", 0.0)
    known = measure.run("forget", forget)
    show("Test data", 0.05 * whole)
    measure.run("test", test, forgotten={one for inputs, _ in known for one in hashes_of(inputs)})
    if retain is not None:
        show("Retained data", 0.2 * whole)
        measure.run("retain", retain)
    if earlier is not None:
        show("Forgotten earlier", 0.9 * whole)
        measure.run("earlier", earlier)
    own = {name: measure.alone(name) for name in models}
    found = {name: measure.compared(name, own) for name in models}
    target_loss, target_acc = None, _RELEARNED_ACC
    if original is not None:
        loss = found[original].forget_loss
        target_loss = loss + _SLACK * (abs(loss) + 1e-3)
        target_acc = _RELEARNED_ACC * (found[original].forget_acc or 0.0)
    names = [name for name in models if name in attacked]
    for number, name in enumerate(names):

        def show_step(step: int, name: str = name, number: int = number) -> None:
            done = (number + step / max(relearn_steps, 1)) / len(names)
            show(f"Relearning, {name}", whole + (1 - whole) * done)

        curve = relearning_curve(
            models[name],
            known,
            target_loss=target_loss,
            target_acc=target_acc if found[name].forget_acc is not None else None,
            fraction=relearn_fraction,
            num_steps=relearn_steps,
            lr=relearn_lr,
            batch_size=batch_size,
            output_loss=output_loss,
            source=LogitsSource.of_pairs(source or LogitsSource()),
            seed=seed,
            progress=show_step,
        )
        found[name] = replace(found[name], relearning=curve)
    show("Done", 1.0)
    return found


# ---------------------------------------------------------------- one pass


@dataclass
class _Figures:
    """Of one model on one part, a tensor a batch."""

    losses: list[Tensor] = field(default_factory=list)
    accs: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    disagreement: list[Tensor] = field(default_factory=list)
    distance: list[Tensor] = field(default_factory=list)


class _Measurement:
    """All models on all parts."""

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        reference: str | None,
        source: LogitsSource,
        output_loss: OutputLoss | None,
        batch_size: int,
    ) -> None:
        self.models = models
        self.reference = reference
        self.source = source
        self.output_loss = output_loss
        self.batch_size = batch_size
        self.figures: dict[tuple[str, _Part], _Figures] = {}
        self.distances: dict[str, float] = {}
        if reference is not None:
            others = [name for name in models if name != reference]
            self.distances = {name: weight_distance(models[name], models[reference]) for name in others}

    @torch.no_grad()
    def run(self, part: _Part, batches: Iterable[Any], forgotten: set[bytes] | None = None) -> list[Records]:
        """Measure all models on a part.

        Args:
            part: Which.
            batches: Its records.
            forgotten: Hashes of inputs that must not be among them.

        Returns:
            The records, in batches; of the forget set only, for others may be too large to keep.
        """
        for name in self.models:
            self.figures[name, part] = _Figures()
        kept: list[Records] = []
        found = 0
        with ExitStack() as stack:
            for module in self.models.values():
                stack.enter_context(evaluating(module))
            for inputs, labels in self._records(part, batches):
                if part == "forget":
                    kept.append((inputs, labels))
                if forgotten is not None:
                    found += sum(one in forgotten for one in hashes_of(inputs))
                self._batch(part, inputs, labels)
        if found:
            raise ValueError(
                f"{found} samples of the test data are in the forget set: forgetting could not be told from "
                "generalisation. Take them out of the test data."
            )
        self._refuse_nonfinite(part)
        return kept

    def _records(self, part: _Part, batches: Iterable[Any]) -> Iterator[Records]:
        number = 0
        for inputs, labels in records_in(batches, self.source, self.batch_size):
            number += len(labels)
            yield inputs, labels
        if not number:
            names: dict[_Part, str] = {"forget": "forget set", "retain": "retained data", "test": "test data"}
            raise ValueError(
                f"The {names.get(part, 'data forgotten earlier')} is empty: give at least one record with a label"
                f"{', or retain=None if the retained data is gone' if part == 'retain' else ''}."
            )

    def _batch(self, part: _Part, inputs: Any, labels: Tensor) -> None:
        outputs = {name: outputs_of(module, inputs, self.source).detach() for name, module in self.models.items()}
        for name, own in outputs.items():
            figures, own_labels = self.figures[name, part], labels.to(own.device)
            figures.losses.append(record_losses(own, own_labels, self.output_loss).double().cpu())
            accs = record_accuracies(own, own_labels)
            if accs is not None:
                figures.accs.append(accs.cpu())
            if self.reference is None or name == self.reference or part not in ("forget", "test"):
                continue
            theirs = outputs[self.reference].to(own.device)
            if accs is not None:
                figures.kl.append(kl_divergences(theirs, own, own_labels).cpu())
                figures.disagreement.append(disagreements(theirs, own, own_labels).cpu())
                figures.distance.append(output_distances(theirs, own, labels=own_labels).cpu())
            else:
                figures.distance.append(output_distances(theirs, own, are_logits=False).cpu())

    def _refuse_nonfinite(self, part: _Part) -> None:
        for name in self.models:
            losses = torch.cat(self.figures[name, part].losses)
            wrong = int((~torch.isfinite(losses)).sum())
            if wrong:
                raise RuntimeError(
                    f"The {name} has a loss that is not finite on {wrong} of {len(losses)} {part} records: it has "
                    "diverged, and there is nothing to measure. Lower the method's learning rate or its number of steps."
                )

    def compared(self, name: str, alone: Mapping[str, UnlearningResult]) -> UnlearningResult:
        """The figures of a model with those against the reference."""
        own = alone[name]
        if self.reference is None or name == self.reference:
            return own
        theirs = alone[self.reference]
        forget, test = self.figures[name, "forget"], self.figures[name, "test"]
        return replace(
            own,
            forget_gap=_difference(own.forget_acc, theirs.forget_acc),
            retain_gap=_difference(own.retain_acc, theirs.retain_acc),
            test_gap=_difference(own.test_acc, theirs.test_acc),
            mia_gap=_difference(own.mia_efficacy, theirs.mia_efficacy),
            kl_forget=_mean(forget.kl),
            kl_test=_mean(test.kl),
            disagreement_forget=_mean(forget.disagreement),
            disagreement_test=_mean(test.disagreement),
            output_distance_forget=_mean(forget.distance),
            output_distance_test=_mean(test.distance),
            weight_distance=self.distances[name],
        )

    def alone(self, name: str) -> UnlearningResult:
        """The figures of a model that need no other."""
        found = self._of_retained(name, self._of_others(name))
        earlier = self.figures.get((name, "earlier"))
        if earlier is None:
            return found
        losses = torch.cat(earlier.losses)
        return replace(
            found, earlier_records=len(losses), earlier_loss=float(losses.mean()), earlier_acc=_mean(earlier.accs)
        )

    def _of_others(self, name: str) -> UnlearningResult:
        forget, test = self.figures[name, "forget"], self.figures[name, "test"]
        forget_losses, test_losses = torch.cat(forget.losses), torch.cat(test.losses)
        return UnlearningResult(
            forget_records=len(forget_losses),
            test_records=len(test_losses),
            forget_loss=float(forget_losses.mean()),
            test_loss=float(test_losses.mean()),
            forget_acc=_mean(forget.accs),
            test_acc=_mean(test.accs),
            mia_auc=mia_auc(forget_losses, test_losses),
        )

    def _of_retained(self, name: str, found: UnlearningResult) -> UnlearningResult:
        retain = self.figures.get((name, "retain"))
        if retain is None:
            return found
        forget_losses, retain_losses, test_losses = (
            torch.cat(self.figures[name, part].losses) for part in ("forget", "retain", "test")
        )
        in_nats = self.output_loss is None and bool(retain.accs)
        return replace(
            found,
            retain_records=len(retain_losses),
            retain_loss=float(retain_losses.mean()),
            retain_acc=_mean(retain.accs),
            mia_efficacy=mia_efficacy(retain_losses, test_losses, forget_losses, cross_entropy=in_nats),
        )


def _mean(values: list[Tensor]) -> float | None:
    return float(torch.cat(values).mean()) if values else None


def _difference(own: float | None, reference: float | None) -> float | None:
    return None if own is None or reference is None else own - reference
