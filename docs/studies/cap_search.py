"""Search for the best design of CAP on validation images, with a fixed budget.

Every variant costs 11 gradient evaluations a training sample, as PGD-10 training does, unless it says otherwise. Trained on
10,000 images of Fashion-MNIST; chosen by accuracy under the worse of PGD-20 with cross entropy and with margin on 1,000
validation images, never on test images.

    python docs/studies/cap_search.py STAGE FOLDER [PART/PARTS]      writes FOLDER/cap_search_STAGE_PART.csv

Stage 1: distance, centre and weight, 6 epochs, one seed. Stage 2: around the best of stage 1, start, number of particles,
repulsion, fixed centre. Stage 3: the best two, 12 epochs, another seed. Stage `references`: the other methods in the same
way, with three weights each.
"""

from __future__ import annotations

import csv
import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from groundwire.callbacks.adversarial import (
    MART,
    PGD,
    TRADES,
    AdversarialTraining,
    ConfinedPolytopes,
    CornerSearch,
    ThreatModel,
    evaluate_robustness,
)
from groundwire.datamodules import FashionMNIST
from groundwire.recipes import SmallCNN

THREAT = ThreatModel(eps=0.1)
COLUMNS = ("stage", "variant", "lam", "seed", "epochs", "gradients", "val_acc", "val_ce_acc", "val_margin_acc", "val_robust_acc", "seconds")  # fmt: skip

Variant = tuple[float, dict[str, Any]]


def stage_1() -> list[Variant]:
    """Distance, centre and weight: two particles of four steps from uniform starts."""
    grid: dict[tuple[str, str, str], tuple[float, ...]] = {
        ("l2sq", "logits", "mean"): (0.1, 0.3, 1.0, 3.0),
        ("l2sq", "logits", "clean"): (0.1, 0.3, 1.0),
        ("l2", "logits", "mean"): (1.0, 3.0),
        ("l2", "logits", "clean"): (3.0,),
        ("linf", "logits", "mean"): (1.0, 3.0),
        ("kl", "logits", "clean"): (3.0, 6.0, 12.0),
        ("kl", "logits", "mean"): (6.0, 12.0, 24.0),
        ("l2sq", "probs", "clean"): (10.0, 30.0),
        ("l2sq", "probs", "mean"): (10.0, 30.0),
        ("l2sq", "log_probs", "mean"): (0.3,),
    }
    return [
        (lam, {"distance": distance, "outputs": outputs, "center": center})
        for (distance, outputs, center), weights in grid.items()
        for lam in weights
    ]


def train(callback: Callback, seed: int, epochs: int) -> SmallCNN:
    seed_everything(seed, verbose=False)
    optimizer = lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    model = SmallCNN(width=16, optimizer=optimizer, schedule="one_cycle")
    data = FashionMNIST(num_train=10_000, batch_size=128, seed=seed)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(model, datamodule=data)
    return model


def validate(model: SmallCNN, seed: int) -> dict[str, float]:
    data = FashionMNIST(seed=seed)
    data.setup()
    x, y = (part[:1000] for part in data.val_data)
    attacks = {loss: PGD(20, loss=loss, early_stop=True) for loss in ("ce", "margin")}  # type: ignore[arg-type]
    found = evaluate_robustness(model, x, y, THREAT, attacks=attacks, sweep=(), probes=0)
    acc = {name: float(alive.double().mean()) for name, alive in found.survived.items()}
    worst = (found.survived["ce"] & found.survived["margin"]).double().mean()
    return {
        "val_acc": acc["clean"],
        "val_ce_acc": acc["ce"],
        "val_margin_acc": acc["margin"],
        "val_robust_acc": float(worst),
    }


def cap(variant: Variant, epochs: int, stage: str, seed: int) -> dict[str, Any]:
    lam, options = variant
    options = dict(options)
    detach = options.pop("detach_center", False)
    search = CornerSearch(**({"num_particles": 2, "num_steps": 4} | options))
    callback = ConfinedPolytopes(THREAT, lam=lam, search=search, detach_center=detach, warmup_epochs=epochs / 6)
    started = time.monotonic()
    model = train(callback, seed, epochs)
    name = " ".join(f"{key}={value}" for key, value in (options | ({"detach_center": True} if detach else {})).items())
    gradients = search.gradients + search.num_restarts + 1
    return {
        "stage": stage,
        "variant": name,
        "lam": lam,
        "seed": seed,
        "epochs": epochs,
        "gradients": gradients,
        "seconds": round(time.monotonic() - started, 1),
    } | validate(model, seed)


def reference(name: str, weight: float, callback: Callback, epochs: int, seed: int) -> dict[str, Any]:
    started = time.monotonic()
    model = train(callback, seed, epochs)
    return {
        "stage": "references",
        "variant": name,
        "lam": weight,
        "seed": seed,
        "epochs": epochs,
        "gradients": 11,
        "seconds": round(time.monotonic() - started, 1),
    } | validate(model, seed)


def references() -> list[tuple[str, float, Callback]]:
    """The other methods, with a weight below and above the usual one where they have one."""
    trades = PGD(9, loss="kl", start="gaussian", track="last")
    mart = PGD(9, start="gaussian", track="last")
    return [
        ("PGD-AT", 0.0, AdversarialTraining(THREAT, PGD(10, track="last"), warmup_epochs=1)),
        *(("TRADES", beta, TRADES(THREAT, beta=beta, attack=trades, warmup_epochs=1)) for beta in (3.0, 6.0, 12.0)),
        *(("MART", lam, MART(THREAT, lam=lam, attack=mart, warmup_epochs=1)) for lam in (2.5, 5.0, 10.0)),
    ]


def stage_2() -> list[Variant]:
    """What the best two of stage 1 (the divergence, from the clean centre and from the mean) gain from the rest."""
    clean: dict[str, Any] = {"distance": "kl", "outputs": "logits", "center": "clean"}
    mean = clean | {"center": "mean"}
    return [
        (24.0, clean),
        (12.0, clean | {"start": "gaussian"}),
        (12.0, clean | {"repulsion": 0.5}),
        (12.0, clean | {"detach_center": True}),
        (12.0, clean | {"num_particles": 1, "num_steps": 9}),  # the limit of TRADES, from a uniform start
        (12.0, clean | {"num_particles": 3, "num_steps": 3}),  # 13 gradient evaluations
        (12.0, mean | {"start": "gaussian"}),
        (12.0, mean | {"repulsion": 0.5}),
        (12.0, mean | {"detach_center": True}),
        (12.0, mean | {"num_particles": 3, "num_steps": 3}),
    ]


def stage_3() -> list[Variant]:
    """The best two of both."""
    kl: dict[str, Any] = {"distance": "kl", "outputs": "logits"}
    return [(12.0, kl | {"center": "clean"}), (12.0, kl | {"center": "mean", "detach_center": True})]


STAGES: dict[str, tuple[list[Variant], int, tuple[int, ...]]] = {
    "1": (stage_1(), 6, (100,)),
    "2": (stage_2(), 6, (100,)),
    "3": (stage_3(), 12, (101,)),
}


def main() -> None:
    stage, folder = sys.argv[1], Path(sys.argv[2])
    part, parts = (int(number) for number in (sys.argv[3] if len(sys.argv) > 3 else "0/1").split("/"))
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    jobs: list[Any] = []
    if stage == "references":
        jobs = [lambda r=r: reference(*r, epochs=6, seed=100) for r in references()]
    else:
        variants, epochs, seeds = STAGES[stage]
        jobs = [lambda v=v, s=s: cap(v, epochs, stage, s) for s in seeds for v in variants]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"cap_search_{stage}_{part}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for job in jobs[part::parts]:
            row = job()
            writer.writerow(row)
            file.flush()
            print(row, flush=True)


if __name__ == "__main__":
    main()
