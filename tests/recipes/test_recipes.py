"""Every recipe builds and runs, on the embedded digits, through the real command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cli_fixtures import groundwire, workplace

from groundwire.callbacks.reporting import read_metrics
from groundwire.recipes.catalog import all_recipes
from groundwire.recipes.cli.study import Study

__all__ = ["groundwire", "workplace"]  # fixtures

Command = Callable[..., tuple[int, str, str]]
RECIPES = [recipe.name for recipe in all_recipes() if not recipe.is_overlay]
STUDIES = sorted((Path(__file__).parents[2] / "docs" / "studies").glob("*.yaml"))
BREAKER = """\
from lightning.pytorch import Callback


class Break(Callback):
    def on_before_optimizer_step(self, trainer, *args):
        if trainer.global_step == 3:
            raise RuntimeError("broken")
"""
UNTRACKED = ("--trainer.logger", "groundwire.callbacks.reporting.MetricsCSV")  # W&B is tested once, elsewhere


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_non_iid_is_one_override_on_the_digits_as_well(groundwire: Command, seed: int) -> None:
    words = ("--config=digits", "--data.partition", "by_label", "--seed_everything", seed)
    assert groundwire("check", "error_free", *words)[0] == 0


@pytest.mark.parametrize("name", RECIPES)
def test_the_seed_of_a_run_is_the_seed_of_all_its_parts(groundwire: Command, workplace: Path, name: str) -> None:
    words = ("fit", "--config", name, "--config", "digits", *UNTRACKED, "--trainer.max_steps", 2)
    losses = []
    for folder, seed in [("a", 1), ("b", 1), ("c", 2)]:
        groundwire(*words, "--seed_everything", seed, "--trainer.default_root_dir", folder)
        losses.append([row.get("train/loss") for row in read_metrics(Path(folder, "metrics.csv"))])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_resumes_within_an_epoch(
    groundwire: Command, workplace: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    words = ("--config", name, "--config", "digits", *UNTRACKED, "--data.rounds_per_epoch", 2)
    callback = "groundwire.callbacks.reporting.ResumableCheckpoint"
    part = ("--trainer.callbacks", callback, "--trainer.callbacks.every_n_steps", 3)
    groundwire("fit", *words, *part, "--trainer.max_steps", 4, "--trainer.default_root_dir", "whole")
    monkeypatch.syspath_prepend(workplace)
    (workplace / "breaker.py").write_text(BREAKER)
    broken = ("--trainer.callbacks+=breaker.Break", "--trainer.max_steps", 4, "--trainer.default_root_dir", "part")
    with pytest.raises(RuntimeError, match="broken"):
        groundwire("fit", *words, *part, *broken)
    assert groundwire("fit", *words, *part, "--trainer.max_steps", 4, "--ckpt_path", "part")[0] == 0
    assert Path("part", "metrics.csv").read_text() == Path("whole", "metrics.csv").read_text()


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_of_the_docs_can_be_built(groundwire: Command, path: Path) -> None:
    """On the digits, so that no data has to be there."""
    for job in {job.label: job for job in Study.of_file(path).jobs(Path("out"))}.values():
        status, _, err = groundwire("check", job.args[0].removeprefix("--config="), *job.args[1:], "--config=digits")
        assert status == 0, err
