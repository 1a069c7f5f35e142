"""Per-sample gradients of every kind of layer against one backward pass a record."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from opacus import GradSampleModule
from opacus.layers import DPGRU, DPLSTM, DPMultiheadAttention
from torch import Tensor, nn

from groundwire.callbacks.privacy import PerSampleGradients
from groundwire.callbacks.privacy.grad_samples import (
    Call,
    Conv2dGradients,
    EmbeddingGradients,
    Instantiated,
    LinearGradients,
    LinearMap,
    bookkeeping,
    functorch_grad_samples,
    opacus_grad_samples,
)

N = 5
ENGINES = ("auto", "bookkeeping", "ghost", "hooks", "functorch")


def randn(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tokens(*shape: int, below: int) -> Tensor:
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(4))


class Affine(nn.Module):
    """A leaf that nobody has a rule for: two parameters, two inputs."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x * self.scale.square() + torch.sin(y * self.shift) * self.scale


class LowRank(nn.Module):
    """Own parameters and a child at once, as in adapters."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.inner = nn.Linear(features, 4)
        self.down, self.up = nn.Parameter(torch.randn(2, features)), nn.Parameter(torch.randn(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x @ self.down.T @ self.up.T


class First(nn.Module):
    """The first output of a layer that returns several."""

    def __init__(self, layer: nn.Module, copies: int = 1) -> None:
        super().__init__()
        self.layer, self.copies = layer, copies

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(*[x] * self.copies)[0]


class Whole(nn.Module):
    """A module around one layer: parameters of the root itself are refused."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.layer(*inputs)


def frozen(layer: nn.Module, name: str) -> nn.Module:
    layer.get_parameter(name).requires_grad_(False)
    return layer


def groups(channels: int) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(4, channels, 3, groups=2)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "linear-2d": (lambda: nn.Linear(7, 3), (randn(N, 7),)),
    "linear-3d": (lambda: nn.Linear(7, 3), (randn(N, 4, 7),)),
    "linear-3d-gram": (lambda: nn.Linear(12, 9), (randn(N, 3, 12),)),
    "linear-4d": (lambda: nn.Linear(7, 3), (randn(N, 2, 3, 7),)),
    "linear-4d-gram": (lambda: nn.Linear(12, 9), (randn(N, 2, 2, 12),)),
    "linear-no-bias": (lambda: nn.Linear(7, 3, bias=False), (randn(N, 4, 7),)),
    "linear-frozen-weight": (lambda: frozen(nn.Linear(7, 3), "weight"), (randn(N, 4, 7),)),
    "linear-frozen-bias": (lambda: frozen(nn.Linear(7, 3), "bias"), (randn(N, 7),)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1, dilation=2), (randn(N, 3, 11),)),
    "conv1d-groups": (lambda: nn.Conv1d(4, 6, 3, groups=2, bias=False), (randn(N, 4, 9),)),
    "conv1d-same": (lambda: nn.Conv1d(3, 4, 4, padding="same", dilation=2), (randn(N, 3, 11),)),
    "conv1d-valid": (lambda: nn.Conv1d(3, 4, 3, padding="valid"), (randn(N, 3, 9),)),
    "conv1d-circular": (lambda: nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"), (randn(N, 3, 9),)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3), (randn(N, 3, 6, 6),)),
    "conv2d-gram": (lambda: nn.Conv2d(6, 8, 3), (randn(N, 6, 5, 5),)),
    "conv2d-many-positions": (lambda: nn.Conv2d(2, 3, 3, padding=1), (randn(N, 2, 7, 7),)),
    "conv2d-one-position": (lambda: nn.Conv2d(3, 4, 5), (randn(N, 3, 5, 5),)),
    "conv2d-stride": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 3), padding=(1, 0)), (randn(N, 3, 8, 9),)),
    "conv2d-dilation": (lambda: nn.Conv2d(3, 4, 3, dilation=(2, 1), padding=2), (randn(N, 3, 8, 7),)),
    "conv2d-groups": (groups(6), (randn(N, 4, 6, 6),)),
    "conv2d-depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), (randn(N, 4, 6, 6),)),
    "conv2d-same": (lambda: nn.Conv2d(3, 4, (3, 4), padding="same"), (randn(N, 3, 6, 6),)),
    "conv2d-valid": (lambda: nn.Conv2d(3, 4, 3, padding="valid"), (randn(N, 3, 6, 6),)),
    "conv2d-reflect": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (randn(N, 3, 6, 6),)),
    "conv2d-circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (randn(N, 3, 6, 6),)),
    "conv2d-no-bias": (lambda: nn.Conv2d(3, 4, 3, bias=False), (randn(N, 3, 6, 6),)),
    "conv2d-frozen-weight": (lambda: frozen(nn.Conv2d(3, 4, 3), "weight"), (randn(N, 3, 6, 6),)),
    "conv2d-frozen-bias": (lambda: frozen(nn.Conv2d(3, 4, 3), "bias"), (randn(N, 3, 6, 6),)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (2, 3, 2), stride=(1, 2, 1), padding=1), (randn(N, 2, 4, 5, 4),)),
    "conv3d-dilation": (lambda: nn.Conv3d(2, 3, 2, dilation=2), (randn(N, 2, 4, 5, 4),)),
    "conv3d-groups": (lambda: nn.Conv3d(4, 4, 2, groups=2), (randn(N, 4, 3, 3, 3),)),
    "conv3d-same": (lambda: nn.Conv3d(2, 3, 3, padding="same"), (randn(N, 2, 4, 4, 4),)),
    "conv3d-replicate": (lambda: nn.Conv3d(2, 3, 3, padding=1, padding_mode="replicate"), (randn(N, 2, 4, 4, 4),)),
    "conv2d-transposed": (lambda: nn.ConvTranspose2d(3, 2, 3, stride=2), (randn(N, 3, 4, 4),)),
    "layer-norm": (lambda: nn.LayerNorm(6), (randn(N, 6),)),
    "layer-norm-3d": (lambda: nn.LayerNorm((3, 6)), (randn(N, 2, 3, 6),)),
    "layer-norm-no-bias": (lambda: nn.LayerNorm(6, bias=False), (randn(N, 3, 6),)),
    "layer-norm-frozen": (lambda: frozen(nn.LayerNorm(6), "weight"), (randn(N, 3, 6),)),
    "group-norm": (lambda: nn.GroupNorm(2, 6), (randn(N, 6, 3, 3),)),
    "group-norm-2d": (lambda: nn.GroupNorm(2, 6), (randn(N, 6),)),
    "group-norm-frozen": (lambda: frozen(nn.GroupNorm(2, 6), "bias"), (randn(N, 6, 3),)),
    "instance-norm-1d": (lambda: nn.InstanceNorm1d(4, affine=True), (randn(N, 4, 7),)),
    "instance-norm-2d": (lambda: nn.InstanceNorm2d(4, affine=True), (randn(N, 4, 3, 3),)),
    "rms-norm": (lambda: nn.RMSNorm(6), (randn(N, 6),)),
    "rms-norm-3d": (lambda: nn.RMSNorm(6), (randn(N, 3, 6),)),
    "prelu": (lambda: nn.PReLU(4), (randn(N, 4, 3),)),
    "bilinear": (lambda: nn.Bilinear(4, 3, 2), (randn(N, 4), randn(N, 3))),
    "embedding": (lambda: nn.Embedding(6, 3), (tokens(N, 8, below=6),)),  # 8 of 6 tokens: some repeat in every record
    "embedding-one-token": (lambda: nn.Embedding(6, 3), (tokens(N, below=6),)),
    "embedding-grid": (lambda: nn.Embedding(6, 3), (tokens(N, 2, 4, below=6),)),
    "embedding-padding": (lambda: nn.Embedding(4, 3, padding_idx=1), (tokens(N, 8, below=4),)),
    "embedding-last-is-padding": (lambda: nn.Embedding(4, 3, padding_idx=-1), (tokens(N, 8, below=4),)),
    "custom": (lambda: Affine(4), (randn(N, 3, 4), randn(N, 3, 4, seed=2))),
    "own-and-children": (lambda: LowRank(6), (randn(N, 3, 6),)),
    "own-frozen-child": (lambda: frozen(LowRank(6), "inner.weight"), (randn(N, 6),)),
}
RECURRENT: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "dp-lstm": (lambda: First(DPLSTM(3, 4, batch_first=True)), (randn(N, 6, 3),)),
    "dp-lstm-2-layers": (
        lambda: First(DPLSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True)),
        (randn(N, 3, 3),),
    ),
    "dp-gru": (lambda: First(DPGRU(3, 4, batch_first=True)), (randn(N, 6, 3),)),
    "dp-attention": (lambda: First(DPMultiheadAttention(4, 2, batch_first=True), copies=3), (randn(N, 3, 4),)),
}


def build(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = make().double()
        with torch.no_grad():
            for p in layer.parameters():  # norms start at one and zero, where mistakes hide
                p += 0.3 * torch.randn_like(p)
        return layer


def one_by_one(layer: nn.Module, inputs: tuple[Tensor, ...], backprops: Tensor) -> dict[str, Tensor]:
    """The oracle: a backward pass for each record alone."""
    samples: dict[str, list[Tensor]] = {n: [] for n, p in layer.named_parameters() if p.requires_grad}
    params = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    for i in range(len(backprops)):
        loss = (layer(*(x[i : i + 1] for x in inputs)) * backprops[i : i + 1]).sum()
        grads = torch.autograd.grad(loss, list(params.values()))
        for name, grad in zip(params, grads, strict=True):
            samples[name].append(grad)
    return {name: torch.stack(values) for name, values in samples.items()}


def assert_matches(
    layer: nn.Module, norms: dict[Tensor, Tensor], sums: dict[Tensor, Tensor], w: Tensor, want: Any
) -> None:
    params = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    assert set(norms) == set(sums) == set(params.values())
    for name, p in params.items():
        expected = want[name].flatten(1).square().sum(1)
        torch.testing.assert_close(norms[p], expected, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"norm of {n}: {m}")
        torch.testing.assert_close(
            sums[p], torch.einsum("n,n...->...", w, want[name]), rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


def observed(
    net: nn.Module, inputs: tuple[Tensor, ...], r: Tensor, w: Tensor, engine: Any
) -> tuple[dict[Tensor, Tensor], dict[Tensor, Tensor]]:
    """Norms and weighted sums as a step gets them, for the mean over records of ``(output * r).sum()``."""
    n = len(r)
    gradients = PerSampleGradients(net, engine)
    with gradients.attached():
        for p in net.parameters():
            p.grad = None
        loss = (net(*inputs) * r).sum() / n
        gradients.begin()
        if engine != "ghost":
            loss.backward()
            assert gradients.stray() == []
            norms = gradients.squared_norms(n)
            sums = gradients.weighted_sum(dict.fromkeys(norms, w), n)
        else:
            gradients.first_pass(loss)
            norms = gradients.squared_norms(n)
            gradients.second_pass_with(w, n)
            loss.backward()
            sums = {p: p.grad for p in net.parameters() if p.grad is not None}
        assert gradients.unreached() == [] or engine == "ghost"
    for p in net.parameters():
        p.grad = None
    return norms, sums


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", [*LAYERS, *RECURRENT])
def test_norms_and_weighted_sums_are_those_of_single_backward_passes(name: str, engine: str) -> None:
    make, inputs = (LAYERS | RECURRENT)[name]
    net = Whole(build(make))
    r = randn(*net(*inputs).shape, seed=5)
    w = torch.tensor([0.0, 1.0, 0.3, 2.0, 1e-3], dtype=torch.float64)
    if engine == "ghost" and name.startswith("own-"):  # a layer with parameters and submodules
        with pytest.raises(MisconfigurationException, match=r"Ghost clipping cannot tell .* of `layer`"):
            PerSampleGradients(net, engine).attach()
        return
    norms, sums = observed(net, inputs, r, w, engine)
    assert_matches(net, norms, sums, w, one_by_one(net, inputs, r))


@pytest.mark.parametrize("rule", [opacus_grad_samples, functorch_grad_samples])
@pytest.mark.parametrize("name", LAYERS)
def test_rules_build_the_samples_of_single_backward_passes(name: str, rule: Any) -> None:
    make, inputs = LAYERS[name]
    layer = build(make)
    if rule is opacus_grad_samples and any(True for _ in layer.children()):
        pytest.skip("the engine gives layers with children to vmap")
    r = randn(*layer(*inputs).shape, seed=5)
    samples = rule(layer, Call.of(inputs, {}), r)
    want = one_by_one(layer, inputs, r)
    got = {n: samples[p] for n, p in layer.named_parameters() if p.requires_grad}
    assert got.keys() == want.keys()
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-9, atol=1e-9)
    kept = Instantiated({p: s for p, s in samples.items() if p.requires_grad})
    w = randn(N, seed=6)
    weights = {p: w for p in layer.parameters()}
    assert_matches(layer, kept.squared_norms(), kept.weighted_sum(weights), w, want)


@pytest.mark.parametrize("name", [n for n in LAYERS if n.startswith(("linear", "conv1d", "conv2d", "layer-norm-3d"))])
def test_opacus_s_own_module_agrees(name: str) -> None:
    """A second oracle, where Opacus has no known mistake of its own."""
    if "circular" in name or "reflect" in name or "transposed" in name:
        pytest.skip("Opacus ignores the padding mode")
    make, inputs = LAYERS[name]
    plain = build(make)
    net = nn.Sequential(plain)
    r = randn(*net(*inputs).shape, seed=5)
    w = torch.ones(N, dtype=torch.float64)
    norms, _ = observed(net, inputs, r, w, "auto")
    ours = {n: norms[p] for n, p in net.named_parameters() if p.requires_grad}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = GradSampleModule(nn.Sequential(build(make)), strict=False)
        ((wrapped(*inputs) * r).sum() / N).backward()
    for key, p in wrapped._module.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(ours[key], p.grad_sample.flatten(1).square().sum(1), rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- the ways to compute a norm


def never(*_: Any) -> Tensor:
    raise AssertionError("this way was not to be taken")


@pytest.mark.parametrize(
    ("make", "shape", "way"),
    [
        (lambda: nn.Linear(9, 8), (9,), "product"),
        (lambda: nn.Linear(9, 8), (2, 9), "gram"),  # 2 * 2 * (9 + 8) < 72
        (lambda: nn.Linear(9, 8), (3, 9), "kept"),  # 2 * 3 * (9 + 8) > 72, which is below 4 * 3 * (9 + 8)
        (lambda: nn.Conv2d(3, 4, 5), (3, 5, 5), "product"),
        (lambda: nn.Conv2d(8, 16, 5), (8, 7, 7), "gram"),  # 9 positions, 3200 weights, 392 + 144 numbers recorded
        (lambda: nn.Conv2d(2, 3, 3), (2, 5, 5), "kept"),  # 54 weights, 50 + 27 numbers recorded
        (lambda: nn.Conv2d(8, 8, 5), (8, 9, 9), "forced"),  # 25 positions: patches
        (lambda: nn.Conv2d(5, 17, 15), (5, 24, 24), "recomputed"),  # 100 positions, 19125 weights, 2880 + 1700 recorded
        (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 7, 7), "kept"),  # 49 positions: one grouped convolution
        (lambda: nn.Conv2d(8, 8, 5), (8, 10, 10), "forced"),  # 36 positions: one grouped convolution
        (lambda: nn.Conv2d(8, 8, 5, stride=2, padding=1, dilation=2), (8, 19, 18), "kept"),  # 42 positions
    ],
)
def test_every_way_to_a_norm_is_taken_and_right(
    make: Callable[[], nn.Module], shape: tuple[int, ...], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, inputs = build(make), (randn(N, *shape),)
    r = randn(*layer(*inputs).shape, seed=5)
    kind = bookkeeping(layer)
    assert kind is not None
    parts = kind(layer, inputs, r)
    assert isinstance(parts, LinearMap)
    if way == "forced":  # to make the gradients twice
        monkeypatch.setattr(LinearMap, "_samples_are_small", property(lambda _: False))
        monkeypatch.setattr(LinearMap, "_gram_is_cheaper", lambda _: False)
    if way in ("product", "gram"):
        monkeypatch.setattr(type(parts), "weight_samples", never)
    if way == "kept":
        monkeypatch.setattr(type(parts), "weight_sum", never)
    norms = parts.squared_norms()
    assert (parts._samples is not None) == (way == "kept")
    w = randn(N, seed=6)
    assert_matches(
        layer, norms, parts.weighted_sum({p: w for p in layer.parameters()}), w, one_by_one(layer, inputs, r)
    )


def test_one_weight_a_parameter() -> None:
    for make, inputs in (
        LAYERS["linear-3d"],
        LAYERS["conv2d"],
        LAYERS["conv2d-many-positions"],
        LAYERS["layer-norm-3d"],
    ):
        net = Whole(build(make))
        r = randn(*net(*inputs).shape, seed=5)
        want = one_by_one(net, inputs, r)
        gradients = PerSampleGradients(net)
        with gradients.attached():
            gradients.begin()
            ((net(*inputs) * r).sum() / N).backward()
            gradients.squared_norms(N)
            weights = {p: randn(N, seed=i) for i, p in enumerate(net.parameters())}
            sums = gradients.weighted_sum(weights, N)
        for name, p in net.named_parameters():
            torch.testing.assert_close(
                sums[p], torch.einsum("n,n...->...", weights[p], want[name]), rtol=1e-9, atol=1e-9
            )


def test_which_layers_have_a_way_around() -> None:
    class Special(nn.Linear):
        """Its forward may be anything."""

    assert bookkeeping(nn.Linear(2, 2)) is LinearGradients
    assert bookkeeping(nn.Conv2d(2, 2, 1)) is Conv2dGradients
    assert bookkeeping(nn.Embedding(2, 2)) is EmbeddingGradients
    others: list[nn.Module] = [
        Special(2, 2),
        nn.Conv1d(2, 2, 1),
        nn.Conv2d(2, 2, 1, groups=2),
        nn.Conv2d(2, 2, 1, padding="same"),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
        nn.LayerNorm(2),
    ]
    assert [bookkeeping(layer) for layer in others] == [None] * len(others)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_subclass_whose_forward_differs_is_not_taken_for_its_parent(engine: str) -> None:
    class Squared(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.square(), self.bias)

    net, inputs = Whole(build(lambda: Squared(4, 3))), (randn(N, 4),)
    r, w = randn(N, 3, seed=5), torch.ones(N, dtype=torch.float64)
    norms, sums = observed(net, inputs, r, w, engine)
    assert_matches(net, norms, sums, w, one_by_one(net, inputs, r))


# ---------------------------------------------------------------- precision


def test_positions_that_cancel_do_not_hide_a_record_s_gradient_from_its_norm() -> None:
    """The Gram sum of large positions of opposite sign loses all digits in single precision; the gradient does not."""
    u, v = randn(200, 64, dtype=torch.float32), randn(200, 64, seed=2, dtype=torch.float32)
    a = torch.stack([100 * u, 100 * u + randn(200, 64, seed=3, dtype=torch.float32) / 100], 1)
    b = torch.stack([v, -v], 1)
    parts = LinearGradients(nn.Linear(64, 64, bias=False), (a,), b)
    norms = parts.squared_norms()[parts.weight].double().sqrt()
    true = (b.double().transpose(1, 2) @ a.double()).flatten(1).norm(dim=1)
    clipped = true * (0.1 / (norms + 1e-6)).clamp(max=1.0)
    assert clipped.max() <= 0.101, f"a record clipped to 0.1 moves the sum by {clipped.max():.3g}"


def test_tokens_whose_backprops_cancel_do_not_hide_a_record_s_gradient_from_its_norm() -> None:
    v = 100 * randn(200, 64, dtype=torch.float32)
    b = torch.stack([v, -v + randn(200, 64, seed=3, dtype=torch.float32) / 100], 1)
    parts = EmbeddingGradients(nn.Embedding(3, 64), (torch.ones(200, 2, dtype=torch.long),), b)
    norms = parts.squared_norms()[parts.embedding.weight].double().sqrt()
    true = b.double().sum(1).norm(dim=1)
    clipped = true * (0.01 / (norms + 1e-6)).clamp(max=1.0)
    assert clipped.max() <= 0.0101, f"a record clipped to 0.01 moves the sum by {clipped.max():.3g}"


@pytest.mark.parametrize("engine", ENGINES)
def test_single_precision_agrees_with_double(engine: str) -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))

    double = build(net)
    single = build(net).float()
    x, r, w = randn(N, 1, 6, 6), randn(N, 3, seed=5), torch.rand(N, dtype=torch.float64)
    norms, sums = observed(double, (x,), r, w, engine)
    norms32, sums32 = observed(single, (x.float(),), r.float(), w.float(), engine)
    for p, q in zip(double.parameters(), single.parameters(), strict=True):
        assert norms32[q].dtype == torch.float32
        assert sums32[q].dtype == torch.float32
        torch.testing.assert_close(norms32[q].double(), norms[p], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sums32[q].double(), sums[p], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("engine", ["auto", "hooks", "functorch"])
def test_embedding_bag_on_one_row_of_tokens_a_record(engine: Any, mode: Any) -> None:
    """Tokens repeat within a record: Opacus's rule counts them once."""
    net, inputs = Whole(build(lambda: nn.EmbeddingBag(3, 3, mode=mode))), (tokens(N, 4, below=3),)
    r, w = randn(N, 3, seed=5), torch.ones(N, dtype=torch.float64)
    norms, sums = observed(net, inputs, r, w, engine)
    assert_matches(net, norms, sums, w, one_by_one(net, inputs, r))


@pytest.mark.parametrize("per_record", [1, 2])
def test_embedding_bag_on_one_row_of_all_tokens_is_refused(per_record: int) -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.EmbeddingBag(6, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.layer(ids, torch.arange(0, len(ids), per_record))

    net = Bag()
    gradients = PerSampleGradients(net)
    with gradients.attached():
        gradients.begin()
        net(tokens(N * per_record, below=6)).sum().backward()
        with pytest.raises(MisconfigurationException, match=r"`layer`.*first dimension must be the records"):
            gradients.squared_norms(N)


def test_embedding_that_scales_by_frequency_is_refused() -> None:
    net = Whole(nn.Embedding(6, 3, scale_grad_by_freq=True))
    with pytest.raises(MisconfigurationException, match="`layer` scales gradients by how often"):
        PerSampleGradients(net).attach()


@pytest.mark.parametrize("layer", [nn.LSTM(3, 4, batch_first=True), nn.GRU(3, 4), nn.MultiheadAttention(4, 2)])
def test_layers_that_return_several_tensors_are_refused(layer: nn.Module) -> None:
    x = torch.randn(N, 2, 4 if isinstance(layer, nn.MultiheadAttention) else 3)
    net = First(layer, copies=3 if isinstance(layer, nn.MultiheadAttention) else 1)
    gradients = PerSampleGradients(net)
    with (
        gradients.attached(),
        pytest.raises(MisconfigurationException, match=r"`layer` .* returns a tuple.*DPLSTM, DPGRU"),
    ):
        net(x)
    assert all(p.requires_grad for p in net.parameters())


def test_time_first_recurrence_is_refused() -> None:
    net = First(DPMultiheadAttention(4, 2), copies=3)
    gradients = PerSampleGradients(net)
    with gradients.attached():
        gradients.begin()
        net(torch.randn(3, N, 4)).mean().backward()
        with pytest.raises(MisconfigurationException, match="the first dimension must be the records"):
            gradients.squared_norms(N)
