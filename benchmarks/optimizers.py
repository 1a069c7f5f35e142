"""Time of a step and bytes of state of the memory-efficient optimizers, beside AdamW and GaLore; one thread.

    python benchmarks/optimizers.py [--repeats 5] [--csv docs/benchmark_optimizers.csv]

The parameters are those of a small transformer, the gradients are random; nothing but ``step`` is timed. Optimizers take
turns, and the CPU time of the median turn is printed. ``refresh`` is a step in which a subspace is selected anew, one in
200. Of SGC, the bound is the work that defines matching pursuit: for every atom that is taken, one product of all chunks'
residuals with all atoms, measured as bare matrix products of those shapes.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from groundwire.plugins.optimizers import CESGC, FRUGAL, MESGC, optimizer_state_bytes, orthogonal_matching_pursuit
from groundwire.plugins.optimizers.functional import gaussian_atoms

MODELS = {"1M": (4, 144), "5M": (6, 264)}  # blocks and width: 12 width^2 entries a block
SGC = {"4096/512/32": (4096, 512, 32), "1024/128/8": (1024, 128, 8), "512/64/4": (512, 64, 4)}  # n / k / s


def galore(params: Any) -> Optimizer:
    from pytorch_optimizer import GaLore

    return GaLore(params, rank=32, update_proj_gap=200, scale=0.25, projection_type="std")


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda params: torch.optim.AdamW(params),
    "GaLore, rank 32": galore,
    **{
        f"FRUGAL, {kind}": lambda p, kind=kind: FRUGAL(p, selection=kind)
        for kind in ("rows", "columns", "randk", "blocks")
    },
    **{f"FRUGAL, {kind}": lambda p, kind=kind: FRUGAL(p, selection=kind) for kind in ("random", "svd")},
    **{
        f"MESGC, {name}": lambda p, s=s: MESGC(p, chunk_size=s[0], subspace_dim=s[1], sparsity=s[2])
        for name, s in SGC.items()
    },
    **{
        f"CESGC, rank 32, {name}": lambda p, s=s: CESGC(p, chunk_size=s[0], subspace_dim=s[1], sparsity=s[2])
        for name, s in SGC.items()
    },
}


def parameters(model: str) -> list[nn.Parameter]:
    blocks, width = MODELS[model]
    shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width), (width,)] * blocks
    g = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=g)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=g) ** 3
    return params


def cpu_ms(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return 1e3 * (time.process_time() - start)


def bound_ms(model: str, n: int, k: int, s: int, rank: int | None) -> float:
    """Bare products of residuals and atoms, one for each atom taken."""
    sizes = [p.numel() if rank is None else rank * max(p.shape) for p in parameters(model) if p.ndim > 1]
    rows = sum(-(-size // n) for size in sizes)
    atoms, residuals = torch.randn(n, k), torch.randn(rows, k)

    def products() -> None:
        for _ in range(s):
            for block in residuals.split(256):
                torch.matmul(block, atoms.T)

    products()
    return min(cpu_ms(products) for _ in range(3))


def measure(model: str, repeats: int) -> list[dict[str, Any]]:
    built: dict[str, Optimizer] = {}
    refresh: dict[str, float] = {}
    for name, build in OPTIMIZERS.items():
        try:
            built[name] = build(parameters(model))
        except ModuleNotFoundError:
            print(f"{name}: needs `pip install pytorch_optimizer`")
            continue
        refresh[name] = cpu_ms(built[name].step)
        built[name].step()
    times: dict[str, list[float]] = {name: [] for name in built}
    for _ in range(repeats):
        for name, optimizer in built.items():
            times[name].append(cpu_ms(optimizer.step))
    numel = sum(p.numel() for p in parameters(model))
    rows = []
    for name, optimizer in built.items():
        row: dict[str, Any] = {"model": model, "optimizer": name, "step_ms": statistics.median(times[name])}
        row |= {"refresh_ms": refresh[name], "state_bytes": optimizer_state_bytes(optimizer)}
        row["shared_bytes"] = sum(t.numel() * t.element_size() for t in getattr(optimizer, "shared_tensors", ()))
        settings = next((s for key, s in SGC.items() if name.endswith(key)), None)
        row["bound_ms"] = bound_ms(model, *settings, 32 if "CESGC" in name else None) if settings else ""
        rows.append(row)
        bound = f"   {row['step_ms'] / row['bound_ms']:.2f} x bound of {row['bound_ms']:.0f} ms" if settings else ""
        print(
            f"{model} {name:28} {row['step_ms']:8.1f} ms, refresh {row['refresh_ms']:7.0f} ms, state "
            f"{row['state_bytes'] / numel:5.2f} bytes an entry, {row['shared_bytes'] / 2**20:.2f} MiB of it shared{bound}"
        )
    return rows


def pursuit() -> None:
    """All chunks at once against one by one."""
    for name, (n, k, s) in SGC.items():
        atoms = gaussian_atoms(n, k, torch.Generator().manual_seed(0))
        targets = torch.randn(256, k, generator=torch.Generator().manual_seed(1))

        def one_by_one(some: Tensor = targets[:32], atoms: Tensor = atoms, s: int = s) -> None:
            for row in some:
                orthogonal_matching_pursuit(atoms, row[None], s)

        orthogonal_matching_pursuit(atoms, targets, s)
        together = (
            min(cpu_ms(lambda a=atoms, t=targets, s=s: orthogonal_matching_pursuit(a, t, s)) for _ in range(3)) / 256
        )
        alone = min(cpu_ms(one_by_one) for _ in range(3)) / 32
        print(
            f"matching pursuit {name}: {together:.3f} ms a chunk together, {alone:.3f} alone: {alone / together:.1f} x"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pursuit()
    rows = [row for model in MODELS for row in measure(model, args.repeats)]
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
