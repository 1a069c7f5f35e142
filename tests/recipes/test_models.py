from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset

from groundwire.datamodules import Digits
from groundwire.recipes import Classifier, ConvClassifier, SmallCNN, SmallResNet, SoftmaxRegression
from groundwire.recipes.models import BasicBlock

PURE = [SoftmaxRegression, ConvClassifier]  # without batch normalisation
NORMALISED = [SmallCNN, SmallResNet]
MODELS = [*PURE, *NORMALISED]
QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


def test_softmax_regression_is_the_papers_model_and_starts_at_zero() -> None:
    parameters = list(SoftmaxRegression().parameters())
    assert sum(p.numel() for p in parameters) == 7850
    assert all((p == 0).all() for p in parameters)


def test_its_gradient_is_the_closed_form() -> None:
    x, y = torch.randn(20, 1, 8, 8, dtype=torch.float64), torch.arange(20) % 10
    module = SoftmaxRegression(input_shape=(1, 8, 8)).double()
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign,assignment]
    module.training_step((x, y), 0).backward()
    error = torch.full((20, 10), 0.1, dtype=torch.float64) - nn.functional.one_hot(y, 10)  # softmax(0) - onehot
    weight = module.get_parameter("net.1.weight")
    assert weight.grad is not None
    assert torch.allclose(weight.grad, error.T @ x.flatten(1) / 20)


@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 8, 8), (3, 9, 13)])
@pytest.mark.parametrize("model", MODELS)
def test_models_take_images_of_any_size(model: type[Classifier], shape: tuple[int, ...]) -> None:
    assert model(input_shape=shape, num_classes=7)(torch.zeros(2, *shape)).shape == (2, 7)  # type: ignore[call-arg]


@pytest.mark.parametrize("shape", [(28, 28), (1, 3, 8)])
def test_images_too_small_for_the_cnn_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="height and width at least 4"):
        ConvClassifier(input_shape=shape)


@pytest.mark.parametrize("model", NORMALISED)
def test_bad_arguments_of_the_normalised_nets_by_message(model: type[SmallCNN | SmallResNet]) -> None:
    for shape in ((64,), (28, 28), (1, 7, 8), (0, 8, 8)):
        with pytest.raises(ValueError, match=r"height and width at least 8, got \(.*flatten=False.*enlarge"):
            model(input_shape=shape)
    with pytest.raises(ValueError, match="`width` must be at least 1 channel, got 0: 8 is small"):
        model(width=0)


def cnn_count(channels: int, w: int, classes: int) -> int:
    kernels = 9 * (channels * w + w * 2 * w + 2 * w * 4 * w)
    return kernels + 2 * 7 * w + (4 * w * 2 * 2 + 1) * classes  # two numbers a normalised channel


def resnet_count(channels: int, w: int, classes: int) -> int:
    kernels = 9 * (channels * w + 2 * w**2 + (2 + 4) * w**2 + (8 + 16) * w**2)
    projections = 2 * w**2 + 8 * w**2
    normalised = w + 2 * w + 3 * 2 * w + 3 * 4 * w
    return kernels + projections + 2 * normalised + (4 * w + 1) * classes


@pytest.mark.parametrize(("channels", "width", "classes"), [(1, 16, 10), (3, 5, 7), (2, 1, 3)])
@pytest.mark.parametrize("size", [8, 28])
def test_the_number_of_parameters_is_that_of_the_formula(channels: int, width: int, classes: int, size: int) -> None:
    for model, count in ((SmallCNN, cnn_count), (SmallResNet, resnet_count)):
        module = model(input_shape=(channels, size, size), num_classes=classes, width=width)
        assert sum(p.numel() for p in module.parameters()) == count(channels, width, classes), model


@pytest.mark.parametrize(("size", "expected"), [(8, [8, 8, 4, 2]), (27, [27, 27, 14, 7]), (28, [14, 14, 7, 4])])
def test_the_stem_of_the_resnet_halves_images_of_28_pixels(size: int, expected: list[int]) -> None:
    module, sizes = SmallResNet(input_shape=(1, size, size)), []
    x = torch.zeros(1, 1, size, size)
    for layer in list(module.eval().net.children())[:6]:  # convolution, norm, ReLU, three blocks
        x = layer(x)
        sizes.append(x.shape[-1])
    assert [sizes[0], *sizes[3:]] == expected


def test_a_block_whose_residual_is_zero_is_its_shortcut() -> None:
    x = torch.randn(2, 6, 5, 5)
    for block in (BasicBlock(6, 6).eval(), BasicBlock(6, 4, stride=2).eval()):
        assert isinstance(block.residual[-1], nn.BatchNorm2d)
        nn.init.zeros_(block.residual[-1].weight)
        if isinstance(block.shortcut, nn.Identity):
            assert torch.equal(block(x), x.relu())
        else:
            conv = block.shortcut[0]
            assert isinstance(conv, nn.Conv2d)
            by_hand = torch.einsum("oc,bchw->bohw", conv.weight[:, :, 0, 0], x[:, :, ::2, ::2])
            assert torch.allclose(block(x), (by_hand / (1 + 1e-5) ** 0.5).relu(), atol=1e-5)


@pytest.mark.parametrize("size", [8, 28])
@pytest.mark.parametrize("model", MODELS)
def test_the_gradient_reaches_every_parameter(model: type[Classifier], size: int) -> None:
    module = model(input_shape=(1, size, size))  # type: ignore[call-arg]
    x = torch.randn(16, 1, size, size, generator=torch.Generator().manual_seed(0))
    nn.functional.cross_entropy(module(x), torch.arange(16) % 10).backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        assert bool(parameter.grad.abs().sum() > 0), name


@pytest.mark.parametrize("model", NORMALISED)
def test_the_normalised_nets_fit_the_digits(model: type[SmallCNN | SmallResNet], seeded: Callable[[int], None]) -> None:
    seeded(0)
    module = model(input_shape=(1, 8, 8), optimizer=lambda params: torch.optim.Adam(params, lr=5e-3))
    trainer = Trainer(**QUIET, max_epochs=4, enable_model_summary=False)  # type: ignore[arg-type]
    trainer.fit(module, data := Digits(batch_size=64))
    (result,) = trainer.test(module, data, verbose=False)
    assert result["test/acc"] > 0.9


@pytest.mark.parametrize("model", PURE)
def test_the_training_step_runs_under_vmap_with_equal_gradients(model: type[Classifier]) -> None:
    module = model(input_shape=(1, 8, 8))  # type: ignore[call-arg]
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign,assignment]
    x, y = torch.randn(3, 5, 1, 8, 8), torch.arange(15).view(3, 5) % 10
    parameters = dict(module.named_parameters())

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.module.training_step((x, y), 0)

    def loss(p: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return functional_call(Step(), {f"module.{name}": value for name, value in p.items()}, (x, y))  # type: ignore[no-any-return]

    at_once = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    for device in range(3):
        one = torch.autograd.grad(loss(parameters, x[device], y[device]), list(parameters.values()))
        for name, expected in zip(parameters, one, strict=True):
            assert torch.allclose(at_once[name][device], expected, atol=1e-6), name


def test_accuracy_and_loss_are_means_over_samples_not_over_batches() -> None:
    module = SoftmaxRegression(input_shape=(2,), num_classes=2)
    with torch.no_grad():
        module.get_parameter("net.1.weight").copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    x = torch.tensor([[2.0, 0.0]] * 5)
    y = torch.tensor([0, 0, 0, 0, 1])  # the last batch, of one sample, is the wrong one
    (result,) = Trainer(**QUIET).test(module, DataLoader(TensorDataset(x, y), batch_size=4), verbose=False)  # type: ignore[arg-type]
    assert result["test/acc"] == pytest.approx(0.8)
    assert result["test/loss"] == pytest.approx(nn.functional.cross_entropy(x, y).item())


def test_the_schedule_steps_once_per_optimizer_step() -> None:
    module = SoftmaxRegression(
        input_shape=(2,),
        optimizer=lambda params: torch.optim.SGD(params, lr=1.0),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
    )
    trainer = Trainer(**QUIET, max_steps=3, enable_model_summary=False)  # type: ignore[arg-type]
    trainer.fit(module, DataLoader(TensorDataset(torch.zeros(8, 2), torch.zeros(8).long()), batch_size=2))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.125)
    assert {"train/loss"} <= trainer.callback_metrics.keys()
