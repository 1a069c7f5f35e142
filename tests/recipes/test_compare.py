from __future__ import annotations

import csv
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_fixtures import groundwire, start, workplace

from groundwire.recipes.cli.errors import CommandError
from groundwire.recipes.cli.study import Study

__all__ = ["groundwire", "workplace"]  # fixtures

Command = Callable[..., tuple[int, str, str]]
STUDY = """\
# Tiny rivals
seeds: 2
set: {trainer.max_steps: 8, model.lr: 0.05}
runs:
  plain: tiny.yaml
  faster: {recipe: tiny.yaml, set: {model.lr: 0.5}}
  broken: {recipe: tiny.yaml, set: {model.broken_at: 2}}
"""


def table(folder: str) -> dict[str, dict[str, str]]:
    with open(Path(folder, "table.csv"), newline="") as file:
        return {row["label"]: row for row in csv.DictReader(file)}


def test_a_study_runs_tabulates_and_draws_what_works_and_names_what_does_not(
    groundwire: Command, workplace: Path
) -> None:
    (workplace / "study.yaml").write_text(STUDY)
    status, out, _ = groundwire("compare", "--study", "study.yaml", "--output", "out", "--jobs", "2")
    assert status == 1
    assert "broken, seed 0: the step is broken" in out
    rows = table("out")
    assert rows.keys() == {"plain", "faster"}
    results = {path.parent: json.loads(path.read_text()) for path in Path("out").rglob("result.json")}
    assert len(results) == 4
    of_plain = [result["test"]["test/acc"] for folder, result in results.items() if "plain" in str(folder)]
    mean = sum(of_plain) / 2
    assert float(rows["plain"]["test/acc mean"]) == pytest.approx(mean)
    assert float(rows["plain"]["test/acc std"]) == pytest.approx(abs(of_plain[0] - of_plain[1]) / 2**0.5)
    with open(Path("out", "curves.csv"), newline="") as file:
        curves = list(csv.DictReader(file))
    assert [row["round"] for row in curves if row["label"] == "plain" and row["seed"] == "0"] == ["4", "8"]
    assert Path("out", "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "| plain | 2 | 8 |" in Path("out", "table.md").read_text()


def test_an_interrupted_comparison_goes_on_where_it_was(groundwire: Command, workplace: Path) -> None:
    words = ("compare", "tiny.yaml", "--seeds", "2", "--set", "model.seconds_per_step=0.15", "--output", "out")
    process = start(*words)
    deadline = time.monotonic() + 60
    while not any(path.read_text().count("\n") > 3 for path in Path("out").rglob("metrics.csv")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "The same command goes on from here" in out
    (checkpoint,) = Path("out").rglob("last.ckpt")  # the run was stopped between two steps, and the next never began
    assert not list(Path("out").rglob("result.json"))
    status, _, _ = groundwire(*words)
    assert status == 0
    results = [json.loads(path.read_text()) for path in sorted(Path("out").rglob("result.json"))]
    assert [(result["resumed"], result["rounds"]) for result in results] == [(True, 10), (False, 10)]
    assert checkpoint.is_file()


def test_overrides_nearer_to_the_run_win(workplace: Path) -> None:
    (workplace / "study.yaml").write_text(STUDY)
    study = Study.of_file(Path("study.yaml"))
    assert study.title == "Tiny rivals"
    by_label = {job.label: job.args for job in study.jobs(Path("out")) if job.seed == 1}
    assert by_label["plain"] == (
        "--config=tiny.yaml",
        "--trainer.max_steps=8",
        "--model.lr=0.05",
        "--seed_everything=1",
    )
    assert "--model.lr=0.5" in by_label["faster"]
    from_command_line = study.on_top([], {"model.lr": "9"}).jobs(Path("out"))
    assert all("--model.lr=9" in job.args for job in from_command_line)


def test_changed_settings_run_in_other_folders(workplace: Path) -> None:
    study = Study.of_names(["tiny.yaml"])
    folder = study.jobs(Path("out"))[0].folder
    assert study.jobs(Path("out"))[0].folder == folder
    assert study.on_top([], {"model.lr": 1}).jobs(Path("out"))[0].folder != folder
    (workplace / "tiny.yaml").write_text((workplace / "tiny.yaml").read_text() + "\n# changed\n")
    assert study.jobs(Path("out"))[0].folder != folder


def test_a_sweep_multiplies_the_runs_that_depend_on_it(workplace: Path) -> None:
    (workplace / "sweep.yaml").write_text(
        "seeds: [3]\nruns: {a: tiny.yaml, level: {recipe: tiny.yaml, sweep: false}}\n"
        "sweep: {set: model.lr, values: [0.1, 1], label: Learning rate, log: true}\n"
    )
    jobs = Study.of_file(Path("sweep.yaml")).jobs(Path("out"))
    assert [(job.label, job.value) for job in jobs[:2]] == [("a", 0.1), ("a", 1)]
    assert jobs[2].label == "level"
    assert not any("model.lr" in arg for arg in jobs[2].args)
    assert len({job.folder for job in jobs}) == 3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "Name what to compare"),
        (["tiny.yaml", "--study", "study.yaml"], "Name what to compare"),
        (["nothing_like_it"], "There is no recipe or file"),
        (["tiny.yaml", "tiny.yaml"], "the same label"),
        (["tiny.yaml", "--set", "model.lr"], "--set takes KEY=VALUE, got 'model.lr'"),
        (["tiny.yaml", "--seeds", "0"], "must be at least 1"),
        (["--study", "nowhere.yaml"], "--study nowhere.yaml"),
    ],
)
def test_mistakes_are_said_in_one_line(groundwire: Command, words: list[str], says: str) -> None:
    status, _, err = groundwire("compare", *words)
    assert status == 1
    assert says in err


@pytest.mark.parametrize("text", ["runs: {}", "seeds: 3", "runs: {a: tiny.yaml}\nseed: 3", "runs: {a: {set: {}}}"])
def test_a_file_that_is_no_study_is_refused(workplace: Path, text: str) -> None:
    (workplace / "study.yaml").write_text(text)
    with pytest.raises(CommandError, match="study"):
        Study.of_file(Path("study.yaml"))
