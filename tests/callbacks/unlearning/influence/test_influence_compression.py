from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from groundwire.callbacks.unlearning.influence import Dropout, DropoutKron, GaussianProjection, GradientCompressor
from groundwire.callbacks.unlearning.influence import compression as compression_module
from groundwire.plugins.layout import ParameterLayout
from helpers.edge import generator

KINDS = [Dropout, DropoutKron, GaussianProjection]
every_kind = pytest.mark.parametrize("kind", KINDS)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head, self.scale = nn.Conv2d(2, 6, 3), nn.Linear(12, 5), nn.Parameter(torch.ones(()))


LAYOUT = ParameterLayout.of(Net())
P = LAYOUT.numel  # 108 + 6 + 60 + 5 + 1


def fitted(kind: type[GradientCompressor], layout: ParameterLayout = LAYOUT, **options: object) -> GradientCompressor:
    compressor = kind(**{"seed": 0, **options})  # type: ignore[arg-type]
    compressor.fit(layout)
    return compressor


def matrix(compressor: GradientCompressor) -> Tensor:
    """P, shape (k, p)."""
    return compressor(torch.eye(P, dtype=torch.float64)).T


@every_kind
def test_it_is_one_linear_map_for_all_rows_and_the_same_for_the_same_seed(kind: type[GradientCompressor]) -> None:
    compressor = fitted(kind, density=0.25)
    rows = torch.randn(5, P, generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(compressor(rows), rows @ matrix(compressor).T)
    torch.testing.assert_close(compressor(rows[2:3]), compressor(rows)[2:3])
    assert torch.equal(matrix(fitted(kind, density=0.25)), matrix(compressor))
    assert not torch.equal(matrix(fitted(kind, density=0.25, seed=1)), matrix(compressor))
    assert compressor(rows.float()).dtype == torch.float32


@every_kind
def test_the_seed_of_the_run_is_the_default(kind: type[GradientCompressor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert torch.equal(matrix(fitted(kind, k=20, seed=None)), matrix(fitted(kind, k=20, seed=7)))


@pytest.mark.parametrize("kind", [Dropout, DropoutKron])
def test_dropout_of_density_one_leaves_gradients_as_they_are(kind: type[GradientCompressor]) -> None:
    rows = torch.randn(3, P, generator=generator())
    compressor = fitted(kind, density=1.0)
    assert compressor.k == P
    assert torch.equal(compressor(rows), rows)


@pytest.mark.parametrize("k", [1, 2, 7, 90, P - 1, P])
def test_dropout_keeps_exactly_k_entries_unscaled_and_each_tensors_share(k: int) -> None:
    kept = matrix(fitted(Dropout, k=k))
    assert kept.shape == (k, P)
    assert torch.equal(kept.sum(dim=1), torch.ones(k, dtype=torch.float64))
    assert kept.max() == 1
    assert kept.sum(dim=0).max() == 1, "no entry twice"
    for size, inside in zip(LAYOUT.sizes, kept.sum(dim=0).split(LAYOUT.sizes), strict=True):
        assert abs(float(inside.sum()) - k * size / P) < 1


def test_a_mask_depends_on_the_tensors_name_and_not_on_the_others() -> None:
    """Freezing other parameters does not move it."""
    net = Net()
    net.conv.requires_grad_(False)
    found = []
    for layout in (LAYOUT, ParameterLayout.of(net)):
        kept = torch.zeros(layout.numel).scatter(0, fitted(Dropout, layout, density=0.5).indices, 1.0)  # type: ignore[attr-defined]
        found.append(layout.unflatten(kept)["head.weight"])
    assert torch.equal(*found)
    assert found[0].sum() == 30


def test_a_smaller_dropout_is_part_of_a_larger_one() -> None:
    entries = torch.arange(float(P))[None]
    small, large = (set(fitted(Dropout, density=d)(entries)[0].tolist()) for d in (0.25, 0.5))
    assert small < large


def test_dropout_kron_keeps_a_block_of_each_matrix() -> None:
    kept = matrix(fitted(DropoutKron, density=0.25)).sum(dim=0).split(LAYOUT.sizes)
    for name, shape, inside in zip(LAYOUT.names, LAYOUT.shapes, kept, strict=True):
        if len(shape) < 2:
            assert inside.sum() == max(1, round(0.25 * shape.numel())), name
            continue
        block = inside.view(shape[0], -1)
        rows, columns = block.amax(dim=1), block.amax(dim=0)
        assert torch.equal(block, torch.outer(rows, columns)), "a product of rows and columns"
        assert rows.sum() == round(0.5 * shape[0]), name
        assert abs(float(block.sum()) / block.numel() - 0.25) < 0.1


def test_dropout_kron_is_the_product_of_masked_inputs_and_masked_gradients_of_outputs() -> None:
    layer = nn.Linear(8, 6, bias=False)
    layout = ParameterLayout.of(layer)
    a, b = torch.randn(8, generator=generator()), torch.randn(6, generator=generator(1))
    found = fitted(DropoutKron, layout, density=0.25)(torch.outer(b, a).reshape(1, -1)).view(3, 4)
    singular = torch.linalg.svdvals(found)
    assert singular[0] > 0
    assert singular[1] < 1e-5 * singular[0]


def test_gaussian_entries_have_variance_one_over_k_and_keep_norms() -> None:
    layout = ParameterLayout.of(nn.Linear(400, 20))
    k, p = 200, layout.numel
    entries = fitted(GaussianProjection, layout, k=k)(torch.eye(p)) * math.sqrt(k)
    samples = entries.numel()
    assert abs(float(entries.mean())) < 5 / math.sqrt(samples)
    assert abs(float(entries.square().mean()) - 1) < 5 * math.sqrt(2 / samples)
    row = torch.randn(1, p, generator=generator())
    ratio = float(fitted(GaussianProjection, layout, k=k)(row).square().sum() / row.square().sum())
    assert abs(ratio - 1) < 5 * math.sqrt(2 / k)


def test_a_gaussian_matrix_that_is_not_kept_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression_module, "_BLOCK", 70)  # several blocks, the last one smaller
    kept = fitted(GaussianProjection, k=10)
    monkeypatch.setattr(compression_module, "_KEPT", 0)
    drawn_again = fitted(GaussianProjection, k=10)
    rows = torch.randn(3, P, generator=generator())
    assert torch.equal(kept(rows), drawn_again(rows))
    assert torch.equal(drawn_again(rows), drawn_again(rows))
    assert len(kept._blocks) == math.ceil(P / 7)  # type: ignore[attr-defined]
    assert not drawn_again._blocks  # type: ignore[attr-defined]
    whole = matrix(kept)
    assert torch.linalg.matrix_rank(whole) == 10, "blocks differ from each other"
    assert not torch.equal(whole[:, :7], whole[:, 7:14])


@every_kind
def test_more_entries_than_parameters_are_all_of_them_and_it_says_so(
    kind: type[GradientCompressor], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(compression_module, "rank_zero_info", said.append)
    assert fitted(kind, k=P + 1).k == P
    assert said == [f"{kind.__name__}: k={P + 1} is above the {P} parameters; k={P} is used."]
    assert fitted(kind, k=P).k == P
    assert len(said) == 1


@every_kind
def test_bad_arguments_are_refused(kind: type[GradientCompressor]) -> None:
    for options in ({}, {"density": 0.5, "k": 3}):
        with pytest.raises(ValueError, match="Give `density` or `k`, and not both"):
            kind(**options)
    for density in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"`density` must be in \(0, 1\]"):
            kind(density=density)
    with pytest.raises(ValueError, match="`k` must be at least 1"):
        kind(k=0)
    with pytest.raises(RuntimeError, match="call `fit\\(layout\\)` first"):
        kind(k=3)(torch.ones(1, P))
    with pytest.raises(ValueError, match=rf"expected rows \(B, {P}\), got shape \(2, {P + 1}\)"):
        fitted(kind, k=3)(torch.ones(2, P + 1))
