"""The recipes that come with the package: where they are, what they are called, what their header says."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
OVERLAYS = "overlays"


class UnknownRecipeError(LookupError):
    """No recipe has that name."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One packaged YAML.

    Args:
        name: Its stem, by which it is run.
        family: The folder it is in; ``overlays`` for those that only change another recipe.
        path: The file.
        title: First line of its header comment.
    """

    name: str
    family: str
    path: Path
    title: str

    @property
    def is_overlay(self) -> bool:
        """Whether it changes another recipe (``--config a_dsgd --config digits``) and does not run by itself."""
        return self.family == OVERLAYS


def all_recipes(root: Path = ROOT) -> list[Recipe]:
    """Every packaged recipe, by family and name, overlays last.

    Args:
        root: Folder with one folder per family.

    Returns:
        The recipes found.
    """
    recipes = [
        Recipe(name=path.stem, family=path.parent.relative_to(root).as_posix(), path=path, title=_title(path))
        for path in root.glob("*/**/*.yaml")
    ]
    return sorted(recipes, key=lambda recipe: (recipe.is_overlay, recipe.family, recipe.name))


def find_recipe(name: str) -> Recipe:
    """The packaged recipe of that name (``a_dsgd``, or ``edge/a_dsgd``).

    Args:
        name: Stem, with or without its family.

    Returns:
        The recipe.

    Raises:
        UnknownRecipeError: If there is none; the message offers close names.
    """
    recipes = all_recipes()
    for recipe in recipes:
        if name in (recipe.name, f"{recipe.family}/{recipe.name}"):
            return recipe
    close = difflib.get_close_matches(name, [recipe.name for recipe in recipes], n=3, cutoff=0.5)
    meant = f" Did you mean {' or '.join(close)}?" if close else ""
    raise UnknownRecipeError(f"There is no recipe or file {name!r}.{meant} `groundwire ls` lists the recipes.")


def resolve_config(name: str) -> Path:
    """The file behind ``--config NAME``: a YAML file of the user's, or a packaged recipe.

    Args:
        name: Path of a file, or name of a recipe. A bare name without a suffix is a recipe.

    Returns:
        Path of an existing file.

    Raises:
        UnknownRecipeError: If it is neither.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml", ".json") or path.name != name:
        if path.is_file():
            return path
        name = path.with_suffix("").as_posix() if path.suffix else name
    return find_recipe(name).path


def _title(path: Path) -> str:
    with open(path) as file:
        first = file.readline()
    return first.removeprefix("#").strip() if first.startswith("#") else ""
