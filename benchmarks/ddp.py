"""Milliseconds and bytes a step of compressed DDP on two gloo processes, beside plain DDP and PyTorch's own hooks.

An MLP of 10 million parameters, batches of 32 on each of two processes with one torch thread. All variants run in turn in
the same two processes, several times over; a ratio is that of the runs that lie beside each other, so a drift of the
machine's speed cancels. Every variant is a hook of torch's DistributedDataParallel in the same loop (forward, backward,
SGD); ours is what CompressedDDPStrategy registers.

    python benchmarks/ddp.py [--rates full 1gbit 100mbit] [--repeats 5] [--csv docs/benchmark_ddp.csv]

A rate limits the loopback of a network namespace of its own (Linux, `unshare` and `tc` of iproute2, root or user
namespaces). Both directions share it: of 100mbit, each of two processes that send at the same time has half. "Handed" are
the bytes that both hand to collectives, "on the wire" is what the kernel counted, headers and acknowledgements included;
"CPU ms" is the processor time of one of the two processes, which other work on the machine touches less.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from groundwire.plugins.compression import (
    QSGD,
    RCFED,
    CountSketch,
    ErrorFeedback,
    Granularity,
    LowPrecision,
    NaturalCompression,
    PowerSGD,
    RandK,
    Sender,
    SignSGD,
    TernGrad,
    TopK,
)
from groundwire.plugins.ddp import CountedGroup
from groundwire.plugins.ddp.exchange import GradientExchange, compressed_allreduce
from groundwire.plugins.layout import ParameterLayout

RANKS, BATCH, WARM_UP = 2, 32, 3
PLAIN = "plain DDP"
ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
ONE_BUCKET = 100
"""Megabytes that hold all gradients: with several buckets, two of PyTorch's PowerSGD may wait for each other on gloo."""


class HandwrittenTopK:
    """Top-k with a residual as one writes it for one's own project: whole buckets, int32 indices, float32 values."""

    def __init__(self, density: float, *, remembers: bool) -> None:
        self.density, self.remembers = density, remembers
        self.residuals: dict[tuple[int, int], Tensor] = {}

    def __call__(self, bucket: Any) -> torch.futures.Future[Tensor]:
        flat: Tensor = bucket.buffer()
        if self.remembers:
            which = (bucket.index(), flat.numel())  # DDP cuts its buckets anew after the first step
            if which not in self.residuals:
                self.residuals[which] = torch.zeros_like(flat)
            residual = self.residuals[which]
            flat.add_(residual)
        indices = flat.abs().topk(int(self.density * flat.numel()), sorted=False).indices
        values = flat[indices]
        if self.remembers:
            residual.copy_(flat)
            residual[indices] = 0
        all_values = values.new_empty(RANKS * len(values))
        all_indices = torch.empty(RANKS * len(values), dtype=torch.int32)
        first = getattr(dist, ALL_GATHER)(all_values, values, async_op=True)
        second = getattr(dist, ALL_GATHER)(all_indices, indices.int(), async_op=True)

        def finish(_: Any) -> Tensor:
            flat.zero_().index_add_(0, all_indices, all_values).div_(RANKS)
            return flat

        return torch.futures.collect_all([first.get_future(), second.get_future()]).then(finish)


def handwritten(state, bucket):  # type: ignore[no-untyped-def]  # DDP compares annotations with classes
    return state(bucket)


@dataclass(frozen=True)
class Hooked:
    """What a step does after its backward pass, and who knows the bytes; None for the counter of all collectives."""

    end: Callable[[], object] = lambda: None
    take_bytes: Callable[[], int] | None = None


Register = Callable[[DistributedDataParallel, int], Hooked]


def torch_fp16(model: DistributedDataParallel, rank: int) -> Hooked:
    model.register_comm_hook(None, fp16_compress_hook)
    return Hooked()


def torch_power_sgd(factors: int) -> Register:
    def register(model: DistributedDataParallel, rank: int) -> Hooked:
        model.register_comm_hook(PowerSGDState(None, factors, start_powerSGD_iter=2), powerSGD_hook)
        return Hooked()

    return register


def by_hand(*, remembers: bool) -> Register:
    def register(model: DistributedDataParallel, rank: int) -> Hooked:
        model.register_comm_hook(HandwrittenTopK(0.01, remembers=remembers), handwritten)
        return Hooked()

    return register


def ours(make: Callable[[], Any], granularity: Granularity = "layer") -> Register:
    def register(model: DistributedDataParallel, rank: int) -> Hooked:
        sender, layout, group = Sender(make(), granularity), ParameterLayout.of(model.module), CountedGroup()
        sender.setup(layout, RANKS, range(rank, rank + 1))
        names = {id(parameter): name for name, parameter in model.module.named_parameters()}
        exchange = GradientExchange(sender, layout, names, 0, group)
        model.register_comm_hook(exchange, compressed_allreduce)
        return Hooked(exchange.end_round, group.take_bytes)

    return register


VARIANTS: dict[str, tuple[Register, float | None]] = {
    PLAIN: (lambda model, rank: Hooked(take_bytes=lambda: 0), None),
    "torch fp16 hook": (torch_fp16, None),
    "torch PowerSGD hook, rank 2": (torch_power_sgd(2), ONE_BUCKET),
    "torch PowerSGD hook, rank 4": (torch_power_sgd(4), ONE_BUCKET),
    "hand-written top-k 1 %": (by_hand(remembers=False), None),
    "hand-written top-k 1 %, residual": (by_hand(remembers=True), None),
    "TopK 1 %": (ours(lambda: TopK(density=0.01)), None),
    "TopK 1 %, EF": (ours(lambda: ErrorFeedback(TopK(density=0.01))), None),
    "TopK 1 %, EF, whole model": (ours(lambda: ErrorFeedback(TopK(density=0.01)), "model"), None),
    "PowerSGD rank 2, EF": (ours(lambda: ErrorFeedback(PowerSGD(rank=2))), ONE_BUCKET),
    "PowerSGD rank 4, EF": (ours(lambda: ErrorFeedback(PowerSGD(rank=4))), ONE_BUCKET),
    "LowPrecision float16": (ours(lambda: LowPrecision("float16")), None),
    "LowPrecision float8": (ours(lambda: LowPrecision("float8_e4m3fn")), None),
    "QSGD 7 levels": (ours(lambda: QSGD(num_levels=7, bucket_size=512)), None),
    "QSGD 1 level": (ours(lambda: QSGD(num_levels=1, bucket_size=512)), None),
    "TernGrad": (ours(lambda: TernGrad()), None),
    "NaturalCompression": (ours(lambda: NaturalCompression()), None),
    "SignSGD scaled, EF": (ours(lambda: ErrorFeedback(SignSGD(scaled=True))), None),
    "RandK 1 %, EF": (ours(lambda: ErrorFeedback(RandK(density=0.01, unbiased=False))), None),
    "CountSketch 1 %, EF": (ours(lambda: ErrorFeedback(CountSketch(density=0.01, unbiased=False))), None),
    "RC-FED 2 bits, Huffman": (ours(lambda: RCFED(target_rate=2.0, entropy="huffman")), None),
    "RC-FED 2 bits, ANS": (ours(lambda: RCFED(target_rate=2.0)), None),
}


# ---------------------------------------------------------------- one of the two processes


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(784, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(),
        nn.Linear(2048, 10),
    )  # fmt: skip


class Handed:
    """Bytes that both ranks hand to the collectives that hooks call from Python."""

    def __init__(self) -> None:
        self._bytes = 0
        for name, sent in (("all_reduce", 0), (ALL_GATHER, 1)):
            setattr(dist, name, self._counted(getattr(dist, name), sent))

    def take_bytes(self) -> int:
        taken, self._bytes = self._bytes, 0
        return taken

    def _counted(self, collective: Callable[..., Any], sent: int) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._bytes += RANKS * args[sent].numel() * args[sent].element_size()
            return collective(*args, **kwargs)

        return counted


def wire_bytes() -> int:
    """What the loopback of this network namespace has sent so far, as the kernel counts."""
    (line,) = (line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split()[9])


def measure(variant: str, rank: int, seconds: float, handed: Handed) -> dict[str, Any]:
    """Steps of one variant, for about so many seconds."""
    register, bucket_cap_mb = VARIANTS[variant]
    module = mlp()
    model = DistributedDataParallel(module, init_sync=False, bucket_cap_mb=bucket_cap_mb)
    hooked = register(model, rank)
    take_bytes = hooked.take_bytes or handed.take_bytes
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    g = torch.Generator().manual_seed(rank)
    x, y = torch.randn(BATCH, 784, generator=g), torch.randint(0, 10, (BATCH,), generator=g)
    times: list[float] = []

    def step() -> None:
        start = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        hooked.end()
        optimizer.step()
        times.append(time.perf_counter() - start)

    for _ in range(WARM_UP):
        step()
    count = torch.tensor(max(3, min(200, int(seconds / times[-1]))))
    dist.broadcast(count, src=0)
    dist.barrier()
    times.clear()
    take_bytes()
    on_wire, cpu = wire_bytes(), time.process_time()
    for _ in range(int(count)):
        step()
    cpu = time.process_time() - cpu
    dist.barrier()
    numel = sum(parameter.numel() for parameter in module.parameters())
    return {
        "variant": variant,
        "ms": 1e3 * statistics.median(times),
        "cpu_ms": 1e3 * cpu / int(count),
        "handed_bytes": RANKS * 4 * numel if variant == PLAIN else take_bytes() / int(count),
        "wire_bytes": (wire_bytes() - on_wire) / int(count),
    }


def work(rank: int, port: int, variants: list[str], repeats: int, seconds: float) -> None:
    torch.set_num_threads(1)
    handed = Handed()
    store = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=timedelta(minutes=3))
    for repeat in range(repeats):
        for variant in variants:
            result = measure(variant, rank, seconds, handed)
            if rank == 0:
                print(json.dumps({"repeat": repeat} | result), flush=True)
    dist.destroy_process_group()


# ---------------------------------------------------------------- both, and their wire


def namespace(rate: str) -> list[str]:
    """What to put before a command so that it has a loopback of its own, of that rate."""
    set_up = "ip link set lo up"
    if rate != "full":
        set_up += f" && tc qdisc add dev lo root tbf rate {rate} burst 256kb latency 2s"
    unshare = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--net"]
    prefix = [*unshare, "sh", "-c", f'{set_up} && exec "$@"', "sh"]
    tools = ["unshare", "ip"] + ["tc"] * (rate != "full")
    missing = [tool for tool in tools if shutil.which(tool) is None]
    problem = f"{', '.join(missing)} not found" if missing else ""
    if not problem:
        problem = subprocess.run([*prefix, "true"], check=False, capture_output=True, text=True).stderr.strip()
    if not problem:
        return prefix
    if rate == "full":
        print(f"No network namespace ({problem}): bytes on the wire include the machine's other traffic.")
        return []
    raise SystemExit(
        f"A loopback of {rate} needs a network namespace with a token bucket filter: Linux with `unshare` (util-linux), "
        f"`ip` and `tc` (iproute2), and root or user namespaces. Here: {problem}. Without it, leave --rates at full."
    )


def run_pair(args: argparse.Namespace) -> None:
    """Start the two processes, and pass on what rank 0 prints."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    common = [sys.executable, __file__, "--port", str(port), "--repeats", str(args.repeats)]
    common += ["--seconds", str(args.seconds), "--variants", *args.variants]
    processes = [subprocess.Popen([*common, "--rank", str(rank)], env=environment) for rank in range(RANKS)]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"The processes ended with {codes}.")


def results(rate: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    command = [*namespace(rate), sys.executable, __file__, "--pair", "--repeats", str(args.repeats)]
    command += ["--seconds", str(args.seconds), "--variants", *args.variants]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as pair:
        assert pair.stdout is not None
        for line in pair.stdout:
            yield json.loads(line)
    if pair.returncode:
        raise SystemExit("A run failed.")


def table(rate: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all variants at one rate, and print them."""
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results(rate, args):
        runs[result["variant"]].append(result)
    rows = []
    print(
        f"\nLoopback at {rate}:\n{'':34}{'ms a step':>10}{'/ plain':>9}{'CPU ms':>9}{'MB handed':>11}{'MB on wire':>12}"
    )
    for variant, ran in runs.items():
        ratio = statistics.median(one["ms"] / of["ms"] for one, of in zip(ran, runs[PLAIN], strict=True))
        row = {"rate": rate, "variant": variant, "ratio_to_plain": round(ratio, 4)}
        row |= {key: round(statistics.median(run[key] for run in ran), 2) for key in ("ms", "cpu_ms")}
        row |= {key: round(statistics.median(run[key] for run in ran)) for key in ("handed_bytes", "wire_bytes")}
        rows.append(row)
        print(
            f"{variant:34}{row['ms']:10.1f}{ratio:9.3f}{row['cpu_ms']:9.1f}{row['handed_bytes'] / 1e6:11.2f}"
            f"{row['wire_bytes'] / 1e6:12.2f}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", default=["full"], help="full, or rates as tc takes them (100mbit)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each variant in each repeat; at least 3 steps")
    parser.add_argument("--variants", nargs="+", default=[], help="parts of names; plain DDP always runs")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--pair", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    wanted = args.variants or [""]
    args.variants = [v for v in VARIANTS if v == PLAIN or any(part.lower() in v.lower() for part in wanted)]
    if args.rank is not None:
        work(args.rank, args.port, args.variants, args.repeats, args.seconds)
        return
    if args.pair:
        run_pair(args)
        return
    rows = [row for rate in args.rates for row in table(rate, args)]
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
