"""Representations of curvature against dense linear algebra."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from groundwire.callbacks.unlearning import SingularCurvatureError
from groundwire.callbacks.unlearning.curvature import (
    Curvature,
    EKFACCurvature,
    FullCurvature,
    LowRankCurvature,
    make_curvature,
    solve_without,
)
from groundwire.plugins.layout import ParameterLayout
from helpers.edge import generator

LAYOUT = ParameterLayout.of(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double())
P = LAYOUT.numel


def rows_of(number: int, seed: int = 0) -> Tensor:
    return torch.randn(number, P, generator=generator(seed), dtype=torch.float64)


def recorded(kind: str, rows: Tensor, rank: int = P) -> Curvature:
    curvature = make_curvature(kind, LAYOUT, [0.0] * len(LAYOUT.names), rank, seed=0)  # type: ignore[arg-type]
    for number in range(curvature.num_passes):
        for chunk in rows.split(7):
            if not curvature.has_enough(number):
                curvature.observe(chunk, number)
        curvature.end_pass(number)
    return curvature


@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 1000))
def test_woodbury_equals_the_direct_solve(k: int, s: int, seed: int) -> None:
    """On both sides of s = k: rows that are part of the system never have leverage 1."""
    g = generator(seed)
    rows, rhs = torch.randn(s, k, generator=g, dtype=torch.float64), torch.randn(k, generator=g, dtype=torch.float64)
    others = torch.randn(k + 2, k, generator=g, dtype=torch.float64)
    system = rows.T @ rows + others.T @ others + 0.1 * torch.eye(k, dtype=torch.float64)
    step = solve_without(system, rows, rhs)
    torch.testing.assert_close(step.delta, torch.linalg.solve(system - rows.T @ rows, rhs), rtol=1e-7, atol=1e-9)
    assert 0 < step.max_leverage < 1


def test_leverages_of_a_regression_are_those_of_the_hat_matrix() -> None:
    """One removed row of ridge regression: h_ii of the textbook."""
    x = torch.randn(20, 4, generator=generator(1), dtype=torch.float64)
    system = x.T @ x + 0.3 * torch.eye(4, dtype=torch.float64)
    hat = x @ torch.linalg.inv(system) @ x.T
    assert solve_without(system, x[5:6], x[0]).max_leverage == pytest.approx(float(hat[5, 5]), rel=1e-12)


def test_a_singular_or_indefinite_remainder_is_refused_and_can_be_clipped() -> None:
    system, rows = torch.eye(2, dtype=torch.float64), torch.tensor([[1.1, 0.0]], dtype=torch.float64)
    rhs = torch.ones(2, dtype=torch.float64)
    with pytest.raises(SingularCurvatureError, match=r"leverage 1\.21.*Raise `damping`"):
        solve_without(system, rows, rhs)
    clipped = solve_without(system, rows, rhs, clip=0.95)
    torch.testing.assert_close(clipped.delta, torch.tensor([20.0, 1.0], dtype=torch.float64))
    assert clipped.num_high == 1
    wide = solve_without(system, torch.cat([rows, rows * 0, rows * 0]), rhs, clip=0.95)  # more rows than the system has
    torch.testing.assert_close(wide.delta, clipped.delta)
    with pytest.raises(SingularCurvatureError, match="not positive definite"):
        solve_without(-system, rows, rhs)


@pytest.mark.parametrize("kind", ["full", "lowrank"])
def test_exact_representations_solve_downdate_and_apply_as_the_matrix(kind: str) -> None:
    rows, forget = rows_of(60), rows_of(60)[:9]
    curvature, matrix = recorded(kind, rows), rows.T @ rows
    ridge = torch.linspace(0.1, 0.5, P, dtype=torch.float64)
    rhs, vector = rows_of(1, 5)[0], rows_of(1, 6)[0]
    step = curvature.newton_step(curvature.removal([forget]), rhs, ridge, clip=None)
    expected = torch.linalg.solve(matrix - forget.T @ forget + torch.diag(ridge), rhs)
    torch.testing.assert_close(step.delta, expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(curvature.apply(vector), matrix @ vector, rtol=1e-8, atol=1e-8)
    curvature.remove(curvature.removal([forget]))
    torch.testing.assert_close(curvature.apply(vector), rows[9:].T @ (rows[9:] @ vector), rtol=1e-8, atol=1e-8)


def test_low_rank_finds_the_leading_eigenpairs_and_the_tail() -> None:
    scales = 2.0 ** -torch.arange(P, dtype=torch.float64)
    rows = rows_of(200) @ torch.linalg.qr(rows_of(P, 3)).Q * scales
    curvature = recorded("lowrank", rows, rank=5)
    assert isinstance(curvature, LowRankCurvature)
    exact = torch.linalg.eigvalsh(rows.T @ rows)
    torch.testing.assert_close(curvature.values, exact[-5:], rtol=1e-6, atol=0)
    tail = curvature._tail()
    assert tail == pytest.approx(float(exact[:-5].mean()), rel=1e-3)


def test_low_rank_solves_its_own_matrix_without_the_projected_forget_set() -> None:
    """Against dense algebra: kept eigenpairs, the tail's mean elsewhere, both without what is removed."""
    rows, ridge = rows_of(60) * torch.linspace(3, 0.1, P, dtype=torch.float64), 0.1
    forget, rhs = rows[:9], rows_of(1, 5)[0]
    curvature = recorded("lowrank", rows, rank=5)
    assert isinstance(curvature, LowRankCurvature)
    basis = curvature.basis
    inside = forget @ basis
    tail = (rows.square().sum() - curvature.values.sum()) - (forget.square().sum() - inside.square().sum())
    outside = torch.eye(P, dtype=torch.float64) - basis @ basis.T
    kept = torch.diag(curvature.values) - inside.T @ inside
    matrix = basis @ kept @ basis.T + tail / (P - 5) * outside + ridge * torch.eye(P, dtype=torch.float64)
    removal = curvature.removal([forget[:4], forget[4:]])
    step = curvature.newton_step(removal, rhs, torch.full((P,), ridge, dtype=torch.float64), clip=None)
    torch.testing.assert_close(step.delta, torch.linalg.solve(matrix, rhs))
    curvature.remove(removal)
    assert curvature.trace == pytest.approx(float(rows[9:].square().sum()))
    torch.testing.assert_close(curvature.apply(rhs), matrix @ rhs - ridge * rhs)


def test_ekfac_bounds_leverages_where_it_is_asked_to() -> None:
    """A forget set that is more than the whole: refused, or bounded at 0.95 in each direction."""
    rows = rows_of(12)
    curvature = recorded("ekfac", rows)
    ridge = torch.full((P,), 1e-3, dtype=torch.float64)
    twice = curvature.removal([rows, rows])
    with pytest.raises(SingularCurvatureError, match=r"leverage .* Raise `damping`"):
        curvature.newton_step(twice, rows[0], ridge, clip=None)
    bounded = curvature.newton_step(twice, rows[0], ridge, clip=0.95)
    alone = curvature.newton_step(curvature.removal([rows * 0]), rows[0], ridge, clip=None)
    torch.testing.assert_close(bounded.delta, alone.delta / 0.05, rtol=1e-3, atol=1e-6)


def test_the_damping_that_a_refusal_names_is_enough() -> None:
    system, rows = torch.eye(3, dtype=torch.float64), torch.tensor([[2.0, 0.0, 1.0]], dtype=torch.float64)
    with pytest.raises(SingularCurvatureError) as caught:
        solve_without(system, rows, rows[0])
    found = re.search(r"by ([\d.e+-]+) at least", str(caught.value))
    assert found is not None
    damped = solve_without(system + float(found[1]) * torch.eye(3).double(), rows, rows[0])
    assert damped.max_leverage == pytest.approx(0.9, rel=0.02)


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_what_is_not_finite_is_named(broken: int) -> None:
    arguments = [torch.eye(2), torch.ones(1, 2) / 2, torch.ones(2)]
    arguments[broken][0] = torch.nan
    what = ("recorded curvature", "forget set's curvature", "forget set's gradient")[broken]
    with pytest.raises(RuntimeError, match=f"The {what} is not finite"):
        solve_without(*arguments)


def test_an_unprojected_low_rank_removal_would_have_leverages_above_one() -> None:
    """Why the forget set is projected: its columns outside of the kept subspace are not in the sum."""
    rows = rows_of(40)
    curvature = recorded("lowrank", rows, rank=4)
    assert isinstance(curvature, LowRankCurvature)
    basis, ridge = curvature.basis, 0.1
    kept = basis @ torch.diag(curvature.values) @ basis.T + ridge * torch.eye(P, dtype=torch.float64)
    with pytest.raises(SingularCurvatureError):
        solve_without(kept, rows[:10], rows[0])
    step = curvature.newton_step(
        curvature.removal([rows[:10]]), rows[0], torch.full((P,), ridge, dtype=torch.float64), clip=None
    )
    assert step.max_leverage < 1


def test_ekfac_is_exact_where_the_curvature_is_a_kronecker_product() -> None:
    """Columns v = b a^T of one layer with b of orthonormal columns: the basis diagonalises the sum."""
    layout = ParameterLayout.of(nn.Linear(3, 2, bias=False).double())
    g = generator(4)
    a, b = (torch.linalg.qr(torch.randn(k, k, generator=g, dtype=torch.float64)).Q for k in (3, 2))
    scale_a, scale_b = torch.tensor([3.0, 1.0, 0.5]).double(), torch.tensor([2.0, 0.7]).double()
    rows = torch.stack(
        [(torch.outer(b[:, i] * scale_b[i], a[:, j] * scale_a[j])).flatten() for i in range(2) for j in range(3)]
    )
    curvature = EKFACCurvature(layout)
    for number in range(2):
        curvature.observe(rows, number)
        curvature.end_pass(number)
    vector = torch.randn(6, generator=g, dtype=torch.float64)
    torch.testing.assert_close(curvature.apply(vector), rows.T @ (rows @ vector))
    ridge = torch.full((6,), 0.2, dtype=torch.float64)
    step = curvature.newton_step(curvature.removal([rows[:1]]), vector, ridge, clip=None)
    matrix = rows.T @ rows - torch.outer(rows[0], rows[0]) + torch.diag(ridge)
    torch.testing.assert_close(step.delta, torch.linalg.solve(matrix, vector))


def test_ekfac_keeps_the_trace_and_is_closer_than_the_diagonal() -> None:
    rows = rows_of(50) @ torch.randn(P, P, generator=generator(9), dtype=torch.float64)
    curvature = recorded("ekfac", rows)
    identity = torch.eye(P, dtype=torch.float64)
    found = torch.stack([curvature.apply(column) for column in identity])
    assert float(found.trace()) == pytest.approx(float(rows.square().sum()), rel=1e-9)
    exact = rows.T @ rows
    assert (found - exact).norm() < (torch.diag(exact.diagonal()) - exact).norm()
    curvature.remove(curvature.removal([rows[:20]]))
    left = recorded("ekfac", rows)  # the same bases, and the sum over the others alone
    assert isinstance(left, EKFACCurvature)
    assert isinstance(curvature, EKFACCurvature)
    for block, other in zip(curvature.blocks, left.blocks, strict=True):
        torch.testing.assert_close(block.values, EKFACCurvature._diagonal(other, rows[20:]), rtol=1e-8, atol=1e-8)


def test_a_bias_joins_its_weight_only_under_the_same_decay() -> None:
    sizes = lambda decay: [(b.rows, b.columns) for b in EKFACCurvature(LAYOUT, decay).blocks]
    assert sizes([0.1] * 4) == [(4, 4), (2, 5)]
    assert sizes([0.1, 0.0, 0.1, 0.1]) == [(4, 3), (4, 1), (2, 5)]


def test_a_bias_that_comes_before_its_weight_is_in_one_block() -> None:
    layer = nn.Module()
    layer.bias, layer.weight = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, 3))
    assert [block.parts for block in EKFACCurvature(ParameterLayout.of(layer)).blocks] == [[(2, 6), (0, 2)]]


@pytest.mark.parametrize("kind", ["full", "ekfac", "lowrank"])
def test_state_goes_through_a_checkpoint(kind: str) -> None:
    curvature = recorded(kind, rows_of(30), rank=6)
    other = type(curvature).__new__(type(curvature))
    other.load_state_dict(curvature.state_dict())
    vector = rows_of(1, 8)[0]
    assert torch.equal(other.apply(vector), curvature.apply(vector))
    other.remove(other.removal([rows_of(30)[:3]]))
    curvature.remove(curvature.removal([rows_of(30)[:3]]))
    assert torch.equal(other.apply(vector), curvature.apply(vector))


@pytest.mark.parametrize("kind", ["full", "ekfac", "lowrank"])
def test_leverages_stay_below_one_and_removing_everything_leaves_nothing(kind: str) -> None:
    rows = rows_of(25)
    curvature = recorded(kind, rows)
    ridge = torch.full((P,), 1e-3, dtype=torch.float64)
    step = curvature.newton_step(curvature.removal([rows]), rows[0], ridge, clip=None)
    assert 0.9 < step.max_leverage < 1
    curvature.remove(curvature.removal([rows]))
    assert float(curvature.apply(rows[0]).norm()) < 1e-8 * float(rows.square().sum())


def test_bad_input() -> None:
    wide = ParameterLayout.of(nn.Linear(200, 100))
    with pytest.raises(ValueError, match=r"20,100 parameters takes 3\.0 GiB.*kind='ekfac'"):
        FullCurvature(wide)
    with pytest.raises(ValueError, match="`kind` must be"):
        make_curvature("diag", LAYOUT, [0.0] * 4, 1, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`rank` must be"):
        LowRankCurvature(LAYOUT, 0)
    assert make_curvature("auto", LAYOUT, [0.0] * 4, 1, 0).kind == "full"
    assert make_curvature("auto", wide, [0.0] * 2, 1, 0).kind == "lowrank"
    assert make_curvature("auto", wide, [0.0] * 2, 20_000, 0).kind == "ekfac", "its vectors would take 1.5 GiB"
    nothing = recorded("ekfac", torch.zeros(3, P, dtype=torch.float64))
    with pytest.raises(SingularCurvatureError, match="no damping"):
        nothing.newton_step(
            nothing.removal([torch.zeros(1, P).double()]), torch.ones(P).double(), torch.zeros(P), clip=None
        )
    low = recorded("lowrank", rows_of(3)[:, :1] * torch.eye(P, dtype=torch.float64)[:1], rank=2)
    with pytest.raises(SingularCurvatureError, match=r"neither curvature nor damping|not positive definite"):
        low.newton_step(
            low.removal([torch.zeros(1, P).double()]), torch.ones(P).double(), torch.zeros(P).double(), clip=None
        )
