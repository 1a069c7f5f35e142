"""What `groundwire compare` compares: labelled recipes with overrides, over seeds and perhaps over one setting.

A study file, every line but ``runs`` optional::

    # First line: the title of the plot.
    seeds: 3                          # a number n (seeds 0 to n-1) or a list
    metric: val/acc                   # ordinate
    x: round                          # abscissa: round, or a logged metric such as uplink/bits_cumulative
    columns: [test/cmi_nats]          # further metrics for the tables: of the test, else as logged last
    configs: [digits]                 # overlays on every run
    set: {trainer.max_steps: 300}     # overrides for every run
    runs:
      error-free: error_free          # label: recipe
      A-DSGD, low power:              # label: recipe with overlays and overrides of its own
        recipe: a_dsgd
        set: {trainer.strategy.init_args.uplink.init_args.power: 200}
      teacher: {recipe: cross_entropy, sweep: false, listed: false}  # runs, but is in no plot and no table
      student:                        # "{run:LABEL}", in quotes: folder of the run with that label and the same seed,
        recipe: distill_from_ce       # which runs before, and whose settings are then settings of this one as well
        set: {trainer.callbacks.init_args.checkpoint: "{run:teacher}"}
    sweep:                            # final test accuracy against a setting, instead of curves
      set: trainer.strategy.init_args.uplink.init_args.power
      values: [50, 200, 500]
      label: Average power            # of the abscissa
      log: true
    # a run with `sweep: false` does not depend on the setting and is drawn as a level; only such can be referred to
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import yaml

from groundwire.recipes.catalog import resolve_config
from groundwire.recipes.cli.errors import CommandError

_REFERENCE = re.compile(r"\{run:([^{}]*)\}")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One setting, varied.

    Args:
        key: The configuration key.
        values: What it is set to.
        label: Its name on the plot, with its unit.
        log: Whether the plot's abscissa is logarithmic.
    """

    key: str
    values: tuple[float, ...]
    label: str
    log: bool = False


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the plot.

    Args:
        label: Its name there.
        configs: Recipe and overlays, in order.
        overrides: Values by configuration key.
        swept: Whether it depends on the study's sweep.
        listed: Whether plot and tables show it.
    """

    label: str
    configs: tuple[str, ...]
    overrides: dict[str, Any] = field(default_factory=dict)
    swept: bool = True
    listed: bool = True


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a study.

    Args:
        label: Line of the plot that it belongs to.
        value: Of the sweep; NaN where there is none.
        seed: Its seed.
        args: What ``fit`` gets.
        folder: Where it runs; named after a digest of all that it is made of, so that changed settings never mix.
        needs: Folders of the runs that have to be over before.
        listed: Whether plot and tables show it.
    """

    label: str
    value: float
    seed: int
    args: tuple[str, ...]
    folder: Path
    needs: tuple[Path, ...] = ()
    listed: bool = True


@dataclass(frozen=True, kw_only=True)
class Study:
    """A comparison.

    Args:
        name: Names the output folder and the tracker's group.
        entries: What is compared.
        title: Title of the plot.
        seeds: The seeds.
        metric: Ordinate of the plot.
        x: Abscissa of the plot.
        columns: Metrics that the tables have beside that of the plot.
        sweep: Setting to vary.
    """

    name: str
    entries: tuple[Entry, ...]
    title: str | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    metric: str = "val/acc"
    x: str = "round"
    columns: tuple[str, ...] = ()
    sweep: Sweep | None = None

    @classmethod
    def of_names(cls, names: list[str]) -> Study:
        """Recipes as they are."""
        return cls(name="-".join(Path(n).stem for n in names), entries=tuple(_entry(Path(n).stem, n) for n in names))

    @classmethod
    def of_file(cls, path: Path) -> Study:
        """Read a study file.

        Args:
            path: The file.

        Returns:
            The study.

        Raises:
            CommandError: If the file is missing or is not a study.
        """
        try:
            text = path.read_text()
            content = yaml.safe_load(text)
        except (OSError, yaml.YAMLError) as error:
            raise CommandError(f"--study {path}: {error}") from error
        known = {"seeds", "metric", "x", "columns", "configs", "set", "runs", "sweep"}
        if not isinstance(content, dict) or not content.get("runs") or content.keys() - known:
            raise CommandError(
                f"--study {path}: expected `runs:` and, if wanted, {', '.join(sorted(known - {'runs'}))}."
            )
        seeds = content.get("seeds", 3)
        columns = content.get("columns") or []
        if not isinstance(columns, list):
            raise CommandError(f"--study {path}: `columns:` takes a list of metrics, got {columns!r}.")
        sweep = content.get("sweep")
        study = cls(
            name=path.stem,
            title=text.splitlines()[0].removeprefix("#").strip() if text.startswith("#") else None,
            entries=tuple(_entry(str(label), run) for label, run in content["runs"].items()),
            seeds=tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds),
            metric=content.get("metric", cls.metric),
            x=content.get("x", cls.x),
            columns=tuple(columns),
            sweep=None
            if sweep is None
            else Sweep(
                key=sweep["set"],
                values=tuple(sweep["values"]),
                label=sweep.get("label", sweep["set"].rpartition(".")[2]),
                log=sweep.get("log", False),
            ),
        )
        # of the run itself before of all runs: an override nearer to the run wins
        return study.on_top(content.get("configs") or [], content.get("set") or {}, wins=False)

    def on_top(self, configs: list[str], overrides: dict[str, Any], wins: bool = True) -> Study:
        """The study with overlays and overrides for every entry.

        Args:
            configs: Names of overlays.
            overrides: Values by configuration key.
            wins: Whether they override those that an entry has of its own.

        Returns:
            A new study.
        """
        entries = [
            replace(
                entry,
                configs=(*entry.configs, *configs) if wins else (entry.configs[0], *configs, *entry.configs[1:]),
                overrides=entry.overrides | overrides if wins else overrides | entry.overrides,
            )
            for entry in self.entries
        ]
        return replace(self, entries=tuple(entries))

    def jobs(self, folder: Path) -> list[Job]:
        """All runs, seed by seed, so that every label has a result early.

        Args:
            folder: Where their folders go.

        Returns:
            The runs.

        Raises:
            CommandError: If a label is there twice, or a reference leads nowhere or in a circle.
        """
        made: dict[tuple[int, str], list[Job]] = {}
        for entry in self._in_order():
            sweep = self.sweep if entry.swept else None
            for seed in self.seeds:
                needed = {label: made[seed, label][0] for label in _references(entry.overrides)}
                made[seed, entry.label] = [
                    _job(entry, sweep, value, seed, folder, needed)
                    for value in (sweep.values if sweep else (math.nan,))
                ]
        return [job for seed in self.seeds for entry in self.entries for job in made[seed, entry.label]]

    def _in_order(self) -> list[Entry]:
        """The entries, each after those that it refers to."""
        entries = {entry.label: entry for entry in self.entries}
        if len(entries) < len(self.entries):
            raise CommandError("Two runs of a comparison have the same label.")
        needs = {label: _references(entry.overrides) for label, entry in entries.items()}
        for label, some in needs.items():
            for needed in some:
                what = f"Run {label!r} refers to {needed!r}"
                if needed not in entries:
                    raise CommandError(f"{what}, but no run of the comparison has that label.")
                if self.sweep is not None and entries[needed].swept:
                    raise CommandError(f"{what}, which runs once per value of the sweep: give it `sweep: false`.")
        try:
            return [entries[label] for label in TopologicalSorter(needs).static_order()]
        except CycleError as error:
            circle = " -> ".join(repr(label) for label in reversed(error.args[1]))
            raise CommandError(f"Runs refer to each other in a circle: {circle}.") from error


def _entry(label: str, run: str | dict[str, Any]) -> Entry:
    if isinstance(run, str):
        return Entry(label=label, configs=(run,))
    unknown = run.keys() - {"recipe", "configs", "set", "sweep", "listed"}
    if "recipe" not in run or unknown:
        raise CommandError(f"Run {label!r} of the study needs `recipe:`, and may have configs, set, sweep, listed.")
    return Entry(
        label=label,
        configs=(run["recipe"], *(run.get("configs") or [])),
        overrides=dict(run.get("set") or {}),
        swept=bool(run.get("sweep", True)),
        listed=bool(run.get("listed", True)),
    )


def _job(entry: Entry, sweep: Sweep | None, value: float, seed: int, folder: Path, needed: dict[str, Job]) -> Job:
    paths = [resolve_config(name) for name in entry.configs]
    overrides = entry.overrides | ({sweep.key: value} if sweep else {})
    # a folder's name stands for all that the run is made of, whatever the seed and wherever the output is
    settings = _arguments(overrides, {label: job.folder.parent.name for label, job in needed.items()})
    digest = hashlib.sha256(json.dumps([[path.read_text() for path in paths], settings]).encode())
    name = re.sub(r"[^\w.+-]+", "_", f"{entry.label}_{value:g}" if sweep else entry.label).strip("_")
    return Job(
        label=entry.label,
        value=value if sweep else math.nan,
        seed=seed,
        args=(
            *(f"--config={path}" for path in paths),
            *_arguments(overrides, {label: str(job.folder.absolute()) for label, job in needed.items()}),
            f"--seed_everything={seed}",
        ),
        folder=folder / f"{name}-{digest.hexdigest()[:8]}" / f"seed{seed}",
        needs=tuple(job.folder for job in needed.values()),
        listed=entry.listed,
    )


def _arguments(overrides: dict[str, Any], folders: dict[str, str]) -> list[str]:
    """Overrides as arguments of the command, with ``folders`` for the labels that they refer to."""
    values = {key: _filled(value, folders) for key, value in overrides.items()}
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


def _references(value: Any) -> list[str]:
    """Labels that the strings within a value refer to, each once."""
    if isinstance(value, str):
        return list(dict.fromkeys(_REFERENCE.findall(value)))
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return list(dict.fromkeys(label for part in parts for label in _references(part)))


def _filled(value: Any, folders: dict[str, str]) -> Any:
    """A value with folders for the references within its strings."""
    if isinstance(value, str):
        return _REFERENCE.sub(lambda found: folders[found[1]], value)
    if isinstance(value, dict):
        return {key: _filled(part, folders) for key, part in value.items()}
    return [_filled(part, folders) for part in value] if isinstance(value, list) else value
