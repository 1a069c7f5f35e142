"""One-run audits of real training: DP-SGD at two budgets, clipping without noise, and no privacy at all.

A thousand canaries, each trained on or not by a fair coin, among 4,000 images of Fashion-MNIST; 30 epochs of the network
of ``dp_sgd``. Attacked is the network at the end alone, by the loss of each canary; delta 1e-5, confidence 95 %.

Run:  python docs/studies/audits.py --output runs/audits.csv
"""

from __future__ import annotations

import argparse
import csv
import logging
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from groundwire.callbacks.privacy import DPSGD
from groundwire.callbacks.privacy.audit import PrivacyAudit
from groundwire.datamodules import FashionMNIST
from groundwire.recipes import TanhCNN

CASES: dict[str, dict[str, Any] | None] = {
    "DP-SGD, epsilon 1": {"target_epsilon": 1.0},
    "DP-SGD, epsilon 8": {"target_epsilon": 8.0},
    "clipping without noise": {"noise_multiplier": 0.0},
    "no privacy": None,
}
CLAIMED = 1.0  # as if, by those that have no epsilon


def audit(label: str, seed: int, folder: Path) -> dict[str, Any]:
    """One run and its attack."""
    pl.seed_everything(seed, verbose=False)
    options = CASES[label]
    settings: dict[str, Any] = {"num_canaries": 1000, "dirpath": folder, "seed": seed}
    callbacks: list[pl.Callback] = []
    if options is not None:
        callbacks.append(DPSGD(target_delta=1e-5, max_grad_norm=0.1, reproducible=True, **options))
    if options is None or "target_epsilon" not in options:
        settings |= {"claimed_epsilon": CLAIMED, "delta": 1e-5}
    attacked = PrivacyAudit(**settings)
    callbacks.insert(0, attacked)
    lr = 0.05 if options is None else 4.0
    module = TanhCNN(optimizer=partial(torch.optim.SGD, lr=lr, momentum=0.9))
    data = FashionMNIST(num_train=4000, batch_size=256 if options is not None else 64, seed=seed)
    trainer = pl.Trainer(
        max_epochs=30,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        accelerator="cpu",
    )
    trainer.fit(module, data)
    report = attacked.report
    assert report is not None
    accuracy = trainer.test(module, data, verbose=False)[0]["test/acc"]
    (attack,) = report.attacks
    return {
        "case": label,
        "seed": seed,
        "claimed": report.claimed_epsilon,
        "epsilon_lower": attack.epsilon_lower,
        "auc": attack.auc,
        "refuted": report.refuted,
        "test_acc": accuracy,
    }


def main() -> None:
    """All cases and seeds, one row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/audits.csv"))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            for label in CASES:
                rows.append(audit(label, seed, Path(folder)))
                print(rows[-1], flush=True)
                with options.output.open("w", newline="") as file:
                    writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(rows)


if __name__ == "__main__":
    main()
