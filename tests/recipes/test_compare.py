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
from groundwire.recipes.cli.study import Job, Study

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

TEACHING = """\
# Taught by each other
seeds: 2
columns: [test/loss, student/taught, nobody/logs_this]
runs:
  last: {recipe: student.yaml, set: {trainer.callbacks.init_args.checkpoint: "{run:the student}/checkpoints/last.ckpt"}}
  the student: {recipe: student.yaml, set: {trainer.callbacks.init_args.checkpoint: "{run:the teacher}"}}
  the teacher: {recipe: tiny.yaml, listed: false}
"""
STUDENT = """\
from pathlib import Path

from lightning.pytorch import Callback


class Student(Callback):
    def __init__(self, checkpoint: str) -> None:
        path = Path(checkpoint)
        assert path.is_absolute()
        self.path = path if path.suffix else path / "checkpoints" / "last.ckpt"

    def on_fit_start(self, trainer, pl_module):
        assert self.path.is_file(), "the teacher is not there"

    def on_train_batch_end(self, trainer, pl_module, *args):
        pl_module.log("student/taught", 1234.5678)
"""


@pytest.fixture
def school(workplace: Path) -> Path:
    """The current folder, with ``student.yaml`` and the study ``teaching.yaml``."""
    callback = "    - {class_path: student.Student, init_args: {checkpoint: nowhere}}\n  logger:"
    (workplace / "student.py").write_text(STUDENT)
    (workplace / "student.yaml").write_text((workplace / "tiny.yaml").read_text().replace("  logger:", callback))
    (workplace / "teaching.yaml").write_text(TEACHING)
    return workplace


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


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_gets_the_folder_of_the_run_that_it_refers_to(groundwire: Command, school: Path, jobs: int) -> None:
    """The student itself fails where the checkpoint of its teacher is not there when it begins."""
    words = ("compare", "--study", "teaching.yaml", "--output", "out", "--jobs", jobs)
    status, out, err = groundwire(*words)
    assert status == 0, out + err
    rows = table("out")
    assert rows.keys() == {"last", "the student"}, "an unlisted run is in no table"
    with open(Path("out", "curves.csv"), newline="") as file:
        assert {row["label"] for row in csv.DictReader(file)} == {"last", "the student"}
    folders = {path.parent.parent.name: path.parent for path in Path("out").rglob("result.json")}
    assert {name.rpartition("-")[0] for name in folders} == {"last", "the_student", "the_teacher"}

    losses = [
        json.loads(path.read_text())["test"]["test/loss"] for path in Path("out").glob("runs/last-*/*/result.json")
    ]
    assert float(rows["last"]["test/loss mean"]) == pytest.approx(sum(losses) / 2), "of the test"
    assert float(rows["last"]["student/taught mean"]) == pytest.approx(1234.5678), "as logged last"
    assert rows["last"]["nobody/logs_this mean"] == "nan"
    text = Path("out", "table.md").read_text()
    assert "test/loss |" in text
    assert "| 1,235 |" in text
    assert "nobody/logs_this" not in text
    _, out, _ = groundwire(*words)
    assert "6 of 6 runs are there already" in out


def test_who_needs_a_failed_run_fails_with_it_and_the_rest_goes_on(groundwire: Command, school: Path) -> None:
    broken = TEACHING.replace("listed: false", "set: {model.broken_at: 2}")
    Path("teaching.yaml").write_text(broken + "  alone: tiny.yaml\n")
    status, out, _ = groundwire("compare", "--study", "teaching.yaml", "--seeds", 1, "--output", "out", "--jobs", 2)
    assert status == 1
    assert "failed: the teacher, seed 0: the step is broken" in out
    assert "failed: the student, seed 0: it needs the teacher, seed 0, which failed\n" in out
    assert "failed: last, seed 0: it needs the student, seed 0, which failed\n" in out
    assert "4/4" in out
    assert table("out").keys() == {"alone"}


def test_what_a_run_needs_is_part_of_its_digest_and_the_output_folder_is_not(school: Path) -> None:
    def jobs(output: str = "out") -> dict[tuple[str, int], Job]:
        study = Study.of_file(Path("teaching.yaml"))
        return {(job.label, job.seed): job for job in study.jobs(Path(output))}

    before, elsewhere = jobs(), jobs("elsewhere/deeper")
    assert [label for label, _ in before] == 2 * ["last", "the student", "the teacher"]
    for seed in (0, 1):
        teacher, student = before["the teacher", seed], before["the student", seed]
        assert student.needs == (teacher.folder,)
        assert f"--trainer.callbacks.init_args.checkpoint={teacher.folder.absolute()}" in student.args
        assert before["last", seed].needs == (student.folder,)
        assert not teacher.needs
    assert len({job.folder.parent for job in before.values()}) == 3, "seeds share a digest"
    assert [job.folder.relative_to("out") for job in before.values()] == [
        job.folder.relative_to("elsewhere/deeper") for job in elsewhere.values()
    ]
    Path("teaching.yaml").write_text(TEACHING.replace("listed: false", "set: {model.lr: 0.5}"))
    assert not {job.folder for job in jobs().values()} & {job.folder for job in before.values()}


def test_references_are_found_within_lists_and_beside_a_sweep(school: Path) -> None:
    Path("study.yaml").write_text(
        "seeds: [3]\nsweep: {set: model.lr, values: [0.1, 1]}\nruns:\n  a: {recipe: tiny.yaml, sweep: false}\n"
        '  b: {recipe: tiny.yaml, sweep: false}\n  c: {recipe: tiny.yaml, set: {key: [{x: "{run:a}:{run:b}"}, 1]}}\n'
    )
    a, b, *swept = Study.of_file(Path("study.yaml")).jobs(Path("out"))
    assert [job.value for job in swept] == [0.1, 1]
    for job in swept:
        assert job.needs == (a.folder, b.folder)
        value = json.loads(job.args[1].removeprefix("--key="))
        assert value == [{"x": f"{a.folder.absolute()}:{b.folder.absolute()}"}, 1]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("tiny.yaml, listed: false", 'tiny.yaml, set: {k: "{run:last}"}', "in a circle: 'last' -> 'the student' -> "),
        ("tiny.yaml, listed: false", 'tiny.yaml, set: {k: "{run:the teacher}"}', "'the teacher' -> 'the teacher'"),
        ("{run:the teacher}", "{run:teacher}", "Run 'the student' refers to 'teacher', but no run"),
        ("seeds: 2", "seeds: 2\nsweep: {set: model.lr, values: [1, 2]}", "give it `sweep: false`"),
        ("columns: [", "columns: test/acc # [", "takes a list of metrics, got 'test/acc'"),
    ],
)
def test_references_that_lead_nowhere_are_said_in_one_line(
    groundwire: Command, school: Path, old: str, new: str, says: str
) -> None:
    assert TEACHING.count(old) == 1
    Path("teaching.yaml").write_text(TEACHING.replace(old, new))
    status, _, err = groundwire("compare", "--study", "teaching.yaml", "--output", "out")
    assert status == 1
    (line,) = err.splitlines()
    assert says in line
    assert not Path("out").exists()
