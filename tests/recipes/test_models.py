from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset

from groundwire.recipes import Classifier, ConvClassifier, SoftmaxRegression

MODELS = [SoftmaxRegression, ConvClassifier]
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


@pytest.mark.parametrize("model", MODELS)
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
