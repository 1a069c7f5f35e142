"""NormalizedCMI as a metric: against loops over pairs, over splits, options, processes and precisions."""

from __future__ import annotations

import itertools
import math
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax
from torch import Tensor, nn

from groundwire.callbacks.information import NormalizedCMI
from helpers.ddp import run_ddp

Array = np.ndarray[Any, np.dtype[Any]]
STATES = ("p_sums", "log_sums", "count", "neg_entropy", "correct")


def sample(n: int = 90, classes: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Logits that lean to their label, and labels; every class is present."""
    rng = np.random.default_rng(seed)
    target = np.concatenate([np.arange(classes), rng.integers(0, classes, n - classes)])
    return torch.tensor(rng.standard_normal((n, classes)) + np.eye(classes)[target], dtype=dtype), torch.tensor(target)


def entropy(p: Array) -> float:
    return -float(sum(value * math.log(value) for value in p if value > 0))


def brute(log_p: Array, y: Array, kind: str = "ce", bessel: bool = False) -> dict[str, Any]:
    """All results by loops over samples and pairs, in nats."""
    p, n, classes = np.exp(log_p), len(y), log_p.shape[1]
    per_class, within = np.full(classes, math.nan), 0.0
    weighted, weight = 0.0, 0.0
    for c in range(classes):
        rows = np.flatnonzero(y == c)
        if len(rows) == 0:
            continue
        centroid = p[rows].mean(0)
        within += len(rows) / n * entropy(centroid)
        if bessel and len(rows) == 1:
            continue
        mean = np.mean([(p[i] * (log_p[i] - np.log(centroid))).sum() for i in rows])
        per_class[c] = mean * (len(rows) / (len(rows) - 1) if bessel else 1)
        weighted, weight = weighted + len(rows) * per_class[c], weight + len(rows)
    gamma = sum(
        float((p[j] * ((log_p[j] if kind == "kl" else 0) - log_p[k])).sum())
        for j, k in itertools.product(range(n), repeat=2)
        if y[j] != y[k]
    ) / (n * n)
    cmi = weighted / weight
    return {
        "cmi": cmi,
        "cmi_per_class": per_class,
        "h_yhat_given_y": within,
        "accuracy": np.mean(log_p.argmax(1) == y),
        "recall_per_class": np.array(
            [np.mean(log_p.argmax(1)[y == c] == c) if c in y else math.nan for c in range(classes)]
        ),
        "n": n,
        "gamma": gamma,
        "ncmi": cmi / gamma,
    }


def brute_of(logits: Tensor, target: Tensor, **options: Any) -> dict[str, Any]:
    return brute(log_softmax(logits.double().numpy(), axis=1), target.numpy(), **options)


def measured(logits: Tensor, target: Tensor, num_classes: int = 5, **options: Any) -> dict[str, Tensor]:
    metric = NormalizedCMI(num_classes, **options)
    metric.update(logits, target)
    return result_of(metric)


def result_of(metric: NormalizedCMI) -> dict[str, Tensor]:
    result: dict[str, Tensor] = metric.compute()
    return result


def same(found: dict[str, Tensor], expected: dict[str, Any], atol: float = 1e-11) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].numpy(), np.asarray(value), rtol=0, atol=atol, err_msg=name)


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("kind", ["ce", "kl"])
@pytest.mark.parametrize("estimator", ["plugin", "bessel"])
@pytest.mark.parametrize(("n", "classes"), [(90, 5), (200, 7), (70, 66)])
@pytest.mark.filterwarnings("ignore:Classes with a single sample")
def test_results_are_those_of_loops(n: int, classes: int, kind: Any, estimator: Any) -> None:
    logits, target = sample(n, classes)
    found = measured(logits, target, classes, separation=kind, estimator=estimator)
    same(found, brute_of(logits, target, kind=kind, bessel=estimator == "bessel"), 1e-10)


def test_per_class_values_average_to_the_total_and_stay_below_the_entropy() -> None:
    logits, target = sample()
    found = measured(logits, target)
    share = torch.bincount(target).double() / len(target)
    assert float((share * found["cmi_per_class"]).sum()) == pytest.approx(float(found["cmi"]), abs=1e-14)
    assert 0 < float(found["cmi"]) < float(found["h_yhat_given_y"]) < math.log(5)


def test_classes_without_a_sample_are_nan_and_change_nothing() -> None:
    logits, target = sample(60, 5)
    kept = target != 3
    found = measured(logits[kept], target[kept])
    same(found, brute_of(logits[kept], target[kept]))
    assert found["cmi_per_class"].isnan().tolist() == [False, False, False, True, False]


def test_centroids_are_the_mean_outputs() -> None:
    logits, target = sample(60, 5)
    metric = NormalizedCMI(6)
    metric.update(torch.cat([logits, torch.zeros(60, 1)], dim=1), target)
    p = torch.softmax(torch.cat([logits, torch.zeros(60, 1)], dim=1), 1)
    expected = torch.stack([p[target == c].mean(0) for c in range(5)])
    torch.testing.assert_close(metric.centroids[:5], expected)
    assert metric.centroids[5].isnan().all()


# ---------------------------------------------------------------- streaming


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False), st.lists(st.integers(1, 89), max_size=6, unique=True))
def test_any_split_in_any_order_is_one_batch(random: Any, cuts: list[int]) -> None:
    logits, target = sample()
    expected = measured(logits, target)
    order = list(range(90))
    random.shuffle(order)
    metric = NormalizedCMI(5)
    for rows in torch.tensor(order).tensor_split(sorted(cuts)):
        metric.update(logits[rows], target[rows])
    same(result_of(metric), expected, 1e-12)


def test_repeated_data_gives_the_same_but_for_n() -> None:
    logits, target = sample()
    metric = NormalizedCMI(5)
    for _ in range(3):
        metric.update(logits, target)
    same(result_of(metric), measured(logits, target) | {"n": torch.tensor(270.0)}, 1e-12)


def test_forward_gives_the_batch_and_keeps_the_whole() -> None:
    logits, target = sample()
    metric = NormalizedCMI(5)
    for rows in torch.arange(90).tensor_split(2):
        same(metric(logits[rows], target[rows]), brute_of(logits[rows], target[rows]))
    same(result_of(metric), brute_of(logits, target))


def test_reset_forgets() -> None:
    metric = NormalizedCMI(5)
    metric.update(*sample(seed=1))
    metric.reset()
    assert all(int(getattr(metric, name).count_nonzero()) == 0 for name in STATES)
    metric.update(*sample())
    same(result_of(metric), brute_of(*sample()))


@pytest.mark.parametrize("estimator", ["plugin", "bessel"])
def test_sums_of_two_metrics_are_one_metric(estimator: Any) -> None:  # what processes do
    logits, target = sample()
    parts = [NormalizedCMI(5, estimator=estimator) for _ in range(2)]
    parts[0].update(logits[:30], target[:30])
    parts[1].update(logits[30:], target[30:])
    for name in STATES:
        assert parts[0]._reductions[name] is parts[1]._reductions[name]
        setattr(parts[0], name, parts[0]._reductions[name](torch.stack([getattr(part, name) for part in parts])))  # type: ignore[operator, misc]
    same(result_of(parts[0]), brute_of(logits, target, bessel=estimator == "bessel"))


def on_rank(seed: int) -> dict[str, Tensor]:
    """Rank ``r`` of two measures every other sample, from ``r``."""
    dist.init_process_group("gloo")
    logits, target = sample(91, seed=seed)
    mine = slice(dist.get_rank(), None, 2)
    metric = NormalizedCMI(5)
    metric.update(logits[mine], target[mine])
    metric.update(logits[:0], target[:0])
    return {name: value.clone() for name, value in result_of(metric).items()}


def test_two_processes_are_one() -> None:
    for result in run_ddp(on_rank, 4):
        same(result, brute_of(*sample(91, seed=4)))


# ---------------------------------------------------------------- state


def test_pickled_metrics_go_on() -> None:
    logits, target = sample()
    metric = NormalizedCMI(5, separation="kl", log_base="2")
    metric.update(logits[:50], target[:50])
    copy = pickle.loads(pickle.dumps(metric))
    for one in (metric, copy):
        one.update(logits[50:], target[50:])
    same(result_of(copy), result_of(metric), 0.0)
    same(result_of(copy), measured(logits, target, separation="kl", log_base="2"), 1e-12)


def test_the_state_is_in_checkpoints_on_request() -> None:
    metric = NormalizedCMI(5)
    metric.update(*sample())
    assert metric.state_dict() == {}
    metric.persistent(True)
    state = metric.state_dict()
    assert set(state) == set(STATES)
    other = NormalizedCMI(5)
    other.persistent(True)
    other.load_state_dict(state)
    other.update(*sample(seed=1))
    logits, target = (torch.cat(parts) for parts in zip(sample(), sample(seed=1), strict=True))
    same(result_of(other), brute_of(logits, target))


@pytest.mark.parametrize("cast", ["float", "half", "double", "bfloat16"])
def test_casting_a_module_leaves_the_sums_in_float64(cast: str) -> None:
    metric = NormalizedCMI(5)
    holder = nn.ModuleDict({"metric": metric})
    getattr(holder, cast)()
    getattr(metric, "half" if cast == "bfloat16" else cast)()
    assert {getattr(metric, name).dtype for name in STATES} == {torch.float64}
    metric.update(*sample())
    same(result_of(metric), brute_of(*sample()))


def test_sums_can_be_float32() -> None:
    logits, target = sample(dtype=torch.float32)
    metric = NormalizedCMI(5, accumulate=torch.float32)
    metric.update(logits, target)
    assert {getattr(metric, name).dtype for name in STATES} == {torch.float32}
    same(result_of(metric), brute_of(logits, target), 2e-5)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-6), (torch.float16, 5e-3), (torch.bfloat16, 3e-2)])
def test_logits_of_every_precision(dtype: torch.dtype, atol: float) -> None:
    logits, target = sample()
    found = measured(logits.to(dtype), target)
    same(found, brute_of(logits.to(dtype), target), 2e-6)  # exact for the logits it was given
    assert float(found["cmi"]) == pytest.approx(brute_of(logits, target)["cmi"], abs=atol)


def test_it_keeps_no_graph() -> None:
    logits, target = sample()
    metric = NormalizedCMI(5)
    metric.update(logits.requires_grad_(), target)
    assert not metric.p_sums.requires_grad
    assert (metric.higher_is_better, metric.is_differentiable, metric.full_state_update) == (False, False, False)


# ---------------------------------------------------------------- options


def test_probabilities_instead_of_logits() -> None:
    logits, target = sample()
    same(measured(torch.softmax(logits, 1), target, from_probs=True), brute_of(logits, target), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_probabilities_that_are_zero_are_clamped_with_one_warning(dtype: torch.dtype) -> None:
    p = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0, 0, 1.0]], dtype=dtype)
    target = torch.tensor([0, 0, 2])
    metric = NormalizedCMI(3, from_probs=True)
    with pytest.warns(UserWarning, match="5 probabilities are exactly 0 and are clamped"):
        metric.update(p, target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric.update(p, target)
        found = result_of(metric)
    log_p = np.log(np.maximum(p.double().numpy(), 1e-12))
    same(found, brute(log_p, target.numpy()) | {"n": 6}, 1e-5)
    assert float(found["gamma"]) > 10  # clamped far down, at the same number for every dtype


def test_binary_heads_with_one_logit() -> None:
    rng = np.random.default_rng(0)
    z, target = torch.tensor(rng.standard_normal(40)), torch.tensor(rng.integers(0, 2, 40))
    pairs = torch.stack([torch.zeros(40), z], dim=1)
    for one, labels in ((z, target), (z[:, None], target[:, None]), (z, target.float())):
        same(measured(one, labels, 2, binary=True), brute_of(pairs, target))
    same(measured(torch.sigmoid(z), target, 2, binary=True, from_probs=True), brute_of(pairs, target), 1e-10)
    with pytest.warns(UserWarning, match="1 probabilities are exactly 0"):
        sure = measured(torch.tensor([0.0, 1.0, 0.5]), torch.tensor([0, 1, 1]), 2, binary=True, from_probs=True)
    assert math.isfinite(float(sure["gamma"]))
    assert float(sure["accuracy"]) == pytest.approx(2 / 3)


def test_segmentation() -> None:
    logits, target = sample(96, 5)
    maps = logits.reshape(4, 6, 4, 5).permute(0, 3, 1, 2)  # [B, C, H, W]
    assert maps.shape == (4, 5, 6, 4)
    same(measured(maps, target.reshape(4, 6, 4), flatten=True), brute_of(logits, target))
    same(measured(logits, target, flatten=True), brute_of(logits, target))
    series = logits.reshape(4, 24, 5).movedim(2, 1)
    same(measured(series, target.reshape(4, 24), flatten=True), brute_of(logits, target))


@pytest.mark.parametrize("ignore", [-100, 255, 2])
def test_ignored_labels_are_left_out(ignore: int) -> None:
    logits, target = sample()
    dropped = torch.arange(90) % 3 == 0
    target[dropped] = ignore
    kept = target != ignore
    logits[~kept] = math.nan  # not even looked at
    same(measured(logits, target, ignore_index=ignore), brute_of(logits[kept], target[kept]))


def test_a_batch_of_ignored_labels_only_adds_nothing() -> None:
    metric = NormalizedCMI(5, ignore_index=-1)
    metric.update(*sample())
    metric.update(torch.zeros(3, 5), torch.full((3,), -1))
    same(result_of(metric), brute_of(*sample()))


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    logits, target = sample()
    same(measured(logits, target, temperature=temperature), brute_of(logits / temperature, target))


@pytest.mark.parametrize("kind", ["ce", "kl", None])
def test_bits_are_nats_over_log_two(kind: Any) -> None:
    logits, target = sample()
    nats = measured(logits, target, separation=kind)
    bits = measured(logits, target, separation=kind, log_base="2")
    for name in nats:
        unit = 1.0 if name in ("ncmi", "accuracy", "recall_per_class", "n") else math.log(2)
        torch.testing.assert_close(bits[name] * unit, nats[name], msg=name)


def test_without_separation_there_is_no_gamma_and_half_the_state() -> None:
    logits, target = sample()
    expected = brute_of(logits, target)
    del expected["gamma"], expected["ncmi"]
    metric = NormalizedCMI(5, separation=None)
    assert not hasattr(metric, "log_sums")
    metric.update(logits, target)
    same(result_of(metric), expected)
    with warnings.catch_warnings():  # nor does it miss a second class
        warnings.simplefilter("error")
        one_class = measured(logits, torch.zeros_like(target), separation=None)
    assert float(one_class["cmi"]) > 0


def test_bessel_leaves_out_classes_with_one_sample_and_says_so() -> None:
    logits, target = sample(20, 4)
    target = target.clamp_max(2)
    target[0] = 3
    with pytest.warns(UserWarning, match="Classes with a single sample say nothing about their spread"):
        found = measured(logits, target, 4, estimator="bessel")
    same(found, brute_of(logits, target, bessel=True))
    assert found["cmi_per_class"].isnan().tolist() == [False, False, False, True]
    assert found["cmi"] > measured(logits, target, 4)["cmi"]


def test_plugin_and_bessel_see_a_class_of_one_sample_as_zero_and_as_unknown() -> None:
    logits, target = sample(5, 5)
    assert float(measured(logits, target)["cmi"]) == pytest.approx(0, abs=1e-14)
    with pytest.warns(UserWarning, match="single sample"):
        assert math.isnan(float(measured(logits, target, estimator="bessel")["cmi"]))


def test_a_single_class_gives_nan_and_a_warning_or_raises() -> None:
    logits, _ = sample(12)
    target = torch.full((12,), 3)
    with pytest.warns(UserWarning, match="NCMI needs at least two classes in the data, saw 3"):
        found = measured(logits, target)
    assert math.isnan(float(found["ncmi"]))
    assert float(found["gamma"]) == pytest.approx(0, abs=1e-14)
    assert float(found["cmi"]) == pytest.approx(brute_cmi_of_one(logits), abs=1e-12)
    with pytest.raises(ValueError, match="NCMI needs at least two classes in the data, saw 3"):
        measured(logits, target, strict=True)
    with pytest.raises(ValueError, match="saw none"):
        measured(logits[:0], target[:0], strict=True)


def brute_cmi_of_one(logits: Tensor) -> float:
    p = torch.softmax(logits, 1).numpy()
    return entropy(p.mean(0)) - float(np.mean([entropy(row) for row in p]))


def test_a_sanity_check_on_no_data_does_not_raise() -> None:
    metric = NormalizedCMI(5)
    metric.update(*(part[:0] for part in sample()))
    with pytest.warns(UserWarning, match="saw none"):
        assert math.isnan(float(result_of(metric)["cmi"]))


def test_accuracy_knows_what_ncmi_does_not() -> None:
    logits, target = sample()
    right, wrong = measured(logits, target), measured(logits.roll(1, dims=1), target)
    for name in ("cmi", "gamma", "ncmi"):
        assert float(right[name]) == pytest.approx(float(wrong[name]), abs=1e-12)
    assert float(right["accuracy"]) > float(wrong["accuracy"]) + 0.2


@pytest.mark.parametrize("scale", [160.0, 1e4])
def test_huge_logits_are_finite(scale: float) -> None:
    logits, target = sample(dtype=torch.float32)
    found = measured(scale * logits, target)
    assert all(bool(value.isfinite().all()) for value in found.values())
    assert 0 <= float(found["cmi"]) <= math.log(5)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, r"at least 2 classes, got num_classes=1; .* binary=True"),
        ({"temperature": 0.0}, r"`temperature` must be positive, got 0.0"),
        ({"temperature": -1.0}, r"`temperature` must be positive, got -1.0"),
        ({"temperature": math.inf}, r"`temperature` must be positive, got inf"),
        ({"temperature": math.nan}, r"`temperature` must be positive, got nan"),
        ({"separation": "l2"}, r"`separation` must be one of ce, kl, None, got 'l2'"),
        ({"estimator": "jackknife"}, r"`estimator` must be one of plugin, bessel, got 'jackknife'"),
        ({"log_base": "10"}, r"`log_base` must be one of e, 2, got '10'"),
        ({"num_classes": 21000}, r"21000 classes take 7.1 GB of sums. Pass separation=None, .* or allow_large=True"),
        ({"num_classes": 4097}, r"4097 classes take 0.3 GB"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NormalizedCMI(**{"num_classes": 3} | options)


def test_many_classes_are_fine_on_request() -> None:
    assert NormalizedCMI(4096).p_sums.shape == (4096, 4096)
    assert NormalizedCMI(4097, allow_large=True, accumulate=torch.float32).log_sums.shape == (4097, 4097)
    metric = NormalizedCMI(4097, separation=None, accumulate=torch.float32)
    metric.update(torch.zeros(2, 4097), torch.tensor([0, 4096]))
    assert float(metric.compute()["h_yhat_given_y"]) == pytest.approx(math.log(4097), rel=1e-5)


Z, Y = torch.zeros(2, 3), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("logits", "target", "error", "message"),
    [
        (torch.zeros(2), Y, ValueError, r"expected logits \[batch, classes\], got shape \(2,\) dtype torch.float32"),
        (torch.zeros(2, 3, 4), Y, ValueError, r"got shape \(2, 3, 4\) .* pass flatten=True"),
        (torch.zeros(2, 3, dtype=torch.long), Y, ValueError, r"expected logits .* dtype torch.int64"),
        (torch.zeros(2, 1), Y, ValueError, r"at least 2 classes; for one-logit binary heads pass binary=True"),
        (Z, Y.float(), ValueError, r"expected class indices \[2\], .* mixup or soft labels are not supported here"),
        (Z, torch.eye(3)[:2], ValueError, r"expected class indices \[2\], got shape \(2, 3\) .* not supported here"),
        (Z, torch.tensor([0, 1, 2]), ValueError, r"expected class indices \[2\], got shape \(3,\)"),
        (Z, torch.tensor([0, 12]), ValueError, r"label 12 but the logits have 3 columns"),
        (Z, torch.tensor([-1, 1]), ValueError, r"label -1 but the logits have 3 columns"),
        (torch.zeros(2, 4), Y, ValueError, r"num_classes=3\) got logits with 4 columns"),
        (Z + math.nan, Y, RuntimeError, "non-finite logits"),
        (Z - math.inf, Y, RuntimeError, "non-finite logits"),
        (torch.tensor([[0.0, 1.0, math.inf]] * 2), Y, RuntimeError, "non-finite logits"),
    ],
)
def test_bad_batches_are_refused_and_leave_no_trace(
    logits: Tensor, target: Tensor, error: type[Exception], message: str
) -> None:
    metric = NormalizedCMI(3)
    with pytest.raises(error, match=message):
        metric.update(logits, target)
    assert all(int(getattr(metric, name).count_nonzero()) == 0 for name in STATES)


def test_integer_probabilities_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected logits .* dtype torch.int64"):
        measured(torch.ones(3, 3, dtype=torch.long), torch.arange(3), 3, from_probs=True)


def test_logits_that_look_like_probabilities_are_remarked_on() -> None:
    logits, target = sample()
    with pytest.warns(UserWarning, match="These logits look like probabilities; pass from_probs=True"):
        measured(torch.softmax(logits, 1), target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measured(logits, target)
        measured(torch.softmax(logits, 1), target, from_probs=True)
        measured(torch.softmax(logits, 1), target, validate_args=False)
        measured(2 * torch.softmax(logits, 1), target)


def test_values_are_not_looked_at_without_validation() -> None:
    logits, target = sample()
    logits[0, 0] = math.nan
    found = measured(logits, target, validate_args=False)
    for name in ("cmi", "h_yhat_given_y", "gamma", "ncmi"):  # nor do they vanish: no class is left out for its NaN
        assert math.isnan(float(found[name])), name
