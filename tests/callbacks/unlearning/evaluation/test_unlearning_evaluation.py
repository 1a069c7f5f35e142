from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundwire.callbacks import LogitsSource
from groundwire.callbacks.unlearning.evaluation import (
    UnlearningResult,
    compare_unlearning,
    evaluate_unlearning,
    plot_unlearning,
    relearning_curve,
    unlearning_table,
)
from helpers.callbacks import state_of
from helpers.edge import Rounds

Records = tuple[Tensor, Tensor]


def net(seed: int = 1, dropout: float = 0.5) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 4))


def records(number: int, seed: int) -> Records:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(number, 6, generator=g), torch.randint(4, (number,), generator=g)


FORGET, RETAIN, TEST = records(30, 0), records(90, 1), records(50, 2)


def batched(part: Records, size: int = 16) -> list[Any]:
    return list(zip(part[0].split(size), part[1].split(size), strict=True))


PARTS = (batched(FORGET), batched(RETAIN), batched(TEST))


def by_hand(module: nn.Module, part: Records) -> tuple[float, float, Tensor, Tensor]:
    """Loss, accuracy, losses and probabilities."""
    with torch.no_grad():
        z = copy.deepcopy(module).eval()(part[0])
    losses = F.cross_entropy(z, part[1], reduction="none")
    return float(losses.mean()), float((z.argmax(1) == part[1]).double().mean()), losses, z.softmax(1)


@pytest.mark.parametrize("batch_size", [500, 7])
def test_all_figures_are_those_of_a_hand_written_loop(batch_size: int) -> None:
    module, original, reference = net(1), net(2), net(3)
    before = [state_of(m) for m in (module, original, reference)]
    with_modes = [[sub.training for sub in m.modules()] for m in (module, original, reference)]
    found = evaluate_unlearning(
        module, *PARTS, original=original, reference=reference, batch_size=batch_size, relearn_steps=5, relearn_lr=0.02
    )
    for name, part in (("forget", FORGET), ("retain", RETAIN), ("test", TEST)):
        loss, acc, _, probs = by_hand(module, part)
        _, acc_of_reference, _, theirs = by_hand(reference, part)
        assert getattr(found, f"{name}_records") == len(part[1])
        assert getattr(found, f"{name}_loss") == pytest.approx(loss, rel=1e-5)
        assert getattr(found, f"{name}_acc") == pytest.approx(acc)
        assert getattr(found, f"{name}_gap") == pytest.approx(acc - acc_of_reference)
        if name == "retain":
            continue
        kl = float((theirs * (theirs.log() - probs.log())).sum(1).mean())
        assert getattr(found, f"kl_{name}") == pytest.approx(kl, rel=1e-4)
        assert getattr(found, f"disagreement_{name}") == pytest.approx(
            float((probs.argmax(1) != theirs.argmax(1)).double().mean())
        )
        assert getattr(found, f"output_distance_{name}") == pytest.approx(
            float((probs - theirs).norm(dim=1).mean()), rel=1e-5
        )
    assert found.unlearning_acc == pytest.approx(1 - by_hand(module, FORGET)[1])
    forget, test = by_hand(module, FORGET)[2].numpy(), by_hand(module, TEST)[2].numpy()
    assert found.mia_auc == pytest.approx((forget[:, None] < test).mean(), abs=1e-3)
    gaps = [found.forget_gap, found.retain_gap, found.test_gap, found.mia_gap]
    assert found.average_gap == pytest.approx(100 * np.abs(np.array(gaps)).mean())
    squares = [(a - b).square().sum() for a, b in zip(module.parameters(), reference.parameters(), strict=True)]
    assert found.weight_distance == pytest.approx(float(torch.stack(squares).sum().sqrt().detach()), rel=1e-5)
    target = by_hand(original, FORGET)[0]
    curve = relearning_curve(module, PARTS[0], num_steps=5, lr=0.02, target_loss=target * 1.001 + 1e-6, target_acc=2.0)
    assert found.relearning is not None
    assert found.relearning.losses == pytest.approx(curve.losses[: len(found.relearning.losses)], rel=1e-4)
    assert found.relearn_steps == curve.loss_steps
    assert [state_of(m) for m in (module, original, reference)] == before
    assert [[sub.training for sub in m.modules()] for m in (module, original, reference)] == with_modes


def test_the_membership_attack_learns_from_retained_and_test_records() -> None:
    """A model that is sure of what it has seen, and the forget records among it, then among the others."""

    class Sure(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :4]

    def known(number: int, by: float, seed: int) -> Records:
        x, y = records(number, seed)
        return torch.cat([0.1 * x[:, :4] + by * F.one_hot(y, 4), x[:, 4:]], dim=1), y

    retain, test = [known(60, 5.0, 0)], [known(30, 0.0, 1)]
    seen = evaluate_unlearning(Sure(), [known(20, 5.0, 2)], retain, test, relearn=False)
    unseen = evaluate_unlearning(Sure(), [known(20, 0.0, 2)], retain, test, relearn=False)
    assert (seen.mia_efficacy, seen.mia_auc) == (0.0, 1.0)
    assert unseen.mia_efficacy == 1.0
    assert unseen.mia_auc == pytest.approx(0.5, abs=0.2)


def test_several_models_are_read_in_one_pass_and_each_is_as_if_alone() -> None:
    read: list[int] = []

    class Counted(Rounds):
        def __iter__(self) -> Any:
            read.append(1)
            return super().__iter__()

    models = {"original": net(1), "mine": net(2), "reference": net(3)}
    options: dict[str, Any] = {"relearn_steps": 3, "relearn_lr": 0.01}
    parts = [Counted(*part) for part in PARTS]
    together = compare_unlearning(models, *parts, original="original", reference="reference", **options)
    assert len(read) == 3
    alone = evaluate_unlearning(models["mine"], *PARTS, original=net(1), reference=net(3), **options)
    assert together["mine"] == alone
    assert list(together) == list(models)
    assert together["original"].relearn_steps == together["original"].relearn_acc_steps == 0
    assert together["reference"].kl_test is together["reference"].average_gap is None
    same = evaluate_unlearning(net(1), *PARTS, reference=net(1), relearn=False)
    assert same.kl_forget == same.kl_test == same.average_gap == same.weight_distance == 0
    assert same.disagreement_test == same.output_distance_test == 0


def test_it_is_reproducible() -> None:
    first, again = (
        evaluate_unlearning(net(2), *PARTS, original=net(1), relearn_steps=3, relearn_fraction=0.5) for _ in range(2)
    )
    assert first == again


def test_retained_data_that_is_gone_has_no_figures() -> None:
    found = evaluate_unlearning(net(), PARTS[0], None, PARTS[2], reference=net(2), relearn=False)
    assert found.retain_acc is found.retain_loss is found.retain_records is found.retain_gap is None
    assert found.mia_efficacy is found.mia_gap is None
    assert found.mia_auc is not None
    assert found.average_gap == pytest.approx(100 * (abs(found.forget_gap) + abs(found.test_gap)) / 2)
    assert "no retained records (gone)" in found.as_markdown()
    assert "retain acc" not in found.as_markdown()


def test_without_an_original_relearning_aims_at_nine_tenths_of_all_records() -> None:
    found = evaluate_unlearning(net(dropout=0.0), *PARTS, relearn_steps=400, relearn_lr=0.05)
    assert found.relearn_steps is None
    assert found.relearning is not None
    assert found.relearn_acc_steps == len(found.relearning.losses) - 1 > 0
    assert found.relearning.accs[-1] >= 0.9


# ---------------------------------------------------------------- other kinds of records


class Sequences(nn.Module):
    """Tokens (B, T) to logits (B, T, 5)."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding, self.head = nn.Embedding(5, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.embedding(x))}


def tokens(number: int, seed: int) -> list[Any]:
    x = torch.randint(5, (number, 9), generator=torch.Generator().manual_seed(seed))
    return [(x[:, :-1], x[:, 1:])]


def test_sequences() -> None:
    module, reference = Sequences(0), Sequences(1)
    forget, retain, test = tokens(6, 0), tokens(20, 1), tokens(8, 2)
    found = evaluate_unlearning(module, forget, retain, test, reference=reference, original=reference, relearn_steps=3)
    with torch.no_grad():
        z, w = (m(forget[0][0])["logits"].flatten(0, 1) for m in (module, reference))
    y = forget[0][1].flatten()
    assert found.forget_loss == pytest.approx(float(F.cross_entropy(z, y)), rel=1e-5)
    assert found.forget_acc == pytest.approx(float((z.argmax(1) == y).double().mean()))
    kl = F.kl_div(z.log_softmax(1), w.log_softmax(1), log_target=True, reduction="batchmean")
    assert found.kl_forget == pytest.approx(float(kl), rel=1e-4)
    assert found.forget_records == 6
    assert found.mia_efficacy is not None
    assert found.relearning is not None


def padded(parts: list[Any], empty: bool = True) -> list[Any]:
    """Without the labels of the last three tokens, and of one record, or with a record more that has none."""
    x, y = parts[0][0], parts[0][1].clone()
    y[:, -3:] = -100
    if empty:
        x, y = torch.cat([x[:2], x[:1], x[2:]]), torch.cat([y[:2], torch.full_like(y[:1], -100), y[2:]])
    return [(x, y)]


def test_records_and_tokens_without_a_label_count_nowhere() -> None:
    module, reference = Sequences(0), Sequences(1)
    parts = [tokens(6, 0), tokens(20, 1), tokens(8, 2)]
    options: dict[str, Any] = {"reference": reference, "original": reference, "relearn_steps": 3}
    found = evaluate_unlearning(module, *map(padded, parts), earlier=padded(tokens(5, 3)), **options)
    without = evaluate_unlearning(
        module, *(padded(p, empty=False) for p in parts), earlier=padded(tokens(5, 3), empty=False), **options
    )
    assert found == without, "a record without labels is left out, and no model has diverged"
    assert (found.forget_records, found.test_records, found.earlier_records) == (6, 8, 5)
    cut = [[(x, y[:, :-3])] for part in parts for x, y in part]

    class Shorter(nn.Module):
        def __init__(self, whole: nn.Module) -> None:
            super().__init__()
            self.whole = whole

        def forward(self, x: Tensor) -> Tensor:
            return self.whole(x)["logits"][:, :-3]

    short = evaluate_unlearning(Shorter(module), *cut, reference=Shorter(reference), relearn=False)
    for name in ("kl_forget", "kl_test", "disagreement_forget", "disagreement_test", "output_distance_forget"):
        assert getattr(found, name) == pytest.approx(getattr(short, name), rel=1e-6), name
    whole = evaluate_unlearning(module, *parts, reference=reference, relearn=False)
    assert found.kl_forget != pytest.approx(whole.kl_forget, rel=1e-4), "padding would have made a difference"
    with pytest.raises(ValueError, match="The test data is empty: give at least one record with a label"):
        evaluate_unlearning(module, parts[0], parts[1], [(x, torch.full_like(y, -100)) for x, y in parts[2]])


def test_what_earlier_requests_removed_is_one_more_part() -> None:
    earlier = records(12, 9)
    found = evaluate_unlearning(net(), *PARTS, earlier=batched(earlier), reference=net(2), relearn=False)
    loss, acc, _, _ = by_hand(net(), earlier)
    assert (found.earlier_records, found.earlier_acc) == (12, pytest.approx(acc))
    assert found.earlier_loss == pytest.approx(loss, rel=1e-5)
    assert {"earlier_acc", "earlier_loss"} <= found.scalars().keys()
    assert found.as_dict()["earlier_acc"] == found.earlier_acc
    assert "12 forgotten by earlier requests" in found.as_markdown()
    assert "| earlier acc % |" in found.as_markdown()
    none = evaluate_unlearning(net(), *PARTS, relearn=False)
    assert none.earlier_acc is none.earlier_loss is none.earlier_records is None
    assert "earlier" not in none.as_markdown()


def test_the_membership_attack_on_values_does_not_depend_on_their_unit() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small, large = nn.Linear(6, 1), nn.Linear(6, 1)
    for own, p in zip(small.parameters(), large.parameters(), strict=True):
        p.data.copy_(1000 * own.data)
    parts = [[(x, x.sum(1, keepdim=True))] for x in (FORGET[0], RETAIN[0] / 2, TEST[0])]
    scaled = [[(x, 1000 * y) for x, y in part] for part in parts]
    found, again = (evaluate_unlearning(m, *p, relearn=False) for m, p in ((small, parts), (large, scaled)))
    assert again.forget_loss == pytest.approx(1e6 * found.forget_loss, rel=1e-4)
    assert again.mia_efficacy == pytest.approx(found.mia_efficacy, abs=1e-9)
    assert 0.5 < found.mia_efficacy <= 1, "the forget records look like test records"


def test_values_have_losses_and_distances_alone() -> None:
    parts = [[(x, x.sum(1, keepdim=True))] for x in (FORGET[0], RETAIN[0], TEST[0])]
    module, reference = nn.Linear(6, 1), nn.Linear(6, 1)
    found = evaluate_unlearning(module, *parts, reference=reference, original=reference, relearn_steps=2)
    with torch.no_grad():
        expected = (module(FORGET[0])[:, 0] - FORGET[0].sum(1)).square().mean()
        apart = (module(TEST[0]) - reference(TEST[0])).abs().mean()
    assert found.forget_loss == pytest.approx(float(expected), rel=1e-5)
    assert found.output_distance_test == pytest.approx(float(apart), rel=1e-5)
    assert found.forget_acc is found.unlearning_acc is found.kl_forget is found.average_gap is None
    assert found.relearn_acc_steps is None
    assert found.relearn_steps is not None
    assert "forget acc" not in found.as_markdown()
    fig, _ = plot_unlearning({"mine": found})
    assert fig.axes[0].get_xlabel() == "Forget loss"


def test_outputs_and_labels_are_found_where_the_source_says() -> None:
    class Wrapped(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.net = net(seed)

        def forward(self, x: Tensor) -> str:
            self.net(x)
            return "nothing"

    parts = [[{"picture": x, "kind": y} for x, y in part] for part in PARTS]
    source = LogitsSource("net", unpack=lambda batch: (batch["picture"], batch["kind"]))
    found = evaluate_unlearning(Wrapped(1), *parts, source=source, original=Wrapped(2), relearn_steps=2)
    plain = evaluate_unlearning(net(1), *PARTS, original=net(2), relearn_steps=2)
    assert found == plain


def test_one_logit_for_two_classes() -> None:
    parts = [[(x, y % 2)] for x, y in (FORGET, RETAIN, TEST)]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Linear(6, 1)
    found = evaluate_unlearning(module, *parts, source=LogitsSource(binary=True), relearn_steps=1)
    with torch.no_grad():
        z = module(FORGET[0])[:, 0]
    assert found.forget_loss == pytest.approx(
        float(F.binary_cross_entropy_with_logits(z, (FORGET[1] % 2).float())), rel=1e-5
    )
    assert found.forget_acc == pytest.approx(float(((z > 0) == (FORGET[1] % 2 == 1)).double().mean()))


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forget": []}, "The forget set is empty: give at least one record"),
        ({"test": []}, "The test data is empty"),
        ({"retain": []}, "The retained data is empty.*or retain=None"),
        ({"test": [*PARTS[2], (FORGET[0][3:5], FORGET[1][3:5])]}, "2 samples of the test data are in the forget set"),
        ({"reference": nn.Linear(6, 4)}, "The reference has another architecture"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"relearn_fraction": 2.0}, "`fraction` must be in"),
        ({"test": [(TEST[0], TEST[0][:, :3])]}, "do not fit"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], message: str) -> None:
    options = dict(zip(("forget", "retain", "test"), PARTS, strict=True)) | change
    with pytest.raises(ValueError, match=message):
        evaluate_unlearning(net(), **options)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="There is no model to evaluate"):
        compare_unlearning({}, *PARTS)
    with pytest.raises(ValueError, match="no model named 'retrained' among a"):
        compare_unlearning({"a": net()}, *PARTS, reference="retrained")


def test_a_model_that_has_diverged_is_refused_and_left_as_it_was() -> None:
    module = net()
    with torch.no_grad():
        module[4].weight.fill_(math.nan)
    with pytest.raises(RuntimeError, match="loss that is not finite on 30 of 30 forget records"):
        evaluate_unlearning(module, *PARTS)
    assert module.training


# ---------------------------------------------------------------- what is shown


def result(**changes: Any) -> UnlearningResult:
    plain: dict[str, Any] = {"forget_records": 3, "test_records": 5, "forget_loss": 2.0, "test_loss": 0.5}
    return UnlearningResult(**plain | changes)


def test_tables_have_a_row_a_model_and_no_empty_column(tmp_path: Path) -> None:
    models = {"original": net(1), "unlearned": net(2), "reference": net(3)}
    found = compare_unlearning(
        models, *PARTS, original="original", reference="reference", relearn_steps=2, relearn_lr=1e-6
    )
    table = unlearning_table(found)
    header, _, *rows = [line for line in table.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in (header, *rows)]
    assert [row[0] for row in cells[1:]] == list(models)
    mine = dict(zip(cells[0], cells[2], strict=True))
    assert mine["forget acc %"] == f"{100 * found['unlearned'].forget_acc:.1f}"
    assert mine["average gap"] == f"{found['unlearned'].average_gap:.2f}"
    assert dict(zip(cells[0], cells[3], strict=True))["average gap"] == ""
    assert "time s" not in header
    steps = {row[0]: dict(zip(cells[0], row, strict=True))["relearn steps (loss)"] for row in cells[1:]}
    assert steps["original"] == "0"
    at_the_end = found["unlearned"].relearning
    assert steps["unlearned"] == f"> 2 ({at_the_end.losses[-1]:.3g})"
    assert f"> 2 ({100 * at_the_end.accs[-1]:.1f} %)" in mine.values()
    assert "; in brackets, the loss after the last step, by which models that did not get there" in table
    assert found["unlearned"].as_markdown().splitlines()[4].startswith("| unlearned |")
    with pytest.raises(ValueError, match="at least one result"):
        unlearning_table({})


def test_results_are_plain_for_json_and_loggers() -> None:
    found = evaluate_unlearning(net(1), *PARTS, original=net(2), reference=net(3), relearn_steps=1, relearn_lr=1e-6)
    plain = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert plain["forget_loss"] == found.forget_loss
    assert plain["average_gap"] == found.average_gap
    assert plain["relearning"]["losses"] == list(found.relearning.losses)
    numbers = found.scalars()
    assert {"forget_acc", "retain_acc", "test_acc", "kl_forget", "mia_efficacy", "average_gap"} <= set(numbers)
    assert all(isinstance(value, float) for value in numbers.values())
    assert not {"seconds", "peak_memory_bytes", "relearning"} & set(result(seconds=1.0, peak_memory_bytes=9).scalars())
    assert not {"recording_seconds", "test_split"} & set(result(recording_seconds=1.0).scalars())
    assert result(kl_test=math.inf).as_dict()["kl_test"] == "inf"


def test_tables_and_pictures_name_what_stood_in_for_test_data() -> None:
    assert "5 of the test data." in result().as_markdown()
    assert "5 of the validation data, which stand in for test data." in result(test_split="validation").as_markdown()
    fig, _ = plot_unlearning({"mine": result(forget_acc=0.1, test_acc=0.9, test_split="validation")})
    assert fig.axes[0].get_ylabel() == "Validation accuracy (%)"


def test_a_table_has_the_costs_that_are_known() -> None:
    table = unlearning_table({"a": result(recording_seconds=1.5, peak_memory_bytes=3 * 2**20), "b": result()})
    columns, _, first, second = ([c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines()[2:6])
    assert dict(zip(columns, first, strict=True))["recording s"] == "1.50"
    assert dict(zip(columns, first, strict=True))["peak memory increase MiB"] == "3"
    assert second[columns.index("recording s")] == ""
    assert "recording s" not in result(peak_memory_bytes=1).as_markdown()


def test_the_plot_marks_the_reference_and_draws_each_curve() -> None:
    models = {"original": net(1), "unlearned": net(2), "reference": net(3)}
    found = compare_unlearning(models, *PARTS, original="original", reference="reference", relearn_steps=3)
    fig, axes = plot_unlearning(found)
    assert axes.shape == (2,)
    stars = [line for line in axes[0].get_lines() if line.get_marker() == "*"]
    assert float(stars[0].get_xdata()[0]) == found["reference"].forget_acc
    assert float(stars[0].get_ydata()[0]) == found["reference"].test_acc
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes[1].get_lines()}
    assert drawn["unlearned"] == list(found["unlearned"].relearning.losses)
    assert "Relearning step" in axes[1].get_xlabel()
    fig.canvas.draw()
    alone, only = plot_unlearning({"mine": result(forget_acc=0.1, test_acc=0.9)})
    assert only.shape == (1,)
    alone.canvas.draw()
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_unlearning({})


def test_progress_goes_from_nothing_to_all() -> None:
    seen: list[tuple[str, float]] = []
    evaluate_unlearning(net(), *PARTS, relearn_steps=3, progress=lambda what, share: seen.append((what, share)))
    shares = [share for _, share in seen]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert "Relearning, model" in {what for what, _ in seen}
