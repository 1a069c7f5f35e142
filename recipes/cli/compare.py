"""`groundwire compare`: runs a study, draws it, and tabulates it."""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Container
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from groundwire.callbacks.reporting.metrics_csv import MetricRow, read_metrics
from groundwire.callbacks.reporting.plots import mean_and_spread, plot_curves, plot_sweep
from groundwire.recipes.cli.errors import CommandError
from groundwire.recipes.cli.runs import METRICS
from groundwire.recipes.cli.study import Job, Study

_RESULT = "result.json"
_LOG = "log.txt"
_COLUMNS = {
    "uplink/bits_cumulative": "uplink bits",
    "uplink/channel_uses_cumulative": "channel uses",
    "uplink/energy_cumulative": "energy",
}


def compare_command(options: argparse.Namespace) -> int:
    """Run a comparison.

    Args:
        options: As parsed from the command line.

    Returns:
        0 if every run came to its end, 1 if one failed, 130 if interrupted.

    Raises:
        CommandError: If there is nothing to compare.
    """
    study = _study(options)
    output = Path(options.output) if options.output else Path("runs", "compare", study.name[:100])
    jobs = study.jobs(output / "runs")
    output.mkdir(parents=True, exist_ok=True)
    console = Console()
    todo = [job for job in jobs if not (job.folder / _RESULT).is_file()]
    if len(todo) < len(jobs):
        console.print(f"{len(jobs) - len(todo)} of {len(jobs)} runs are there already.")
    try:
        failures = _Pool(todo, options.jobs, group=study.name).run(console, done=len(jobs) - len(todo), total=len(jobs))
    except KeyboardInterrupt:
        console.print("Interrupted. The same command goes on from here.")
        return 130
    finished = [job for job in jobs if job.listed and (job.folder / _RESULT).is_file()]
    for job, reason in failures:
        log = f"  ({job.folder / _LOG})" if (job.folder / _LOG).is_file() else ""  # none of what never began
        console.print(f"[red]failed[/]: {job.label}, seed {job.seed}: {reason}{log}", soft_wrap=True)
    if finished:
        for path in write_report(study, finished, output):
            console.print(str(path), soft_wrap=True)
    return 1 if failures else 0


def write_report(study: Study, jobs: list[Job], output: Path) -> list[Path]:
    """Write plot and tables of finished runs.

    Args:
        study: What they belong to.
        jobs: The finished runs.
        output: Folder to write to.

    Returns:
        The files written.
    """
    results = [_Result.read(job, study) for job in jobs]
    files = [output / name for name in ("plot.png", "curves.csv", "table.csv", "table.md")]
    _write_curves(files[1], study, results)
    table = _table(study, results)
    with open(files[2], "w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    files[3].write_text(_markdown(table, study.columns))
    by_label: dict[str, list[_Result]] = {}
    for result in results:
        by_label.setdefault(result.job.label, []).append(result)
    if study.sweep is not None:
        y = _final_metric(study, results)
        points = {
            label: {
                value: [one.final(y) for one in some if _same(one.job.value, value)]
                for value in {one.job.value for one in some if not math.isnan(one.job.value)} or {math.nan}
            }
            for label, some in by_label.items()
        }
        fig, _ = plot_sweep(points, x=study.sweep.label, y=y, log_x=study.sweep.log, title=study.title)
    else:
        curves = {label: [one.curve for one in some if one.curve[0]] for label, some in by_label.items()}
        curves = {label: some for label, some in curves.items() if some}
        if not curves:
            raise CommandError(f"No run has logged {study.metric!r} and {study.x!r}: there is nothing to plot.")
        fig, _ = plot_curves(curves, x=study.x, y=study.metric, title=study.title)
    fig.savefig(files[0], dpi=150)
    return files


@dataclass(frozen=True, kw_only=True)
class _Result:
    """What a finished run left behind."""

    job: Job
    result: dict[str, Any]
    last: MetricRow
    best: float
    curve: tuple[list[float], list[float]]
    rounds: list[int]

    @classmethod
    def read(cls, job: Job, study: Study) -> _Result:
        rows = read_metrics(job.folder / METRICS)
        last: MetricRow = {}
        rounds: list[int] = []
        xs: list[float] = []
        ys: list[float] = []
        for row in rows:
            last = last | row  # an abscissa is logged in another row than the ordinate: the latest counts
            here = row["step"] + 1 if study.x == "round" else last.get(study.x)
            if study.metric in row and here is not None:
                rounds.append(int(row["step"]) + 1)
                xs.append(here)
                ys.append(row[study.metric])
        pick = min if study.metric.endswith("loss") else max
        return cls(
            job=job,
            result=json.loads((job.folder / _RESULT).read_text()),
            last=last,
            best=pick(ys, default=math.nan),
            curve=(xs, ys),
            rounds=rounds,
        )

    def final(self, metric: str) -> float:
        return float(self.result["test"].get(metric, self.last.get(metric, math.nan)))


def _study(options: argparse.Namespace) -> Study:
    if bool(options.names) == bool(options.study):
        raise CommandError("Name what to compare: recipes (`groundwire ls` lists them), or one --study FILE.")
    if options.jobs < 1 or (options.seeds is not None and options.seeds < 1):
        raise CommandError(f"--jobs and --seeds must be at least 1, got {options.jobs} and {options.seeds}.")
    study = Study.of_file(Path(options.study)) if options.study else Study.of_names(options.names)
    overrides: dict[str, Any] = {}
    for text in options.set or []:
        key, equals, value = text.partition("=")
        if not equals:
            raise CommandError(f"--set takes KEY=VALUE, got {text!r}.")
        overrides[key.removeprefix("--")] = value
    study = study.on_top(options.config or [], overrides)
    given = {"metric": options.metric, "x": options.x, "seeds": options.seeds and tuple(range(options.seeds))}
    return replace(study, **{name: value for name, value in given.items() if value})


class _Pool:
    """Worker processes and the jobs they work on; one progress bar over all."""

    def __init__(self, jobs: list[Job], size: int, group: str) -> None:
        self._waiting = list(jobs)
        self._unfinished = {job.folder for job in jobs}
        self._size = min(size, len(jobs))
        self._environment = {"OMP_NUM_THREADS": "1", "WANDB_RUN_GROUP": group} | os.environ
        self._selector = selectors.DefaultSelector()
        self._running: dict[int, tuple[subprocess.Popen[bytes], Job | None]] = {}
        self._idle: list[int] = []
        self._unread: dict[int, bytes] = {}
        self._reasons: dict[int, str] = {}
        self._fractions: dict[int, tuple[float, str]] = {}
        self._failures: list[tuple[Job, str]] = []

    def run(self, console: Console, done: int, total: int) -> list[tuple[Job, str]]:
        """Work until no job is left; the jobs that failed, with their reasons."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task("Starting", total=total, completed=done)
            try:
                for _ in range(self._size):
                    self._start()
                while self._running:
                    for key, _ in self._selector.select():
                        for finished in self._hear(key.fd) if key.fd in self._running else ():
                            done += 1
                            if not console.is_terminal:
                                console.print(f"{done}/{total} {finished.label}, seed {finished.seed}", soft_wrap=True)
                    doing = [text for _, text in self._fractions.values()]
                    progress.update(
                        task,
                        completed=done + sum(fraction for fraction, _ in self._fractions.values()),
                        description="; ".join(doing) or "Starting",
                    )
            finally:
                self._stop()
        return self._failures

    def _start(self) -> None:
        worker = subprocess.Popen(
            [sys.executable, "-m", "groundwire.recipes.cli.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self._environment,
            start_new_session=True,  # Ctrl-C reaches it through us, once
        )
        assert worker.stdout is not None
        self._running[worker.stdout.fileno()] = worker, None
        self._unread[worker.stdout.fileno()] = b""
        self._selector.register(worker.stdout, selectors.EVENT_READ)

    def _hear(self, fd: int) -> list[Job]:
        """Take what a worker has said; the jobs that are over with it."""
        data = os.read(fd, 1 << 16)
        *lines, self._unread[fd] = (self._unread[fd] + data).split(b"\n")
        over = [job for line in lines for job in self._take(fd, json.loads(line))]
        return over if data else over + self._lost(fd)

    def _take(self, fd: int, message: dict[str, Any]) -> list[Job]:
        """Act on one message of a worker; the jobs that are over with it."""
        worker, job = self._running[fd]
        over: list[Job] = []
        if "error" in message:
            self._reasons[fd] = message["error"]
        elif "step" in message and job is not None:
            of = f"/{message['total']}" if message["total"] else ""
            fraction = message["step"] / message["total"] if message["total"] else 0.0
            self._fractions[fd] = min(fraction, 0.99), f"{job.label}, seed {job.seed}, round {message['step']}{of}"
        elif "exit" in message and job is not None:
            self._fractions.pop(fd, None)
            reason = self._reasons.pop(fd, None) or f"ended with status {message['exit']}"
            over = self._end(job, reason if message["exit"] != 0 else None)
        if "ready" in message or "exit" in message:
            self._running[fd] = worker, None
            self._idle.append(fd)
            self._hand_out()
        return over

    def _lost(self, fd: int) -> list[Job]:
        """A worker is gone; another takes its place, unless it never came to work. The jobs that are over with it."""
        job = self._running[fd][1]
        self._fractions.pop(fd, None)
        self._release(fd)
        if job is None and fd not in self._idle:
            raise CommandError("The process that was to run the comparison ended before it had begun.")
        self._idle = [one for one in self._idle if one != fd]
        over = self._end(job, "its process was killed") if job is not None else []
        if self._waiting:
            self._start()
        self._hand_out()
        return over

    def _end(self, job: Job, failure: str | None) -> list[Job]:
        """Note that a job is over; with it, where it failed, are those that need it."""
        self._unfinished.discard(job.folder)
        if failure is None:
            return [job]
        self._failures.append((job, failure))
        stuck = [one for one in self._waiting if job.folder in one.needs]
        self._waiting = [one for one in self._waiting if one not in stuck]
        reason = f"it needs {job.label}, seed {job.seed}, which failed"
        return [job, *(over for one in stuck for over in self._end(one, reason))]

    def _hand_out(self) -> None:
        """Give the idle workers what can run now, and let them go where nothing is left to wait for."""
        for fd in list(self._idle):
            job = next((job for job in self._waiting if self._unfinished.isdisjoint(job.needs)), None)
            if job is None and self._waiting:
                return
            self._idle.remove(fd)
            if job is None:
                self._release(fd)
                continue
            self._waiting.remove(job)
            worker, _ = self._running[fd]
            self._running[fd] = worker, job
            assert worker.stdin is not None
            worker.stdin.write((json.dumps({"args": job.args, "folder": str(job.folder)}) + "\n").encode())
            worker.stdin.flush()

    def _release(self, fd: int) -> None:
        worker, _ = self._running.pop(fd)
        assert worker.stdin is not None
        assert worker.stdout is not None
        self._selector.unregister(worker.stdout)
        worker.stdin.close()
        worker.stdout.read()  # what it still says, so that it does not wait for us
        worker.stdout.close()
        worker.wait()

    def _stop(self) -> None:
        """Interrupt what still runs and wait until it has saved its state."""
        for worker, _ in self._running.values():
            worker.send_signal(signal.SIGINT)
        for fd in list(self._running):
            self._release(fd)
        self._selector.close()


def _write_curves(path: Path, study: Study, results: list[_Result]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        x = [] if study.x == "round" else [study.x]
        writer.writerow(["label", *([study.sweep.key] if study.sweep else []), "seed", "round", *x, study.metric])
        for one in results:
            value = [one.job.value] if study.sweep else []
            for index, number in enumerate(one.rounds):
                xs = [one.curve[0][index]] if x else []
                writer.writerow([one.job.label, *value, one.job.seed, number, *xs, one.curve[1][index]])


def _table(study: Study, results: list[_Result]) -> list[dict[str, Any]]:
    final = _final_metric(study, results)
    groups: dict[tuple[str, str], list[_Result]] = {}
    for one in results:
        groups.setdefault((one.job.label, f"{one.job.value:g}"), []).append(one)
    table = []
    for (label, value), some in groups.items():
        row: dict[str, Any] = {"label": label}
        if study.sweep is not None:
            row[study.sweep.label] = "" if value == "nan" else value
        row |= {"seeds": len(some), "rounds": max(one.result["rounds"] for one in some)}
        columns = {final: [one.final(final) for one in some], f"best {study.metric}": [one.best for one in some]}
        columns |= {name: [one.final(name) for one in some] for name in study.columns}
        columns |= {name: [float(one.last.get(key, math.nan)) for one in some] for key, name in _COLUMNS.items()}
        columns["seconds"] = [one.result["seconds"] for one in some]
        for name, values in columns.items():
            mean, spread = mean_and_spread(values)
            row |= {f"{name} mean": float(mean), f"{name} std": float(spread)}
        table.append(row)
    return table


def _markdown(table: list[dict[str, Any]], short: Container[str]) -> str:
    """The table for reading: mean ± std in one cell, four digits in those of ``short``, no column without a value."""
    names = [name.removesuffix(" mean") for name in table[0] if name.endswith(" mean")]
    names = [name for name in names if not all(math.isnan(row[f"{name} mean"]) for row in table)]
    plain = [name for name in table[0] if not name.endswith((" mean", " std"))]
    lines = ["| " + " | ".join(plain + names) + " |", "|" + "---|" * len(plain + names)]
    for row in table:
        cells = [str(row[name]) for name in plain]
        for name in names:
            digits = ".4f" if name.endswith(("acc", "loss")) else ",.4g" if name in short else ",.6g"
            cells.append(_cell(row[f"{name} mean"], row[f"{name} std"], row["seeds"], digits))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(mean: float, spread: float, seeds: int, digits: str) -> str:
    if math.isnan(mean):
        return "-"
    shown = f" ± {spread:{'.4f' if digits == '.4f' else '.2g'}}" if seeds > 1 and spread > 1e-6 * abs(mean) else ""
    return f"{mean:{digits}}{shown}"


def _final_metric(study: Study, results: list[_Result]) -> str:
    """The metric at the end of the runs: the plotted one on the test data, where there is such a thing."""
    name = f"test/{study.metric.rpartition('/')[2]}"
    return name if all(name in one.result["test"] for one in results) else study.metric


def _same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))
