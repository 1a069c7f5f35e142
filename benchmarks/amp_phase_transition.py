"""Where AMP recovers a sparse vector, measured over (s/d, k/s) next to what theory allows.

For vectors of ``d`` entries of which ``k`` are +-1 and the rest 0 (the least favourable values), seen through ``s``
noiseless measurements, counts how often the relative squared error falls below 1e-4. Theory: l1 recovery, and AMP with
the minimax threshold, succeed below the curve of Donoho and Tanner; AMP with another threshold below a lower one.

Run: ``python benchmarks/amp_phase_transition.py`` (minutes on one core; writes docs/amp_phase_transition.{csv,png})
Source: Donoho, Maleki, Montanari, PNAS 106(45), 2009, arXiv:0907.3574, its formula for rho(delta) and supplement.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import norm

from groundwire.plugins.channels import amp, make_projection, minimax_alpha

Array = npt.NDArray[np.float64]

SUCCESS_NMSE = 1e-4
DELTAS = np.linspace(0.1, 0.9, 9)
RHOS = np.linspace(0.04, 0.84, 21)
FIXED_ALPHA = {"gaussian": 1.0, "dct": 1.2}  # AMP() takes these, or the minimax threshold where that is higher


def transition(delta: float) -> float:
    """The l1 phase transition ``rho(delta)``, in non-zeros per measurement."""
    tau = minimax_alpha(delta)
    return float(1 - tau * norm.cdf(-tau) / norm.pdf(tau))


def transition_at(delta: float, alpha: float) -> float:
    """The phase transition of AMP with a given threshold, from state evolution; at most ``transition(delta)``."""
    leak = 2 * ((1 + alpha**2) * norm.cdf(-alpha) - alpha * norm.pdf(alpha))
    return max(float((1 - leak / delta) / (1 + alpha**2 - leak)), 0.0)


def measure(
    kind: Any, delta: float, alpha: float, d: int, seeds: int, trials: int, num_iterations: int
) -> tuple[Array, Array]:
    """Success probability and median squared error over ``RHOS``: ``seeds`` matrices with ``trials`` vectors each."""
    s = round(delta * d)
    errors = np.empty((seeds, len(RHOS), trials))
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(1000 + seed)
        x = torch.zeros(len(RHOS), trials, d)
        for row, rho in zip(x, RHOS, strict=True):
            k = max(1, round(rho * s))
            support = torch.rand(trials, d, generator=generator).topk(k).indices
            row.scatter_(-1, support, (2 * torch.randint(2, (trials, k), generator=generator) - 1).float())
        projection = make_projection(kind, s, d, seed)
        found = amp(projection.mv(x), projection, alpha, num_iterations, tol=1e-5).x
        errors[seed] = ((found - x).square().sum(-1) / x.square().sum(-1)).numpy()
    return (errors < SUCCESS_NMSE).mean((0, 2)), np.median(errors, (0, 2))


def halfway(success: Array) -> float:
    """Where the success probability falls to one half, by interpolation; NaN if it never succeeds or never fails."""
    below = np.flatnonzero(success < 0.5)
    if not len(below) or below[0] == 0:
        return float("nan")
    last = below[0] - 1
    share = (success[last] - 0.5) / (success[last] - success[last + 1])
    return float(RHOS[last] + share * (RHOS[last + 1] - RHOS[last]))


def plot(surfaces: dict[tuple[str, str], Array], d: int, trials: int) -> tuple[Any, Any]:
    """Success of the tuned threshold as a map, theory as lines, measured transitions as points; one panel a matrix."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(11, 4.8), sharey=True, layout="constrained")
    fine = np.linspace(0.02, 0.98, 200)
    image = None
    for ax, kind in zip(axes, ("gaussian", "dct"), strict=True):
        image = ax.pcolormesh(
            DELTAS, RHOS, surfaces[kind, "minimax"].T, cmap="cividis", vmin=0, vmax=1, shading="nearest"
        )
        alpha = FIXED_ALPHA[kind]
        ax.plot(
            fine, [transition(x) for x in fine], color="white", lw=2.2, label="theory (Gaussian), minimax threshold"
        )
        ax.plot(
            fine,
            [transition_at(x, alpha) for x in fine],
            "--",
            color="white",
            lw=1.6,
            label=f"theory (Gaussian), alpha = {alpha}",
        )
        for rule, marker in (("minimax", "o"), ("fixed", "^")):
            name = "minimax threshold" if rule == "minimax" else f"alpha = {alpha}"
            measured = [halfway(row) for row in surfaces[kind, rule]]
            ax.plot(DELTAS, measured, marker, color="tab:red", mec="white", ms=7, label=f"measured, {name}")
        ax.set(xlabel="measurements per entry, s/d", xlim=(0.05, 0.95), ylim=(0.02, 0.86))
        ax.set_title({"gaussian": "Gaussian matrix", "dct": "subsampled DCT"}[kind])
        ax.legend(loc="upper left", fontsize=8, facecolor="0.25", labelcolor="white", framealpha=0.9)
    axes[0].set_ylabel("non-zeros per measurement, k/s")
    fig.colorbar(image, ax=axes, label=f"probability of recovery, minimax threshold ({trials} trials)")
    fig.suptitle(f"AMP: where it recovers (d = {d}, no noise, squared error below {SUCCESS_NMSE:g} of the energy)")
    return fig, axes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d", type=int, default=1000, help="entries of the vector")
    parser.add_argument("--seeds", type=int, default=5, help="matrices per cell")
    parser.add_argument("--trials", type=int, default=4, help="vectors per matrix")
    parser.add_argument("--iterations", type=int, default=600)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()

    rows, surfaces = [], {}
    print(f"{'matrix':>9} {'threshold':>9} {'alpha':>6} {'s/d':>5} {'theory':>7} {'measured':>9}")
    for kind in ("gaussian", "dct"):
        for rule in ("minimax", "fixed"):
            surface = []
            for delta in map(float, DELTAS):
                alpha = minimax_alpha(delta) if rule == "minimax" else FIXED_ALPHA[kind]
                theory = transition_at(delta, alpha)
                success, nmse = measure(kind, delta, alpha, args.d, args.seeds, args.trials, args.iterations)
                surface.append(success)
                print(f"{kind:>9} {rule:>9} {alpha:6.3f} {delta:5.2f} {theory:7.3f} {halfway(success):9.3f}")
                rows += [
                    (kind, rule, f"{alpha:.4f}", f"{delta:.2f}", f"{rho:.2f}", p, f"{e:.3e}", f"{theory:.4f}")
                    for rho, p, e in zip(RHOS, success, nmse, strict=True)
                ]
            surfaces[kind, rule] = np.array(surface)
    args.out.mkdir(exist_ok=True)
    with (args.out / "amp_phase_transition.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ["matrix", "threshold", "alpha", "s_over_d", "k_over_s", "success_prob", "median_nmse", "theory_k_over_s"]
        )
        writer.writerows(rows)
    fig, _ = plot(surfaces, args.d, args.seeds * args.trials)
    fig.savefig(args.out / "amp_phase_transition.png", dpi=150)
    print(f"{time.process_time() - start:.0f} CPU seconds; wrote {args.out / 'amp_phase_transition.csv'} and .png")


if __name__ == "__main__":
    main()
