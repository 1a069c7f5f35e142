"""PerSampleGradients: what it leaves behind, what it tells apart, and what it refuses."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from groundwire.callbacks.privacy import PerSampleGradients

N, FEATURES = 6, 5
ENGINES = ("auto", "bookkeeping", "ghost", "hooks", "functorch")
ONE_PASS = ("auto", "hooks", "functorch")  # "bookkeeping" is another name of "auto"
WEIGHTS = torch.tensor([1.0, 0.0, 0.5, 2.0, 0.1, 1.0], dtype=torch.float64)

Loss = Callable[[Any, Tensor], Tensor]


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_squares(net: Any, x: Tensor) -> Tensor:
    return net(x).flatten(1).square().sum(1).mean()


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().double()


def mlp(activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(FEATURES, 8), activation(), nn.Linear(8, 3)))


def one_by_one(net: nn.Module, x: Tensor, loss: Loss = of_squares) -> dict[str, Tensor]:
    """The oracle: the gradient of each record alone, of a copy that was never observed."""
    net = copy.deepcopy(net)
    params = {name: p for name, p in net.named_parameters() if p.requires_grad}
    rows = [torch.autograd.grad(loss(net, x[i : i + 1]), list(params.values())) for i in range(len(x))]
    return {name: torch.stack([row[j] for row in rows]) for j, name in enumerate(params)}


def step(
    gradients: PerSampleGradients, net: nn.Module, x: Tensor, loss: Loss = of_squares, w: Tensor = WEIGHTS
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Squared norms and the weighted sum of one batch, by name."""
    n = len(x)
    value = loss(net, x)
    gradients.begin()
    if gradients.engine == "ghost":
        gradients.first_pass(value)
        norms = gradients.squared_norms(n)
        gradients.second_pass_with(w, n)
        value.backward()
        sums = {p: p.grad for p in gradients.parameters.values() if p.grad is not None}
    else:
        value.backward()
        if gradients.stray():  # what a step refuses
            raise MisconfigurationException(f"`{gradients.stray()}`")
        assert gradients.unreached() == []
        norms = gradients.squared_norms(n)
        sums = gradients.weighted_sum(dict.fromkeys(norms, w), n)
    gradients.end()
    for p in gradients.parameters.values():
        p.grad = None
    names = {p: name for name, p in gradients.parameters.items()}
    return {names[p]: v for p, v in norms.items()}, {names[p]: v for p, v in sums.items()}


def check(net: nn.Module, engine: Any, x: Tensor, loss: Loss = of_squares, **options: Any) -> None:
    """An engine's norms and sums are those of single backward passes."""
    want = one_by_one(net, x, loss)
    gradients = PerSampleGradients(net, engine, **options)
    with gradients.attached():
        norms, sums = step(gradients, net, x, loss, WEIGHTS[: len(x)])
    assert norms.keys() == sums.keys() == want.keys()
    for name, samples in want.items():
        torch.testing.assert_close(norms[name], samples.flatten(1).square().sum(1), rtol=1e-9, atol=1e-12)
        total = torch.einsum("n,n...->...", WEIGHTS[: len(x)], samples)
        torch.testing.assert_close(sums[name], total, rtol=1e-9, atol=1e-10)


# ---------------------------------------------------------------- no trace


def traces(net: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, module in net.named_modules():
        found[name] = sorted(module.__dict__), [len(v) for k, v in module.__dict__.items() if k.endswith("_hooks")]
        found[f"{name} flags"] = {
            k: dict(v)
            for k, v in module.__dict__.items()
            if k in ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
        }
    for name, p in net.named_parameters():
        found[f"{name}."] = (sorted(vars(p)), p.requires_grad, p.grad is None, bool(p._backward_hooks), id(p))
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_is_left_after_detach(engine: Any) -> None:
    net = mlp()
    net[0].bias.requires_grad_(False)
    before = traces(net)
    gradients = PerSampleGradients(net, engine)
    with gradients.attached():
        assert traces(net) != before
        step(gradients, net, randn(N, FEATURES))
    assert traces(net) == before
    gradients.detach()
    assert traces(net) == before
    assert gradients.parameters == {}
    of_squares(net, randn(N, FEATURES)).backward()
    assert net[0].weight.grad is not None
    assert net[0].bias.grad is None


def test_attach_twice_observes_once_and_sees_what_is_trainable_now() -> None:
    net, x = mlp(), randn(N, FEATURES)
    want = one_by_one(net, x)
    gradients = PerSampleGradients(net)
    gradients.attach()
    net[0].weight.requires_grad_(False)
    gradients.attach()
    norms, _ = step(gradients, net, x)
    gradients.detach()
    assert sorted(norms) == ["0.bias", "2.bias", "2.weight"]
    for name, norm in norms.items():
        torch.testing.assert_close(norm, want[name].flatten(1).square().sum(1))


class Fails(nn.Module):
    """Fails in the middle of its forward, once."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.fails = nn.Parameter(torch.ones(8)), True

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:
            raise RuntimeError("in the middle")
        return x * self.scale


@pytest.mark.parametrize("engine", ENGINES)
def test_an_exception_inside_a_forward_leaves_no_trace_and_the_next_step_is_right(engine: Any) -> None:
    net = seeded(lambda: nn.Sequential(nn.Linear(FEATURES, 8), Fails(), nn.Linear(8, 3)))
    x, before = randn(N, FEATURES), traces(net)
    gradients = PerSampleGradients(net, engine)
    with gradients.attached():
        with pytest.raises(RuntimeError, match="in the middle"):
            net(x)
        assert all(p.requires_grad for p in net.parameters())
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            net(randn(N, FEATURES + 1))
        assert all(p.requires_grad for p in net.parameters())
        net[1].fails = False
        norms, _ = step(gradients, net, x)
    assert traces(net) == before
    for name, samples in one_by_one(net, x).items():
        torch.testing.assert_close(norms[name], samples.flatten(1).square().sum(1))
    net[1].fails = True
    with pytest.raises(RuntimeError, match="in the middle"), gradients.attached():  # out of the context, too
        net(x)
    assert traces(net) == before


def test_outputs_and_input_gradients_are_those_of_the_bare_module() -> None:
    net, x = mlp(), randn(N, FEATURES).requires_grad_()
    bare = net(x)
    expected = torch.autograd.grad(bare.square().sum(), x)[0]
    for engine in ENGINES:
        with PerSampleGradients(net, engine).attached():
            seen = net(x)
            assert torch.equal(seen, bare)
            assert torch.equal(torch.autograd.grad(seen.square().sum(), x)[0], expected)


# ---------------------------------------------------------------- networks that do odd things


class Bent(nn.Module):
    """A layer of its own whose last operation keeps its result for the backward pass."""

    def __init__(self, bend: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.scale, self.bend = nn.Parameter(torch.linspace(0.5, 1.5, 8)), bend

    def forward(self, x: Tensor) -> Tensor:
        return self.bend(x * self.scale)


BENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "softmax": lambda x: x.softmax(-1),
    "transposed": lambda x: x.unsqueeze(1).transpose(1, 2),
    "half": lambda x: x[:, :4],
    "chunk": lambda x: x.chunk(2, -1)[0],
}


@pytest.mark.parametrize("engine", ONE_PASS)
@pytest.mark.parametrize("bend", BENDS)
def test_layers_that_end_in_any_operation(engine: Any, bend: str) -> None:
    check(seeded(lambda: nn.Sequential(nn.Linear(FEATURES, 8), Bent(BENDS[bend]))), engine, randn(N, FEATURES))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("activation", [lambda: nn.ReLU(inplace=True), lambda: nn.ELU(inplace=True), nn.ReLU])
def test_activations_in_place(engine: Any, activation: Any) -> None:
    check(mlp(activation), engine, randn(N, FEATURES))


def test_an_input_changed_in_place_after_its_layer_is_noticed() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(FEATURES, FEATURES)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 2
            y = self.layer(x)
            x.add_(1)
            return y + x

    net = seeded(Overwrites)
    gradients = PerSampleGradients(net)
    with gradients.attached():
        loss = of_squares(net, randn(N, FEATURES))
        gradients.begin()
        with pytest.raises(RuntimeError, match="changed in place"):
            loss.backward()


class Twice(nn.Module):
    """One layer, called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(torch.tanh(self.layer(torch.tanh(self.layer(x))))))


class Tied(nn.Module):
    """Two modules, one weight, and biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class TiedEmbedding(nn.Module):
    """Tokens in, scores over tokens out, by one table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(FEATURES, 4), nn.Linear(4, FEATURES, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(x.abs().mul(3).long().remainder(FEATURES))))


class RegisteredTwice(nn.Module):
    """One module under two names and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(FEATURES, FEATURES)
        self.b, self.all = self.a, nn.ModuleList([self.a])

    def forward(self, x: Tensor) -> Tensor:
        return self.b(x)


class Adapter(nn.Module):
    """Parameters of its own beside a child."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(torch.full((FEATURES,), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.scale) * self.scale


class ChildAlsoOutside(nn.Module):
    """The child of a layer with parameters of its own is registered beside it, too."""

    def __init__(self, child_first: bool, call_child: bool) -> None:
        super().__init__()
        inner = nn.Linear(FEATURES, FEATURES)
        parts = [("inner", inner), ("adapter", Adapter(inner))]
        for name, part in parts if child_first else parts[::-1]:
            self.add_module(name, part)
        self.call_child = call_child

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter(torch.tanh(self.inner(x)) if self.call_child else x)


class Keywords(nn.Module):
    """Calls its layer by keyword, in another order than the signature's."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.shift = nn.Parameter(torch.rand(FEATURES)), nn.Parameter(torch.rand(FEATURES))

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return torch.sin(first * self.scale) - second.square() * self.shift

    def __init__(self) -> None:
        super().__init__()
        self.layer = self.Layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(second=x, first=x + 1)


class Options(nn.Module):
    """Hands its layer what is no tensor."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(FEATURES))

        def forward(
            self, x: Tensor, mask: Tensor | None = None, power: float = 1.0, other: Tensor | None = None
        ) -> Tensor:
            x = x if mask is None else x * mask
            return (x * self.scale).abs() ** power + (0 if other is None else other * self.scale)

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how = self.Layer(), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "a number":
            return self.layer(x, None, 3.0)
        if self.how == "a keyword":
            return self.layer(x, power=2.0)
        if self.how == "None between":
            return self.layer(x, None, 2.0, x + 1)
        return self.layer(x, x.sign())


class Dicts(nn.Module):
    """Takes and returns a dict, as larger models do; its layers are called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(FEATURES, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, *, gain: float = 1.0) -> Tensor:
        hidden = {"h": self.a(input=x), "gain": gain}
        return self.b(input=torch.tanh(hidden["h"]) * hidden["gain"])


ODD: dict[str, Callable[[], nn.Module]] = {
    "used three times": Twice,
    "tied": Tied,
    "tied embedding": TiedEmbedding,
    "registered twice": RegisteredTwice,
    "child outside, parent first": lambda: ChildAlsoOutside(child_first=False, call_child=False),
    "child outside, child first": lambda: ChildAlsoOutside(child_first=True, call_child=False),
    "child called, child first": lambda: ChildAlsoOutside(child_first=True, call_child=True),
    "keywords": Keywords,
    "a number": lambda: Options("a number"),
    "a keyword": lambda: Options("a keyword"),
    "None between": lambda: Options("None between"),
    "two tensors": lambda: Options("two tensors"),
    "dicts": Dicts,
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ODD)
def test_odd_networks(name: str, engine: Any) -> None:
    """Right, or refused by name; never wrong in silence."""
    try:
        check(seeded(ODD[name]), engine, randn(N, FEATURES))
    except MisconfigurationException as refusal:
        assert "`" in str(refusal)  # noqa: PT017
        assert name not in ("used three times", "tied", "tied embedding", "registered twice", "dicts")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_child_called_by_itself_beside_its_parent_is_right_or_refused(engine: Any) -> None:
    """The hooks are on the parent alone then, which the child's own call does not pass."""
    net, x = seeded(lambda: ChildAlsoOutside(child_first=False, call_child=True)), randn(N, FEATURES)
    want = one_by_one(net, x)
    gradients = PerSampleGradients(net, engine)
    if engine == "ghost":
        with pytest.raises(MisconfigurationException, match="Ghost clipping cannot tell `"):
            gradients.attach()
        return
    with gradients.attached():
        loss = of_squares(net, x)
        gradients.begin()
        loss.backward()
        if gradients.stray():
            assert set(gradients.stray()) <= {"adapter.inner.weight", "adapter.inner.bias"}
            return
        norms = gradients.squared_norms(N)
    for name, p in net.named_parameters():
        torch.testing.assert_close(norms[p], want[name].flatten(1).square().sum(1))


# ---------------------------------------------------------------- passes on the side


@pytest.mark.parametrize("engine", ENGINES)
def test_an_attack_before_the_step_does_not_count(engine: Any) -> None:
    def attacked(net: nn.Module, x: Tensor) -> Tensor:
        adversarial = x.clone().requires_grad_()
        (direction,) = torch.autograd.grad(of_squares(net, adversarial), adversarial)
        return of_squares(net, x + 0.1 * direction.sign())

    check(mlp(), engine, randn(N, FEATURES), attacked)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_pass_without_gradients_and_one_that_the_loss_ignores_do_not_count(engine: Any) -> None:
    def taught(net: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = net(x * 2)
        ignored = net(x * 3)
        assert ignored.requires_grad
        return (net(x) - teacher).square().sum(1).mean() + 0 * ignored.detach().sum()

    check(mlp(), engine, randn(N, FEATURES), taught)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_passes_that_both_count_add_before_the_norm(engine: Any) -> None:
    def both(net: nn.Module, x: Tensor) -> Tensor:
        return of_squares(net, x) + of_squares(net, x.flip(1) * 0.5)

    check(mlp(), engine, randn(N, FEATURES), both)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("whole", [True, False])
def test_activation_checkpointing(engine: Any, whole: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = mlp(), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            if whole:
                return checkpoint(lambda y: self.head(self.body(y)), x, use_reentrant=False)
            return self.head(checkpoint(self.body, x, use_reentrant=False))

    check(seeded(Checkpointed), engine, randn(N, FEATURES))


def test_paused_observes_nothing() -> None:
    net, x = mlp(), randn(N, FEATURES)
    gradients = PerSampleGradients(net)
    with gradients.attached():
        gradients.begin()
        with gradients.paused():
            of_squares(net, x).backward()
            assert gradients.squared_norms(N) == {}
        assert sorted(gradients.stray()) == sorted(gradients.parameters)  # the plain gradient is there
        assert sorted(gradients.unreached()) == sorted(gradients.parameters)


# ---------------------------------------------------------------- stray gradients, unreached parameters


@pytest.mark.parametrize("engine", ONE_PASS)
def test_gradients_that_pass_by_the_layer_are_stray(engine: Any) -> None:
    net, x = mlp(), randn(N, FEATURES)
    gradients = PerSampleGradients(net, engine)
    with gradients.attached():
        loss = of_squares(net, x) + 0.1 * net[2].weight.square().sum()
        gradients.begin()
        loss.backward()
        assert gradients.stray() == ["2.weight"]
        net.zero_grad()
        loss = of_squares(net, x) + F.linear(x, net[0].weight).square().mean()
        gradients.begin()
        loss.backward()
        assert gradients.stray() == ["0.weight"]
        net.zero_grad()
        loss = of_squares(net, x)
        gradients.begin()
        loss.backward()
        assert gradients.stray() == gradients.unreached() == []


def test_parameters_that_no_gradient_reaches_are_named() -> None:
    net = nn.ModuleDict({"used": nn.Linear(FEATURES, 2), "idle": nn.Linear(2, 2)})
    gradients = PerSampleGradients(net)
    with gradients.attached():
        gradients.begin()
        net["used"](torch.randn(N, FEATURES)).mean().backward()
        assert gradients.unreached() == ["idle.weight", "idle.bias"]
        norms = gradients.squared_norms(N)
        assert set(norms) == set(net["used"].parameters())
        sums = gradients.weighted_sum({p: torch.ones(N) for p in net.parameters()}, N)
        assert set(sums) == set(net["used"].parameters())


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize("engine", ONE_PASS)
def test_another_number_of_rows_is_refused(engine: Any) -> None:
    class Merges(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(FEATURES, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.flatten(0, 1))

    net = Merges()
    gradients = PerSampleGradients(net, engine)
    with gradients.attached():
        gradients.begin()
        net(torch.randn(N, 3, FEATURES)).mean().backward()
        expected = rf"`layer` \(Linear\) has an input of shape \[18, {FEATURES}\], but the batch has {N} records"
        with pytest.raises(MisconfigurationException, match=expected):
            gradients.squared_norms(N)


def test_a_layer_without_records_is_refused() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(4, FEATURES), nn.Linear(FEATURES, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(x + self.embed(torch.arange(4)))

    net = Positions()
    gradients = PerSampleGradients(net)
    with gradients.attached():
        gradients.begin()
        net(torch.randn(N, 4, FEATURES)).mean().backward()
        with pytest.raises(MisconfigurationException, match=r"`embed` \(Embedding\) has an input of shape \[4\]"):
            gradients.squared_norms(N)


def test_parameters_of_the_root_are_refused() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.temperature, self.layer = nn.Parameter(torch.ones(())), nn.Linear(2, 2)

    with pytest.raises(MisconfigurationException, match="`temperature` belongs to Root itself"):
        PerSampleGradients(Root()).attach()
    net = Root()
    net.temperature.requires_grad_(False)
    with PerSampleGradients(net).attached():
        pass


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="no parameter that requires a gradient"):
        PerSampleGradients(nn.Linear(2, 2).requires_grad_(False)).attach()


def test_a_refused_module_is_left_without_hooks() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Embedding(2, 2, scale_grad_by_freq=True))
    before = traces(net)
    gradients = PerSampleGradients(net)
    with pytest.raises(MisconfigurationException, match="scale_grad_by_freq"), gradients.attached():
        pass
    gradients.detach()
    assert traces(net) == before


# ---------------------------------------------------------------- arguments that are the same for all records


class Masked(nn.Module):
    """A layer that takes a mask of positions, or one of each record, beside the records."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return (mask * (x @ self.weight @ x.transpose(1, 2))).tanh()

    def __init__(self) -> None:
        super().__init__()
        self.layer = Masked.Layer()
        self.mask = randn(N, N, seed=3)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        return self.layer(x, self.mask[:length, :length])


@pytest.mark.parametrize("engine", ONE_PASS)
def test_a_mask_with_as_many_rows_as_records_is_known_from_a_batch_of_another_size(engine: Any) -> None:
    net, x = seeded(Masked), randn(N, N, 4)
    want = one_by_one(net, x)["layer.weight"].flatten(1).square().sum(1)
    gradients = PerSampleGradients(net, engine)
    with gradients.attached():
        net(x[:2])  # a forward pass is enough
        norms, _ = step(gradients, net, x)
        torch.testing.assert_close(norms["layer.weight"], want)
        gradients.attach()  # all is forgotten: by its rows alone, the mask looks like records
        norms, _ = step(gradients, net, x)
        assert not torch.allclose(norms["layer.weight"], want)


def test_an_argument_that_holds_records_now_and_then_is_refused() -> None:
    class Both(Masked):
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, self.mask[: len(x), :1, None]) if len(x) == N else super().forward(x)

    net, x = seeded(Both), randn(N, 3, 4)
    gradients = PerSampleGradients(net)
    with gradients.attached():
        step(gradients, net, x)
        net(x[:2])
        with pytest.raises(MisconfigurationException, match=r"Layer made an output of shape .* one row per record"):
            step(gradients, net, x)


def test_discarding_records_leaves_a_mask_alone() -> None:
    net, x = seeded(Masked), randn(N, 3, 4)
    want = one_by_one(net, x)["layer.weight"]
    x[2, 1, 0] = float("nan")
    gradients = PerSampleGradients(net)
    with gradients.attached():
        gradients.begin()
        of_squares(net, x).backward()
        gradients.discard(~torch.isfinite(x).flatten(1).all(1))
        p = net.layer.weight
        sums = gradients.weighted_sum({p: WEIGHTS}, N)
    kept = [i for i in range(N) if i != 2]
    torch.testing.assert_close(sums[p], torch.einsum("n,n...->...", WEIGHTS[kept], want[kept]))


# ---------------------------------------------------------------- records that are not finite, scale, several batches


@pytest.mark.parametrize("engine", ONE_PASS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_discarded_records_leave_the_others_alone(engine: Any, value: float) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv1d(1, 2, 2), nn.Flatten(), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2))

    net, x = seeded(make), randn(N, 1, FEATURES)
    want = one_by_one(net, x)
    x[2, 0, 1] = value
    kept = [i for i in range(N) if i != 2]
    gradients = PerSampleGradients(net, engine)
    with gradients.attached():
        gradients.begin()
        of_squares(net, x).backward()
        norms = gradients.squared_norms(N)
        broken = ~torch.isfinite(torch.stack(list(norms.values())).sum(0))
        assert broken.tolist() == [i == 2 for i in range(N)]
        gradients.discard(broken)
        sums = gradients.weighted_sum(dict.fromkeys(norms, WEIGHTS), N)
        again = gradients.squared_norms(N)
    for name, p in net.named_parameters():
        total = torch.einsum("n,n...->...", WEIGHTS[kept], want[name][kept])
        torch.testing.assert_close(sums[p], total, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(again[p][kept], want[name][kept].flatten(1).square().sum(1))
        assert again[p][2] == 0


def test_ghost_cannot_leave_a_broken_record_out() -> None:
    """Autograd multiplies its NaN input by the weight 0: what comes out is not finite, which the callback refuses."""
    net, x = mlp(), randn(N, FEATURES)
    x[2, 1] = float("nan")
    w = torch.ones(N, dtype=torch.float64)
    w[2] = 0
    gradients = PerSampleGradients(net, "ghost")
    with gradients.attached():
        _, sums = step(gradients, net, x, w=w)
    assert not torch.isfinite(sums["0.weight"]).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_scale_undoes_the_division_by_accumulated_batches(engine: Any) -> None:
    net, x = mlp(), randn(N, FEATURES)
    norms, sums = [], []
    for chunks in (1, 4):
        gradients = PerSampleGradients(net, engine)
        with gradients.attached():
            loss = of_squares(net, x) / chunks
            gradients.begin()
            if engine == "ghost":
                gradients.first_pass(loss)
                norms.append(gradients.squared_norms(N, chunks))
                gradients.second_pass_with(WEIGHTS, N, chunks)
                loss.backward()
                sums.append([p.grad.clone() for p in net.parameters()])
            else:
                loss.backward()
                norms.append(gradients.squared_norms(N, chunks))
                total = gradients.weighted_sum(dict.fromkeys(norms[-1], WEIGHTS), N, chunks)
                sums.append([total[p] for p in net.parameters()])
            net.zero_grad()
    for p in net.parameters():
        torch.testing.assert_close(norms[0][p], norms[1][p], rtol=1e-12, atol=0)
    for one, four in zip(*sums, strict=True):
        torch.testing.assert_close(one, four, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("engine", ENGINES)
def test_several_micro_batches_equal_the_whole(engine: Any) -> None:
    """Nothing of one batch is carried into the next; batches of other sizes, and of one record, are fine."""

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 3, 2), nn.GroupNorm(1, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 2)
        )

    net, x = seeded(make), randn(N, 1, 3, 3)
    want = one_by_one(net, x)
    gradients = PerSampleGradients(net, engine)
    total = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    norms: dict[str, list[Tensor]] = {name: [] for name in total}
    with gradients.attached():
        for part in (slice(0, 3), slice(3, 4), slice(4, 6)):
            chunk_norms, sums = step(gradients, net, x[part], w=WEIGHTS[part])
            for name in total:
                total[name] += sums[name]
                norms[name].append(chunk_norms[name])
    for name, samples in want.items():
        torch.testing.assert_close(torch.cat(norms[name]), samples.flatten(1).square().sum(1), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(total[name], torch.einsum("n,n...->...", WEIGHTS, samples), rtol=1e-9, atol=1e-10)


def test_ghost_output_names_a_submodule() -> None:
    class Step(nn.Module):
        """As a LightningModule: its own forward is not what the step calls."""

        def __init__(self) -> None:
            super().__init__()
            self.network = mlp()

    def loss(net: Any, x: Tensor) -> Tensor:
        return of_squares(net.network, x)

    check(Step().double(), "ghost", randn(N, FEATURES), loss, ghost_output="network")


def test_ghost_with_an_output_that_the_step_does_not_pass_is_refused() -> None:
    """Otherwise the second pass is a plain one, and what comes out was never clipped."""

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = mlp()

    net, x = Step().double(), randn(N, FEATURES)
    gradients = PerSampleGradients(net, "ghost")
    with gradients.attached():
        loss = of_squares(net.network, x)
        gradients.begin()
        gradients.first_pass(loss)
        gradients.squared_norms(N)

        def second_pass() -> None:
            gradients.second_pass_with(torch.zeros(N, dtype=torch.float64), N)
            loss.backward()
            if any(p.grad is not None and bool(p.grad.any()) for p in net.parameters()) and not gradients.stray():
                pytest.fail("records of weight 0 moved the gradient, and nothing tells")

        try:
            second_pass()
        except MisconfigurationException as refusal:
            assert "ghost_output" in str(refusal)  # noqa: PT017


def test_an_unknown_ghost_output_is_an_error_that_leaves_no_hooks() -> None:
    net = mlp()
    before = traces(net)
    gradients = PerSampleGradients(net, "ghost", ghost_output="nowhere")
    with pytest.raises((AttributeError, MisconfigurationException), match="nowhere"), gradients.attached():
        pass
    gradients.detach()
    assert traces(net) == before


def test_the_example_of_the_documentation() -> None:
    """The class's docstring, which must hold."""
    net = nn.Sequential(nn.Linear(3, 1))
    gradients = PerSampleGradients(net)
    with gradients.attached(), warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients.begin()
        net(torch.ones(4, 3)).mean().backward()
        norms = gradients.squared_norms(batch_size=4)
    assert norms[net[0].weight].tolist() == pytest.approx([3.0] * 4)
