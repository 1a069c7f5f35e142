"""DP-SGD with Opacus alone, no Lightning: what ``dp_sgd`` is compared with, at the same settings.

Run:  python docs/studies/opacus_by_hand.py --output runs/opacus_by_hand.csv
"""

from __future__ import annotations

import argparse
import csv
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from torch.utils.data import DataLoader, TensorDataset

from groundwire.datamodules import FashionMNIST
from groundwire.recipes import TanhCNN


def train(epsilon: float, seed: int, *, epochs: int = 15, batch_size: int = 1024) -> dict[str, float]:
    """One run of the recipe's settings; returns its test accuracy and what it spent."""
    torch.manual_seed(seed)
    data = FashionMNIST(batch_size=batch_size, seed=seed)  # the same split as the recipe's
    data.setup("fit")
    network = TanhCNN().net
    optimizer = torch.optim.SGD(network.parameters(), lr=4.0, momentum=0.9)
    loader = DataLoader(TensorDataset(*data.train_data), batch_size=batch_size)
    engine = PrivacyEngine(accountant="prv")
    network, optimizer, loader = engine.make_private_with_epsilon(
        module=network,
        optimizer=optimizer,
        data_loader=loader,
        target_epsilon=epsilon,
        target_delta=1e-5,
        epochs=epochs,
        max_grad_norm=0.1,
    )
    started = time.perf_counter()
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()
    seconds = time.perf_counter() - started
    x, y = data.test_data
    with torch.no_grad():
        predictions = torch.cat([network(part).argmax(1) for part in x.split(1000)])
    accuracy = float((predictions == y).double().mean())
    return {
        "epsilon": epsilon,
        "seed": seed,
        "accuracy": accuracy,
        "spent": engine.get_epsilon(1e-5),
        "seconds": seconds,
    }


def main() -> None:
    """All budgets and seeds, one row each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/opacus_by_hand.csv"))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in range(options.seeds):
        for epsilon in (1.0, 3.0, 8.0):
            rows.append(train(epsilon, seed))
            print(rows[-1], flush=True)
            with options.output.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0].keys())
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main()
