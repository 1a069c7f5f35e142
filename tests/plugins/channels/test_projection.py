import math

import numpy as np
import pytest
import scipy.fft
import torch

from groundwire.plugins.channels import DCTProjection, GaussianProjection, make_projection
from groundwire.plugins.channels import functional as F
from helpers.channels import ProjectionTester


class TestGaussianProjection(ProjectionTester):
    def make(self, num_rows: int, numel: int, seed: int = 0) -> GaussianProjection:
        return GaussianProjection(num_rows, numel, seed)

    def test_entries_are_independent_normals(self) -> None:
        s, d = 300, 700
        entries = self.dense(self.make(s, d)) * math.sqrt(s)
        n = s * d
        assert abs(float(entries.mean())) < 5 / math.sqrt(n)
        assert abs(float(entries.square().mean()) - 1) < 5 * math.sqrt(2 / n)
        assert abs(float(entries.pow(4).mean()) - 3) < 5 * math.sqrt(96 / n)  # Var(g^4) = 105 - 9
        singular = torch.linalg.svdvals(entries / math.sqrt(s))  # Marchenko-Pastur edges
        assert float(singular[0]) == pytest.approx(math.sqrt(d / s) + 1, rel=0.05)
        assert float(singular[-1]) == pytest.approx(math.sqrt(d / s) - 1, rel=0.1)

    def test_square_matrix_is_inverted(self) -> None:
        projection, x = self.make(60, 60), torch.linspace(-1, 1, 60)
        torch.testing.assert_close(projection.least_squares(projection.mv(x)), x, rtol=0, atol=1e-3)

    def test_refuses_what_does_not_fit_into_memory(self) -> None:
        message = r"would need 1862\.65 GiB \(s=500000, d=1000000\), above the limit of 2\.00 GiB; use projection='dct'"
        with pytest.raises(ValueError, match=message):
            GaussianProjection(500_000, 1_000_000, seed=0)
        with pytest.raises(ValueError, match="use projection='dct'"):
            GaussianProjection(10, 100, seed=0, memory_limit=3999)


class TestDCTProjection(ProjectionTester):
    shapes = (*ProjectionTester.shapes, (31, 62))

    def make(self, num_rows: int, numel: int, seed: int = 0) -> DCTProjection:
        return DCTProjection(num_rows, numel, seed)

    def test_rows_are_orthogonal(self) -> None:
        for s, d in self.shapes:
            matrix = self.dense(self.make(s, d).double())
            torch.testing.assert_close(matrix @ matrix.T, d / s * torch.eye(s, dtype=torch.float64))

    def test_is_the_definition_with_scipys_matrix(self) -> None:
        for s, d in self.shapes:
            projection = self.make(s, d).double()
            cosines = scipy.fft.dct(np.eye(d), axis=0, norm="ortho")
            expected = math.sqrt(d / s) * cosines[projection.rows.numpy()] * projection.signs.numpy()
            np.testing.assert_allclose(self.dense(projection).numpy(), expected, atol=1e-12)
            assert len(set(projection.rows.tolist())) == s
            assert set(projection.signs.tolist()) <= {-1.0, 1.0}

    def test_a_constant_vector_is_spread(self) -> None:
        # Without the random signs all its energy would sit in one coefficient, which is sent or not.
        for seed in range(5):
            energy = float(self.make(500, 1000, seed).mv(torch.full((1000,), 1000**-0.5)).square().sum())
            assert abs(energy - 1) < 0.3

    def test_gradients_flow(self) -> None:
        projection = self.make(30, 61).double()
        x = torch.randn(61, dtype=torch.float64, requires_grad=True)
        y = torch.randn(30, dtype=torch.float64)
        (projection.mv(x) @ y).backward()
        assert x.grad is not None
        torch.testing.assert_close(x.grad, projection.mtv(y))


@pytest.mark.parametrize("d", [1, 2, 3, 4, 7, 8, 61, 100, 7850])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_dct_on_torch_agrees_with_scipy(
    d: int, dtype: torch.dtype, atol: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(2, 3, d, dtype=dtype, generator=torch.Generator().manual_seed(d))
    on_scipy, back_on_scipy = F.dct(x), F.idct(x)
    monkeypatch.setattr(F, "_on_numpy", lambda x: False)  # the way an accelerator takes
    for ours, scipys in ((F.dct(x), on_scipy), (F.idct(x), back_on_scipy)):
        assert ours.dtype == scipys.dtype == dtype
        torch.testing.assert_close(ours, scipys, rtol=0, atol=atol)
    torch.testing.assert_close(F.idct(F.dct(x)), x, rtol=0, atol=atol)


def test_dct_sums_to_its_definition() -> None:
    x = torch.tensor([1.0, -2.0, 5.0], dtype=torch.float64)
    expected = [
        math.sqrt((1 if k == 0 else 2) / 3) * sum(float(x[n]) * math.cos(math.pi * (n + 0.5) * k / 3) for n in range(3))
        for k in range(3)
    ]
    torch.testing.assert_close(F.dct(x), torch.tensor(expected, dtype=torch.float64))


def test_make_projection() -> None:
    assert isinstance(make_projection("auto", 300, 650, seed=0), GaussianProjection)
    assert isinstance(make_projection("auto", 20_000, 40_000, seed=0), DCTProjection)
    assert isinstance(make_projection("gaussian", 3, 6, seed=0), GaussianProjection)
    assert isinstance(make_projection("dct", 3, 6, seed=0), DCTProjection)
    with pytest.raises(ValueError, match="Unknown projection 'fourier'; allowed are 'auto', 'gaussian' and 'dct'"):
        make_projection("fourier", 3, 6, seed=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="use projection='dct'"):
        make_projection("gaussian", 200_000, 400_000, seed=0)
