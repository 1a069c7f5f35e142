"""Per-record derivatives against torch.autograd, loops and closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from groundwire.callbacks import LogitsSource
from groundwire.callbacks.unlearning import Records
from groundwire.callbacks.unlearning.records import default_output_loss, loss_of_step
from groundwire.recipes import SoftmaxRegression
from helpers.edge import generator


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch(number: int = 7) -> tuple[Tensor, Tensor]:
    g = generator(2)
    return torch.randn(number, 4, generator=g, dtype=torch.float64), torch.randint(0, 3, (number,), generator=g)


def flat_function(module: nn.Module, x: Tensor) -> Any:
    names, shapes = zip(*[(n, p.shape) for n, p in module.named_parameters()], strict=True)

    def outputs(vector: Tensor) -> Tensor:
        parts = torch.split(vector, [s.numel() for s in shapes])
        params = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        return torch.func.functional_call(module, params, (x,))

    return outputs


def test_gradients_equal_a_loop_of_backwards() -> None:
    module, (x, y) = net(), batch()
    found = Records(module).gradients((x, y))
    for i in range(len(y)):
        module.zero_grad()
        F.cross_entropy(module(x[i : i + 1]), y[i : i + 1]).backward()
        expected = torch.cat([p.grad.flatten() for p in module.parameters()])
        torch.testing.assert_close(found[i], expected)
    torch.testing.assert_close(Records(module).gradient((x, y)), found.sum(dim=0))


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_columns_make_the_gauss_newton_matrix(loss: str) -> None:
    """Against J^T (Hessian in the outputs) J, both by torch.autograd.functional, record by record."""
    module, (x, y) = net(), batch(3)
    if loss == "mse":
        y = torch.randn(3, 3, generator=generator(5), dtype=torch.float64)
    vector = torch.cat([p.detach().flatten() for p in module.parameters()])
    columns = Records(module).columns((x, y))
    for i in range(3):
        outputs = flat_function(module, x[i : i + 1])
        jacobian = torch.autograd.functional.jacobian(outputs, vector).squeeze(0)
        of_outputs = (lambda z: F.mse_loss(z, y[i])) if loss == "mse" else (lambda z: F.cross_entropy(z, y[i]))  # noqa: B023
        hessian = torch.autograd.functional.hessian(of_outputs, outputs(vector).squeeze(0).detach())
        torch.testing.assert_close(columns[i].T @ columns[i], jacobian.T @ hessian @ jacobian)


def test_for_a_linear_model_it_is_the_hessian() -> None:
    module = nn.Linear(4, 3).double()
    x, y = batch()
    vector = torch.cat([p.detach().flatten() for p in module.parameters()])
    outputs = flat_function(module, x)
    hessian = torch.autograd.functional.hessian(lambda v: F.cross_entropy(outputs(v), y, reduction="sum"), vector)
    rows = torch.cat(list(Records(module).chunks((x, y))))
    torch.testing.assert_close(rows.T @ rows, hessian)


def test_drawn_labels_are_unbiased_and_depend_on_the_record_alone() -> None:
    module, (x, y) = net(), batch(4)
    exact = Records(module).columns((x, y)).flatten(0, 1)
    drawn = Records(module, draws=4000, seed=3)
    ids = torch.tensor([10, 11, 12, 13])
    found = drawn.columns((x, y), ids)
    rows = found.flatten(0, 1)
    error = (rows.T @ rows - exact.T @ exact).norm() / (exact.T @ exact).norm()
    assert error < 0.05  # about 1 / sqrt(4 * 4000) in relative terms, with room
    alone = drawn.columns((x[2:3], y[2:3]), ids[2:3])
    torch.testing.assert_close(alone[0], found[2])
    assert not torch.allclose(drawn.columns((x[2:3], y[2:3]), ids[1:2])[0], found[2])


def test_sequences_have_the_mean_over_positions() -> None:
    module = nn.Linear(4, 3).double()
    x = torch.randn(2, 5, 4, dtype=torch.float64, generator=generator(1))
    y = torch.randint(0, 3, (2, 5), generator=generator(2))
    vector = torch.cat([p.detach().flatten() for p in module.parameters()])
    hessian = torch.autograd.functional.hessian(
        lambda v: 2 * F.cross_entropy(flat_function(module, x)(v).flatten(0, 1), y.flatten()), vector
    )
    rows = Records(module).columns((x, y)).flatten(0, 1)
    torch.testing.assert_close(rows.T @ rows, hessian)
    drawn = Records(module, draws=3000).columns((x, y), torch.arange(2)).flatten(0, 1)
    assert (drawn.T @ drawn - hessian).norm() / hessian.norm() < 0.1


def test_modes_are_put_back_and_dropout_is_off() -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    module[1].eval()
    records = Records(module)
    assert torch.equal(records.gradients(batch()), records.gradients(batch()))
    assert [sub.training for sub in module] == [True, False, True]


def test_frozen_parameters_are_left_out() -> None:
    module = net()
    module[0].requires_grad_(False)
    records = Records(module)
    assert records.layout.names == ("2.weight", "2.bias")
    assert records.gradients(batch()).shape == (7, 18)


def test_chunks_are_the_columns() -> None:
    module, data = net(), batch()
    rows = torch.cat(list(Records(module).chunks(data)))
    torch.testing.assert_close(rows, Records(module).columns(data).flatten(0, 1))


def test_write_puts_a_vector_into_the_module() -> None:
    module = net()
    records = Records(module)
    vector = torch.arange(records.layout.numel, dtype=torch.float64)
    records.write(vector)
    assert torch.equal(records.vector(), vector)
    assert torch.equal(module[0].weight.flatten(), vector[:20])


def test_the_modules_own_loss_is_that_of_its_step_and_nothing_is_logged() -> None:
    module = SoftmaxRegression(input_shape=(1, 2, 2), num_classes=3)
    x, y = batch()
    pair = x.float().view(-1, 1, 2, 2), y
    assert loss_of_step(module, pair) == pytest.approx(float(F.cross_entropy(module(pair[0]), y)))
    assert "log" not in module.__dict__


def test_bad_input() -> None:
    module, (x, y) = net(), batch()
    with pytest.raises(ValueError, match="at least 1"):
        Records(module, draws=0)
    with pytest.raises(ValueError, match="leave `loss`"):
        Records(module, loss=default_output_loss, draws=2)
    with pytest.raises(ValueError, match="give `ids`"):
        Records(module, draws=2).columns((x, y))
    with pytest.raises(ValueError, match="labels are values"):
        Records(module, draws=2).columns((x, x[:, :3]), torch.arange(7))
    with pytest.raises(MisconfigurationException, match="draws=16"):
        Records(nn.Linear(4, 300).double()).columns((x, y))
    with pytest.raises(ValueError, match="no parameter"):
        Records(module.requires_grad_(False))


def test_a_loss_that_is_not_convex_is_said_once() -> None:
    records = Records(net(), loss=lambda z, y: -z.square().sum(), source=LogitsSource())
    with pytest.warns(UserWarning, match="not convex in the outputs"):
        columns = records.columns(batch())
    assert float(columns.abs().max()) == 0.0
