"""Dispatch of the command ``groundwire``."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from groundwire.recipes.catalog import UnknownRecipeError, all_recipes, find_recipe
from groundwire.recipes.cli.errors import CommandError, innermost_cause

_RUNS = {
    "fit": "train; resumes with --ckpt_path FOLDER",
    "validate": "evaluate on the validation data",
    "test": "evaluate on the test data",
    "predict": "predict",
}
_UNLEARN = "let the model of --ckpt_path forget; compares with --reference, if given"
_EXAMPLES = """\
examples:
  groundwire ls
  groundwire fit --config a_dsgd --config digits --trainer.max_steps 100
  groundwire fit --ckpt_path runs/a_dsgd/20270101-120000-seed1
  groundwire unlearn --config win_u --ckpt_path runs/original --data.forget class --data.label 3
  groundwire check a_dsgd --data.partition by_label
  groundwire compare error_free a_dsgd d_dsgd --config digits --seeds 3

GROUNDWIRE_DEBUG=1 shows the traceback behind an error.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The words after ``groundwire``; those of the process where None.

    Returns:
        The exit status: 0 done, 1 a mistake or a failed run, 2 an unknown command, 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("WANDB_SILENT", "true")  # read when wandb is imported
    try:
        return _dispatch(words)
    except (CommandError, UnknownRecipeError) as error:
        return _fail(error)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `groundwire ls | head`
        sys.stderr.close()
        return 0
    except Exception as error:
        from lightning.fabric.utilities.exceptions import MisconfigurationException

        # data or a checkpoint that a part misses and says how to get; an error of the operating system has a number
        missing = isinstance(error, FileNotFoundError) and error.errno is None
        if not (missing or isinstance(error, MisconfigurationException)):
            raise
        return _fail(error)


def _dispatch(words: list[str]) -> int:
    if words and words[0] in _RUNS:
        from groundwire.recipes.cli.lightning_cli import GroundwireCLI, quiet_process

        quiet_process()
        GroundwireCLI(words[0], words[1:])
        return 0
    if words and words[0] == "unlearn":
        from groundwire.recipes.cli.lightning_cli import quiet_process
        from groundwire.recipes.cli.unlearn import UnlearnCLI

        quiet_process()
        UnlearnCLI(words[1:])
        return 0
    parser = _parser()
    options, rest = parser.parse_known_args(words)
    if rest and options.command != "check":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.command == "ls":
        return _ls()
    if options.command == "cp":
        return _cp(options.name, options.destination)
    if options.command == "check":
        # argparse takes an option with a space in it for a name
        names = [word for word in options.names if not word.startswith("-")]
        return _check(names, [word for word in options.names if word.startswith("-")] + rest)
    if options.command == "compare":
        from groundwire.recipes.cli.compare import compare_command

        return compare_command(options)
    parser.print_help()
    return 2 if words else 0


def _ls() -> int:
    from rich.console import Console
    from rich.table import Table

    table = Table("recipe", "family", "what it is", box=None, pad_edge=False, header_style="bold")
    for recipe in all_recipes():
        table.add_row(recipe.name, recipe.family, recipe.title)
    Console().print(table)
    return 0


def _cp(name: str, destination: str | None) -> int:
    source = find_recipe(name).path
    target = Path(destination or ".")
    if target.is_dir():
        target = target / source.name
    if target.exists():
        raise CommandError(f"{target} exists already; name another destination.")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    print(f"{target}    Run: groundwire fit --config {target}")
    return 0


def _check(names: list[str], overrides: list[str]) -> int:
    from groundwire.recipes.cli.lightning_cli import CheckCLI, quiet_process

    quiet_process()
    CheckCLI("fit", [word for name in names for word in ("--config", name)] + overrides)
    print(f"OK: {' '.join([*names, *overrides])}")
    return 0


def _fail(error: BaseException) -> int:
    if os.environ.get("GROUNDWIRE_DEBUG"):
        raise error
    print(f"groundwire: error: {innermost_cause(error)}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="groundwire",
        description="Training under constraints: recipes by name, one folder per run.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in _RUNS.items():
        commands.add_parser(name, help=text, add_help=False)
    commands.add_parser("unlearn", help=_UNLEARN, add_help=False)
    commands.add_parser("ls", help="list the recipes")
    copy = commands.add_parser("cp", help="copy a recipe, to change it")
    copy.add_argument("name", metavar="NAME")
    copy.add_argument("destination", metavar="DEST", nargs="?", help="file or folder; the current folder by default")
    check = commands.add_parser(
        "check",
        help="build a recipe without running it",
        description="Build trainer, model and data, run nothing, write nothing. Overrides as for `fit` may follow.",
        allow_abbrev=False,
    )
    check.add_argument("names", metavar="NAME", nargs="+", help="recipe or file; further ones on top")
    compare = commands.add_parser(
        "compare",
        help="run several recipes over several seeds; one plot, one table",
        description="Run fit and test for each recipe and seed, then write plot.png, curves.csv, table.csv and "
        "table.md. Runs that are there already are not repeated, and interrupted ones go on.",
        allow_abbrev=False,
    )
    compare.add_argument("names", metavar="NAME", nargs="*", help="recipes or files")
    compare.add_argument("--study", metavar="FILE", help="YAML of what to compare (groundwire.recipes.cli.study)")
    compare.add_argument("--config", action="append", metavar="NAME", help="overlay on each of them, such as digits")
    compare.add_argument("--set", action="append", metavar="KEY=VALUE", help="override for each of them")
    compare.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N-1 (default 3)")
    compare.add_argument("--metric", help="ordinate of the plot (default val/acc)")
    compare.add_argument("--x", help="abscissa: round, or a logged metric such as uplink/bits_cumulative")
    compare.add_argument("--output", metavar="DIR", help="default runs/compare/<names>")
    compare.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at the same time (default 1)")
    return parser
