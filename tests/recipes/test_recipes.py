"""Every recipe builds and runs, on the embedded digits, through the real command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from cli_fixtures import (
    NO_STEPS,
    RECIPES,
    UNTRACKED,
    groundwire,
    one_of_each_family,
    original,
    overlay_of,
    short,
    teacher,
    workplace,
)

from groundwire.callbacks.reporting import read_metrics
from groundwire.plugins.optimizers import optimizer_state_bytes
from groundwire.recipes.catalog import Recipe
from groundwire.recipes.cli.study import Study

__all__ = ["groundwire", "original", "short", "teacher", "workplace"]  # fixtures

Command = Callable[..., tuple[int, str, str]]
Short = Callable[[Recipe], list[str]]
every_recipe = pytest.mark.parametrize(
    "recipe", [recipe for recipe in RECIPES if recipe.name not in NO_STEPS], ids=lambda recipe: recipe.name
)
STUDIES = sorted((Path(__file__).parents[2] / "docs" / "studies").glob("*.yaml"))
LONG = ("compression_dirichlet", "fading_by_label", "students", "unlearning_class", "unlearning_random")  # or twins
KEEPER = """\
import shutil

from lightning.pytorch import Callback


class Keep(Callback):
    def on_before_optimizer_step(self, trainer, *args):
        if trainer.global_step == 3 and trainer.is_global_zero:
            shutil.copytree(trainer.default_root_dir, "part")
"""


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_non_iid_is_one_override_on_the_digits_as_well(groundwire: Command, seed: int) -> None:
    words = ("--config=digits", "--data.partition", "by_label", "--seed_everything", seed)
    assert groundwire("check", "error_free", *words)[0] == 0


@one_of_each_family([recipe for recipe in RECIPES if recipe.name not in NO_STEPS])
def test_the_seed_of_a_run_is_the_seed_of_all_its_parts(
    groundwire: Command, workplace: Path, short: Short, recipe: Recipe
) -> None:
    words = ("fit", "--config", recipe.name, *short(recipe), *UNTRACKED, "--trainer.max_steps", 2)
    losses = []
    for folder, seed in [("a", 1), ("b", 1), ("c", 2)]:
        assert groundwire(*words, "--seed_everything", seed, "--trainer.default_root_dir", folder)[0] == 0
        losses.append([row.get("train/loss") for row in read_metrics(Path(folder, "metrics.csv"))])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


@pytest.mark.parametrize(
    ("name", "state_mb"),
    {
        "adamw": 180.5,
        "frozen": 0.0154,
        "lora": 21.2,
        "galore": 21.4,
        "mesgc": 22.9,
        "cesgc": 22.9,
        "frugal": 22.8,
    }.items(),
)
def test_optimizer_recipes_train_minilm_with_the_state_that_they_say(
    groundwire: Command, workplace: Path, name: str, state_mb: float
) -> None:
    """With their own model and data, that is; elsewhere they run on a tiny one."""
    few = ("--data.max_length=8", "--data.train_fraction=0.02", "--trainer.limit_val_batches=1")
    few += ("--trainer.limit_test_batches=1", "--trainer.max_steps=1")
    assert groundwire("fit", "--config", name, *few, *UNTRACKED)[0] == 0
    (path,) = Path().rglob("last.ckpt")
    (state,) = torch.load(path, weights_only=False)["optimizer_states"]
    (recipe,) = (recipe for recipe in RECIPES if recipe.name == name)
    shared = 512 * 64 * 4 if name in ("mesgc", "cesgc") else 0  # the projection, which is drawn again
    found = (optimizer_state_bytes(SimpleNamespace(state=state["state"])) + shared) / 1e6
    assert found == pytest.approx(state_mb, rel=5e-3)
    assert str(state_mb) in recipe.path.read_text()


@every_recipe
def test_a_recipe_resumes_within_an_epoch(
    groundwire: Command, workplace: Path, monkeypatch: pytest.MonkeyPatch, short: Short, recipe: Recipe
) -> None:
    """From what a run that is killed in its fourth step leaves; its checkpoint is from the middle of the second epoch."""
    content = yaml.safe_load(recipe.path.read_text())
    (keeper,) = [one for one in content["trainer"]["callbacks"] if one["class_path"].endswith("ResumableCheckpoint")]
    keeper["init_args"] = {"every_n_steps": 3}
    (workplace / "recipe.yaml").write_text(yaml.safe_dump(content))
    words = ("fit", "--config", "recipe.yaml", *short(recipe), *UNTRACKED, "--trainer.max_steps", 4)
    monkeypatch.syspath_prepend(workplace)
    (workplace / "keeper.py").write_text(KEEPER)
    assert groundwire(*words, "--trainer.callbacks+=keeper.Keep", "--trainer.default_root_dir", "whole")[0] == 0
    rows = read_metrics(Path("whole", "metrics.csv"))
    if any("uplink/bits" in row for row in rows):
        assert any(row.get("uplink/bits", 0) or row.get("uplink/energy", 0) for row in rows), (
            "nobody ever sent anything"
        )
    assert len(Path("part", "metrics.csv").read_text()) < len(Path("whole", "metrics.csv").read_text())
    assert groundwire(*words, "--ckpt_path", "part")[0] == 0
    assert Path("part", "metrics.csv").read_text() == Path("whole", "metrics.csv").read_text()


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow if path.stem in LONG else ()) for path in STUDIES],
    ids=lambda path: path.stem,
)
def test_a_study_of_the_docs_can_be_built(groundwire: Command, path: Path) -> None:
    """On the digits, so that no data has to be there; the text comes with a package. Bare recipes are checked elsewhere."""
    recipes = {recipe.path: recipe for recipe in RECIPES}
    study = Study.of_file(path)
    bare = {entry.label for entry in study.entries if not entry.overrides and not (study.sweep and entry.swept)}
    jobs = {job.label: job for job in study.jobs(Path("out")) if job.label not in bare}
    for job in jobs.values():
        recipe = Path(job.args[0].removeprefix("--config="))
        overlay = () if recipes[recipe].family == "optimizers" else (f"--config={overlay_of(recipes[recipe])[0]}",)
        status, _, err = groundwire("check", recipe, *overlay, *job.args[1:])
        assert status == 0, err
