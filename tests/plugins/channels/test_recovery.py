import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import integrate, optimize, stats
from sklearn.linear_model import OrthogonalMatchingPursuit
from torch import Tensor

from groundwire.plugins.channels import (
    AMP,
    BernoulliGaussAMP,
    DCTProjection,
    Decoder,
    GaussianProjection,
    LeastSquares,
    Projection,
    amp,
    bernoulli_gauss_amp,
    least_squares,
    make_projection,
    minimax_alpha,
)
from helpers.channels import build_from_yaml

Array = npt.NDArray[np.float64]
KINDS: Any = ["gaussian", "dct"]


def sparse(d: int, k: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(d, dtype=dtype)
    x[torch.randperm(d, generator=generator)[:k]] = torch.randn(k, dtype=dtype, generator=generator)
    return x


def dense(projection: Projection) -> Array:
    return projection.mv(torch.eye(projection.numel, dtype=projection.dtype)).T.numpy()


def nmse(estimate: Tensor, x: Tensor) -> float:
    return float((estimate - x).square().sum() / x.square().sum())


def amp_of_the_paper(v: Array, A: Array, alpha: float, num_iterations: int) -> Array:
    """The iteration as the paper writes it, on a dense matrix, with nothing for safety or speed."""
    s, d = A.shape
    x, r = np.zeros(d), v
    for _ in range(num_iterations):
        u = x + A.T @ r
        threshold = alpha * np.linalg.norm(r) / math.sqrt(s)
        x = np.sign(u) * np.maximum(np.abs(u) - threshold, 0)
        r = v - A @ x + np.count_nonzero(x) / s * r
    return x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [0.9, 1.3])
@pytest.mark.parametrize("num_iterations", [1, 2, 10])
def test_amp_is_the_iteration_of_the_paper(kind: Any, alpha: float, num_iterations: int) -> None:
    projection = make_projection(kind, 80, 200, seed=1).double()
    v = projection.mv(sparse(200, 30, seed=2)) + 0.1
    expected = amp_of_the_paper(v.numpy(), dense(projection), alpha, num_iterations)
    found = amp(v, projection, alpha, num_iterations, tol=0)
    np.testing.assert_allclose(found.x.numpy(), expected, rtol=1e-9, atol=1e-11)
    assert int(found.iterations) == num_iterations
    relative = np.linalg.norm(v.numpy() - dense(projection) @ expected) / np.linalg.norm(v.numpy())
    assert float(found.residual) == pytest.approx(relative, rel=1e-9)
    assert not found.diverged


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_amp_recovers_well_below_the_phase_transition(kind: Any, seed: int) -> None:
    d, s = 2000, 1000
    projection = make_projection(kind, s, d, seed)
    x = sparse(d, s // 10, seed, torch.float32)
    found = AMP(num_iterations=40)(projection.mv(x), projection)
    assert found.x.dtype == torch.float32
    assert nmse(found.x, x) < 1e-3
    assert float(found.residual) < 0.03


@pytest.mark.parametrize("kind", KINDS)
def test_amp_fails_well_above_the_phase_transition(kind: Any) -> None:
    d, s = 2000, 1000
    projection, x = make_projection(kind, s, d, seed=0), sparse(d, int(0.6 * s), 0, torch.float32)
    assert nmse(AMP(num_iterations=100)(projection.mv(x), projection).x, x) > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_amp_finds_what_linear_programming_and_matching_pursuit_find(kind: Any) -> None:
    d, s, k = 100, 60, 5
    projection = make_projection(kind, s, d, seed=4).double()
    x, A = sparse(d, k, seed=5), dense(projection)
    v = projection.mv(x)
    # Basis pursuit, min |x|_1 with A x = v, as a linear program in x = p - q.
    program = optimize.linprog(np.ones(2 * d), A_eq=np.hstack([A, -A]), b_eq=v.numpy())
    pursuit = OrthogonalMatchingPursuit(n_nonzero_coefs=k, fit_intercept=False).fit(A, v.numpy())
    found = amp(v, projection, 1.5, num_iterations=400, tol=1e-10).x.numpy()
    np.testing.assert_allclose(found, program.x[:d] - program.x[d:], atol=1e-5)
    np.testing.assert_allclose(found, pursuit.coef_, atol=1e-5)


def test_amp_follows_state_evolution() -> None:
    d, s, k, noise_std, alpha = 4000, 2000, 400, 0.1, 1.4
    density, delta = k / d, s / d
    signals, z = np.linspace(-6, 6, 401)[:, None], np.linspace(-8, 8, 1601)

    def risk(std: float, signal: Array) -> Array:
        """``E (eta(X + std Z; alpha std) - X)^2`` for each given ``X = signal``."""
        u = signal + std * z
        shrunk = np.sign(u) * np.maximum(np.abs(u) - alpha * std, 0)
        return integrate.trapezoid((shrunk - signal) ** 2 * stats.norm.pdf(z), z)

    mse, predicted = density, []
    for _ in range(6):
        std = math.sqrt(noise_std**2 + mse / delta)
        active = integrate.trapezoid(risk(std, signals) * stats.norm.pdf(signals[:, 0]), signals[:, 0])
        mse = (1 - density) * risk(std, np.zeros((1, 1)))[0] + density * active
        predicted.append(mse)

    measured = np.zeros(6)
    for seed in range(4):
        projection, x = GaussianProjection(s, d, seed), sparse(d, k, seed, torch.float32)
        noise = noise_std * torch.randn(s, generator=torch.Generator().manual_seed(99 + seed))
        v = projection.mv(x) + noise
        for t in range(6):
            measured[t] += float((amp(v, projection, alpha, t + 1, tol=0).x - x).square().mean()) / 4
    np.testing.assert_allclose(measured, predicted, rtol=0.15)
    assert predicted[0] / predicted[-1] > 3  # the prediction says something


def test_amp_commutes_with_a_permutation_of_the_entries() -> None:
    projection = GaussianProjection(60, 150, seed=0).double()
    order = torch.randperm(150, generator=torch.Generator().manual_seed(1))
    permuted = GaussianProjection(60, 150, seed=0).double()
    permuted.matrix = projection.matrix[:, order]
    v = projection.mv(sparse(150, 12, seed=2))
    torch.testing.assert_close(amp(v, permuted).x, amp(v, projection).x[order], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("decoder", [AMP(), BernoulliGaussAMP(), LeastSquares()])
def test_rows_of_a_batch_are_independent(decoder: Decoder) -> None:
    projection = GaussianProjection(100, 200, seed=0).double()
    easy, hard = sparse(200, 3, seed=1), sparse(200, 45, seed=2)
    v = projection.mv(torch.stack([easy, hard, torch.zeros(200, dtype=torch.float64), 1e6 * hard]))
    v = torch.stack([v, v.flip(0)])
    together = decoder(v, projection)
    assert together.x.shape == (2, 4, 200)
    for i in range(2):
        for j in range(4):
            alone = decoder(v[i, j], projection)
            torch.testing.assert_close(together.x[i, j], alone.x, rtol=1e-6, atol=1e-9)
            assert int(together.iterations[i, j]) == int(alone.iterations)
            torch.testing.assert_close(together.residual[i, j], alone.residual, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decoder", [AMP(), LeastSquares()])
@pytest.mark.parametrize("scale", [2.0**-100, 1e-30, 1e-6, 1e6, 1e30])
def test_estimate_scales_with_the_measurements(kind: Any, decoder: Decoder, scale: float) -> None:
    projection, x = make_projection(kind, 100, 200, seed=0), sparse(200, 10, 1, torch.float32)
    v = projection.mv(x)
    torch.testing.assert_close(decoder(v * scale, projection).x / scale, decoder(v, projection).x, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("decoder", [AMP(), BernoulliGaussAMP(), LeastSquares()])
def test_zero_gives_zero_and_not_finite_is_flagged(decoder: Decoder) -> None:
    projection = GaussianProjection(10, 20, seed=0)
    v = torch.ones(4, 10)
    v[0], v[1, 3], v[2, 3] = 0, math.nan, math.inf
    found = decoder(v, projection)
    assert not found.x[:3].any()
    assert found.x[3].any()
    assert found.x.isfinite().all()
    assert found.diverged[:3].tolist() == [False, True, True]
    assert found.residual[:3].tolist() == [0, 1, 1]


def test_amp_stops_when_settled() -> None:
    projection, x = DCTProjection(500, 1000, seed=0).double(), sparse(1000, 20, seed=0)
    found = amp(projection.mv(x), projection, 1.5, num_iterations=1000)
    assert 5 < int(found.iterations) < 100
    assert nmse(found.x, x) < 1e-9


def test_amp_guards_against_divergence() -> None:
    projection = GaussianProjection(100, 200, seed=0)
    projection.matrix.mul_(4.0)  # columns far from unit norm: the iteration blows up
    v = projection.mv(sparse(200, 30, 1, torch.float32))
    found = amp(v, projection, 0.5, num_iterations=50)
    assert found.diverged
    assert int(found.iterations) < 50
    assert found.x.isfinite().all()
    residual = float(torch.linalg.vector_norm(v - projection.mv(found.x)) / torch.linalg.vector_norm(v))
    assert residual <= 1.0  # the best iterate, at worst zero
    assert float(found.residual) == pytest.approx(residual, rel=1e-4)


def test_amp_does_not_hand_out_an_estimate_worse_than_zero() -> None:
    # A threshold too low for the bandwidth, caught before it has grown large: the plain iteration ends far off.
    projection, x = GaussianProjection(200, 2000, seed=0).double(), sparse(2000, 100, seed=0)
    v = projection.mv(x)
    plain = torch.from_numpy(amp_of_the_paper(v.numpy(), dense(projection), 1.2, 25))
    found = amp(v, projection, 1.2, 25)
    assert nmse(plain, x) > 4
    assert found.diverged
    assert int(found.iterations) == 25
    assert nmse(found.x, x) <= 1


def test_damping_keeps_the_fixed_point_and_slows_the_way() -> None:
    projection, x = GaussianProjection(200, 400, seed=0).double(), sparse(400, 20, seed=1)
    plain, damped = (amp(projection.mv(x), projection, 1.4, 500, tol=1e-10, damping=d) for d in (1.0, 0.7))
    torch.testing.assert_close(damped.x, plain.x, rtol=0, atol=1e-6)
    assert int(damped.iterations) > int(plain.iterations)


def test_least_squares_error_is_one_minus_s_over_d() -> None:
    for d, s in ((200, 100), (200, 40)):
        for make in (GaussianProjection, DCTProjection):
            errors = []
            for seed in range(20):
                projection, x = make(s, d, seed), sparse(d, 17, seed, torch.float32)
                errors.append(nmse(least_squares(projection.mv(x), projection).x, x))
            assert np.mean(errors) == pytest.approx(1 - s / d, abs=0.03)


def test_bernoulli_gauss_denoiser_is_the_posterior_mean() -> None:
    # One iteration from zero: x = E[X | X + t Z = u] under the prior, here by quadrature of Bayes' rule.
    d, s, eps = 60, 30, 0.2
    projection = GaussianProjection(s, d, seed=3).double()
    v = projection.mv(sparse(d, 6, seed=4))
    v = v / v.norm()
    u = dense(projection).T @ v.numpy()
    std, prior_std = 1 / math.sqrt(s), 1 / math.sqrt(d * eps)
    grid = np.linspace(-8 * prior_std, 8 * prior_std, 20_001)
    prior = stats.norm.pdf(grid, scale=prior_std)
    for index in range(0, d, 7):
        likelihood = stats.norm.pdf(u[index], loc=grid, scale=std)
        evidence = (1 - eps) * stats.norm.pdf(u[index], scale=std) + eps * integrate.trapezoid(likelihood * prior, grid)
        expected = eps * integrate.trapezoid(grid * likelihood * prior, grid) / evidence
        found = float(bernoulli_gauss_amp(v, projection, num_iterations=1).x[index])
        assert found == pytest.approx(expected, abs=1e-7)


def test_bernoulli_gauss_is_better_where_amp_is_past_its_transition() -> None:
    d, s = 1000, 500
    ratios = []
    for seed in range(3):
        projection, x = GaussianProjection(s, d, seed), sparse(d, s // 2, seed, torch.float32)
        v = projection.mv(x)
        better, plain = BernoulliGaussAMP(num_iterations=60)(v, projection), AMP(num_iterations=60)(v, projection)
        assert not better.diverged
        ratios.append(nmse(better.x, x) / nmse(plain.x, x))
    assert np.mean(ratios) < 0.7


def test_bernoulli_gauss_refuses_row_orthogonal_matrices() -> None:
    with pytest.raises(ValueError, match=r"unstable with a row-orthogonal projection.*use projection='gaussian'"):
        BernoulliGaussAMP()(torch.ones(5), DCTProjection(5, 10, seed=0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampling", [0.05, 0.1, 0.2, 0.8])
def test_default_alpha_holds_at_every_bandwidth(kind: Any, sampling: float) -> None:
    d = 4000
    s = int(sampling * d)
    projection, x = make_projection(kind, s, d, seed=0), sparse(d, s // 12, 0, torch.float32)
    found = AMP(num_iterations=60)(projection.mv(x), projection)
    assert not found.diverged
    assert nmse(found.x, x) < 1e-3
    if sampling <= 0.1:  # the threshold that serves s/d = 0.5 gives an error above that of sending nothing
        blown = AMP(alpha=0.9, num_iterations=60)(projection.mv(x), projection)
        assert blown.diverged
        assert float(blown.residual) <= 1


def test_minimax_alpha_is_where_state_evolution_reaches_furthest() -> None:
    def transition(alpha: float, delta: float) -> float:
        leak = 2 * ((1 + alpha**2) * stats.norm.cdf(-alpha) - alpha * stats.norm.pdf(alpha))
        return float((1 - leak / delta) / (1 + alpha**2 - leak))

    for delta in (0.05, 0.1, 0.3, 0.5, 0.7, 0.9):
        furthest = optimize.minimize_scalar(
            lambda a, delta=delta: -transition(a, delta), bounds=(0.05, 4), method="bounded", options={"xatol": 1e-9}
        )
        assert minimax_alpha(delta) == pytest.approx(furthest.x, abs=1e-5)
    # The published transition at s/d = 0.5 is k/s = 0.385 (Donoho and Tanner).
    assert transition(minimax_alpha(0.5), 0.5) == pytest.approx(0.385, abs=1e-3)
    assert minimax_alpha(1.0) == pytest.approx(0, abs=1e-6)
    for sampling in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"must be in \(0, 1\], got"):
            minimax_alpha(sampling)


def test_alpha_follows_the_projection_by_default() -> None:
    for kind, alpha in (("gaussian", 1.0), ("dct", 1.2)):
        projection: Projection = make_projection(kind, 50, 100, seed=0)  # type: ignore[arg-type]
        v = projection.mv(sparse(100, 20, 0, torch.float32))
        assert torch.equal(AMP()(v, projection).x, amp(v, projection, alpha).x)
        assert not torch.equal(AMP(alpha=0.9)(v, projection).x, AMP()(v, projection).x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decoder", [AMP(damping=0.8), BernoulliGaussAMP()])
def test_amp_reads_nothing_back_from_an_accelerator(kind: Any, decoder: Decoder) -> None:
    if kind == "dct" and isinstance(decoder, BernoulliGaussAMP):
        return
    projection = make_projection(kind, 30, 61, seed=0).to("meta")  # there, every read of a value raises
    found = decoder(torch.ones(2, 30, device="meta"), projection)
    assert found.x.shape == (2, 61)
    assert found.iterations.shape == found.residual.shape == found.diverged.shape == (2,)


@pytest.mark.parametrize("kind", KINDS)
def test_the_way_of_an_accelerator_gives_the_same_numbers(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    projection = make_projection(kind, 100, 200, seed=0).double()
    v = projection.mv(torch.stack([sparse(200, 5, seed=1), sparse(200, 40, seed=2)]))
    expected = amp(v, projection, num_iterations=60)
    monkeypatch.setattr("groundwire.plugins.channels.functional._can_ask", lambda x: False)
    found = amp(v, projection, num_iterations=60)
    torch.testing.assert_close(found.x, expected.x, rtol=0, atol=0)
    assert torch.equal(found.iterations, expected.iterations)
    assert not torch.equal(found.iterations[0], found.iterations[1])  # one settled early, and was left alone


@pytest.mark.parametrize("name", ["AMP", "BernoulliGaussAMP", "LeastSquares"])
def test_builds_from_yaml(name: str) -> None:
    decoder = build_from_yaml(Decoder, f"{{class_path: groundwire.plugins.channels.{name}}}")
    assert type(decoder).__name__ == name
    assert not decoder.state_dict()


def test_refuses_bad_settings() -> None:
    projection, v = GaussianProjection(5, 10, seed=0), torch.ones(5)
    for alpha in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="`alpha`"):
            AMP(alpha=alpha)
        with pytest.raises(ValueError, match="`alpha`"):
            amp(v, projection, alpha)
    for make in (AMP, BernoulliGaussAMP):
        with pytest.raises(ValueError, match="`num_iterations` must be at least 1, got 0"):
            make(num_iterations=0)
        for damping in (0.0, 1.1):
            with pytest.raises(ValueError, match=r"`damping`.*in \(0, 1\], got"):
                make(damping=damping)
    with pytest.raises(ValueError, match="`num_iterations`"):
        amp(v, projection, num_iterations=0)
    with pytest.raises(ValueError, match="`damping`"):
        amp(v, projection, damping=2.0)
    with pytest.raises(ValueError, match="`tol`"):
        amp(v, projection, tol=-1.0)
    with pytest.raises(ValueError, match="`density`"):
        bernoulli_gauss_amp(v, projection, density=1.0)
    for decoder in (AMP(), BernoulliGaussAMP(), LeastSquares()):
        with pytest.raises(ValueError, match=r"\(\.\.\., 5\), with num_rows=5, got \(6,\)"):
            decoder(torch.ones(6), projection)
