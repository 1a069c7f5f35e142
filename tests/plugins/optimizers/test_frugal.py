"""FRUGAL: AdamW and signSGD at its ends, a plain reference between them, and all that an optimizer must do."""

from __future__ import annotations

import copy
import io
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from groundwire.plugins.edge import EdgeStrategy
from groundwire.plugins.optimizers import FRUGAL, optimizer_state_bytes
from helpers.ddp import fit_ddp
from helpers.edge import Classifier, fit, loader, mlp, weights

SELECTIONS = ["columns", "rows", "randk", "blocks", "svd", "random"]
COORDINATES = ["columns", "rows", "randk"]
every_selection = pytest.mark.parametrize("selection", SELECTIONS)
ADAM: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    g = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype))


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    for i, p in enumerate(params):
        g = torch.Generator().manual_seed(100 * step + i)
        noise = torch.randn(p.shape, generator=g, dtype=torch.float64)
        p.grad = (noise + 0.1 * p.detach().double()).to(p.dtype)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def run(optimizer: Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        give_gradients(params, step)
        optimizer.step()


@every_selection
def test_at_density_one_it_is_exactly_adamw(selection: Any) -> None:
    ours, theirs = network(), network()
    head = [{"params": [ours[4].weight], "density": 0.0}]  # there must be something to compress
    rest = [p for p in ours.parameters() if p is not ours[4].weight]
    frugal = FRUGAL([{"params": rest}, *head], density=1.0, selection=selection, update_gap=2, **ADAM)
    adamw = torch.optim.AdamW(theirs.parameters(), **ADAM)
    for step in range(7):
        give_gradients(list(ours.parameters()), step)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            q.grad = p.grad
        frugal.step()
        adamw.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q) == (p is not ours[4].weight), name


@pytest.mark.parametrize("selection", COORDINATES)
def test_selecting_everything_is_adamw_too(selection: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FRUGAL, "_keeps_full_state", lambda self, group, p: False)  # go the long way
    ours, theirs = parameter(6, 10), parameter(6, 10)
    frugal = FRUGAL([ours], density=1.0, selection=selection, **ADAM)
    adamw = torch.optim.AdamW([theirs], **ADAM)
    for step in range(7):
        give_gradients([ours], step)
        theirs.grad = ours.grad
        frugal.step()
        adamw.step()
    assert "indices" in frugal.state[ours]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@every_selection
def test_at_density_zero_it_is_exactly_sign_sgd(selection: Any) -> None:
    w = parameter(6, 10)
    expected = w.detach().numpy().copy()
    optimizer = FRUGAL([w], lr=0.05, weight_decay=0.1, density=0.0, selection=selection, inactive_lr_scale=0.5)
    for step in range(5):
        give_gradients([w], step)
        assert w.grad is not None
        expected = expected * (1 - 0.05 * 0.1)
        expected = expected - np.sign(w.grad.numpy()) * (0.05 * 0.5)
        optimizer.step()
        np.testing.assert_array_equal(w.detach().numpy(), expected)
    assert optimizer_state_bytes(optimizer) == 0


def active_entries(optimizer: FRUGAL, p: nn.Parameter) -> Tensor:
    """Which entries have moments now, as a mask: what was selected, seen from outside."""
    state, selection = optimizer.state[p], optimizer.param_groups[0]["selection"]
    mask = torch.zeros(p.shape, dtype=torch.bool)
    if selection == "blocks":
        return mask | ("exp_avg" in state)
    indices = state["indices"].long()
    view = mask.view(1, -1) if selection == "randk" else mask.view(p.shape[0], -1)
    view.index_fill_(0 if selection == "rows" else 1, indices, value=True)
    return mask


@pytest.mark.parametrize("rule", ["sign", "identity", "none"])
@pytest.mark.parametrize("selection", COORDINATES)
def test_it_is_the_papers_algorithm_step_by_step(selection: Any, rule: Any) -> None:
    w = parameter(8, 12)
    expected, lr, scale, gap = w.detach().numpy().copy(), 0.05, 0.3, 3
    optimizer = FRUGAL(
        [w],
        lr=lr,
        weight_decay=0.1,
        density=0.3,
        selection=selection,
        rule=rule,
        inactive_lr_scale=scale,
        update_gap=gap,
    )
    masks = []
    for step in range(8):
        give_gradients([w], step)
        assert w.grad is not None
        g = w.grad.numpy().copy()
        optimizer.step()
        if step % gap == 0:
            m, v, t = np.zeros_like(g), np.zeros_like(g), 0
            masks.append(active_entries(optimizer, w).numpy())
        t += 1
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        adam = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        rest = {"sign": np.sign(g), "identity": g, "none": 0 * g}[rule]
        expected = expected * (1 - lr * 0.1) - lr * np.where(masks[-1], adam, scale * rest)
        np.testing.assert_allclose(w.detach().numpy(), expected, rtol=1e-10, atol=1e-12)
    total = {"columns": 12, "rows": 8, "randk": 96}[selection]
    unit = 96 // total
    assert [int(mask.sum()) for mask in masks] == [unit * int(0.3 * total)] * 3
    assert not all(np.array_equal(mask, masks[0]) for mask in masks), "it is another subspace"


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (4, 3, 2, 2)])
@pytest.mark.parametrize("rule", ["sign", "identity", "none"])
@pytest.mark.parametrize("selection", ["svd", "random"])
def test_projections_step_by_step(selection: Any, rule: Any, shape: tuple[int, ...]) -> None:
    w = parameter(*shape)
    expected, lr, gap = w.detach().flatten(1).numpy().copy(), 0.05, 2
    is_tall = expected.shape[0] > expected.shape[1]
    optimizer = FRUGAL(
        [w], lr=lr, weight_decay=0.1, density=0.5, selection=selection, rule=rule, update_gap=gap, inactive_lr_scale=0.3
    )
    for step in range(5):
        give_gradients([w], step)
        assert w.grad is not None
        g = w.grad.flatten(1).numpy().copy()
        optimizer.step()
        if step % gap == 0:
            basis = optimizer.state[w]["basis"].numpy().copy()
            rank = round(0.5 * min(expected.shape))
            np.testing.assert_allclose(basis.T @ basis, np.eye(rank), atol=1e-12)
            if selection == "svd":
                left = np.linalg.svd(g.T if is_tall else g)[0][:, :rank]
                np.testing.assert_allclose(basis @ basis.T, left @ left.T, atol=1e-9)
            m = v = 0.0
            t = 0
        t += 1
        down = g @ basis if is_tall else basis.T @ g
        up = lambda x: x @ basis.T if is_tall else basis @ x  # noqa: B023
        m, v = 0.9 * m + 0.1 * down, 0.999 * v + 0.001 * down * down
        adam = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        left_over = g - up(down)
        assert math.isclose(np.sum(g**2), np.sum(down**2) + np.sum(left_over**2)), "the split is orthogonal"
        rest = {"sign": np.sign(left_over), "identity": left_over, "none": 0 * g}[rule]
        expected = expected * (1 - lr * 0.1) - lr * (up(adam) + 0.3 * rest)
        np.testing.assert_allclose(w.detach().flatten(1).numpy(), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("ascending", [{0, 1}, {2, 3}, {4, 0}, {1, 2}]),
        ("descending", [{4, 3}, {2, 1}, {0, 4}, {3, 2}]),
        ("mirror", [{0, 4}, {1, 3}, {2}, {0, 4}]),
    ],
)
def test_blocks_take_turns(order: Any, expected: list[set[int]]) -> None:
    params = [parameter(4, 3, seed=i) for i in range(5)]
    optimizer = FRUGAL(
        [parameter(7), *params], lr=0.1, density=0.4, selection="blocks", block_order=order, update_gap=2, rule="none"
    )
    found = []
    for step in range(8):
        before = [p.detach().clone() for p in params]
        run(optimizer, params, range(step, step + 1))
        moved = {i for i, (p, old) in enumerate(zip(params, before, strict=True)) if not torch.equal(p, old)}
        assert moved == {i for i, p in enumerate(params) if "exp_avg" in optimizer.state[p]}
        assert all(optimizer.state[params[i]]["step"] == step % 2 + 1 for i in moved), "moments begin anew"
        found.append(moved)
    assert found[::2] == expected
    assert found[1::2] == expected


def test_random_blocks_come_all_in_their_turn() -> None:
    params = [parameter(4, 3, seed=i) for i in range(5)]
    optimizer = FRUGAL(params, density=0.4, selection="blocks", update_gap=1)
    counts = torch.zeros(5)
    for step in range(300):
        run(optimizer, params, range(step, step + 1))
        active = torch.tensor([float("exp_avg" in optimizer.state[p]) for p in params])
        assert active.sum() == 2
        counts += active
    spread = 5 * math.sqrt(300 * 0.4 * 0.6)
    assert ((counts - 120).abs() < spread).all()


def test_random_columns_are_uniform() -> None:
    w = parameter(2, 8)
    optimizer = FRUGAL([w], density=0.25, update_gap=1)
    counts = torch.zeros(8)
    for step in range(400):
        run(optimizer, [w], range(step, step + 1))
        counts += torch.bincount(optimizer.state[w]["indices"].long(), minlength=8)
    assert ((counts - 100).abs() < 5 * math.sqrt(400 * 0.25 * 0.75)).all()


def test_layers_and_seeds_select_apart() -> None:
    def chosen(seed: int, groups: int = 1) -> list[list[int]]:
        params = [parameter(2, 200, seed=i) for i in range(2)]
        given = [{"params": [p]} for p in params] if groups == 2 else params
        optimizer = FRUGAL(given, density=0.1, seed=seed)
        run(optimizer, params, range(1))
        return [optimizer.state[p]["indices"].tolist() for p in params]

    assert chosen(1) == chosen(1)
    assert chosen(1) != chosen(2)
    assert chosen(1)[0] != chosen(1)[1]
    assert chosen(1, groups=2)[0] != chosen(1, groups=2)[1]


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_without_a_rule_for_the_rest_it_is_galore_until_the_subspace_changes(shape: tuple[int, int]) -> None:
    galore = pytest.importorskip("pytorch_optimizer").GaLore
    ours, theirs = parameter(*shape), parameter(*shape)
    settings: dict[str, Any] = {"rank": 4, "update_proj_gap": 100, "scale": 1.0, "projection_type": "std"}
    frugal = FRUGAL([ours], lr=0.01, density=0.5, selection="svd", rule="none", update_gap=100, eps=1e-30)
    reference = galore([theirs], lr=0.01, eps=1e-30, **settings)  # the two place epsilon differently
    for step in range(10):
        give_gradients([ours], step)
        theirs.grad = ours.grad
        frugal.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # its decomposition is in float32
    assert optimizer_state_bytes(reference) == 8 * (2 * 4 * 20 + 4 * 8), "2 r n, and r m: found in an object"
    assert optimizer_state_bytes(frugal) == optimizer_state_bytes(reference) + 4


# What an optimizer must do.


@every_selection
def test_it_trains(selection: Any) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(256, 12, generator=g)
    y = (x[:, :3] + 0.1 * torch.randn(256, 3, generator=g)).argmax(dim=1)
    model = network()
    optimizer = FRUGAL(
        model.parameters(), lr=0.01, density=0.34, selection=selection, update_gap=20, inactive_lr_scale=0.1
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss.detach()

    losses = [float(optimizer.step(closure)) for _ in range(150)]
    assert losses[0] > 1.0
    assert losses[-1] < 0.3


@every_selection
def test_a_resumed_run_is_bit_identical(selection: Any) -> None:
    def start(seed: int) -> tuple[nn.Module, FRUGAL]:
        model = network()
        return model, FRUGAL(model.parameters(), density=0.34, selection=selection, update_gap=3, seed=seed)

    whole, optimizer = start(seed=5)
    run(optimizer, list(whole.parameters()), range(11))
    first, optimizer = start(seed=5)
    run(optimizer, list(first.parameters()), range(5))
    file = io.BytesIO()
    torch.save([first.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    again, optimizer = start(seed=99)
    for part, state in zip((again, optimizer), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert all(s["indices"].dtype == torch.int32 for s in optimizer.state.values() if "indices" in s)
    run(optimizer, list(again.parameters()), range(5, 11))
    assert torch.equal(weights(whole), weights(again))


@every_selection
def test_a_copy_goes_on_alike(selection: Any) -> None:
    model = network()
    optimizer = FRUGAL(model.parameters(), selection=selection, density=0.34, update_gap=2)
    run(optimizer, list(model.parameters()), range(3))
    model_, optimizer_ = copy.deepcopy((model, optimizer))
    run(optimizer, list(model.parameters()), range(3, 6))
    run(optimizer_, list(model_.parameters()), range(3, 6))
    assert torch.equal(weights(model), weights(model_))


@every_selection
def test_the_layout_in_memory_does_not_matter(selection: Any) -> None:
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        w = nn.Parameter(parameter(8, 4, 3, 3).detach().to(memory_format=layout))
        optimizer = FRUGAL([w], density=0.5, selection=selection, update_gap=2)
        run(optimizer, [w], range(4))
        results.append(w.detach().contiguous())
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@every_selection
def test_half_precision(selection: Any) -> None:
    w = parameter(8, 8, dtype=torch.bfloat16)
    before = w.detach().clone()
    run(FRUGAL([w], lr=0.1, density=0.5, selection=selection), [w], range(3))
    assert torch.isfinite(w).all()
    assert not torch.equal(w, before)


def test_a_parameter_without_gradient_waits_and_then_takes_the_subspace_of_the_others_turn() -> None:
    early, late = parameter(3, 50), parameter(3, 50)
    optimizer = FRUGAL([early, late], density=0.1, update_gap=2)
    for step in range(3):
        give_gradients([early], step)
        optimizer.step()
    assert late not in optimizer.state or not optimizer.state[late]
    give_gradients([early, late], 3)
    optimizer.step()
    assert optimizer.state[late]["selection"] == optimizer.state[early]["selection"] == 1
    assert optimizer.state[late]["step"] == 1


def test_full_state_for_names_and_groups() -> None:
    model = network()
    by_name = FRUGAL(model.named_parameters(), exclude="^4", density=0.5)
    body, head = [*model[:4].parameters()], [*model[4].parameters()]
    by_group = FRUGAL([{"params": body}, {"params": head, "density": 1.0}], density=0.5)
    for optimizer in (by_name, by_group):
        run(optimizer, list(model.parameters()), range(1))
        assert optimizer.state[model[4].weight]["exp_avg"].shape == (3, 8)
        assert optimizer.state[model[2].weight]["exp_avg"].shape == (8, 8)


# The size of the state.


@pytest.mark.parametrize(
    ("selection", "numbers", "indices"),
    [
        ("columns", 2 * 40 * 15, 15),
        ("rows", 2 * 10 * 60, 10),
        ("randk", 2 * 600, 600),
        ("svd", 2 * 10 * 60 + 10 * 40, 0),
        ("random", 2 * 10 * 60 + 10 * 40, 0),
    ],
)
def test_state_bytes_are_the_papers(selection: Any, numbers: int, indices: int) -> None:
    for size, dtype in ((4, torch.float32), (8, torch.float64)):
        w = parameter(40, 60, dtype=dtype)  # a quarter of its 2,400 entries is 600
        optimizer = FRUGAL([w], density=0.25, selection=selection)
        run(optimizer, [w], range(2))
        assert optimizer_state_bytes(optimizer) == size * numbers + 4 * indices + 4, "and the step"


def test_blocks_have_no_other_state() -> None:
    params = [parameter(8, 6, seed=i, dtype=torch.float32) for i in range(4)]
    bias = parameter(8, dtype=torch.float32)
    optimizer = FRUGAL([*params, bias], density=0.25, selection="blocks", update_gap=1)
    for step in range(5):
        run(optimizer, [*params, bias], range(step, step + 1))
        assert optimizer_state_bytes(optimizer) == 4 * (2 * 48 + 1) + 4 * (2 * 8 + 1)


# What cannot be right.


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("rule", ["sign", "identity"])
@every_selection
def test_what_is_not_finite_reaches_the_weights_as_nan(selection: Any, rule: Any, poison: float) -> None:
    for place in range(0, 64, 9):
        w = parameter(8, 8)
        optimizer = FRUGAL([w], selection=selection, rule=rule, density=0.5)
        give_gradients([w], 0)
        assert w.grad is not None
        w.grad.view(-1)[place] = poison
        optimizer.step()
        assert not torch.isfinite(w).all()


def test_bad_gradients_by_message() -> None:
    embedding = nn.Embedding(50, 16, sparse=True)
    optimizer = FRUGAL(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(
        TypeError, match=r"FRUGAL, on a parameter of shape \(50, 16\): sparse gradients are not supported"
    ):
        optimizer.step()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": -0.1}, "`density` must be in [0, 1], got -0.1."),
        ({"density": 1.1}, "`density` must be in [0, 1], got 1.1."),
        ({"density": math.nan}, "`density` must be in [0, 1], got nan."),
        ({"update_gap": 0}, "`update_gap` must be at least 1 step, got 0."),
        ({"inactive_lr_scale": -1}, "`inactive_lr_scale` must be at least 0, got -1."),
        (
            {"selection": "diagonal"},
            "`selection` must be one of ('columns', 'rows', 'randk', 'blocks', 'svd', 'random'), got",
        ),
        ({"rule": "signs"}, "`rule` must be one of ('sign', 'identity', 'none'), got 'signs'."),
        (
            {"block_order": "up"},
            "`block_order` must be one of ('random', 'ascending', 'descending', 'mirror'), got 'up'.",
        ),
        (
            {"density": 1.0},
            "FRUGAL found no parameter to compress: all have one dimension, are excluded, or have density=1.",
        ),
        (
            {"selection": "blocks", "block_order": "mirror", "density": 0.33},
            "density=0.33 of 3 matrices makes 1, an odd number",
        ),
        ({"lr": -1}, "`lr` must be at least 0, got -1."),
        ({"exclude": "head"}, "`exclude` ['head'] needs the names of the parameters"),
    ],
)
def test_bad_settings_by_message(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        FRUGAL([parameter(4, 4, seed=i) for i in range(3)], **settings)


# With the Trainer.


class Small(Classifier):
    def configure_optimizers(self) -> Optimizer:
        settings: dict[str, Any] = {"lr": self.lr, "density": 0.34, "update_gap": 2}
        return FRUGAL(self.parameters(), selection=self.optimizer_name, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("selection", ["columns", "svd"])
def test_ranks_of_ddp_hold_the_same_weights_and_train_as_one_process(selection: str) -> None:
    module = Small(mlp(), optimizer=selection)
    ranks = fit_ddp(module, precision="64-true")
    assert torch.equal(ranks[0].weights, ranks[1].weights)
    alone, _, _ = fit("auto", module, precision="64-true")
    torch.testing.assert_close(ranks[0].weights, alone, rtol=1e-7, atol=1e-9)
    plain, _, _ = fit("auto", Classifier(mlp(), "AdamW"), precision="64-true")
    assert not torch.allclose(alone, plain, atol=1e-4)


def test_in_an_edge_strategy_of_one_device_it_is_the_plain_trainer() -> None:
    module = Small(mlp(), optimizer="columns")
    plain, _, _ = fit("auto", module, data=loader(), precision="64-true")
    edge, _, _ = fit(EdgeStrategy(num_devices=1), module, data=loader(), precision="64-true")
    torch.testing.assert_close(edge, plain, rtol=1e-9, atol=1e-11)
