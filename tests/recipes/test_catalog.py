from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from groundwire.recipes.catalog import UnknownRecipeError, all_recipes, find_recipe, resolve_config


def test_names_are_unique_and_every_header_says_what_to_run() -> None:
    recipes = all_recipes()
    assert len({recipe.name for recipe in recipes}) == len(recipes)
    for recipe in recipes:
        header = [line for line in recipe.path.read_text().splitlines() if line.startswith("#")]
        assert 10 < len(recipe.title) <= 72, recipe.name
        assert any(line.startswith("# Run:") and recipe.name in line for line in header), recipe.name
        assert any(line.startswith("# Differs:") for line in header), recipe.name


def test_every_recipe_tracks_resumes_and_fixes_its_seed() -> None:
    for recipe in all_recipes():
        if not recipe.is_overlay:
            content = yaml.safe_load(recipe.path.read_text())
            parts = [part["class_path"].rpartition(".")[2] for part in content["trainer"]["callbacks"]]
            loggers = [part["class_path"].rpartition(".")[2] for part in content["trainer"]["logger"]]
            assert parts[:2] == ["RoundProgressBar", "ResumableCheckpoint"], recipe.name
            assert loggers == ["MetricsCSV", "WandbLogger"], recipe.name
            assert isinstance(content["seed_everything"], int), recipe.name


def test_a_recipe_is_found_by_its_stem_or_with_its_family() -> None:
    assert find_recipe("a_dsgd") == find_recipe("edge/a_dsgd")
    assert resolve_config("a_dsgd").name == "a_dsgd.yaml"


def test_a_file_of_the_users_own_goes_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a_dsgd.yaml").touch()
    assert resolve_config("a_dsgd.yaml") == Path("a_dsgd.yaml")
    assert resolve_config("a_dsgd") == find_recipe("a_dsgd").path


@pytest.mark.parametrize("name", ["a_dsgdd", "a_dsg.yaml", "edge/a-dsgd"])
def test_an_unknown_name_offers_close_ones(name: str) -> None:
    with pytest.raises(UnknownRecipeError, match=r"Did you mean .*a_dsgd.*groundwire ls"):
        resolve_config(name)


def test_a_name_like_no_other_offers_the_list() -> None:
    with pytest.raises(UnknownRecipeError, match=r"no recipe or file 'xyzzy'\. `groundwire ls`"):
        resolve_config("xyzzy")
