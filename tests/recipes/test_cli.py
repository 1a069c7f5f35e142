"""The command, as a person uses it."""

from __future__ import annotations

import csv
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli_fixtures import (
    NO_STEPS,
    OF_SEVERAL_PROCESSES,
    RECIPES,
    UNTRACKED,
    forgets,
    groundwire,
    is_federated,
    one_of_each_family,
    only_run,
    original,
    overlay_of,
    short,
    start,
    teacher,
    teachers_of,
    workplace,
)

from groundwire.recipes.catalog import Recipe

__all__ = ["groundwire", "original", "short", "teacher", "workplace"]  # fixtures

Run = Callable[..., tuple[int, str, str]]
TIMED = ("time", "seconds", "wall")


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if not any(t in name for t in TIMED)} for row in rows]


def final_weights(folder: Path) -> torch.Tensor:
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
    return torch.cat([value.flatten().double() for value in state.values()])


# ---------------------------------------------------------------- ls, cp, check


def test_ls_names_every_recipe(groundwire: Run) -> None:
    status, out, _ = groundwire("ls")
    assert status == 0
    assert {"a_dsgd", "d_dsgd", "error_free", "fedavg", "qsgd_digital", "signsgd_digital"} <= {
        recipe.name for recipe in RECIPES
    }
    for recipe in RECIPES:
        assert recipe.name in out


def test_cp_copies_once(groundwire: Run, workplace: Path) -> None:
    status, out, _ = groundwire("cp", "a_dsgd", "mine.yaml")
    assert status == 0
    assert "groundwire fit --config mine.yaml" in out
    assert yaml.safe_load((workplace / "mine.yaml").read_text())["trainer"]["max_steps"] == 300
    status, _, err = groundwire("cp", "a_dsgd", "mine.yaml")
    assert status == 1
    assert "mine.yaml exists already" in err


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["a_dsg"], "a_dsgd"),
        (["no_such_thing"], "groundwire ls"),
        (["tiny.yaml", "--model.init_args.lrr", "1"], "lrr"),
        (["tiny.yaml", "--trainer.max_stepz", "1"], "max_stepz"),
        (["tiny.yaml", "--model.init_args.lr", "high"], "lr"),
        (["a_dsgd", "--data.init_args.partition", "random"], "partition"),
        (["a_dsgd", "--trainer.strategy.init_args.uplink.init_args.power", "-1"], "power_per_round must be > 0"),
        (["a_dsgd", "--trainer.strategy.init_args.num_devices", "0"], "`num_devices` must be at least 1, got 0"),
        (["tiny.yaml", "--data.init_args.missing", "true"], "Three ways to get them"),
        (["a_dsgd", "--config", "digits", "--data.init_args.num_devices", "5000"], "num_devices"),
    ],
)
def test_check_says_in_one_line_what_is_wrong(groundwire: Run, workplace: Path, words: list[str], cause: str) -> None:
    status, _, err = groundwire("check", *words)
    assert status == 1
    (line,) = [line for line in err.splitlines() if line.startswith("groundwire: error:")]
    assert cause in line
    assert not (workplace / "runs").exists()


@one_of_each_family(RECIPES)
def test_every_recipe_can_be_checked(groundwire: Run, workplace: Path, recipe: Recipe) -> None:
    """Also where the teacher that it needs is not there."""
    overlay, _ = overlay_of(recipe)
    status, out, err = groundwire("check", recipe.name, "--config", overlay)
    assert (status, err.count("error")) == (0, 0), err
    assert f"OK: {recipe.name}" in out
    assert not (workplace / "runs").exists(), "checking leaves nothing behind"


def test_an_override_with_a_space_in_it_is_no_name_of_a_recipe(groundwire: Run, workplace: Path) -> None:
    status, out, err = groundwire(
        "check", "at_aka", "--config=digits_central", "--trainer.callbacks.checkpoints=[a, b]"
    )
    assert (status, err.count("error")) == (0, 0), err
    assert "OK: at_aka" in out


@pytest.mark.parametrize(
    "words", [("check", "a_dsgd"), ("fit", "--config", "a_dsgd", *UNTRACKED)], ids=["check", "fit"]
)
def test_missing_fashion_mnist_is_said_in_one_line(groundwire: Run, workplace: Path, words: tuple[str, ...]) -> None:
    root = workplace / "nowhere"
    status, _, err = groundwire(*words, "--data.init_args.datamodule.init_args.root", root)
    assert status == 1
    (line,) = [line for line in err.splitlines() if line.startswith("groundwire: error:")]
    for part in (str(root), "apt-get install dataset-fashion-mnist", "download=True"):
        assert part in line


# ---------------------------------------------------------------- fit


@one_of_each_family(RECIPES)
def test_every_recipe_runs_two_rounds(
    groundwire: Run, workplace: Path, short: Callable[[Recipe], list[str]], recipe: Recipe
) -> None:
    """Through the real command, on the embedded data, with the trackers it ships; that all run is tested with resuming."""
    tracked = recipe.name not in OF_SEVERAL_PROCESSES
    words = (*short(recipe), *(() if tracked else UNTRACKED))
    status, _, err = groundwire("fit", "--config", recipe.name, *words, "--trainer.max_steps", 2)
    assert status == 0, err
    run = only_run(workplace / "runs" / recipe.name)
    rows = [] if recipe.name in NO_STEPS else metrics(run)
    assert recipe.name in NO_STEPS or any(row.get("val/acc") for row in rows)
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert not tracked or list((run / "wandb").glob("offline-run-*")), "W&B works without an account"
    again = yaml.safe_load((run / "config.yaml").read_text())
    assert again["trainer"]["max_steps"] == 2
    if recipe.family == "optimizers":
        assert again["data"]["class_path"] == "groundwire.datamodules.DatasetDescriptions"
    elif is_federated(recipe):
        assert any(row.get("uplink/bits_cumulative") or row.get("uplink/energy_cumulative") for row in rows)
        assert again["data"]["class_path"] == "groundwire.datamodules.Federated"
    else:
        data = again["data"]["init_args"]["datamodule"] if forgets(recipe) else again["data"]
        assert data["class_path"] == "groundwire.datamodules.Digits"
    status, _, err = groundwire("check", run / "config.yaml")
    assert status == 0, f"what the run keeps does not build it again: {err}"


@pytest.mark.parametrize("name", [recipe.name for recipe in RECIPES if teachers_of(recipe)])
def test_a_missing_teacher_is_said_in_one_line(groundwire: Run, workplace: Path, name: str) -> None:
    (recipe,) = (recipe for recipe in RECIPES if recipe.name == name)
    status, _, err = groundwire("fit", "--config", name, "--config", overlay_of(recipe)[0])
    assert status == 1
    (line,) = [line for line in err.splitlines() if line.startswith("groundwire: error:")]
    assert "checkpoint" in line
    assert teachers_of(recipe)[0] in line
    if name == "distill_from_ce":
        assert "runs/cross_entropy" in line


def test_two_runs_do_not_clash_and_each_keeps_its_configuration(groundwire: Run, workplace: Path) -> None:
    for steps in (2, 3):
        status, out, err = groundwire("fit", "--config", "tracked.yaml", "--trainer.max_steps", steps)
        assert status == 0, err
        assert "Run: " in out
    runs = sorted(path.parent for path in (workplace / "runs").rglob("run.json"))
    assert len(runs) == 2
    kept = {yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] for run in runs}
    assert kept == {2, 3}
    assert len({json.loads((run / "run.json").read_text())["wandb_id"] for run in runs}) == 2


def test_killed_and_resumed_equals_never_killed(groundwire: Run, workplace: Path) -> None:
    """SIGKILL between checkpoints: metrics and weights are those of an uninterrupted run, A-DSGD's memory included."""
    common = [
        "--config",
        "a_dsgd",
        "--config",
        "digits",
        "--trainer.max_steps",
        60,
        "--data.init_args.rounds_per_epoch",
        7,
    ]
    whole = workplace / "whole"
    status, _, err = groundwire("fit", *common, "--trainer.default_root_dir", whole)
    assert status == 0, err

    killed = workplace / "killed"
    process = start("fit", *common, "--trainer.default_root_dir", killed)
    table = killed / "metrics.csv"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if table.is_file() and table.read_text().count("\n") > 57 and (killed / "checkpoints" / "last.ckpt").is_file():
            break  # past the checkpoint of step 50, before the end
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = json.loads((killed / "run.json").read_text())
    status, _, err = groundwire("fit", "--ckpt_path", killed)
    assert status == 0, err
    assert json.loads((killed / "run.json").read_text()) == before, "the same W&B run goes on"
    assert metrics(killed) == metrics(whole)
    assert torch.equal(final_weights(killed), final_weights(whole))
    states = [
        torch.load(f / "checkpoints" / "last.ckpt", weights_only=False)["groundwire.edge"]["parts"]
        for f in (whole, killed)
    ]
    (memories,) = zip(*([s["uplink.memory._extra_state"]["residuals"]["update"]] for s in states), strict=True)
    assert torch.equal(*memories)
    ids = {path.name.rpartition("-")[2] for path in (killed / "wandb").glob("offline-run-*")}
    assert ids == {before["wandb_id"]}


def test_ctrl_c_leaves_a_resumable_checkpoint(groundwire: Run, workplace: Path) -> None:
    words = ["--config", "tiny.yaml", "--model.init_args.seconds_per_step", 0.05, "--trainer.max_steps", 40]
    folder = workplace / "stopped"
    process = start("fit", *words, "--trainer.default_root_dir", folder)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (folder / "checkpoints" / "last.ckpt").is_file():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert f"groundwire fit --ckpt_path {folder}" in out
    step = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=False)["global_step"]
    assert 0 < step < 40
    status, _, err = groundwire("fit", "--ckpt_path", folder, "--model.init_args.seconds_per_step", 0)
    assert status == 0, err
    status, _, err = groundwire(
        "fit", *words[:2], "--trainer.max_steps", 40, "--trainer.default_root_dir", workplace / "w"
    )
    assert status == 0, err
    assert metrics(folder) == metrics(workplace / "w")
    assert torch.equal(final_weights(folder), final_weights(workplace / "w"))


def test_a_failed_step_says_where_the_run_is(groundwire: Run, workplace: Path) -> None:
    words = ["--config", "tiny.yaml", "--model.init_args.broken_at", 5]
    with pytest.raises(RuntimeError, match="the step is broken"):
        groundwire("fit", *words)
    run = only_run(workplace)
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=False)["global_step"] == 3


def test_validate_test_and_predict_write_nothing(groundwire: Run, workplace: Path) -> None:
    assert groundwire("fit", "--config", "tiny.yaml")[0] == 0
    run = only_run(workplace)
    before = sorted(path for path in workplace.rglob("*") if path.is_file())
    for command in ("validate", "test"):
        status, out, err = groundwire(command, "--ckpt_path", run)
        assert status == 0, err
        assert "acc" in out
    after = sorted(path for path in workplace.rglob("*") if path.is_file())
    assert [p for p in after if "__pycache__" not in p.parts] == [p for p in before if "__pycache__" not in p.parts]


def test_resume_of_what_is_not_there(groundwire: Run, workplace: Path) -> None:
    status, _, err = groundwire("fit", "--ckpt_path", workplace)
    assert status == 1
    assert "holds no checkpoints/last.ckpt" in err


# ---------------------------------------------------------------- compare


def test_compare_writes_plot_and_tables_and_does_not_repeat_itself(groundwire: Run, workplace: Path) -> None:
    (workplace / "slow.yaml").write_text((workplace / "tiny.yaml").read_text())
    words = ["tiny.yaml", "slow.yaml", "--seeds", 2, "--output", workplace / "out"]
    status, _, err = groundwire("compare", *words)
    assert status == 0, err
    out = workplace / "out"
    assert (out / "plot.png").read_bytes()[:4] == b"\x89PNG"
    with (out / "table.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["label"] for row in table] == ["tiny", "slow"]
    assert {row["seeds"] for row in table} == {"2"}
    assert table[0]["test/acc mean"] == table[1]["test/acc mean"], "the same recipe under two names"
    with (out / "curves.csv").open(newline="") as file:
        curves = list(csv.DictReader(file))
    assert {(row["label"], row["seed"]) for row in curves} == {(a, b) for a in ("tiny", "slow") for b in ("0", "1")}
    results = sorted(out.rglob("metrics.csv"))
    assert len(results) == 4
    stamps = [path.stat().st_mtime_ns for path in results]
    assert groundwire("compare", *words)[0] == 0
    assert [path.stat().st_mtime_ns for path in results] == stamps


def test_compare_reports_a_failure_and_goes_on(groundwire: Run, workplace: Path) -> None:
    (workplace / "bad.yaml").write_text(
        (workplace / "tiny.yaml").read_text().replace("tiny_parts.Net", "tiny_parts.No")
    )
    status, out, _ = groundwire("compare", "bad.yaml", "tiny.yaml", "--seeds", 1, "--output", workplace / "out")
    assert status == 1
    assert "failed: bad, seed 0" in out
    with (workplace / "out" / "table.csv").open(newline="") as file:
        assert [row["label"] for row in csv.DictReader(file)] == ["tiny"]


def test_studies_of_the_documentation_can_be_read() -> None:
    from groundwire.recipes.cli.study import Study

    studies = sorted((Path(__file__).resolve().parents[2] / "docs" / "studies").glob("*.yaml"))
    assert {"iid_500", "by_label_200", "power", "bandwidth", "demo"} <= {path.stem for path in studies}
    for path in studies:
        study = Study.of_file(path)
        assert len(study.seeds) >= 3
        assert len(study.jobs(Path("nowhere"))) >= 2 * len(study.seeds)


def test_environment_is_as_it_was(groundwire: Run) -> None:
    before: dict[str, Any] = dict(os.environ)
    groundwire("ls")
    assert {k: v for k, v in os.environ.items() if before.get(k) != v} == {}
