"""Milliseconds of each compressor's round trip beside bare torch.topk and one pass over the rows; one thread.

python benchmarks/compression.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from groundwire.plugins.compression import QSGD, DDSGDQuantizer, ErrorFeedback, SignSGD, TopK
from groundwire.plugins.random import Key


def milliseconds(work: Callable[[], object], repeats: int = 7) -> float:
    work()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return 1e3 * best


def main() -> None:
    torch.set_num_threads(1)
    for numel, k in ((7850, 1962), (400_000, 4000), (400_000, 100_000)):
        x = torch.randn(25, numel, generator=torch.Generator().manual_seed(0)) ** 3
        key = Key(seed=0, devices=tuple(range(25)))
        copy = milliseconds(lambda x=x: x.clone())
        topk = milliseconds(lambda x=x, k=k: x.abs().topk(k, dim=1, sorted=False))
        print(f"[25, {numel}], k = {k}: one copy {copy:.2f} ms, torch.topk {topk:.1f} ms")
        for name, work in {
            "TopK": TopK(k=k).roundtrip,
            "ErrorFeedback(TopK)": ErrorFeedback(TopK(k=k), num_devices=25),
            "TopK, packed and unpacked": lambda x, key, k=k: TopK(k=k).decode(TopK(k=k).encode(x, key)),
            "QSGD, 4 levels": QSGD(num_levels=4).roundtrip,
            "SignSGD": SignSGD().roundtrip,
            "D-DSGD, q = 12": DDSGDQuantizer(num_entries=12).roundtrip,
        }.items():
            took = milliseconds(lambda work=work, x=x, key=key: work(x, key))
            print(f"    {name:26} {took:8.2f} ms   {took / topk:5.2f} x torch.topk   {took / copy:6.1f} x one copy")


if __name__ == "__main__":
    main()
