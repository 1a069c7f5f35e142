"""MESGC and CESGC: against AdamW in the limit, against a plain reference, and all that an optimizer must do."""

from __future__ import annotations

import copy
import io
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import orthogonal_mp
from torch import Tensor, nn
from torch.optim import Optimizer

from groundwire.plugins.edge import EdgeStrategy
from groundwire.plugins.optimizers import CESGC, MESGC, optimizer_state_bytes
from groundwire.plugins.optimizers.functional import gaussian_atoms
from groundwire.plugins.random import stream
from helpers.ddp import fit_ddp
from helpers.edge import Classifier, fit, loader, mlp, weights

SMALL: dict[str, Any] = {"chunk_size": 64, "sparsity": 4, "subspace_dim": 16}
VARIANTS: dict[str, Callable[..., Optimizer]] = {
    "MESGC": lambda params, **kw: MESGC(params, **SMALL | kw),
    "MESGC, scalar": lambda params, **kw: MESGC(params, **SMALL | {"moment": "scalar"} | kw),
    "SGC": lambda params, **kw: MESGC(params, **SMALL | {"chunk_size": None} | kw),
    "CESGC": lambda params, **kw: CESGC(params, **SMALL | {"rank": 4, "update_gap": 3} | kw),
    "CESGC, scalar": lambda params, **kw: CESGC(params, **SMALL | {"rank": 4, "moment": "scalar"} | kw),
}
every_variant = pytest.mark.parametrize("build", VARIANTS.values(), ids=VARIANTS)


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    g = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype))


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    """Heavy-tailed, as gradients are, and a function of the parameter too, so that errors grow."""
    for i, p in enumerate(params):
        g = torch.Generator().manual_seed(100 * step + i)
        noise = torch.randn(p.shape, generator=g, dtype=torch.float64) ** 3
        p.grad = (noise + 0.1 * p.detach().double()).to(p.dtype)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 3))


def identity_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "groundwire.plugins.optimizers.sgc.gaussian_atoms", lambda n, k, source, dtype: torch.eye(n, k, dtype=dtype)
    )


@pytest.mark.parametrize("chunk_size", [None, 10])
def test_with_the_identity_and_nothing_left_out_it_is_adamw(
    monkeypatch: pytest.MonkeyPatch, chunk_size: int | None
) -> None:
    identity_matrix(monkeypatch)
    k = chunk_size or 60
    ours, theirs = parameter(6, 10), parameter(6, 10)
    settings: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    optimizer = MESGC([ours], chunk_size=chunk_size, sparsity=k, subspace_dim=k, **settings)
    reference = torch.optim.AdamW([theirs], **settings)
    for step in range(20):
        give_gradients([ours, theirs], step)
        theirs.grad = ours.grad
        optimizer.step()
        reference.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert optimizer.state[ours]["exp_avg"].shape == (60 // k, k), "and it was compressed"


@pytest.mark.parametrize("shape", [(4, 15), (15, 4)])
def test_cesgc_with_the_identity_is_adam_in_the_leading_subspace(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    identity_matrix(monkeypatch)
    w = parameter(*shape)
    is_tall = shape[0] > shape[1]
    expected = w.detach().clone()
    optimizer = CESGC([w], lr=0.1, rank=3, update_gap=4, chunk_size=None, sparsity=45, subspace_dim=45)
    coordinates = nn.Parameter(torch.zeros(3, 15, dtype=torch.float64))
    reference = torch.optim.AdamW([coordinates], lr=0.1, weight_decay=0.0)
    for step in range(10):
        give_gradients([w], step)
        assert w.grad is not None
        wide = w.grad.T if is_tall else w.grad
        if step % 4 == 0:
            left = np.linalg.svd(wide.numpy())[0][:, :3]
        optimizer.step()
        basis = optimizer.state[w]["basis"]
        np.testing.assert_allclose((basis @ basis.T).numpy(), left @ left.T, atol=1e-9)
        before = coordinates.detach().clone()
        coordinates.grad = basis.T @ wide
        reference.step()
        change = basis @ (coordinates.detach() - before)
        expected += change.T if is_tall else change
    torch.testing.assert_close(w.detach(), expected, rtol=1e-9, atol=1e-9)


def reference_sgc(w: np.ndarray, grads: list[np.ndarray], atoms: np.ndarray, s: int, lr: float, scalar: bool) -> Any:
    """Plain SGC of one vector, written from its steps."""
    k = atoms.shape[1]
    m, v = np.zeros(k), np.zeros(k)
    for t, g in enumerate(grads, start=1):
        kept = np.where(np.abs(g) >= np.sort(np.abs(g))[-s], g, 0)
        p = atoms.T @ kept
        m, v = 0.9 * m + 0.1 * p, 0.999 * v + 0.001 * p * p
        m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.999**t)
        u = m_hat / (np.sqrt(v_hat.mean() if scalar else v_hat) + 1e-8)
        w = w - lr * orthogonal_mp(atoms.T, u, n_nonzero_coefs=s)
    return w


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 32])
def test_it_is_the_papers_algorithm_step_by_step(chunk_size: int | None, scalar: bool) -> None:
    w = parameter(8, 10)
    before = w.detach().flatten().numpy().copy()
    settings: dict[str, Any] = {"sparsity": 5, "subspace_dim": 20, "moment": "scalar" if scalar else "elementwise"}
    optimizer = MESGC([w], lr=0.01, chunk_size=chunk_size, seed=7, **settings)
    grads = []
    for step in range(4):
        give_gradients([w], step)
        assert w.grad is not None
        grads.append(w.grad.flatten().numpy().copy())
        optimizer.step()
    n = chunk_size or 80
    atoms = gaussian_atoms(n, 20, stream(7, purpose="sgc/atoms"), torch.float64).numpy()
    expected = np.concatenate(
        [
            reference_sgc(before[at : at + n], [g[at : at + n] for g in grads], atoms[: len(before[at : at + n])], 5, 0.01, scalar)
            for at in range(0, 80, n)  # the last chunk has 16 entries and takes the first 16 atoms
        ]
    )  # fmt: skip
    np.testing.assert_allclose(w.detach().flatten().numpy(), expected, rtol=1e-9, atol=1e-11)


def test_one_chunk_is_plain_sgc() -> None:
    results = []
    for chunk_size in (None, 80):
        w = parameter(8, 10)
        optimizer = MESGC([w], chunk_size=chunk_size, sparsity=5, subspace_dim=20)
        for step in range(5):
            give_gradients([w], step)
            optimizer.step()
        results.append(w.detach())
    assert torch.equal(*results)


def test_many_layers_together_are_the_layers_alone() -> None:
    shapes = [(8, 16), (4, 16), (3, 50), (10, 7)]  # whole chunks, one, a remainder, less than one
    together = [parameter(*shape, seed=i) for i, shape in enumerate(shapes)]
    alone = copy.deepcopy(together)
    one = MESGC(together, seed=1, **SMALL)
    many = [MESGC([p], seed=1, **SMALL) for p in alone]
    for step in range(4):
        give_gradients(together, step)
        for p, q in zip(together, alone, strict=True):
            q.grad = p.grad
        one.step()
        for optimizer in many:
            optimizer.step()
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_a_step_changes_few_entries_of_a_chunk_and_decays_all() -> None:
    w = parameter(4, 64)
    before = w.detach().clone()
    optimizer = MESGC([w], lr=0.1, weight_decay=0.5, **SMALL)
    give_gradients([w], 0)
    optimizer.step()
    changed = (w.detach() - before * 0.95).abs() > 1e-12
    assert changed.sum(dim=1).tolist() == [4, 4, 4, 4]


def test_a_sparse_gradient_is_recovered_with_one_number_a_chunk() -> None:
    w = parameter(16, 64)
    before = w.detach().clone()
    optimizer = MESGC([w], lr=1.0, chunk_size=256, sparsity=3, subspace_dim=64, moment="scalar")
    w.grad = torch.zeros(16, 64, dtype=torch.float64)
    g = torch.Generator().manual_seed(5)
    for chunk in w.grad.view(4, 256):
        chunk[torch.randperm(256, generator=g)[:3]] = torch.randn(3, generator=g, dtype=torch.float64)
    optimizer.step()
    moved = (before - w.detach()).view(4, 256)
    expected = w.grad.view(4, 256)
    torch.testing.assert_close(moved / moved.norm(dim=1, keepdim=True), expected / expected.norm(dim=1, keepdim=True))


# What an optimizer must do.


@pytest.mark.parametrize("decay", [0.0, 0.3])
@every_variant
def test_small_parameters_are_adamws(build: Any, decay: float) -> None:
    ours, theirs = network(), network()
    for model in (ours, theirs):
        model.append(nn.LayerNorm(3))
    optimizer = build(ours.parameters(), lr=0.01, weight_decay=decay)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=decay)
    for step in range(5):
        params = list(ours.parameters())
        give_gradients(params, step)
        for p, q in zip(params, theirs.parameters(), strict=True):
            q.grad = p.grad
        optimizer.step()
        reference.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q) == (p.ndim == 1), name


@every_variant
def test_it_trains(build: Any) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(256, 12, generator=g)
    y = (x[:, :3] + 0.1 * torch.randn(256, 3, generator=g)).argmax(dim=1)
    model = network()
    optimizer = build(model.parameters(), lr=0.03)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss.detach()

    losses = [float(optimizer.step(closure)) for _ in range(80)]
    assert losses[0] > 1.0
    assert losses[-1] < 0.6, "the closure's loss is returned, and falls"


@every_variant
def test_a_resumed_run_is_bit_identical(build: Any) -> None:
    def run(model: nn.Module, optimizer: Optimizer, schedule: Any, steps: range) -> None:
        for step in steps:
            give_gradients(list(model.parameters()), step)
            optimizer.step()
            schedule.step()

    def start(seed: int) -> tuple[nn.Module, Optimizer, Any]:
        model = network()
        optimizer = build(model.parameters(), lr=0.02, weight_decay=0.1, seed=seed)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)

    whole = start(seed=5)
    run(*whole, range(9))
    first = start(seed=5)
    run(*first, range(4))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    again = start(seed=99)  # the seed is that of the checkpoint
    for part, state in zip(again, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    run(*again, range(4, 9))
    for p, q in zip(whole[0].parameters(), again[0].parameters(), strict=True):
        assert torch.equal(p, q)
    other = start(seed=6)
    run(*other, range(9))
    assert not torch.equal(weights(other[0]), weights(whole[0])), "the seed matters"


@every_variant
def test_loading_keeps_dtypes_and_copies(build: Any) -> None:
    w = parameter(16, 16, dtype=torch.bfloat16)
    optimizer = build([w])
    give_gradients([w], 0)
    optimizer.step()
    state = optimizer.state_dict()
    other = parameter(16, 16, dtype=torch.bfloat16)
    again = build([other])
    again.load_state_dict(state)
    for name, value in state["state"][0].items():
        assert value.dtype == torch.float32, "moments are never kept in less"
        assert again.state[other][name].dtype == value.dtype
        assert torch.equal(again.state[other][name], value)
        assert name == "step" or again.state[other][name].data_ptr() != value.data_ptr()
    assert torch.isfinite(w).all()


@every_variant
def test_a_copy_goes_on_alike(build: Any) -> None:
    model = network()
    optimizer = build(model.parameters())
    give_gradients(list(model.parameters()), 0)
    optimizer.step()
    model_, optimizer_ = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (model_, optimizer_)):
        give_gradients(list(m.parameters()), 1)
        o.step()
    assert torch.equal(weights(model), weights(model_))


def test_groups_have_settings_of_their_own() -> None:
    a, b, frozen = parameter(8, 16), parameter(8, 16, seed=1), parameter(8, 16, seed=2)
    groups = [{"params": [a]}, {"params": [b, frozen], "subspace_dim": 32, "sparsity": 8, "lr": 0.0}]
    optimizer = MESGC(groups, **SMALL)
    before = b.detach().clone()
    give_gradients([a, b], 0)
    optimizer.step()
    assert optimizer.state[a]["exp_avg"].shape == (2, 16)
    assert optimizer.state[b]["exp_avg"].shape == (2, 32)
    assert torch.equal(b, before), "a learning rate of 0"
    assert frozen not in optimizer.state, "no gradient, no step"
    assert len(optimizer.shared_tensors) == 2
    with pytest.raises(ValueError, match="`sparsity` must be at least 1 and not exceed `subspace_dim`=16, got 17"):
        optimizer.add_param_group({"params": [parameter(4, 4)], "sparsity": 17})


def test_names_that_are_excluded_keep_their_full_state() -> None:
    model = network()
    optimizer = MESGC(model.named_parameters(), exclude=["^2"], **SMALL)
    give_gradients(list(model.parameters()), 0)
    optimizer.step()
    assert optimizer.state[model[0].weight]["exp_avg"].shape == (6, 16)
    assert optimizer.state[model[2].weight]["exp_avg"].shape == (3, 32)


def test_the_layout_in_memory_does_not_matter() -> None:
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        w = nn.Parameter(parameter(8, 4, 3, 3).detach().to(memory_format=layout))
        optimizer = MESGC([w], **SMALL)
        for step in range(3):
            give_gradients([w], step)
            optimizer.step()
        results.append(w.detach().contiguous())
    assert torch.equal(*results)


@every_variant
def test_sizes_that_fit_no_chunk(build: Any) -> None:
    params = [
        parameter(*shape, seed=i) for i, shape in enumerate([(1, 16), (65, 1), (7, 11), (3, 5, 7), (2, 64), (2, 2)])
    ]
    before = [p.detach().clone() for p in params]
    optimizer = build(params, lr=0.1)
    give_gradients(params, 0)
    optimizer.step()
    for p, old in zip(params, before, strict=True):
        assert torch.isfinite(p).all()
        assert not torch.equal(p, old)


# The size of the state.


def state_bytes(optimizer: Optimizer, params: list[nn.Parameter]) -> int:
    give_gradients(params, 0)
    optimizer.step()
    return optimizer_state_bytes(optimizer)


@pytest.mark.parametrize("moment", ["elementwise", "scalar"])
@pytest.mark.parametrize("size", [4, 8])
def test_state_bytes_are_the_papers(moment: Any, size: int) -> None:
    dtype = torch.float32 if size == 4 else torch.float64
    w = parameter(40, 50, dtype=dtype)
    moments = lambda chunks, k: 2 * chunks * k if moment == "elementwise" else chunks * (k + 1)
    step = 4
    sgc = MESGC([w], chunk_size=None, sparsity=4, subspace_dim=64, moment=moment)
    assert state_bytes(sgc, [w]) == size * (moments(1, 64) + 64 * 40 * 50) + step, "2k, and A of k times m n"
    mesgc = MESGC([w], chunk_size=256, sparsity=4, subspace_dim=64, moment=moment)
    assert state_bytes(mesgc, [w]) == size * (moments(8, 64) + 64 * 256) + step, "2ck, and A of k times n"
    cesgc = CESGC([w], rank=8, chunk_size=256, sparsity=4, subspace_dim=64, moment=moment)
    assert state_bytes(cesgc, [w]) == size * (8 * 40 + moments(2, 64) + 64 * 256) + step, "r m, 2ck of r n, and A"


def test_one_matrix_serves_all_layers_and_small_ones_count_as_adamws() -> None:
    params = [parameter(*s, dtype=torch.float32) for s in [(32, 32), (64, 16), (10, 30), (50,), (3, 3)]]
    optimizer = MESGC(params, chunk_size=256, sparsity=4, subspace_dim=64)
    moments = 2 * 64 * (4 + 4 + 2) + 2 * (50 + 9)
    assert state_bytes(optimizer, params) == 4 * (moments + 64 * 256 + len(params))
    assert state_bytes(torch.optim.AdamW(params), params) == 4 * (2 * sum(p.numel() for p in params) + len(params))


# What cannot be right.


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@every_variant
def test_what_is_not_finite_reaches_the_weights_as_nan(build: Any, poison: float) -> None:
    w = parameter(16, 16)
    optimizer = build([w])
    give_gradients([w], 0)
    assert w.grad is not None
    w.grad[3, 3] = poison
    optimizer.step()
    assert w.isnan().any(), "as with AdamW, so that the loss shows it"


@every_variant
def test_bad_gradients_and_parameters_by_message(build: Any) -> None:
    embedding = nn.Embedding(50, 16, sparse=True)
    optimizer = build(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match=r"shape \(50, 16\): sparse gradients are not supported; set sparse=False"):
        optimizer.step()
    w = nn.Parameter(torch.zeros(16, 16, dtype=torch.complex64))
    w.grad = torch.zeros(16, 16, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"expected a real floating gradient, got torch.complex64"):
        build([w]).step()
    w = parameter(16, 16)
    w._is_flat_param = True  # type: ignore[attr-defined]  as FSDP marks its own
    w.grad = torch.zeros_like(w)
    with pytest.raises(RuntimeError, match=r"it is sharded, but whole gradients are needed. Use DDP instead of FSDP"):
        build([w]).step()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 17}, "`sparsity` must be at least 1 and not exceed `subspace_dim`=16, got 17."),
        ({"sparsity": 0}, "`sparsity` must be at least 1 and not exceed `subspace_dim`=16, got 0."),
        ({"chunk_size": 0}, "`chunk_size` must be at least 1, or None for whole parameters, got 0."),
        ({"moment": "vector"}, "`moment` must be 'elementwise' or 'scalar', got 'vector'."),
        ({"lr": -1.0}, "`lr` must be at least 0, got -1.0."),
        ({"weight_decay": -1.0}, "`weight_decay` must be at least 0, got -1.0."),
        ({"eps": math.nan}, "`eps` must be at least 0, got nan."),
        ({"betas": (0.9, 1.0)}, "`betas` must be two numbers in [0, 1), got (0.9, 1.0)."),
        ({"exclude": ["head"]}, "`exclude` ['head'] needs the names of the parameters: pass module.named_parameters()"),
        (
            {"subspace_dim": 64, "chunk_size": None},
            "fewer entries than `subspace_dim` for each of its chunks. Use torch",
        ),
    ],
)
@pytest.mark.parametrize("kind", [MESGC, CESGC])
def test_bad_settings_by_message(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        kind([parameter(6, 10)], **SMALL | settings)


def test_more_bad_settings_by_message() -> None:
    for name in ("rank", "update_gap"):
        with pytest.raises(ValueError, match=f"CESGC: `{name}` must be at least 1, got 0"):
            CESGC([parameter(16, 16)], **SMALL | {name: 0})
    with pytest.raises(ValueError, match=r"found no parameter to compress: .*Use torch.optim.AdamW"):
        MESGC([parameter(1000)], **SMALL)
    with pytest.warns(UserWarning, match="subspace_dim=100 exceeds chunk_size=64 and is set to it"):
        optimizer = MESGC([parameter(16, 16)], chunk_size=64, subspace_dim=100, sparsity=4)
    assert optimizer.param_groups[0]["subspace_dim"] == 64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MESGC([parameter(16, 16)], chunk_size=64, subspace_dim=64, sparsity=64)


def test_the_global_random_stream_is_left_alone_and_gives_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "11")
    w = parameter(16, 16)
    state = torch.get_rng_state()
    optimizer = CESGC([w], rank=4, **SMALL)
    give_gradients([w], 0)
    optimizer.step()
    assert torch.equal(state, torch.get_rng_state())
    assert optimizer.param_groups[0]["seed"] == 11


# With the Trainer.


class Small(Classifier):
    def configure_optimizers(self) -> Optimizer:
        return VARIANTS[self.optimizer_name](self.parameters(), lr=self.lr)


@pytest.mark.parametrize("variant", ["MESGC", "CESGC"])
def test_ranks_of_ddp_hold_the_same_weights_and_train_as_one_process(variant: str) -> None:
    module = Small(mlp(), optimizer=variant)
    ranks = fit_ddp(module, precision="64-true")
    assert torch.equal(ranks[0].weights, ranks[1].weights)
    alone, _, _ = fit("auto", module, precision="64-true")
    torch.testing.assert_close(ranks[0].weights, alone, rtol=1e-7, atol=1e-9)
    plain, _, _ = fit("auto", Classifier(mlp(), "AdamW"), precision="64-true")
    assert not torch.allclose(alone, plain, atol=1e-4)


@pytest.mark.parametrize("variant", ["MESGC", "CESGC"])
def test_in_an_edge_strategy_of_one_device_it_is_the_plain_trainer(variant: str) -> None:
    module = Small(mlp(), optimizer=variant)
    plain, _, _ = fit("auto", module, data=loader())
    edge, _, _ = fit(EdgeStrategy(num_devices=1), module, data=loader())
    torch.testing.assert_close(edge, plain, rtol=1e-4, atol=1e-6)
