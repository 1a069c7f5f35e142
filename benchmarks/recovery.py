"""Decode time of AMP, dense and fast, beside its lower bound: the bare matrix products it cannot do without.

An iteration needs one product with the matrix and one with its transpose. The bound runs just these, bare: SciPy's
cosine transforms on a NumPy array, or torch's matrix-vector products; the ratio says what everything else costs.

Run: ``OMP_NUM_THREADS=1 python benchmarks/recovery.py``
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import scipy.fft
import torch

from groundwire.plugins.channels import DCTProjection, GaussianProjection, Projection, amp, least_squares


def timed(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Smallest wall and CPU seconds of ``run``, after one run to warm up."""
    run()
    wall, cpu = [], []
    for _ in range(repeats):
        begin, begin_cpu = time.perf_counter(), time.process_time()
        run()
        wall.append(time.perf_counter() - begin)
        cpu.append(time.process_time() - begin_cpu)
    return min(wall), min(cpu)


def compare(name: str, projection: Projection, bare: Callable[[], object], iterations: int, repeats: int) -> None:
    """Print AMP, its lower bound and least squares for one matrix; ``bare`` is one product each way."""
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(projection.numel)
    x[: projection.num_rows // 4] = torch.randn(projection.num_rows // 4, generator=generator)
    v = projection.mv(x[torch.randperm(projection.numel, generator=generator)])
    alpha = 1.2 if projection.row_orthogonal else 1.0

    def bound() -> None:
        for _ in range(iterations):
            bare()

    floor = timed(bound, repeats)
    ours = timed(lambda: amp(v, projection, alpha, iterations, tol=0), repeats)
    begin = time.perf_counter()
    least_squares(v, projection)
    first = time.perf_counter() - begin
    linear = timed(lambda: least_squares(v, projection), repeats)
    for label, (wall, cpu) in ((f"{2 * iterations} bare products", floor), (f"AMP, {iterations} iterations", ours)):
        print(
            f"{name:<32} {label:<22} {wall * 1e3:9.2f} ms wall {cpu * 1e3:9.2f} ms CPU {wall / floor[0]:6.2f} x bound"
        )
    print(f"{name:<32} {'least squares':<22} {linear[0] * 1e3:9.2f} ms wall {linear[1] * 1e3:9.2f} ms CPU", end="")
    print(f"   (first call {first:.2f} s)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)

    d = 7850
    gaussian = GaussianProjection(d // 2, d, seed=0)
    matrix, x, r = gaussian.matrix, torch.ones(d), torch.ones(d // 2)
    compare(f"Gaussian, d={d}, s=d/2", gaussian, lambda: (matrix @ x, r @ matrix), args.iterations, args.repeats)
    for d in (7850, 400_000, 399_989):
        note = " (prime)" if d == 399_989 else ""
        values = torch.ones(d).numpy()

        def bare(values: object = values) -> None:
            scipy.fft.dct(values, norm="ortho", workers=1)
            scipy.fft.idct(values, norm="ortho", workers=1)

        compare(f"DCT, d={d}{note}, s=d/2", DCTProjection(d // 2, d, seed=0), bare, args.iterations, args.repeats)


if __name__ == "__main__":
    main()
