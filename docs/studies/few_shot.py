"""Few-shot DP: how many images of each class make up for privacy, and what is best trained of a public network.

A small CNN learns Fashion-MNIST's classes 0 to 4, which are public; classes 5 to 9 are private and few. Half of them
make a step in expectation, 100 steps; delta is ``N^-1.1`` of ``N`` images.

Run:  python docs/studies/few_shot.py --output runs/few_shot.csv
"""

from __future__ import annotations

import argparse
import csv
import logging
import tempfile
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn

from groundwire.callbacks.privacy import DPSGD, FiLM, HeadOnly
from groundwire.datamodules import FashionMNIST
from groundwire.recipes import SmallCNN

PER_CLASS = 5_000  # training images of a class
SHOTS = (5, 25, 100, 400)
BUDGETS = (None, 8.0, 3.0, 1.0)


class Everything(FiLM):
    """All weights as well; the normalisation layers keep the public statistics."""

    def trained(self, module: nn.Module) -> Iterator[nn.Module]:
        """Adapters, head and convolutions."""
        yield from super().trained(module)
        yield from (layer for layer in module.modules() if isinstance(layer, nn.Conv2d))


METHODS: dict[str, type[HeadOnly]] = {"head": HeadOnly, "FiLM": FiLM, "all": Everything}


def trainer_of(epochs: int, callbacks: list[pl.Callback]) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        accelerator="cpu",
    )


def pretrain(seed: int, folder: Path) -> Path:
    """The public network of a seed, with the settings of the recipe ``cross_entropy``."""
    pl.seed_everything(seed, verbose=False)
    data = FashionMNIST(num_train=10_000, batch_size=128, omit_classes=[5, 6, 7, 8, 9], seed=seed)
    optimizer = partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    trainer = trainer_of(12, [])
    trainer.fit(SmallCNN(width=16, optimizer=optimizer, schedule="one_cycle"), data)
    path = folder / f"{seed}.ckpt"
    trainer.save_checkpoint(path)
    return path


def adapt(
    pretrained: Path, seed: int, method: str, shots: int, epsilon: float | None, lr: float, on: str
) -> dict[str, float | str | int | None]:
    """One run; its accuracy on images of the private classes, ``on`` the validation or the test data."""
    pl.seed_everything(seed, verbose=False)
    data = FashionMNIST(
        batch_size=shots * 5 // 2,
        train_fraction=shots / PER_CLASS,
        omit_classes=[0, 1, 2, 3, 4],
        omit_in="all",
        seed=seed,
        drop_last=True,
    )
    callbacks: list[pl.Callback] = [METHODS[method](pretrained=pretrained)]
    private = None
    if epsilon is not None:
        private = DPSGD(target_epsilon=epsilon, max_grad_norm=1.0, reproducible=True)
        callbacks.append(private)
    trainer = trainer_of(50, callbacks)
    module = SmallCNN(width=16, optimizer=partial(torch.optim.Adam, lr=lr))
    trainer.fit(module, data)
    x, y = data.test_data if on == "test" else data.val_data
    module.eval()
    with torch.no_grad():
        predictions = torch.cat([module(part).argmax(1) for part in x.split(1000)])
    return {
        "method": method,
        "shots": shots,
        "epsilon": epsilon,
        "seed": seed,
        "lr": lr,
        on: float((predictions == y).double().mean()),
        "spent": private.epsilon if private else None,
        "steps": trainer.global_step,
    }


def main() -> None:
    """All methods, shots, budgets and seeds, one row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/few_shot.csv"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, nargs="*", default=[0.01])
    parser.add_argument("--on", choices=["test", "val"], default="test")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, options.output.open("w", newline="") as file:
        writer = None
        for seed in options.seeds:
            pretrained = pretrain(seed, Path(folder))
            for shots in SHOTS:
                for epsilon in BUDGETS:
                    for method in METHODS:
                        for lr in options.lr:
                            row = adapt(pretrained, seed, method, shots, epsilon, lr, options.on)
                            writer = writer or csv.DictWriter(file, row.keys(), lineterminator="\n")
                            if file.tell() == 0:
                                writer.writeheader()
                            writer.writerow(row)
                            file.flush()
                            print(row, flush=True)


if __name__ == "__main__":
    main()
