"""What an evaluation of unlearning found."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from groundwire.callbacks.unlearning.evaluation.relearning import RelearningCurve

Cell = str | float | None

_NOT_LOGGED = ("forget_records", "retain_records", "test_records", "earlier_records", "test_split", "relearning")
_COST = ("seconds", "recording_seconds", "records_read", "peak_memory_bytes", "touches_retain")


@dataclass(frozen=True, kw_only=True)
class UnlearningResult:
    """Everything that was measured of one model. None is what could not be: see each entry.

    Accuracies are shares of right records (of a sequence, of its tokens), None where labels are values. Entries of the
    retained data are None where there is none any more, and those of earlier requests where there were none. The
    comparison is None without a reference, and for the reference itself.

    Args:
        forget_records: Records that were measured.
        retain_records: The same of the retained data.
        test_records: The same of the test data.
        forget_loss: Mean loss; in nats for cross-entropy.
        retain_loss: The same of the retained data.
        test_loss: The same of the test data.
        forget_acc: Accuracy on the forget set.
        retain_acc: The same on the retained data.
        test_acc: The same on the test data.
        earlier_records: Records that earlier requests have removed.
        earlier_loss: Mean loss on them.
        earlier_acc: Accuracy on them.
        test_split: Which data were used as test data: ``"test"``, or ``"validation"`` where there were no other.
        mia_efficacy: Share of forget records that a membership attack takes for unseen; None without retained data.
        mia_auc: Area under the ROC curve of the loss between forget and test records.
        relearning: How the forget loss falls when the model is trained on it again; None if that was not tried.
        forget_gap: Forget accuracy minus that of the reference.
        retain_gap: The same of the retained data.
        test_gap: The same of the test data.
        mia_gap: The same of the membership attack's efficacy.
        kl_forget: Mean KL(reference || model) on the forget set, in nats; None where outputs are values.
        kl_test: The same on the test data.
        disagreement_forget: Share of the forget set on which the reference names another class.
        disagreement_test: The same of the test data.
        output_distance_forget: Mean Euclidean distance of the probabilities, or of outputs that are values, to the
            reference's.
        output_distance_test: The same on the test data.
        weight_distance: Euclidean distance of the parameters to the reference's.
        seconds: Wall time of the method; None if not known, as the costs below.
        recording_seconds: What recording curvature took in the training before, for a method that uses it.
        records_read: Records it read, by part, all processes together.
        peak_memory_bytes: The most memory that it had in use above what there was when it began.
        touches_retain: Whether it read retained data.

    Example:
        >>> result = UnlearningResult(forget_records=9, test_records=20, forget_loss=2.0, test_loss=0.1, forget_acc=0.25)
        >>> result.unlearning_acc
        0.75
    """

    forget_records: int
    test_records: int
    forget_loss: float
    test_loss: float
    retain_records: int | None = None
    retain_loss: float | None = None
    forget_acc: float | None = None
    retain_acc: float | None = None
    test_acc: float | None = None
    earlier_records: int | None = None
    earlier_loss: float | None = None
    earlier_acc: float | None = None
    test_split: Literal["test", "validation"] = "test"
    mia_efficacy: float | None = None
    mia_auc: float | None = None
    relearning: RelearningCurve | None = None
    forget_gap: float | None = None
    retain_gap: float | None = None
    test_gap: float | None = None
    mia_gap: float | None = None
    kl_forget: float | None = None
    kl_test: float | None = None
    disagreement_forget: float | None = None
    disagreement_test: float | None = None
    output_distance_forget: float | None = None
    output_distance_test: float | None = None
    weight_distance: float | None = None
    seconds: float | None = None
    recording_seconds: float | None = None
    records_read: Mapping[str, int] | None = None
    peak_memory_bytes: int | None = None
    touches_retain: bool | None = None

    @property
    def unlearning_acc(self) -> float | None:
        """1 minus the accuracy on the forget set."""
        return None if self.forget_acc is None else 1 - self.forget_acc

    @property
    def average_gap(self) -> float | None:
        """Mean distance to the reference, in percentage points, of the four figures, or of those that there are.

        They are unlearning accuracy, retain accuracy, test accuracy and the membership attack's efficacy.
        """
        gaps = [g for g in (self.forget_gap, self.retain_gap, self.test_gap, self.mia_gap) if g is not None]
        return 100 * sum(map(abs, gaps)) / len(gaps) if self.forget_gap is not None else None

    @property
    def relearn_steps(self) -> float | None:
        """Steps of relearning to the original's forget loss; infinite if it was not reached, None without an original."""
        return None if self.relearning is None else self.relearning.loss_steps

    @property
    def relearn_acc_steps(self) -> float | None:
        """Steps to 0.9 of the original's forget accuracy; infinite if it was not reached."""
        return None if self.relearning is None else self.relearning.acc_steps

    def scalars(self) -> dict[str, float]:
        """The figures that exist, by name, for loggers: all but the costs, which differ from run to run."""
        figures: dict[str, Any] = {k: v for k, v in vars(self).items() if k not in (*_NOT_LOGGED, *_COST)}
        return {name: float(value) for name, value in (figures | self._derived()).items() if value is not None}

    def as_dict(self) -> dict[str, Any]:
        """Everything, as plain values for JSON; infinite and undefined numbers are strings, as ``"inf"``."""
        found: dict[str, Any] = _plain(asdict(self) | self._derived())
        return found

    def as_markdown(self, name: str = "unlearned") -> str:
        """A table of one row; :func:`unlearning_table` has several.

        Args:
            name: Of the model.

        Returns:
            Markdown.
        """
        return unlearning_table({name: self})

    def _derived(self) -> dict[str, float | None]:
        return {
            "unlearning_acc": self.unlearning_acc,
            "average_gap": self.average_gap,
            "relearn_steps": self.relearn_steps,
            "relearn_acc_steps": self.relearn_acc_steps,
        }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------- tables


def _percent(name: str) -> Callable[[UnlearningResult], Cell]:
    def cell(result: UnlearningResult) -> Cell:
        value = getattr(result, name)
        return None if value is None else 100 * value

    return cell


def _figure(name: str) -> Callable[[UnlearningResult], Cell]:
    return lambda result: getattr(result, name)


def _loss_steps(result: UnlearningResult) -> Cell:
    """Steps, or ``> cap (loss then)``."""
    steps = result.relearn_steps
    if steps is None or steps < math.inf:
        return steps
    assert result.relearning is not None
    losses = result.relearning.losses
    return f"> {len(losses) - 1} ({losses[-1]:.3g})"


def _acc_steps(result: UnlearningResult) -> Cell:
    """Steps, or ``> cap (accuracy then)``."""
    steps = result.relearn_acc_steps
    if steps is None or steps < math.inf:
        return steps
    assert result.relearning is not None
    assert result.relearning.accs is not None
    return f"> {len(result.relearning.accs) - 1} ({100 * result.relearning.accs[-1]:.1f} %)"


def _read(result: UnlearningResult) -> Cell:
    if result.records_read is None:
        return None
    return ", ".join(f"{part} {number}" for part, number in result.records_read.items())


def _memory(result: UnlearningResult) -> Cell:
    return None if result.peak_memory_bytes is None else result.peak_memory_bytes / 2**20


def _retain_used(result: UnlearningResult) -> Cell:
    return None if result.touches_retain is None else "yes" if result.touches_retain else "no"


_COLUMNS: dict[str, tuple[Callable[[UnlearningResult], Cell], str]] = {
    "forget acc %": (_percent("forget_acc"), ".1f"),
    "retain acc %": (_percent("retain_acc"), ".1f"),
    "test acc %": (_percent("test_acc"), ".1f"),
    "earlier acc %": (_percent("earlier_acc"), ".1f"),
    "MIA efficacy %": (_percent("mia_efficacy"), ".1f"),
    "average gap": (_figure("average_gap"), ".2f"),
    "MIA AUC": (_figure("mia_auc"), ".3f"),
    "forget loss": (_figure("forget_loss"), ".3g"),
    "test loss": (_figure("test_loss"), ".3g"),
    "earlier loss": (_figure("earlier_loss"), ".3g"),
    "KL forget": (_figure("kl_forget"), ".2g"),
    "KL test": (_figure("kl_test"), ".2g"),
    "weight distance": (_figure("weight_distance"), ".3g"),
    "relearn steps (loss)": (_loss_steps, ".0f"),
    "relearn steps (acc)": (_acc_steps, ".0f"),
    "time s": (_figure("seconds"), ".2f"),
    "recording s": (_figure("recording_seconds"), ".2f"),
    "records read": (_read, ""),
    "peak memory increase MiB": (_memory, ".0f"),
    "retained data used": (_retain_used, ""),
}


def unlearning_rows(results: Mapping[str, UnlearningResult]) -> tuple[list[str], list[list[Cell]]]:
    """A table: the names of its columns, without those that no model has, and one row a model.

    Args:
        results: By the model's name.

    Returns:
        Column names, the first ``"model"``, and the cells, None where there is nothing.

    Raises:
        ValueError: If there is no result.
    """
    if not results:
        raise ValueError("A table needs at least one result.")
    found = {column: [value(result) for result in results.values()] for column, (value, _) in _COLUMNS.items()}
    kept = {column: cells for column, cells in found.items() if any(cell is not None for cell in cells)}
    rows: list[list[Cell]] = [
        [name, *cells] for name, cells in zip(results, zip(*kept.values(), strict=True), strict=True)
    ]
    return ["model", *kept], rows


def unlearning_table(results: Mapping[str, UnlearningResult]) -> str:
    """A Markdown table, one row a model, and what its columns mean.

    Args:
        results: By the model's name, such as ``original``, ``unlearned``, ``reference``.

    Returns:
        Markdown.

    Raises:
        ValueError: If there is no result.

    Example:
        >>> result = UnlearningResult(forget_records=9, test_records=20, forget_loss=2.0, test_loss=0.1, forget_acc=0.25)
        >>> print(unlearning_table({"unlearned": result}).splitlines()[4])
        | unlearned | 25.0 | 2 | 0.1 |
    """
    columns, rows = unlearning_rows(results)
    first = next(iter(results.values()))
    retained = "no retained records (gone)" if first.retain_records is None else f"{first.retain_records} retained"
    earlier = "" if first.earlier_records is None else f", {first.earlier_records} forgotten by earlier requests"
    test = "test data" if first.test_split == "test" else f"{first.test_split} data, which stand in for test data"
    lines = [
        f"Measured on {first.forget_records} records to forget, {retained}{earlier}, {first.test_records} of the {test}.",
        "",
    ]
    lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name, *cells in rows:
        texts = [_text(cell, _COLUMNS[column][1]) for column, cell in zip(columns[1:], cells, strict=True)]
        lines.append("| " + " | ".join([str(name), *texts]) + " |")
    lines += ["", *_legend(columns, results)]
    return "\n".join(lines) + "\n"


def _text(cell: Cell, form: str) -> str:
    return "" if cell is None else cell if isinstance(cell, str) else format(cell, form)


def _legend(columns: list[str], results: Mapping[str, UnlearningResult]) -> list[str]:
    averaged = [name for name in ("forget acc %", "retain acc %", "test acc %", "MIA efficacy %") if name in columns]
    meanings = {
        "MIA efficacy %": "MIA efficacy is the share of the forget set that a membership attack takes for unseen.",
        "MIA AUC": "MIA AUC ranks forget against test records by their loss: 0.5 where they look alike.",
        "average gap": f"The average gap is the mean distance to the reference in {', '.join(averaged)}, in points.",
        "KL test": "KL is that of the reference to the model, in nats.",
        "peak memory increase MiB": "The peak of memory is counted from the level at which the method began.",
        "recording s": "Recording is what the training spent on the curvature that the method uses.",
    }
    curve = next((r.relearning for r in results.values() if r.relearning is not None), None)
    if curve is not None:
        if curve.target_loss is not None:
            meanings["relearn steps (loss)"] = (
                f"Relearning (loss) ends at a forget loss of {curve.target_loss:.3g}"
                f"{_where_it_stands(results, _loss_steps, 'loss')}."
            )
        if curve.target_acc is not None:
            meanings["relearn steps (acc)"] = (
                f"Relearning (acc) ends at a forget accuracy of {100 * curve.target_acc:.1f} %"
                f"{_where_it_stands(results, _acc_steps, 'accuracy')}."
            )
    return [f"- {text}" for column, text in meanings.items() if column in columns]


def _where_it_stands(
    results: Mapping[str, UnlearningResult], steps: Callable[[UnlearningResult], Cell], what: str
) -> str:
    """How models compare that did not get there in time, if one did not."""
    if not any(isinstance(steps(result), str) for result in results.values()):
        return ""
    return f"; in brackets, the {what} after the last step, by which models that did not get there can be compared"
