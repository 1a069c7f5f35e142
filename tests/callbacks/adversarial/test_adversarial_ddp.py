from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from groundwire.callbacks.adversarial import (
    FGSM,
    MART,
    PGD,
    SVGD,
    TRADES,
    AdaptiveKnowledgeAmalgamation,
    AdversarialCallback,
    AdversarialTraining,
    ConfinedPolytopes,
    CornerSearch,
    RandomFGSM,
    ThreatModel,
)
from helpers.ddp import ddp_trainer, over_ranks, run_ddp
from helpers.edge import CLASSES, FEATURES, Classifier, Rounds, fit, loader, mlp, weights

THREAT = ThreatModel(eps=0.3, lo=-6, hi=6)


class FromClean(SVGD):
    """Without randomness: particle ``m`` starts ``m + 1`` tenths of the radius away, on the same side of every pixel."""

    def _starts(self, x: Tensor, threat: ThreatModel, *_: Any) -> Tensor:
        away = torch.arange(1, self.num_restarts + 1, dtype=x.dtype).reshape(-1, *[1] * x.ndim)
        return threat.project(x + 0.1 * threat.eps * away, x)


class CornersFromClean(CornerSearch):
    """The same for corners."""

    _starts = FromClean._starts


def teachers() -> list[nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(8)
        return [nn.Linear(FEATURES, CLASSES) for _ in range(2)]


def without_randomness() -> dict[str, AdversarialCallback]:
    """All callbacks; without randomness, ranks together do what one process does on the joined batch."""
    return {
        "at": AdversarialTraining(THREAT, PGD(2, start="clean", track="last"), warmup_epochs=1),
        "trades": TRADES(THREAT, 3.0, FGSM()),
        "mart": MART(THREAT, attack=PGD(2, start="clean", track="last")),
        "cap": ConfinedPolytopes(THREAT, 0.5, CornersFromClean(2, 2)),
        "at_aka": AdaptiveKnowledgeAmalgamation(THREAT, teachers(), attack=FromClean(2, num_steps=2)),
    }


class Noisy(FGSM):
    """Remembers what it is asked and finds random points."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __call__(self, model: Any, x: Tensor, target: Tensor, threat: ThreatModel, **options: Any) -> Tensor:
        self.found.append(threat.uniform(x, options["generator"]) - x)
        return x + self.found[-1]


class Remembers(AdversarialTraining):
    """Remembers the accuracies at which it stepped in."""

    said: list[float]

    def _on_overfit(self, *args: Any) -> None:
        self.said.append(args[-1])
        super()._on_overfit(*args)


class Turns(pl.Callback):
    """Turns the output around at the end of the second epoch."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == 8:
            with torch.no_grad():
                pl_module.network[-1].weight.neg_()
                pl_module.network[-1].bias.neg_()


def one_rank() -> dict[str, Any]:
    """Everything that a rank has to show; several fits in one process, since processes are slow to start."""
    found: dict[str, Any] = {}
    data = over_ranks(loader(batch_size=12))
    for name, callback in without_randomness().items():
        module = Classifier(mlp(), "SGD", lr=0.1)
        ddp_trainer(callbacks=[callback], precision="64-true").fit(module, data)
        found[name] = weights(module)

    attack, module = Noisy(), Classifier(mlp())
    same = Rounds(*loader())  # every rank has the same data
    ddp_trainer(callbacks=[AdversarialTraining(THREAT, attack)], use_distributed_sampler=False).fit(module, same)
    found["starts"], found["random"] = attack.found, weights(module)

    module = Classifier(mlp(nn.BatchNorm1d(16), nn.Dropout(0.2)), lr=0.03)
    guarded = AdversarialTraining(THREAT, RandomFGSM(), overfit_guard=1.0)
    t = ddp_trainer(callbacks=[guarded], steps=8)
    t.fit(module, data)
    found["guard"] = float(t.callback_metrics["adversarial_training/guard_acc"])
    found["own batch"] = guarded._guard["inputs"]
    found["fast"] = torch.cat([p.detach().flatten() for p in module.parameters()])

    stops = Remembers(THREAT, FGSM(), overfit_guard=0.01)
    stops.said = []
    module = Classifier(mlp())
    t = ddp_trainer(callbacks=[Turns(), stops], steps=16)
    t.fit(module, data)
    found["stopped"] = (t.global_step, stops.said, weights(module))
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    """One start of the processes for all tests."""
    return run_ddp(one_rank)


@pytest.mark.filterwarnings("ignore")
def test_ranks_together_do_what_one_process_does(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    plain, _, _ = fit("auto", Classifier(mlp(), "SGD", lr=0.1), precision="64-true")
    for name, callback in without_randomness().items():
        assert torch.equal(first[name], second[name]), name
        one, _, _ = fit("auto", Classifier(mlp(), "SGD", lr=0.1), callbacks=[callback], precision="64-true")
        torch.testing.assert_close(first[name], one, rtol=0, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")
        assert (one - plain).abs().max() > 1e-3, name


def test_ranks_draw_different_starts_and_hold_equal_weights(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    assert len(first["starts"]) == 6
    for a, b in zip(first["starts"], second["starts"], strict=True):
        assert a.shape == b.shape == (24, FEATURES)
        assert not bool((a == b).any())
    for rank in ranks:
        assert not bool((rank["starts"][0] == rank["starts"][1]).any())
    for name in ("random", "fast"):
        assert torch.equal(first[name], second[name])


def test_the_guard_is_one_over_all_ranks(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    assert first["guard"] == second["guard"]
    x = next(iter(loader()))[0]
    for r, rank in enumerate(ranks):
        assert torch.equal(rank["own batch"], x[r::2]), "each rank watches its own first batch"
    assert first["stopped"][0] == second["stopped"][0] == 8
    assert first["stopped"][1] == second["stopped"][1]
    assert torch.equal(first["stopped"][2], second["stopped"][2])
