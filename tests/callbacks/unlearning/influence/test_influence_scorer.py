from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.autograd.functional import hessian

from groundwire.callbacks import LogitsSource
from groundwire.callbacks.unlearning.influence import (
    Dropout,
    DropoutKron,
    GaussianProjection,
    InfluenceScorer,
    rank_correlation,
)
from groundwire.callbacks.unlearning.influence import scorer as scorer_module
from groundwire.datamodules import Digits
from helpers.edge import generator

N, D, C, DECAY = 80, 5, 3, 1e-2


def records(number: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three classes that overlap."""
    g = generator(seed)
    y = torch.randint(C, (number,), generator=g)
    return torch.randn(number, D, generator=g, dtype=torch.float64) + F.one_hot(y, D).double(), y


def loss_of(vector: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of a linear layer whose parameters are in one vector."""
    features, classes = x.shape[1], len(vector) // (x.shape[1] + 1)
    weight, bias = vector.split([features * classes, classes])
    return F.cross_entropy(x @ weight.view(classes, features).T + bias, y)


def trained(x: Tensor, y: Tensor, classes: int = C, decay: float = DECAY) -> nn.Linear:
    """Softmax regression at the minimum of mean loss plus decay / 2 times the squared norm."""
    linear = nn.Linear(x.shape[1], classes, dtype=torch.float64)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(linear(x), y) + decay / 2 * sum(p.square().sum() for p in linear.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)
    linear.zero_grad()
    return linear


def vector_of(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def fitted(module: nn.Module, *args: Any, data: Any = None, **options: Any) -> InfluenceScorer:
    scorer = InfluenceScorer(module, *args, **options)
    scorer.fit([records(N)] if data is None else data)
    return scorer


def test_with_ggn_it_is_the_dense_solve_with_the_hessian_of_softmax_regression() -> None:
    (x, y), (xt, yt) = records(N), records(6, seed=1)
    module = trained(x, y)
    theta = vector_of(module)
    curvature = hessian(lambda v: loss_of(v, x, y), theta)
    gradients, of_test = (
        torch.stack([torch.func.grad(loss_of)(theta, a[i : i + 1], b[i : i + 1]) for i in range(len(b))])
        for a, b in ((x, y), (xt, yt))
    )
    inverse = torch.linalg.inv(curvature + DECAY * torch.eye(len(theta), dtype=torch.float64))
    scorer = fitted(module, damping=DECAY)
    torch.testing.assert_close(scorer.score((xt, yt)), of_test @ inverse @ gradients.T, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(scorer.self_influence(), (gradients @ inverse @ gradients.T).diagonal())
    fisher = torch.linalg.inv(gradients.T @ gradients / N + DECAY * torch.eye(len(theta), dtype=torch.float64))
    scorer = fitted(module, damping=DECAY, curvature="fisher")
    torch.testing.assert_close(scorer.score((xt, yt)), of_test @ fisher @ gradients.T, rtol=1e-8, atol=1e-10)


def test_it_predicts_retraining_without_a_record() -> None:
    (x, y), (xt, yt) = records(N), records(8, seed=1)
    module = trained(x, y)
    scores = fitted(module, damping=DECAY).score((xt, yt))
    with torch.no_grad():
        before = F.cross_entropy(module(xt), yt, reduction="none")
        changes = []
        for i in range(N):
            keep = torch.arange(N) != i
            with torch.enable_grad():
                without = trained(x[keep], y[keep], decay=DECAY * N / (N - 1))  # the regulariser's weight stays
            changes.append(N * (F.cross_entropy(without(xt), yt, reduction="none") - before))
    truth = torch.stack(changes, dim=1)
    correlation = rank_correlation(scores, truth)
    assert correlation.min() > 0.98, "and of the sign that is documented"
    slope = (scores * truth).sum(dim=1) / scores.square().sum(dim=1)
    assert ((slope > 0.9) & (slope < 1.3)).all(), "of the size that is documented"


@pytest.mark.parametrize("kind", [Dropout, DropoutKron])
def test_dropout_of_density_one_is_exact_influence(kind: Any) -> None:
    module, test = trained(*records(N)), records(6, seed=1)
    full, kept = fitted(module), fitted(module, kind(density=1.0, seed=0))
    assert torch.equal(kept.score(test), full.score(test))
    assert torch.equal(kept.self_influence(), full.self_influence())


def test_an_orthogonal_map_is_exact_influence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full-rank map that mixes entries changes nothing, if damping is the same in its coordinates."""
    module, test = trained(*records(N)), records(6, seed=1)
    p = len(vector_of(module))
    rotation = torch.linalg.qr(torch.randn(p, p, generator=generator(), dtype=torch.float64)).Q
    rotated = GaussianProjection(k=p, seed=0)
    monkeypatch.setattr(rotated, "_compress", lambda rows: rows @ rotation.T)
    torch.testing.assert_close(fitted(module, rotated).score(test), fitted(module).score(test))


def test_compression_is_that_of_gradients_and_curvature() -> None:
    """P G P^T and P g, with P written out."""
    (x, y), test = records(N), records(6, seed=1)
    module = trained(x, y)
    compressor = Dropout(k=7, seed=3)
    found = fitted(module, compressor, damping=0.02).score(test)
    p = torch.zeros(7, len(vector_of(module)), dtype=torch.float64)
    p[torch.arange(7), compressor.indices] = 1.0
    theta = vector_of(module)
    curvature = p @ hessian(lambda v: loss_of(v, x, y), theta) @ p.T + 0.02 * torch.eye(7, dtype=torch.float64)
    rows = [
        torch.stack([torch.func.grad(loss_of)(theta, a[None], b[None]) for a, b in zip(*d, strict=True)])
        for d in ((x, y), test)
    ]
    expected = (rows[1] @ p.T) @ torch.linalg.solve(curvature, p @ rows[0].T)
    torch.testing.assert_close(found, expected)


def test_batches_chunks_and_where_it_is_kept_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, test = trained(*records(N)), records(6, seed=1)
    x, y = records(N)
    whole = fitted(module, Dropout(k=7, seed=0))
    parts = [(x[:1], y[:1]), (x[1:50], y[1:50]), (x[50:], y[50:])]
    monkeypatch.setattr(scorer_module, "_CHUNK_BYTES", 1000)
    store = tmp_path / "folder" / "gradients.bin"
    pieces = fitted(module, Dropout(k=7, seed=0), data=iter(parts), store=store)
    torch.testing.assert_close(pieces.score(test), whole.score(test))
    torch.testing.assert_close(pieces.self_influence(), whole.self_influence())
    assert store.stat().st_size == pieces.store_bytes == whole.store_bytes == N * 7 * 8
    torch.testing.assert_close(pieces.train, whole.train)
    dicts = fitted(nn.Sequential(module), Dropout(k=7, seed=0), data=[{"features": x, "target": y}])
    assert dicts.num_records == N
    swapped = fitted(module, data=[(y, x)], source=LogitsSource(unpack=lambda batch: (batch[1], batch[0])))
    torch.testing.assert_close(swapped.score((test[1], test[0])), fitted(module).score(test))


def test_the_module_is_left_as_it_was_and_frozen_parameters_have_no_part() -> None:
    module = nn.Sequential(nn.Linear(D, 4), nn.Dropout(0.5), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, C)).double()
    module[0].bias.requires_grad_(False)
    module[1].eval()
    before, modes = copy.deepcopy(module.state_dict()), [m.training for m in module.modules()]
    scorer = fitted(module, curvature="ggn")
    again = fitted(module, curvature="ggn")
    assert torch.equal(scorer.score(records(4)), again.score(records(4))), "nothing is drawn: evaluation mode"
    assert scorer.excluded == ("0.bias",)
    assert scorer.num_parameters == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert [m.training for m in module.modules()] == modes
    assert all(p.grad is None for p in module.parameters())


def test_drawn_labels_stand_in_for_the_output_hessian() -> None:
    module, test = trained(*records(N)), records(6, seed=1)
    exact = fitted(module, damping=DECAY).score(test)
    drawn = fitted(module, damping=DECAY, draws=300).score(test)
    assert rank_correlation(exact, drawn).min() > 0.99
    x, y = records(N)
    other = InfluenceScorer(module, damping=DECAY, draws=300)
    other.fit([(x, y)], ids=torch.arange(N) + 1000)
    assert not torch.equal(other.score(test), drawn), "they depend on the records' numbers"
    assert other.ids.tolist() == list(range(1000, 1000 + N))


def digits(seed: int = 0, flipped: float = 0.05) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """Training data with some wrong labels, test data, and which labels are wrong."""
    data = Digits(flatten=True, seed=seed)
    data.setup()
    (x, y), (xt, yt) = data.train_data, data.test_data
    wrong = torch.rand(len(y), generator=generator(seed)) < flipped
    y = torch.where(wrong, (y + torch.randint(1, 10, y.shape, generator=generator(seed + 1))) % 10, y)
    return (x, y), (xt[:60], yt[:60]), wrong


@pytest.fixture(scope="module")
def on_digits() -> tuple[nn.Module, Any, Any, Tensor, Tensor]:
    """A network, its data, which labels are wrong, and exact influence."""
    train, test, wrong = digits()
    module = trained(train[0].double(), train[1], classes=10, decay=1e-3).float()
    scorer = fitted(module, data=[train])
    return module, train, test, wrong, scorer.score(test)


def test_wrong_labels_have_a_large_self_influence_at_a_sixteenth_of_the_entries(on_digits: Any) -> None:
    module, train, _, wrong, _ = on_digits
    full = roc_auc_score(wrong, fitted(module, data=[train]).self_influence())
    assert full > 0.95
    found = [
        roc_auc_score(wrong, fitted(module, Dropout(density=1 / 16, seed=s), data=[train]).self_influence())
        for s in range(3)
    ]
    assert sum(found) / 3 >= full - 0.02
    shuffled = wrong[torch.randperm(len(wrong), generator=generator())]
    assert abs(roc_auc_score(shuffled, fitted(module, data=[train]).self_influence()) - 0.5) < 0.15


@pytest.mark.parametrize("kind", [Dropout, DropoutKron, GaussianProjection])
def test_the_more_entries_the_nearer_to_exact_influence(kind: Any, on_digits: Any) -> None:
    module, train, test, _, exact = on_digits
    means = [
        float(rank_correlation(fitted(module, kind(density=d, seed=0), data=[train]).score(test), exact).mean())
        for d in (1 / 32, 1 / 8, 1 / 2)
    ]
    assert 0.03 < means[0] < means[1] < means[2] < 0.95
    assert means[2] > 0.4


def test_what_cannot_be_computed_is_refused_with_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    module = trained(*records(N))
    with pytest.raises(ValueError, match="`curvature` must be 'ggn' or 'fisher', got 'kfac'"):
        InfluenceScorer(module, curvature="kfac")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`damping` must be at least 0, got -1"):
        InfluenceScorer(module, damping=-1.0)
    with pytest.raises(RuntimeError, match="call `fit` first"):
        InfluenceScorer(module).score(records(2))
    with pytest.raises(RuntimeError, match="call `fit` first"):
        InfluenceScorer(module).self_influence()
    with pytest.raises(ValueError, match="There is no training record"):
        fitted(module, data=[])
    x, y = records(N)
    x[17, 2] = torch.inf
    with pytest.raises(ValueError, match="training record 17 is not finite"):
        fitted(module, data=[(x[:10], y[:10]), (x[10:], y[10:])])
    with pytest.raises(ValueError, match="test record is not finite"):
        fitted(module).score((x, y))
    few = [(x[:10], y[:10])]
    with pytest.raises(ValueError, match=r"10 records and 18 coordinates.*positive `damping`"):
        fitted(module, data=few, damping=0.0)
    assert fitted(module, data=few).damping_used > 0
    for number in (N - 1, N + 1):
        with pytest.raises(ValueError, match=rf"There are {number} `ids`.*give one to each record"):
            InfluenceScorer(module).fit([records(N)], ids=torch.arange(number))
    monkeypatch.setattr(scorer_module, "MOST_COORDINATES", 17)
    with pytest.raises(ValueError, match=r"18 entries are too long for a dense solve.*Dropout\(k=1024\)"):
        fitted(module)
    assert fitted(module, Dropout(k=17, seed=0)).k == 17


def test_other_weights_are_refused_until_it_is_fitted_again() -> None:
    module = trained(*records(N))
    scorer = fitted(module)
    with torch.no_grad():
        module.bias[0] += 1e-12
    for call in (lambda: scorer.score(records(2)), scorer.self_influence):
        with pytest.raises(RuntimeError, match="weights have changed since `fit`"):
            call()
    scorer.fit([records(N)])
    assert scorer.score(records(2)).shape == (2, N)
