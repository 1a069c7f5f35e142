"""Batched orthogonal matching pursuit, against scikit-learn and by what defines it; projections; the size of a state."""

from __future__ import annotations

import math
import re
import time

import numpy as np
import pytest
import torch
from sklearn.linear_model import orthogonal_mp
from torch import Tensor

from groundwire.plugins.optimizers import optimizer_state_bytes, orthogonal_matching_pursuit
from groundwire.plugins.optimizers.functional import (
    adam_direction,
    gaussian_atoms,
    leading_subspace,
    project_sparse,
    random_subspace,
)
from groundwire.plugins.random import stream


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def atoms(n: int, k: int, seed: int = 0) -> Tensor:
    return gaussian_atoms(n, k, generator(seed), torch.float64)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def dense(indices: Tensor, coefficients: Tensor, n: int) -> Tensor:
    return coefficients.new_zeros(len(indices), n).scatter_add_(1, indices, coefficients)


def sparse_rows(rows: int, n: int, s: int, seed: int = 2) -> Tensor:
    """Rows with ``s`` entries of +1 or -1, which matching pursuit finds hardest, and zeros."""
    g = generator(seed)
    support = torch.stack([torch.randperm(n, generator=g)[:s] for _ in range(rows)])
    signs = 2.0 * torch.randint(0, 2, (rows, s), generator=g).double() - 1
    return torch.zeros(rows, n, dtype=torch.float64).scatter_(1, support, signs)


def test_it_is_scikit_learns_on_a_hundred_problems() -> None:
    shapes = [(20, 8, 3), (64, 32, 8), (40, 40, 40), (150, 30, 12), (9, 5, 5)]
    for i in range(100):
        n, k, s = shapes[i % len(shapes)]
        a, y = atoms(n, k, seed=i), normal(1, k, seed=1000 + i)
        found = dense(*orthogonal_matching_pursuit(a, y, s), n)
        expected = orthogonal_mp(a.T.numpy(), y[0].numpy(), n_nonzero_coefs=s)
        np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-7, atol=1e-9)


def test_many_rows_at_once_are_the_rows_alone() -> None:
    a, y = atoms(50, 24), normal(600, 24)  # more rows than are recovered together
    indices, coefficients = orthogonal_matching_pursuit(a, y, 6)
    for row in (0, 1, 255, 256, 599):
        i, c = orthogonal_matching_pursuit(a, y[row : row + 1], 6)
        assert torch.equal(indices[row], i[0])
        torch.testing.assert_close(coefficients[row], c[0], rtol=1e-9, atol=1e-12)


def test_the_definition_step_by_step() -> None:
    a, y, s = atoms(30, 16), normal(4, 16), 7
    indices, coefficients = orthogonal_matching_pursuit(a, y, s)
    for row in range(4):
        taken: list[int] = []
        for t in range(s):
            fit = np.linalg.lstsq(a[taken].T.numpy(), y[row].numpy(), rcond=None)[0] if taken else np.zeros(0)
            residual = y[row].numpy() - a[taken].T.numpy() @ fit
            correlation = np.abs(a.numpy() @ residual)
            correlation[taken] = -1
            taken.append(int(correlation.argmax()))
            assert taken[-1] == indices[row, t]
        fit = np.linalg.lstsq(a[taken].T.numpy(), y[row].numpy(), rcond=None)[0]
        np.testing.assert_allclose(coefficients[row].numpy(), fit, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_residual_never_grows_with_the_sparsity(dtype: torch.dtype) -> None:
    a, y = atoms(60, 32).to(dtype), normal(40, 32).to(dtype)
    sizes = []
    for s in (1, 2, 4, 8, 16, 31, 32):
        x = dense(*orthogonal_matching_pursuit(a, y, s), 60)
        sizes.append((x @ a - y).norm(dim=1))
    for more, fewer in zip(sizes[1:], sizes[:-1], strict=True):
        assert (more <= fewer + 1e-5 * y.norm(dim=1)).all()
    assert (sizes[-1] < (1e-4 if dtype == torch.float32 else 1e-10) * y.norm(dim=1)).all(), "k atoms span everything"


@pytest.mark.parametrize(("n", "s", "ratio", "least", "most"), [(1024, 16, 16, 0.95, 1.0), (1024, 16, 4, 0.0, 0.05)])
def test_sparse_rows_are_recovered_from_sixteen_times_as_many_numbers(
    n: int, s: int, ratio: int, least: float, most: float
) -> None:
    a, x = atoms(n, ratio * s), sparse_rows(60, n, s)
    found = dense(*orthogonal_matching_pursuit(a, x @ a, s), n)
    share = ((found - x).abs().amax(dim=1) < 1e-10).double().mean().item()
    assert least <= share <= most


def test_with_orthonormal_atoms_it_is_top_s() -> None:
    y = normal(5, 12)
    found = dense(*orthogonal_matching_pursuit(torch.eye(12, dtype=torch.float64), y, 4), 12)
    kth = np.sort(np.abs(y.numpy()), axis=1)[:, [-4]]
    np.testing.assert_array_equal(found.numpy(), np.where(np.abs(y.numpy()) >= kth, y.numpy(), 0))


def test_a_row_takes_no_atoms_beyond_its_length() -> None:
    a, y = atoms(20, 10), normal(3, 10)
    indices, coefficients = orthogonal_matching_pursuit(a, y, 6, lengths=[20, 8, 3])
    assert (indices[1][coefficients[1] != 0] < 8).all()
    assert sorted(indices[2][coefficients[2] != 0].tolist()) == [0, 1, 2], "three atoms, and then it stops"
    alone = orthogonal_matching_pursuit(a[:8], y[1:2], 6)
    torch.testing.assert_close(dense(indices, coefficients, 20)[1, :8], dense(*alone, 8)[0])
    fit = np.linalg.lstsq(a[:3].T.numpy(), y[2].numpy(), rcond=None)[0]
    np.testing.assert_allclose(dense(indices, coefficients, 20)[2, :3].numpy(), fit, rtol=1e-9)


def test_it_stops_where_nothing_is_gained() -> None:
    a = atoms(12, 6)
    x = torch.zeros(3, 12, dtype=torch.float64)
    x[0, 5], x[2, 7] = 2.0, -3.0
    indices, coefficients = orthogonal_matching_pursuit(a, x @ a, 4, tol=1e-9)
    assert coefficients.count_nonzero(dim=1).tolist() == [1, 0, 1], "one atom, or none for zeros"
    torch.testing.assert_close(dense(indices, coefficients, 12), x)
    twins = torch.cat([a[:2], a[:2]])  # only two different atoms
    indices, coefficients = orthogonal_matching_pursuit(twins, normal(2, 6), 4)
    assert torch.isfinite(coefficients).all()
    assert (coefficients.count_nonzero(dim=1) == 2).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so_and_stays_in_its_row(poison: float) -> None:
    a, y = atoms(12, 6).float(), normal(3, 6).float()
    clean = orthogonal_matching_pursuit(a, y, 3)[1]
    y[1, 2] = poison
    indices, coefficients = orthogonal_matching_pursuit(a, y, 3)
    assert coefficients[1].isnan().all()
    assert ((indices >= 0) & (indices < 12)).all()
    assert torch.equal(coefficients[[0, 2]], clean[[0, 2]])


def test_nothing_to_do() -> None:
    indices, coefficients = orthogonal_matching_pursuit(atoms(5, 3), torch.zeros(0, 3, dtype=torch.float64), 2)
    assert indices.shape == coefficients.shape == (0, 2)


def test_bad_arguments_by_message() -> None:
    a, y = atoms(5, 3), normal(2, 3)
    for bad in (0, 4):
        with pytest.raises(ValueError, match=rf"`sparsity` must be in \[1, k\] for targets of k=3 entries, got {bad}"):
            orthogonal_matching_pursuit(a, y, bad)
    with pytest.raises(ValueError, match=re.escape("the same k, got (5, 3) and (2, 4)")):
        orthogonal_matching_pursuit(a, normal(2, 4), 2)
    with pytest.raises(ValueError, match="one entry a row, got 1 for 2 rows"):
        orthogonal_matching_pursuit(a, y, 2, lengths=[5])
    for rank in (0, 6):
        with pytest.raises(ValueError, match=rf"`rank` must be in \[1, 5\].*got {rank}"):
            leading_subspace(normal(5, 7), rank)
        with pytest.raises(ValueError, match=rf"`rank` must be in \[1, 5\].*got {rank}"):
            random_subspace(5, rank, generator())


def test_all_rows_at_once_are_much_faster_than_one_by_one() -> None:
    a, y = gaussian_atoms(512, 64, generator()), normal(256, 64).float()

    def seconds(work: object) -> float:
        best = math.inf
        for _ in range(3):
            start = time.perf_counter()
            work()  # type: ignore[operator]
            best = min(best, time.perf_counter() - start)
        return best

    together = seconds(lambda: orthogonal_matching_pursuit(a, y, 4))
    alone = seconds(lambda: [orthogonal_matching_pursuit(a, y[i : i + 1], 4) for i in range(64)]) * 4
    assert alone > 5 * together


def test_atoms_are_unit_vectors_in_every_dtype_the_same() -> None:
    a = gaussian_atoms(400, 50, generator(), torch.float64)
    torch.testing.assert_close(a.norm(dim=1), torch.ones(400, dtype=torch.float64))
    coherence = (a @ a.T).fill_diagonal_(0)
    assert abs(coherence.square().mean() * 50 - 1) < 0.05, "the variance of a product of random directions is 1 / k"
    torch.testing.assert_close(gaussian_atoms(400, 50, generator()), a.float())


def test_a_sparse_projection_is_the_dense_one() -> None:
    a, x = atoms(30, 7), sparse_rows(5, 30, 4)
    indices = x.abs().topk(4, dim=1).indices
    torch.testing.assert_close(project_sparse(a, indices, x.gather(1, indices)), x @ a)


def test_adams_direction_and_its_scalar_variant() -> None:
    m, v, mean = torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64), normal(3, 1) * 0
    w = torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    reference = torch.optim.Adam([w], lr=1.0)
    first = torch.zeros(3, 4, dtype=torch.float64)
    for step in range(1, 6):
        g = normal(3, 4, seed=step)
        before = w.detach().clone()
        w.grad = g
        reference.step()
        direction = adam_direction(m, v, g, step=step, betas=(0.9, 0.999), eps=1e-8)
        torch.testing.assert_close(direction, before - w.detach(), rtol=1e-12, atol=1e-12)
        scalar = adam_direction(first, mean, g, step=step, betas=(0.9, 0.999), eps=1e-8)
        root = (v / (1 - 0.999**step)).mean(dim=1, keepdim=True).sqrt()
        torch.testing.assert_close(scalar, m / (1 - 0.9**step) / (root + 1e-8), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_the_leading_subspace_is_that_of_the_svd(scale: float) -> None:
    g = (normal(6, 40) * torch.tensor([9.0, 7.0, 5.0, 1.0, 0.5, 0.1])[:, None]).float() * scale
    basis = leading_subspace(g, 3).double()
    torch.testing.assert_close(basis.T @ basis, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-6)
    u = np.linalg.svd(g.double().numpy())[0][:, :3]
    np.testing.assert_allclose((basis @ basis.T).numpy(), u @ u.T, atol=1e-5)
    captured = (basis.T @ g.double()).norm(dim=1)
    assert (captured[:-1] >= captured[1:]).all(), "the largest singular value first"


def test_subspaces_of_bad_gradients_are_subspaces() -> None:
    g = normal(5, 9)
    g[2, 3], g[4, 4] = math.nan, math.inf
    for bad in (g, torch.zeros(5, 9)):
        basis = leading_subspace(bad, 2)
        torch.testing.assert_close(basis.T @ basis, torch.eye(2, dtype=basis.dtype), rtol=0, atol=1e-6)
    random = random_subspace(9, 4, stream(1, purpose="test"), torch.float64)
    torch.testing.assert_close(random.T @ random, torch.eye(4, dtype=torch.float64))


def test_the_size_of_any_optimizers_state() -> None:
    def size(build: type[torch.optim.Optimizer], **settings: object) -> int:
        w = torch.nn.Parameter(torch.zeros(6, 5))
        w.grad = torch.ones(6, 5)
        optimizer = build([w], **settings)  # type: ignore[arg-type]
        assert optimizer_state_bytes(optimizer) == 0
        optimizer.step()
        return optimizer_state_bytes(optimizer)

    assert size(torch.optim.SGD) == 0
    assert size(torch.optim.SGD, momentum=0.9) == 4 * 30
    assert size(torch.optim.AdamW) == 4 * (2 * 30 + 1)
    assert size(torch.optim.AdamW, amsgrad=True) == 4 * (3 * 30 + 1)
    assert size(torch.optim.Adafactor) == 4 * (6 + 5 + 1)

    class Odd(torch.optim.SGD):
        """Keeps tensors in an object, in a list, and one of them twice."""

        def step(self, closure: object = None) -> None:  # type: ignore[override]
            kept = torch.zeros(7)
            holder = type("Holder", (), {})()
            holder.matrix, holder.self = kept, holder
            self.state[self.param_groups[0]["params"][0]] = {"holder": holder, "list": [kept, torch.zeros(2).double()]}

    assert size(Odd) == 4 * 7 + 8 * 2
