"""FiLM and HeadOnly."""

from __future__ import annotations

import contextlib
import copy
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader

from groundwire.callbacks.privacy.dp_sgd import DPSGD
from groundwire.callbacks.privacy.few_shot import FiLM, FiLMLayer, HeadOnly, insert_film
from groundwire.plugins.edge import EdgeStrategy
from helpers.ddp import ddp_trainer, over_ranks, run_ddp
from helpers.edge import CLASSES, Classifier, Killed, Losses, Stateful, generator, loader, trainer, weights

pytestmark = pytest.mark.usefixtures("seed_of_the_run")

IMAGE = (1, 6, 6)


def network(classes: int = CLASSES) -> nn.Sequential:
    """BatchNorm whose statistics and affine parameters are not those of a fresh one, and GroupNorm."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3),
            nn.GroupNorm(2, 6),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, classes),
        )
        with torch.no_grad():
            net(torch.randn(32, *IMAGE) * 2 + 1)
            for norm in (net[1], net[4]):
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.normal_()
        return net


def module(classes: int = CLASSES) -> Classifier:
    return Classifier(network(classes))


def data() -> DataLoader[Any]:
    return loader(shape=IMAGE)


def images(number: int = 5) -> Tensor:
    return torch.randn(number, *IMAGE, generator=generator(11))


def fit(
    callback: HeadOnly, model: pl.LightningModule, *others: pl.Callback, strategy: Any = "auto", **options: Any
) -> Any:
    t = trainer(strategy, callbacks=[callback, *others], **options)
    t.fit(model, data())
    return t


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def save(model: pl.LightningModule, path: Path) -> Path:
    torch.save({"state_dict": model.state_dict()}, path)
    return path


class Seen(pl.Callback):
    """What the module is like while it trains."""

    def __init__(self) -> None:
        self.with_grad: set[str] = set()
        self.training: list[bool] = []
        self.first: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.first = state(pl_module)
        self.training.append(pl_module.network[1].training)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.with_grad |= {name for name, p in pl_module.named_parameters() if p.grad is not None}
        self.training.append(pl_module.network[1].training)


class Validating(Classifier):
    """Goes back to training mode in the middle of the fit, as some modules do."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]))

    def on_validation_end(self) -> None:
        self.train()


HEAD = {"network.8.weight", "network.8.bias"}
FILM = {f"film.network-{i}.{name}" for i in (1, 4) for name in ("gamma", "beta")}


def test_the_adapted_network_is_at_first_the_network_bit_for_bit() -> None:
    model = module().eval()
    before, x = model(images()), images()
    film = insert_film(model)
    assert torch.equal(model(x), before)
    assert [p.numel() for p in film.parameters()] == [4, 4, 6, 6]  # two a channel
    with torch.no_grad():
        film["network-1"].gamma.fill_(0.5)
    assert not torch.equal(model(x), before), "the adapter must be in the path"


@pytest.mark.parametrize(
    ("norm", "shape", "dim"),
    [
        (nn.BatchNorm1d(4), (5, 4), 1),
        (nn.BatchNorm1d(4), (5, 4, 3), 1),
        (nn.BatchNorm2d(4), (5, 4, 3, 3), 1),
        (nn.GroupNorm(2, 4), (5, 4), 1),
        (nn.GroupNorm(2, 4), (5, 4, 3, 3), 1),
        (nn.InstanceNorm1d(4), (5, 4, 3), 1),
        (nn.InstanceNorm2d(4), (5, 4, 3, 3), 1),
        (nn.InstanceNorm2d(4), (4, 3, 3), 0),  # no batch dimension
        (nn.InstanceNorm3d(4), (5, 4, 3, 3, 3), 1),
        (nn.LayerNorm(4), (5, 3, 4), 2),
        (nn.LayerNorm((4, 3, 3)), (5, 4, 3, 3), 1),
        (nn.RMSNorm(4), (5, 3, 4), 2),
        (nn.Conv2d(1, 4, 1), (5, 1, 3, 3), 1),
        (nn.Linear(3, 4), (5, 3), 1),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else str(v),
)
def test_channels_are_scaled_and_shifted_where_the_layer_has_them(norm: nn.Module, shape: Any, dim: int) -> None:
    net, x = Classifier(norm), torch.randn(shape, generator=generator())
    before = net(x)
    (layer,) = insert_film(net, [type(norm)]).values()
    with torch.no_grad():
        layer.gamma.copy_(torch.arange(4.0))
        layer.beta.copy_(torch.arange(4.0) - 2)
    after = net(x)
    for c in range(4):  # channel by channel, no broadcasting
        assert torch.allclose(after.select(dim, c), before.select(dim, c) * (1 + c) + c - 2, atol=1e-6)


def test_a_layer_norm_for_images_has_its_channels_in_front() -> None:
    class LayerNorm2d(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    net = Classifier(LayerNorm2d(4))
    x = torch.randn(2, 4, 4, 4, generator=generator())
    before = net(x)
    with torch.no_grad():
        insert_film(net)["network"].beta.copy_(torch.arange(4.0))
    assert torch.allclose(net(x) - before, torch.arange(4.0).view(1, 4, 1, 1).expand_as(x), atol=1e-6)


def test_only_head_and_adapters_are_trained_and_the_rest_does_not_change_by_a_bit() -> None:
    model, seen = module(), Seen()
    model.network[4].weight.requires_grad_(False)  # the user's own choice, to be put back
    before = state(model)
    fit(FiLM(), model, seen)
    after = state(model)
    assert seen.with_grad == HEAD | FILM
    assert set(seen.training) == {False}
    changed = {name for name, value in after.items() if name not in before or not torch.equal(value, before[name])}
    assert changed == HEAD | FILM  # neither BatchNorm's statistics nor its count of batches are among them
    assert model.network[1].training, "modes are put back"
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["network.4.weight"], "flags are put back"


def test_head_only_trains_the_head_and_leaves_no_trace() -> None:
    model, seen = module(), Seen()
    before = state(model)
    fit(HeadOnly(), model, seen)
    after = state(model)
    assert seen.with_grad == HEAD
    assert {name for name in after if not torch.equal(after[name], before[name])} == HEAD
    assert after.keys() == before.keys()
    assert not any(sub._forward_hooks for sub in model.modules())


def test_the_head_starts_at_zero_if_asked() -> None:
    for zero in (True, False):
        seen = Seen()
        model = module()
        fit(FiLM(zero_head=zero), model, seen, steps=1)
        assert seen.first["network.8.weight"].any() != zero
        assert torch.equal(seen.first["network.0.weight"], module().network[0].weight)


def test_of_a_head_of_several_layers_only_the_last_starts_at_zero() -> None:
    model = Classifier(
        nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(36, 5), nn.ReLU(), nn.Linear(5, 3), nn.Identity()))
    )
    seen = Seen()
    seen.on_train_start = lambda _, pl_module: seen.first.update(state(pl_module))  # type: ignore[method-assign]
    seen.on_train_batch_end = lambda *_: None  # type: ignore[method-assign]
    fit(HeadOnly(head="network.1"), model, seen, steps=1)
    assert seen.first["network.1.0.weight"].any()
    assert not seen.first["network.1.2.weight"].any()


def test_batch_norm_stays_in_evaluation_mode_after_a_validation() -> None:
    model, seen = Validating(network()), Seen()
    before = state(model)
    t = trainer(callbacks=[FiLM(), seen], steps=8, val_check_interval=2)
    t.fit(model, data(), data())
    assert set(seen.training) == {False}
    assert torch.equal(model.network[1].running_mean, before["network.1.running_mean"])
    assert model.network[1].training


def test_modes_and_flags_are_put_back_after_an_error() -> None:
    model = module()
    with contextlib.suppress(Killed.Error):
        fit(FiLM(), model, Killed(2))
    assert model.network[1].training
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("vectorize", [True, False])
def test_under_edge_strategy_devices_send_what_is_trained_only(vectorize: bool) -> None:
    model = module()
    before = state(model)
    t = fit(FiLM(), model, strategy=EdgeStrategy(num_devices=4, vectorize=vectorize))
    numbers = sum(model.state_dict()[name].numel() for name in HEAD | FILM)
    assert t.strategy.layout.numel == numbers
    after = state(model)
    assert {name for name in after if name not in before or not torch.equal(after[name], before[name])} == HEAD | FILM


def test_one_device_under_edge_strategy_equals_the_plain_trainer() -> None:
    plain, edge = module(), module()
    fit(FiLM(), plain)
    fit(FiLM(), edge, strategy=EdgeStrategy(num_devices=1))
    assert torch.equal(weights(plain), weights(edge))


def test_per_sample_gradients_equal_single_backwards() -> None:
    model = module().eval()
    insert_film(model)
    x, y = images(), torch.tensor([0, 1, 2, 0, 1])
    for p in model.parameters():
        p.requires_grad_(False)
    params = {name: p.detach() for name, p in model.named_parameters() if name in HEAD | FILM}

    def loss(params: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, params, (one[None],)), label[None])

    together = vmap(grad(loss), in_dims=(None, 0, 0))(params, x, y)
    for name in params:
        model.get_parameter(name).requires_grad_(True)
    for i in range(len(x)):
        model.zero_grad()
        F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        for name in params:
            assert torch.allclose(together[name][i], model.get_parameter(name).grad, atol=1e-6), name


def test_opacus_takes_per_sample_gradients_through_the_adapters() -> None:
    opacus = pytest.importorskip("opacus")
    model = module().eval()
    insert_film(model)
    model.network[:8].requires_grad_(False)
    x, y = images(), torch.tensor([0, 1, 2, 0, 1])
    sampled = opacus.GradSampleModule(copy.deepcopy(model).train(), strict=False)
    sampled._module.network[1].eval()
    F.cross_entropy(sampled(x), y).backward()
    found = {name.removeprefix("_module."): p.grad_sample for name, p in sampled.named_parameters() if p.requires_grad}
    assert found.keys() == HEAD | FILM
    for i in range(len(x)):
        model.zero_grad()
        F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        for name, rows in found.items():
            assert torch.allclose(rows[i], model.get_parameter(name).grad, atol=1e-6), name


def test_private_training_trains_head_and_adapters_alone() -> None:
    model = module()
    before = state(model)
    fit(FiLM(), model, DPSGD(noise_multiplier=1.0, accountant="rdp"))
    after = state(model)
    assert {name for name in after if name not in before or not torch.equal(after[name], before[name])} == HEAD | FILM


def fit_on_a_rank() -> tuple[Tensor, set[str]]:
    model = module()
    before = state(model)
    ddp_trainer(callbacks=[FiLM()]).fit(model, over_ranks(loader(batch_size=12, shape=IMAGE)))
    after = state(model)
    return weights(model), {n for n in after if n not in before or not torch.equal(after[n], before[n])}


def test_two_processes_agree() -> None:
    (first, changed), (second, _) = run_ddp(fit_on_a_rank)
    assert torch.equal(first, second)
    assert changed == HEAD | FILM
    one = module()
    fit(FiLM(), one)
    assert torch.allclose(first, weights(one), atol=1e-4)


def test_stopped_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    whole, losses = module(), Losses()
    fit(FiLM(), whole, losses, steps=6)
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    killed = trainer(callbacks=[FiLM(), saver, Killed(3)], steps=6, enable_checkpointing=True)
    with contextlib.suppress(Killed.Error):
        killed.fit(module(), Stateful(data()))
    resumed, rest = module(), Losses()
    t = trainer(callbacks=[FiLM(), rest], steps=6)
    t.fit(resumed, Stateful(data()), ckpt_path=str(tmp_path / "step=2.ckpt"))
    assert rest.values == losses.values[2:]
    assert torch.equal(weights(resumed), weights(whole))
    assert "film.network-1.gamma" in torch.load(tmp_path / "step=2.ckpt", weights_only=True)["state_dict"]


def test_a_fresh_module_is_tested_from_a_checkpoint(tmp_path: Path) -> None:
    class Tested(Classifier):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test/loss", F.cross_entropy(self(batch[0]), batch[1]))

    model = Tested(network())
    t = fit(FiLM(), model)
    t.save_checkpoint(tmp_path / "last.ckpt")
    (expected,) = trainer().test(model, data(), verbose=False)  # the adapters stay, without the callback too
    fresh = Tested(network())
    (found,) = trainer(callbacks=[FiLM()]).test(fresh, data(), ckpt_path=str(tmp_path / "last.ckpt"), verbose=False)
    assert found == expected
    assert torch.equal(weights(fresh), weights(model))
    by_hand = Tested(network())
    insert_film(by_hand)
    by_hand.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    assert torch.equal(by_hand.eval()(images()), fresh.eval()(images()))


@pytest.mark.parametrize("again", [True, False], ids=["same-callback", "another"])
def test_a_second_fit_goes_on_and_inserts_nothing(again: bool, tmp_path: Path) -> None:
    file = save(module(), tmp_path / "pretrained.ckpt")
    model, first, seen = module(), FiLM(pretrained=file), Seen()
    fit(first, model)
    after_first = state(model)
    fit(first if again else FiLM(pretrained=file), model, seen, steps=1)
    assert all(torch.equal(seen.first[name], value) for name, value in after_first.items())
    assert seen.first.keys() == after_first.keys()
    assert [len(sub._forward_hooks) for sub in model.modules() if sub._forward_hooks] == [1, 1]


def test_copies_have_adapters_of_their_own() -> None:
    model = module().eval()
    insert_film(model)
    expected = model(images())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            twin.film["network-4"].beta.fill_(1.0)
        assert torch.equal(model(images()), expected)
        assert not torch.equal(twin(images()), expected)


def test_pretrained_weights_are_loaded_and_a_new_head_is_left(tmp_path: Path) -> None:
    source = module(classes=7)
    with torch.no_grad():
        source.network[0].weight.add_(1.0)
        source.network[1].running_mean.add_(1.0)
    file = save(source, tmp_path / "pretrained.ckpt")
    model, seen = module(), Seen()
    fit(FiLM(pretrained=file, zero_head=False), model, seen)
    assert torch.equal(model.network[0].weight, source.network[0].weight)
    assert torch.equal(model.network[1].running_mean, source.network[1].running_mean)
    assert torch.equal(seen.first["network.8.weight"], module().network[8].weight)


def test_pretrained_weights_of_an_adapted_network_bring_their_adapters(tmp_path: Path) -> None:
    source = module()
    fit(FiLM(), source)
    model, seen = module(), Seen()
    fit(FiLM(pretrained=save(source, tmp_path / "adapted.ckpt")), model, seen, steps=1)
    assert all(torch.equal(seen.first[name], source.state_dict()[name]) for name in FILM)


def test_pretrained_weights_of_another_network_are_refused_by_name(tmp_path: Path) -> None:
    other = module()
    other.network[3] = nn.Conv2d(4, 6, 1)
    file = save(other, tmp_path / "other.ckpt")
    with pytest.raises(
        ValueError, match=r"outside of the head `network.8`: `network.3.weight` \[6, 4, 1, 1\] in the file"
    ):
        fit(FiLM(pretrained=file), module())
    with pytest.raises(FileNotFoundError):
        fit(FiLM(pretrained=tmp_path / "none.ckpt"), module())


def test_names_that_clash_get_keys_of_their_own() -> None:
    model = Classifier(nn.Identity())
    model.add_module("keys", nn.LayerNorm(2))
    model.add_module("a-b", nn.LayerNorm(2))
    model.add_module("a", nn.ModuleDict({"b": nn.LayerNorm(2)}))
    assert list(insert_film(model)) == ["keys_", "a-b", "a-b_"]


def test_after_takes_names_and_types() -> None:
    assert list(insert_film(module(), ["network.4"])) == ["network-4"]
    assert list(insert_film(module(), ["BatchNorm2d"])) == ["network-1"]
    assert list(insert_film(module(), [nn.Conv2d, "GroupNorm"])) == ["network-0", "network-3", "network-4"]


def test_the_trainer_refuses_layers_that_were_replaced_after_setup() -> None:
    class Replacing(pl.Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            pl_module.network[1] = nn.BatchNorm2d(4)

    for callback, message in ((FiLM(), "no longer attached|were replaced"), (HeadOnly(), "were replaced by others")):
        with pytest.raises(MisconfigurationException, match=message):
            fit(callback, module(), Replacing())


def test_bad_input_is_refused() -> None:
    plain = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)))
    with pytest.raises(
        MisconfigurationException, match="no normalisation layer to put FiLM behind; it has Flatten, Linear"
    ):
        fit(FiLM(), plain)
    with pytest.raises(MisconfigurationException, match=r"no layer of the name or type 'LayerNorm'.*BatchNorm2d"):
        fit(FiLM(after=["LayerNorm"]), module())
    with pytest.raises(MisconfigurationException, match="`after` names no layer"):
        fit(FiLM(after=[]), module())
    with pytest.raises(MisconfigurationException, match=r"`network.2` is a ReLU: FiLM does not know its channels"):
        fit(FiLM(after=["network.2"]), module())
    with pytest.raises(MisconfigurationException, match="no submodule 'fc' to take as the head; it has network, "):
        fit(HeadOnly(head="fc"), module())
    with pytest.raises(MisconfigurationException, match=r"The head 'network.2' is a ReLU without parameters"):
        fit(HeadOnly(head="network.2"), module())
    with pytest.raises(MisconfigurationException, match="no Linear layer to take as the head"):
        fit(HeadOnly(), Classifier(nn.Sequential(nn.Conv2d(1, 3, 6), nn.Flatten())))
    with pytest.raises(MisconfigurationException, match="would each freeze what the other trains"):
        fit(FiLM(), module(), HeadOnly())
    with pytest.raises(ValueError, match=r"FiLM expects 4 channels in dimension 1, got \(2, 3\)"):
        FiLMLayer(4, 1)(torch.zeros(2, 3))
    taken = module()
    taken.film = nn.Identity()
    with pytest.raises(MisconfigurationException, match=r"Classifier.film is a Identity"):
        fit(FiLM(), taken)
    with pytest.raises(MisconfigurationException, match="A Sequential would take `film` for one more of its layers"):
        insert_film(network())
    adapted = module()
    insert_film(adapted)
    with pytest.raises(MisconfigurationException, match="has adapters after network-1, network-4 already"):
        fit(FiLM(after=["network.1"]), adapted)


def test_an_optimizer_without_the_adapters_is_refused() -> None:
    class Picking(Classifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.network.parameters(), lr=0.1)

    with pytest.raises(MisconfigurationException, match=r"optimizer does not have film.network-1.gamma, .*and 1 more"):
        fit(FiLM(), Picking(network()))
