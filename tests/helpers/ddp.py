"""Runs functions, or a fit, in several processes joined by gloo, on the CPU.

In short::

    def fit_with_penalty(weight: float) -> Tensor:        # at module level, so that a process can import it
        module = Classifier(mlp())
        data = over_ranks(loader(batch_size=12))
        ddp_trainer(callbacks=[Penalty(weight)], precision="64-true").fit(module, data)
        return weights(module)

    def test_ranks_agree() -> None:
        first, second = run_ddp(fit_with_penalty, 0.1)    # what each rank returned; their errors are raised here
        one, _, _ = fit("auto", Classifier(mlp()), data=loader(batch_size=24), callbacks=[Penalty(0.1)], ...)

    def test_shorter() -> None:                           # the same; `build` is called on each rank
        ranks = fit_ddp(build=partial(Penalty, 0.1), precision="64-true")
        assert torch.equal(ranks[0].weights, ranks[1].weights) and ranks[0].metrics["train/loss"] > 0

Lightning shuffles every train loader that it splits over ranks, shuffled or not. ``over_ranks`` (which ``fit_ddp``
applies) does not: rank ``r`` of two sees the samples ``r::2``, so its batches of 12 join to those of 24 in one process.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from helpers.edge import Classifier, Losses, loader, mlp, weights

_GRACE_S = 2.0  # how long the other ranks may take to say what is wrong with them, once one has failed
_PRELOADED = ["torch", "lightning.pytorch", "groundwire.callbacks", "groundwire.plugins.edge"]


class RankError(RuntimeError):
    """A rank failed: its traceback, or how it died. The cause of the error that ``run_ddp`` raises."""


def run_ddp(function: Callable[..., Any], *args: Any, world_size: int = 2, timeout_s: float = 60.0) -> list[Any]:
    """Call ``function(*args)`` on every rank of a process group that is ready to be set up.

    The ranks are fresh processes (of a fork server that has torch and Lightning loaded, so one takes well under a
    second), with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set: ``ddp_trainer()`` inside ``function``
    joins them, and ``dist.init_process_group("gloo")`` would too. No rank outlives the call.

    Args:
        function: At module level of a test or helper file, since each process imports it.
        *args: Its arguments; they are pickled, so no lambdas or local classes.
        world_size: Ranks.
        timeout_s: After this, all ranks are killed; starting the fork server, once a session, does not count.

    Returns:
        What each rank returned, in the order of ranks (pickled, too).

    Raises:
        Exception: What the first rank to fail raised (so ``pytest.raises(ValueError, match=...)`` works), with the
            rank's traceback as its cause; a :class:`RankError` if that cannot be pickled, or is no Exception
            (``SystemExit``, ``KeyboardInterrupt``).
        RankError: If a rank died.
        TimeoutError: If the ranks did not finish.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    _wait_for_the_server(context)
    job = pickle.dumps((function, args))  # plain pickle: torch's own for processes shares memory with who sent it
    environment = dict(os.environ) | {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    connections: list[Connection] = []
    processes = []
    results: dict[int, tuple[bool, Any]] = {}
    try:
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = context.Process(target=_rank, args=(sender, own, job), daemon=True)
            process.start()
            sender.close()
            connections.append(receiver)
            processes.append(process)
        _collect(connections, results, timeout_s)
        for rank in results:
            processes[rank].join(timeout=5.0)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
        for connection in connections:
            connection.close()
    failed = [rank for rank, (ok, _) in results.items() if not ok]  # in the order in which they failed
    if failed:
        _raise(failed, results, processes)
    if len(results) < world_size:
        late = sorted(set(range(world_size)) - set(results))
        raise TimeoutError(f"ranks {late} of {world_size} did not finish within {timeout_s:g} s and were killed.")
    return [results[rank][1] for rank in range(world_size)]


def ddp_trainer(*, world_size: int = 2, steps: int = 6, **options: Any) -> pl.Trainer:
    """Inside ``run_ddp``: a small CPU Trainer like ``helpers.edge.trainer``, whose ranks are those of ``run_ddp``.

    Args:
        world_size: As given to ``run_ddp``.
        steps: Optimizer steps.
        **options: Of the Trainer.
    """
    strategy = options.pop("strategy", None) or DDPStrategy(
        process_group_backend="gloo", timeout=timedelta(seconds=30), find_unused_parameters=False
    )
    options = {"logger": False, "enable_checkpointing": False} | options
    return pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=world_size,
        max_steps=steps,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def over_ranks(data: DataLoader[Any], world_size: int = 2) -> DataLoader[Any]:
    """Inside ``run_ddp``: this rank's share of a loader, samples ``rank::world_size`` in order.

    Args:
        data: A loader over a dataset with a length.
        world_size: As given to ``run_ddp``.
    """
    sampler: DistributedSampler[Any] = DistributedSampler(
        data.dataset, num_replicas=world_size, rank=int(os.environ["RANK"]), shuffle=False
    )
    return DataLoader(
        data.dataset, data.batch_size, sampler=sampler, collate_fn=data.collate_fn, drop_last=data.drop_last
    )


@dataclass
class RankFit:
    """What one rank of :func:`fit_ddp` has to show.

    Args:
        weights: The module's final state in one vector, as ``helpers.edge.weights``.
        losses: The loss of every step on this rank, as other callbacks see it.
        metrics: ``trainer.callback_metrics`` as numbers.
        read: What ``read(trainer, module, callbacks)`` returned after the fit.
    """

    weights: Tensor
    losses: list[float]
    metrics: dict[str, float]
    read: Any = None
    rank: int = field(default_factory=lambda: int(os.environ["RANK"]))


def fit_ddp(
    module: pl.LightningModule | None = None,
    *,
    build: Callable[[], pl.Callback | list[pl.Callback]] | None = None,
    data: Any = None,
    read: Callable[[pl.Trainer, pl.LightningModule, list[pl.Callback]], Any] | None = None,
    world_size: int = 2,
    **options: Any,
) -> list[RankFit]:
    """Train on every rank, and return what each has to show. Everything that is handed over must be picklable.

    Args:
        module: What to train; a ``Classifier(mlp())`` where None.
        build: Makes the callback, or a list of them, on each rank (a class, a module-level function, or a partial).
        data: What ``trainer.fit`` takes; a DataLoader goes through :func:`over_ranks`. Where None, it is
            ``loader(batch_size=24 // world_size)``, so that the ranks' batches join to those of ``loader()``.
        read: A module-level function, called on each rank after the fit with the Trainer, the module and the callbacks
            of ``build``; what it returns is ``RankFit.read``.
        world_size: Ranks.
        **options: Of :func:`ddp_trainer` and the Trainer.

    Returns:
        One :class:`RankFit` a rank.
    """
    data = data if data is not None else loader(batch_size=24 // world_size)
    module = module if module is not None else Classifier(mlp())
    return run_ddp(_fit_one, module, build, data, read, world_size, options, world_size=world_size)


def _fit_one(module: Any, build: Any, data: Any, read: Any, world_size: int, options: dict[str, Any]) -> RankFit:
    built = build() if build is not None else []
    callbacks = built if isinstance(built, list) else [built]
    losses = Losses()
    data = over_ranks(data, world_size) if isinstance(data, DataLoader) else data
    t = ddp_trainer(world_size=world_size, callbacks=[losses, *callbacks], **options)
    t.fit(module, data)
    metrics = {name: float(value) for name, value in t.callback_metrics.items()}
    return RankFit(weights(module), losses.values, metrics, read(t, module, callbacks) if read is not None else None)


@functools.cache
def _wait_for_the_server(context: Any) -> None:
    """Once a session: loading torch and Lightning takes seconds, which are not the ranks'."""
    first = context.Process(target=_nothing)
    first.start()
    first.join()


def _nothing() -> None:
    """The work of the first process."""


def _rank(sender: Connection, environment: dict[str, str], job: bytes) -> None:
    """One process."""
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        function, args = pickle.loads(job)
        answer = pickle.dumps((True, function(*args)))
    except BaseException as error:  # noqa: BLE001  it is raised again in the test's process
        answer = pickle.dumps((False, (_portable(error), traceback.format_exc())))
    sender.send_bytes(answer)  # before the group goes, which the other ranks may notice with an error of their own
    sender.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def _portable(error: BaseException) -> Exception | None:
    try:
        copied = pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  whatever an error's own pickling may raise
        return None
    return copied if isinstance(copied, Exception) else None


def _collect(connections: list[Connection], results: dict[int, tuple[bool, Any]], timeout_s: float) -> None:
    """Wait for all ranks, or until the time is up; not much longer once one has failed."""
    deadline = time.monotonic() + timeout_s
    pending = dict(enumerate(connections))
    while pending and (left := deadline - time.monotonic()) > 0:
        for connection in wait(list(pending.values()), timeout=left):
            rank = next(r for r, c in pending.items() if c is connection)
            del pending[rank]
            try:
                results[rank] = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                results[rank] = (False, None)
            if not results[rank][0]:
                deadline = min(deadline, time.monotonic() + _GRACE_S)


def _raise(failed: list[int], results: dict[int, tuple[bool, Any]], processes: list[Any]) -> None:
    texts, errors = [], []
    for rank in failed:
        if results[rank][1] is None:
            texts.append(f"Rank {rank} died with exit code {processes[rank].exitcode}.")
            continue
        error, text = results[rank][1]
        errors.append(error)
        texts.append(f"On rank {rank}:\n{text}")
    cause = RankError("\n".join(texts))
    if errors and errors[0] is not None:
        raise errors[0] from cause
    raise cause


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
