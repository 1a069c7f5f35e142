"""The language model: what it may see, its gradients, and that it learns."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.data import DataLoader, TensorDataset

from groundwire.datamodules import DatasetDescriptions
from groundwire.recipes import TinyTransformer
from groundwire.recipes.language import CausalSelfAttention

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def tiny(**options: Any) -> TinyTransformer:
    return TinyTransformer(**({"vocab_size": 7, "seq_len": 6, "width": 8, "num_heads": 2} | options))


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 7, shape, generator=torch.Generator().manual_seed(seed))


def loss_of(module: TinyTransformer) -> Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]:
    """The training step of one sequence, as a function of the parameters."""
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign,assignment]

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.module.training_step((x, y), 0)

    step = Step()

    def loss(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        named = {f"module.{name}": value for name, value in p.items()}
        return functional_call(step, named, (x[None], y[None]))  # type: ignore[no-any-return]

    return loss


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def test_the_defaults_fit_those_of_the_descriptions() -> None:
    data, module = DatasetDescriptions(), TinyTransformer()
    assert (module.vocab_size, module.seq_len) == (data.vocab_size, data.seq_len)


@pytest.mark.parametrize(("v", "t", "w", "layers"), [(56, 64, 64, 2), (7, 6, 8, 1), (82, 16, 12, 3)])
def test_the_number_of_parameters_is_that_of_the_formula(v: int, t: int, w: int, layers: int) -> None:
    module = TinyTransformer(vocab_size=v, seq_len=t, width=w, num_layers=layers)
    norms, attention, mlp = 2 * 2 * w, 3 * w * w + 3 * w + w * w + w, 2 * 4 * w * w + 4 * w + w
    expected = (v + t) * w + layers * (norms + attention + mlp) + 2 * w + (w + 1) * v
    assert sum(p.numel() for p in module.parameters()) == expected
    assert expected == layers * (12 * w**2 + 13 * w) + 2 * v * w + v + t * w + 2 * w, "the docstring's"


def test_a_later_token_never_changes_earlier_logits() -> None:
    module, x = tiny(), tokens(3, 6)
    before = module(x)
    for position in range(6):
        changed = x.clone()
        changed[:, position] = (changed[:, position] + 1) % 7
        after = module(changed)
        assert torch.equal(after[:, :position], before[:, :position])
        for later in range(position, 6):  # and every later one sees it
            assert (after[:, later] != before[:, later]).any(), (position, later)
    assert torch.allclose(module(x[:, :4]), before[:, :4], atol=1e-6), "a shorter sequence is its beginning"


def test_attention_is_torchs() -> None:
    layer, x = CausalSelfAttention(12, num_heads=3).double(), torch.randn(2, 5, 12, dtype=torch.float64)
    q, k, v = (part.view(2, 5, 3, 4).transpose(1, 2) for part in layer.qkv(x).split(12, dim=-1))
    mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(layer(x), layer.out(mixed.transpose(1, 2).reshape(2, 5, 12)), rtol=0, atol=1e-12)


def test_gradients_per_sample_under_vmap_are_those_of_a_loop() -> None:
    module, x, y = tiny().double(), tokens(5, 6), tokens(5, 6, seed=1)
    loss, weights = loss_of(module), parameters(module)
    at_once = vmap(grad(loss), in_dims=(None, 0, 0))(weights, x, y)
    for i in range(5):
        module.zero_grad()
        module.training_step((x[i : i + 1], y[i : i + 1]), 0).backward()
        for name, p in module.named_parameters():
            assert torch.allclose(at_once[name][i], p.grad, rtol=0, atol=1e-12), name  # type: ignore[arg-type]
            assert p.grad is not None
            assert p.grad.abs().sum() > 0, name


def test_double_backward_is_the_difference_of_gradients(seeded: Callable[[int], None]) -> None:
    seeded(0)
    module, x, y = tiny().double(), tokens(4, 6), tokens(4, 6, seed=1)
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign,assignment]
    weights = list(module.parameters())
    g = torch.Generator().manual_seed(0)
    direction = [torch.randn(p.shape, generator=g, dtype=p.dtype) / 50 for p in weights]  # of norm about 1
    first = torch.autograd.grad(module.training_step((x, y), 0), weights, create_graph=True)
    product = torch.autograd.grad(sum((a * b).sum() for a, b in zip(first, direction, strict=True)), weights)  # type: ignore[arg-type]

    def moved(by: float) -> tuple[Tensor, ...]:
        with torch.no_grad():
            for p, d in zip(weights, direction, strict=True):
                p.add_(by * d)
        found = torch.autograd.grad(module.training_step((x, y), 0), weights)
        with torch.no_grad():
            for p, d in zip(weights, direction, strict=True):
                p.sub_(by * d)
        return found

    up, down = moved(1e-6), moved(-1e-6)
    for a, b, expected in zip(up, down, product, strict=True):
        assert torch.allclose((a - b) / 2e-6, expected, rtol=1e-5, atol=1e-6)


def test_loss_and_accuracy_are_means_over_tokens() -> None:
    module, x, y = tiny().eval(), tokens(5, 6), tokens(5, 6, seed=1)
    data = DataLoader(TensorDataset(x, y), batch_size=4)
    (test,) = Trainer(**QUIET).test(module, data, verbose=False)
    (val,) = Trainer(**QUIET).validate(module, data, verbose=False)
    with torch.no_grad():
        log_p = module(x).log_softmax(-1)
    picked = [float(log_p[i, t, y[i, t]]) for i in range(5) for t in range(6)]
    right = [int(log_p[i, t].argmax() == y[i, t]) for i in range(5) for t in range(6)]
    assert test == {"test/loss": pytest.approx(-sum(picked) / 30), "test/acc": pytest.approx(sum(right) / 30)}
    assert list(val.values()) == list(test.values())
    assert val.keys() == {"val/loss", "val/acc"}
    assert torch.equal(module.predict_step((x, y), 0), log_p.argmax(-1))


def test_it_learns_more_than_the_frequencies_of_the_characters(seeded: Callable[[int], None]) -> None:
    seeded(0)
    data = DatasetDescriptions(batch_size=16, documents=["twenty_newsgroups", "lfw"])
    module = TinyTransformer(
        width=32, num_layers=1, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2), schedule="one_cycle"
    )
    trainer = Trainer(**QUIET, max_epochs=15, limit_val_batches=0)
    trainer.fit(module, data)
    share = data.train_data[1].flatten().bincount() / data.train_data[1].numel()
    unigram = float(torch.special.entr(share).sum())
    assert unigram < math.log(56)
    assert float(trainer.callback_metrics["train/loss"]) < 0.8 * unigram
    (result,) = trainer.test(module, data, verbose=False)
    assert result["test/loss"] < 0.9 * unigram, "of windows it has not seen"
    assert result["test/acc"] > float(share.max()) + 0.05


def test_built_from_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model", type=LightningModule)
    args = {"vocab_size": 82, "seq_len": 16, "num_layers": 1, "schedule": "cosine"}
    text = yaml.safe_dump({"model": {"class_path": "groundwire.recipes.TinyTransformer", "init_args": args}})
    module = parser.instantiate(parser.parse_string(text)).model
    assert (module.vocab_size, module.seq_len, len(module.blocks), module.schedule) == (82, 16, 1, "cosine")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 1}, "`vocab_size` must be at least 2, got 1"),
        ({"seq_len": 0}, "`seq_len` must be at least 1, got 0"),
        ({"width": 0}, "`width` must be at least 1, got 0"),
        ({"num_layers": 0}, "`num_layers` must be at least 1, got 0"),
        ({"num_heads": 3}, "`num_heads` must divide `width`, got 3 heads for width=8"),
        ({"num_heads": 0}, "got 0 heads"),
        ({"schedule": "linear"}, "`schedule` must be 'one_cycle' or 'cosine', got 'linear'"),
    ],
)
def test_bad_arguments_by_message(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_bad_tokens_by_message() -> None:
    module = tiny()
    for token in (7, -1):
        with pytest.raises(ValueError, match=r"outside \[0, 7\): build the model with `vocab_size` at least"):
            module(torch.full((1, 3), token))
    with pytest.raises(ValueError, match=r"of 9 tokens are longer than seq_len=6: build the model with seq_len=9, or"):
        module(tokens(2, 9))
    with pytest.raises(ValueError, match=r"int64 of shape \(B, T\), got torch.int64 of shape \(6,\)"):
        module(tokens(6))
    with pytest.raises(ValueError, match=r"got torch.float32 of shape \(1, 6\)"):
        module(torch.zeros(1, 6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lowercase": False}, "has vocab_size=82, and this TinyTransformer has vocab_size=56: build .* vocab_size=82"),
        ({"seq_len": 65}, "has seq_len=65, and this TinyTransformer has seq_len=64: build the model with seq_len=65"),
    ],
)
def test_a_datamodule_that_does_not_fit_is_refused_at_setup(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"DatasetDescriptions {message}"):
        Trainer(**QUIET, max_steps=1).fit(TinyTransformer(), DatasetDescriptions(documents=["iris"], **options))
    roomy = TinyTransformer(vocab_size=90, seq_len=70, width=8, num_layers=1)
    Trainer(**QUIET, max_steps=1).fit(roomy, DatasetDescriptions(documents=["iris"], **options))
