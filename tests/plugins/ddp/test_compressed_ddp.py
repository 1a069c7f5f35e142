"""CompressedDDPStrategy: the same model as the simulation, exact bytes, resume, and refusals on all ranks at once."""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from groundwire.callbacks.information import LabelSmoothing
from groundwire.callbacks.privacy import DPSGD
from groundwire.plugins.compression import (
    DGC,
    EF21,
    EF21SGDM,
    EF21W,
    QSGD,
    RCFED,
    RQM,
    SRHT,
    CountSketch,
    EControl,
    ErrorFeedback,
    FedZip,
    Identity,
    LGreCo,
    LowPrecision,
    NaturalCompression,
    PowerSGD,
    RandK,
    SignSGD,
    TernGrad,
    TopK,
)
from groundwire.plugins.ddp import CompressedDDPStrategy, group
from groundwire.plugins.edge import Digital, EdgeStrategy
from groundwire.plugins.errors import CheckpointMismatchError, NonFiniteUpdateError
from helpers.ddp import ddp_trainer, fit_ddp, over_ranks, run_ddp
from helpers.edge import Classifier, Killed, Stateful, fit, loader, mlp, weights

STEPS = 6


def ef(compressor: Any) -> ErrorFeedback:
    return ErrorFeedback(compressor)


PARTS: dict[str, Callable[[], Any]] = {
    "identity": Identity,
    "topk": lambda: TopK(density=0.2),
    "randk": lambda: RandK(density=0.3),
    "qsgd": lambda: QSGD(num_levels=4),
    "sign": lambda: SignSGD(scaled=True),
    "mute_sign": SignSGD,
    "ef_topk": lambda: ef(TopK(density=0.1)),
    "ef_randk": lambda: ef(RandK(density=0.2, unbiased=False)),
    "ef21": lambda: EF21(TopK(density=0.1)),
    "ef21_w": lambda: EF21W(TopK(density=0.1), smoothness=[1.0, 3.0]),
    "ef21_w_linear": lambda: EF21W(RandK(density=0.2, unbiased=False), smoothness=[1.0, 3.0]),
    "ef21_sgdm": lambda: EF21SGDM(TopK(density=0.1), eta=0.3),
    "econtrol": lambda: EControl(TopK(density=0.1), eta=0.1),
    "dgc": lambda: DGC(density=0.1, momentum=0.5, clip_norm=1.0, warmup_rounds=1, warmup_densities=[0.5]),
    "ef_l_greco": lambda: ef(LGreCo([TopK(density=d) for d in (0.05, 0.1, 0.3)], 1, period=2, num_observed=1)),
    "ef_powersgd": lambda: ef(PowerSGD(rank=2)),
    "ef_l_greco_powersgd": lambda: ef(LGreCo([PowerSGD(rank=r) for r in (1, 2)], 1, period=2, num_observed=1)),
    "ef_count_sketch": lambda: ef(CountSketch(density=0.3, unbiased=False)),
    "srht": lambda: SRHT(density=0.5),
    "rc_fed": lambda: RCFED(target_rate=2.0),
    "ef_fedzip": lambda: ef(FedZip()),
    "terngrad": TernGrad,
    "natural": NaturalCompression,
    "fp8": lambda: LowPrecision("float8_e4m3fn"),
    "dgc_nesterov": lambda: DGC(density=0.1, momentum=0.5, nesterov=True),
}
RAGGED = ("rc_fed", "ef_fedzip")
every_granularity = pytest.mark.parametrize("granularity", ["model", "layer"])


def as_the_ranks_see_it(world_size: int = 2, batch_size: int = 24) -> DataLoader[Any]:
    """Batches whose equal parts are those of the ranks: rank ``r`` has samples ``r::world_size``."""
    data = loader(batch_size=batch_size)
    order = [
        start + offset
        for start in range(0, len(data.dataset), batch_size)
        for rank in range(world_size)
        for offset in range(rank, batch_size, world_size)
    ]
    return DataLoader(data.dataset, batch_size, sampler=order)


def simulated(
    name: str, granularity: Any, *, world_size: int = 2, warmup: int = 0, **options: Any
) -> tuple[Tensor, Any]:
    uplink = Digital(PARTS[name](), granularity=granularity, min_numel=10, warmup_rounds=warmup)
    strategy = EdgeStrategy(num_devices=world_size, uplink=uplink, seed=3)
    found, t, _ = fit(strategy, data=as_the_ranks_see_it(world_size), steps=STEPS, **options)
    return found, t.strategy


class Sent(NamedTuple):
    weights: Tensor
    bits: int
    bits_counted: int
    calls: int
    rounds: int


def over_the_wire(name: str, granularity: Any, world_size: int, warmup: int, options: dict[str, Any]) -> Any:
    strategy = CompressedDDPStrategy(
        PARTS[name](), granularity=granularity, min_numel=10, warmup_steps=warmup, seed=3, **options.pop("ddp", {})
    )
    module = options.pop("module", None) or Classifier(mlp())
    counter = _count_bytes()
    t = ddp_trainer(world_size=world_size, strategy=strategy, steps=STEPS, **options)
    t.fit(module, over_ranks(loader(batch_size=24 // world_size), world_size))
    counted = torch.tensor([counter["bytes"]])
    dist.all_reduce(counted)
    return Sent(
        weights(module), strategy.ledger.totals["uplink/bits"], 8 * int(counted), counter["calls"], strategy.round_index
    )


def _count_bytes() -> dict[str, int]:
    """Counts, from outside, what the strategy's group hands to torch.distributed; anew with every call."""
    counter = {"bytes": 0, "calls": 0}

    def counted(where: Any, name: str, which: int, only_source: bool = False) -> None:
        inner = getattr(where, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if not (only_source and dist.get_rank() != kwargs.get("src")):
                counter["bytes"] += args[which].numel() * args[which].element_size()
                counter["calls"] += 1
            return inner(*args, **kwargs)

        setattr(where, name, call)

    counted(group, "_all_gather", 1)
    group.dist = SimpleNamespace(**vars(dist))  # only the group's own view of the module
    counted(group.dist, "all_reduce", 0)
    counted(group.dist, "broadcast", 0, only_source=True)
    return counter


def all_over_the_wire(granularity: str) -> dict[str, Sent]:
    return {name: over_the_wire(name, granularity, 2, 1, {"precision": "64-true"}) for name in parts_of(granularity)}


def parts_of(granularity: str) -> list[str]:
    return [name for name in PARTS if granularity == "layer" or "l_greco" not in name]  # which is for layers


@pytest.fixture(scope="module")
def sent() -> Callable[[str], list[dict[str, Sent]]]:
    """What every part sends on each of two ranks; once, as starting them takes longer than training."""
    return lru_cache(lambda granularity: run_ddp(all_over_the_wire, granularity))


@pytest.mark.parametrize(
    ("granularity", "name"),
    [(granularity, name) for granularity in ("model", "layer") for name in parts_of(granularity)],
)
def test_two_processes_equal_two_simulated_devices(sent: Any, name: str, granularity: str) -> None:
    expected, strategy = simulated(name, granularity, warmup=1, precision="64-true")
    first, second = (by_name[name] for by_name in sent(granularity))
    assert torch.equal(first.weights, second.weights), "replicas must not drift apart"
    torch.testing.assert_close(first.weights, expected, rtol=1e-9, atol=1e-12)
    assert first.bits == second.bits == first.bits_counted
    one_byte_a_rank = 8 * 2 * (STEPS - 1) if name == "mute_sign" else 0  # whether its gradient is finite
    if name in RAGGED:  # simulated devices send just their own bytes; ranks agree on lengths, and pad
        assert first.bits > strategy.ledger.totals["uplink/bits"]
    else:
        assert first.bits == strategy.ledger.totals["uplink/bits"] + one_byte_a_rank
    decisions = 2 if "l_greco" in name else 0
    before = STEPS - 1 if name in RAGGED or "powersgd" in name else 0  # of lengths, or of the first factors
    assert first.rounds == STEPS
    assert first.calls == STEPS + decisions + before


# ---------------------------------------------------------------- ways in which DDP works


@pytest.mark.parametrize("options", [{"granularity": "model"}, {"granularity": "layer"}, {"warmup_steps": 99}], ids=str)
def test_switched_off_it_is_ddp_bit_for_bit(options: dict[str, Any]) -> None:
    part = TopK(density=0.1) if "warmup_steps" in options else Identity()
    ours = fit_ddp(strategy=CompressedDDPStrategy(part, min_numel=10, **options))
    plain = fit_ddp()
    assert torch.equal(ours[0].weights, plain[0].weights)
    assert ours[0].losses == plain[0].losses


@every_granularity
@pytest.mark.parametrize("name", ["ef_topk", "ef_randk", "mute_sign", "ef21"])
def test_several_buckets(name: str, granularity: str) -> None:
    options = {"precision": "64-true"}
    expected, strategy = simulated(name, granularity, **options)
    first, second = run_ddp(over_the_wire, name, granularity, 2, 0, options | {"ddp": {"bucket_cap_mb": 1e-4}})
    assert torch.equal(first.weights, second.weights)
    torch.testing.assert_close(first.weights, expected, rtol=1e-9, atol=1e-12)
    assert first.bits == first.bits_counted
    assert (first.calls > STEPS) == (granularity == "layer"), "layers leave bucket by bucket, a vector at once"
    if name != "mute_sign":
        assert first.bits == strategy.ledger.totals["uplink/bits"]


def test_callbacks_that_surround_the_step_compose() -> None:
    expected, _ = simulated("ef_topk", "layer", precision="64-true", callbacks=[LabelSmoothing(0.2)])
    without, _ = simulated("ef_topk", "layer", precision="64-true")
    strategy = CompressedDDPStrategy(PARTS["ef_topk"](), min_numel=10, seed=3)
    first, second = fit_ddp(
        build=partial(LabelSmoothing, 0.2), strategy=strategy, steps=STEPS, precision="64-true", read=None
    )
    assert torch.equal(first.weights, second.weights)
    torch.testing.assert_close(first.weights, expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(expected, without, rtol=1e-3)


class HalfUsed(Classifier):
    """Some of its parameters do nothing."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.unused = nn.Linear(5, 7)


@every_granularity
def test_unused_parameters(granularity: str) -> None:
    options = {"precision": "64-true", "module": HalfUsed()}
    expected, _ = simulated("ef_topk", granularity, **copy.deepcopy(options))
    first, second = run_ddp(
        over_the_wire, "ef_topk", granularity, 2, 0, options | {"ddp": {"find_unused_parameters": True}}
    )
    assert torch.equal(first.weights, second.weights)
    torch.testing.assert_close(first.weights, expected, rtol=1e-9, atol=1e-12)


def accumulated() -> Any:
    strategy = CompressedDDPStrategy(ef(TopK(density=0.1)), min_numel=10, seed=3)
    t = ddp_trainer(strategy=strategy, steps=STEPS, precision="64-true", accumulate_grad_batches=2)
    module = Classifier(mlp())
    t.fit(module, over_ranks(loader(batch_size=6)))
    return weights(module), strategy.round_index


def test_accumulated_gradients_travel_once() -> None:
    expected, _ = simulated("ef_topk", "layer", precision="64-true")
    (found, rounds), _ = run_ddp(accumulated)
    assert rounds == STEPS
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


class Elementwise(Classifier):
    """A linear classifier without a matrix product, which not every CPU has in half precision."""

    def __init__(self) -> None:
        super().__init__(None, "SGD", lr=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return (x.unsqueeze(1) * self.network.weight).sum(-1) + self.network.bias


def half(name: str, precision: Any, granularity: Any, steps: int) -> Any:
    torch.manual_seed(1)
    strategy = CompressedDDPStrategy(PARTS[name](), granularity=granularity, min_numel=10, seed=3)
    t, module = ddp_trainer(strategy=strategy, steps=steps, precision=precision), Elementwise()
    t.fit(module, over_ranks(loader(batch_size=12)))
    assert module.network.weight.dtype != torch.float32
    feedback = strategy.sender.feedback
    if feedback is not None:
        assert feedback.memory.residual().dtype == (torch.float64 if precision == "64-true" else torch.float32)
    return weights(module), strategy.ledger.totals["uplink/bits"]


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
@pytest.mark.parametrize("name", ["ef_topk", "randk", "ef21", "econtrol"])
def test_half_precision_gradients_travel_in_their_own_dtype(name: str, precision: str) -> None:
    (first, _), (second, _) = run_ddp(half, name, precision, "model", STEPS)
    assert torch.equal(first, second)
    (once, bits), _ = run_ddp(half, name, precision, "model", 1)
    (wide, wide_bits), _ = run_ddp(half, name, "64-true", "model", 1)
    eps = torch.finfo(torch.bfloat16 if precision == "bf16-true" else torch.float16).eps
    torch.testing.assert_close(once, wide, rtol=4 * eps, atol=4 * eps)  # a later step may choose other entries
    num_values = (wide_bits - bits) // 48  # float64 takes 48 bits more for each
    assert num_values > 0
    assert bits - 16 * num_values == wide_bits - 64 * num_values


def alone() -> Any:
    strategy = CompressedDDPStrategy(ef(TopK(density=0.1)), min_numel=10, seed=3)
    t, module = ddp_trainer(world_size=1, strategy=strategy, steps=STEPS, precision="64-true"), Classifier(mlp())
    t.fit(module, over_ranks(loader(), world_size=1))
    return weights(module)


def test_one_process() -> None:
    expected, _ = simulated("ef_topk", "layer", world_size=1, precision="64-true")
    (found,) = run_ddp(alone, world_size=1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_what_it_costs_is_logged() -> None:
    strategy = CompressedDDPStrategy(TopK(density=0.1), granularity="model")
    first, _ = fit_ddp(strategy=strategy, steps=3)
    assert first.metrics["uplink/bits_cumulative"] == 3 * first.metrics["uplink/bits"] > 0
    assert not any(name.startswith("downlink") for name in first.metrics)


# ---------------------------------------------------------------- save and resume


def killed_and_resumed(name: str, folder: str, world_size: int, resume_from: str | None, killed_in: int = 5) -> Any:
    saver = ModelCheckpoint(dirpath=folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    callbacks = [] if resume_from else [saver, Killed(killed_in)]
    strategy = CompressedDDPStrategy(PARTS[name](), min_numel=10, warmup_steps=1, seed=3)
    module = Classifier(mlp())
    t = ddp_trainer(
        world_size=world_size,
        strategy=strategy,
        steps=STEPS,
        callbacks=callbacks,
        enable_checkpointing=not resume_from,
        use_distributed_sampler=False,
    )
    with contextlib.suppress(Killed.Error):
        t.fit(module, Stateful(over_ranks(loader(batch_size=12), world_size)), ckpt_path=resume_from)
    return weights(module), strategy.ledger.totals["uplink/bits"], strategy.round_index


@pytest.mark.parametrize(
    "name",
    [
        "ef_topk",
        "ef21_sgdm",
        "dgc",
        "ef_l_greco_powersgd",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("ef21_w", "econtrol", "qsgd")),
    ],
)
def test_resumed_equals_uninterrupted(name: str, tmp_path: Path) -> None:
    whole, _ = fit_ddp(
        strategy=CompressedDDPStrategy(PARTS[name](), min_numel=10, warmup_steps=1, seed=3), read=_totals
    )
    run_ddp(killed_and_resumed, name, str(tmp_path), 2, None)
    for step in (2, 4):
        first, second = run_ddp(killed_and_resumed, name, str(tmp_path), 2, str(tmp_path / f"step={step}.ckpt"))
        assert torch.equal(first[0], whole.weights)
        assert torch.equal(second[0], whole.weights)
        assert first[1:] == whole.read


@pytest.mark.parametrize("name", ["identity", "ef_topk"])
def test_three_resumed_equal_three_uninterrupted(name: str, tmp_path: Path) -> None:
    """Sums of three depend on their order, and DDP changes that of a bucket's parameters after the first step."""
    (whole, *_), *_ = run_ddp(killed_and_resumed, name, str(tmp_path / "none"), 3, None, 100, world_size=3)
    run_ddp(killed_and_resumed, name, str(tmp_path), 3, None, world_size=3)
    for weights_of_rank, *_ in run_ddp(
        killed_and_resumed, name, str(tmp_path), 3, str(tmp_path / "step=2.ckpt"), world_size=3
    ):
        assert torch.equal(weights_of_rank, whole)


def _totals(trainer: pl.Trainer, module: Any, callbacks: Any) -> Any:
    strategy = trainer.strategy
    assert isinstance(strategy, CompressedDDPStrategy)
    return strategy.ledger.totals["uplink/bits"], strategy.round_index


def test_another_number_of_processes_starts_with_empty_memories(tmp_path: Path) -> None:
    run_ddp(killed_and_resumed, "ef_topk", str(tmp_path), 2, None)
    found = run_ddp(warnings_of_resuming, str(tmp_path / "step=4.ckpt"), world_size=1)
    ((texts, rounds, residual),) = found
    assert any("memories of 2 processes, and there are 1 now" in text for text in texts)
    assert rounds == STEPS
    assert residual


def warnings_of_resuming(path: str) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        strategy = CompressedDDPStrategy(PARTS["ef_topk"](), min_numel=10, warmup_steps=1, seed=3)
        t = ddp_trainer(world_size=1, strategy=strategy, steps=STEPS)
        t.fit(Classifier(mlp()), Stateful(loader(batch_size=24)), ckpt_path=path)
    feedback = strategy.sender.feedback
    assert feedback is not None
    residual = bool(feedback.memory.residual("network.0.weight").any())
    return [str(w.message) for w in caught], strategy.round_index, residual


def resumed_with(path: str, density: float) -> None:
    strategy = CompressedDDPStrategy(ef(TopK(density=density)), min_numel=10, warmup_steps=1, seed=3)
    ddp_trainer(strategy=strategy).fit(Classifier(mlp()), over_ranks(loader(batch_size=12)), ckpt_path=path)


def test_other_settings_do_not_resume(tmp_path: Path) -> None:
    run_ddp(killed_and_resumed, "ef_topk", str(tmp_path), 2, None)
    with pytest.raises(CheckpointMismatchError, match=r"sender was .*density=0.1.* is now .*density=0.2"):
        run_ddp(resumed_with, str(tmp_path / "step=4.ckpt"), 0.2)


# ---------------------------------------------------------------- bad input


class Poisoned(Classifier):
    """One rank's loss is NaN in one step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * torch.nan if batch_idx == 2 and os.environ["RANK"] == "1" else loss


def poisoned(name: str, granularity: Any, on_nonfinite: Any) -> Any:
    strategy = CompressedDDPStrategy(
        PARTS[name](), granularity=granularity, min_numel=10, on_nonfinite=on_nonfinite, seed=3
    )
    module = Poisoned(mlp())
    t = ddp_trainer(strategy=strategy, steps=4)
    error = None
    try:
        t.fit(module, over_ranks(loader(batch_size=12)))
    except NonFiniteUpdateError as caught:
        error = str(caught)
    return weights(module), error, t.global_step


@every_granularity
@pytest.mark.parametrize("name", ["ef_topk", "mute_sign", "randk", "qsgd", "ef21"])
def test_all_ranks_fail_together(name: str, granularity: str) -> None:
    expected = fit_ddp(
        strategy=CompressedDDPStrategy(PARTS[name](), granularity=granularity, min_numel=10, seed=3), steps=2
    )
    for found, error, steps in run_ddp(poisoned, name, granularity, "raise"):
        assert error is not None
        assert "step 2 is not finite" in error
        assert steps == 2
        assert torch.equal(found, expected[0].weights), "the weights are those of the last sound step"


class WithoutTheThirdBatch:
    def __init__(self, inner: DataLoader[Any]) -> None:
        self.batches = [batch for i, batch in enumerate(inner) if i != 2]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        return iter(self.batches)


def without(name: str, granularity: Any) -> Any:
    strategy = CompressedDDPStrategy(PARTS[name](), granularity=granularity, min_numel=10, seed=3)
    module = Classifier(mlp())
    data = WithoutTheThirdBatch(over_ranks(loader(batch_size=12)))
    ddp_trainer(strategy=strategy, steps=3, use_distributed_sampler=False).fit(module, data)
    return weights(module)


@every_granularity
@pytest.mark.parametrize("name", ["ef_topk", "mute_sign", "ef21", "econtrol"])
def test_a_skipped_step_leaves_no_trace(name: str, granularity: str) -> None:
    """None of them draws random numbers, so leaving out the step equals never having had the batch."""
    expected, _ = run_ddp(without, name, granularity)
    for found, error, _ in run_ddp(poisoned, name, granularity, "skip"):
        assert error is None
        assert torch.equal(found, expected)


def differing(what: str) -> None:
    rank = int(os.environ["RANK"])
    density, seed = (0.1 + 0.1 * rank if what == "density" else 0.1), (rank if what == "seed" else 3)
    on_nonfinite: Any = "skip" if what == "on_nonfinite" and rank else "raise"
    strategy = CompressedDDPStrategy(ef(TopK(density=density)), min_numel=10, seed=seed, on_nonfinite=on_nonfinite)
    ddp_trainer(strategy=strategy).fit(Classifier(mlp()), over_ranks(loader(batch_size=12)))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("density", r"density=0.1.* on rank 0 and .*density=0.2"),
        ("seed", "'1'"),
        ("on_nonfinite", "on_nonfinite is 'raise' on rank 0 and 'skip'"),
    ],
)
def test_ranks_that_are_configured_differently_are_found_at_the_start(what: str, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        run_ddp(differing, what)


def privately() -> None:
    strategy = CompressedDDPStrategy(TopK(density=0.1), min_numel=10)
    callbacks = [DPSGD(noise_multiplier=1.0, max_grad_norm=1.0)]
    ddp_trainer(strategy=strategy, callbacks=callbacks).fit(Classifier(mlp()), over_ranks(loader(batch_size=12)))


def test_gradients_that_go_another_way_are_not_passed_over() -> None:
    with pytest.raises(MisconfigurationException, match="did not go through the compressor"):
        run_ddp(privately)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="DDP takes one communication hook"):
        CompressedDDPStrategy(Identity(), ddp_comm_hook=print)
    with pytest.raises(MisconfigurationException, match="secure sums"):
        CompressedDDPStrategy(RQM(clip=1.0))
    with pytest.raises(ValueError, match="`on_nonfinite` must be 'raise' or 'skip', got 'drop'"):
        CompressedDDPStrategy(Identity(), on_nonfinite="drop")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`granularity` must be 'model' or 'layer', got 'row'"):
        CompressedDDPStrategy(Identity(), granularity="row")  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match="would compress no parameter"):
        fit_ddp(strategy=CompressedDDPStrategy(Identity(), min_numel=10**6))


def test_built_from_yaml() -> None:
    parser = ArgumentParser()
    parser.add_argument("--strategy", type=pl.strategies.Strategy)
    yaml = """
    strategy:
      class_path: groundwire.plugins.ddp.CompressedDDPStrategy
      init_args:
        compressor:
          class_path: groundwire.plugins.compression.EF21
          init_args: {compressor: {class_path: groundwire.plugins.compression.TopK, init_args: {density: 0.01}}}
        granularity: model
        warmup_steps: 5
        process_group_backend: gloo
        bucket_cap_mb: 10.0
        find_unused_parameters: true
    """
    strategy = parser.instantiate_classes(parser.parse_string(yaml)).strategy
    assert isinstance(strategy, CompressedDDPStrategy)
    assert isinstance(strategy.sender.feedback, EF21)
    assert strategy.sender.warmup_rounds == 5
    assert strategy._ddp_kwargs["bucket_cap_mb"] == 10.0
    assert strategy._ddp_kwargs["find_unused_parameters"]
