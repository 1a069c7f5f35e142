"""Run folders: where a run keeps its configuration, checkpoints, metrics and tracker files."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from groundwire.recipes.cli.errors import CommandError

CONFIG = "config.yaml"
IDENTITY = "run.json"
METRICS = "metrics.csv"
LAST = Path("checkpoints", "last.ckpt")
_FOLDER_OF_THE_FIRST = "GROUNDWIRE_RUN"  # for the further processes of a strategy


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run and its folder.

    Args:
        folder: Where everything is.
        recipe: What was run.
        wandb_id: Under which the tracker knows it, in this and in resumed processes.
        resumed: Whether the folder was there before.
    """

    folder: Path
    recipe: str
    wandb_id: str
    resumed: bool = False

    @classmethod
    def create(cls, *, recipe: str, seed: int, folder: Path | None = None, root: Path = Path("runs")) -> Run:
        """Start a run in a folder of its own.

        Args:
            recipe: Name of the recipe.
            seed: The run's seed, part of the folder's name.
            folder: The folder to use, instead of ``<root>/<recipe>/<time>-seed<seed>``.
            root: Folder of all runs.

        Returns:
            The run; its folder exists and holds nothing but the run's identity.

        Raises:
            CommandError: If the given folder holds a run already.
        """
        if folder is None:
            folder = _unique(root / recipe / f"{datetime.now():%Y%m%d-%H%M%S}-seed{seed}")
        elif any((folder / name).exists() for name in (CONFIG, IDENTITY, METRICS)):
            raise CommandError(
                f"{folder} holds a run already. Continue it with `--ckpt_path {folder}`, or name another "
                "`--trainer.default_root_dir`."
            )
        else:
            folder.mkdir(parents=True, exist_ok=True)
        run = cls(folder=folder, recipe=recipe, wandb_id=secrets.token_hex(4))
        identity = {"recipe": recipe, "seed": seed, "wandb_id": run.wandb_id}
        (folder / IDENTITY).write_text(json.dumps(identity, indent=2) + "\n")
        return run

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Let processes that are started meanwhile find the run: see :meth:`of_first_process`."""
        os.environ[_FOLDER_OF_THE_FIRST] = str(self.folder.resolve())
        try:
            yield
        finally:
            del os.environ[_FOLDER_OF_THE_FIRST]

    @classmethod
    def of_first_process(cls) -> Run | None:
        """The run that the process which started this one, as a further process of its strategy, has made; else None."""
        folder = os.environ.get(_FOLDER_OF_THE_FIRST)
        return cls._in(Path(folder)) if folder and os.environ.get("LOCAL_RANK", "0") != "0" else None

    @classmethod
    def of_checkpoint(cls, checkpoint: Path) -> Run | None:
        """The run that a checkpoint belongs to; None for a checkpoint from elsewhere."""
        return cls._in(checkpoint.parent.parent)

    @classmethod
    def _in(cls, folder: Path) -> Run | None:
        try:
            identity = json.loads((folder / IDENTITY).read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None
        return cls(folder=folder, recipe=identity["recipe"], wandb_id=identity["wandb_id"], resumed=True)

    def discard_if_empty(self) -> None:
        """Remove the folder of a run that came to nothing: one in which there is only the identity."""
        if not self.resumed and [path.name for path in self.folder.iterdir()] == [IDENTITY]:
            (self.folder / IDENTITY).unlink()
            self.folder.rmdir()

    def save_config(self, text: str) -> Path:
        """Write the resolved configuration; that of a resumed run goes beside the first, if it differs.

        Args:
            text: The configuration as YAML.

        Returns:
            The file that holds it.
        """
        path = self.folder / CONFIG
        if path.exists() and path.read_text() != text:
            path = _unique(self.folder / f"config-resumed-{datetime.now():%Y%m%d-%H%M%S}.yaml", folder=False)
        path.write_text(text)
        return path

    def fill_loggers(self, logger: Any) -> None:
        """Point the loggers of a configuration, where they do not say otherwise, to this run.

        Args:
            logger: The value of ``trainer.logger``: one node with class path and arguments, a list of them, or a flag.
        """
        for node in logger if isinstance(logger, list) else [logger]:
            arguments = getattr(node, "init_args", None)
            if arguments is None:
                continue
            if "save_dir" in arguments and arguments["save_dir"] in (None, "."):
                arguments["save_dir"] = str(self.folder)
            if node.class_path.rpartition(".")[2] == "WandbLogger":
                if arguments.get("id") is None and arguments.get("version") is None:
                    arguments["id"] = self.wandb_id
                if arguments.get("name") is None:
                    arguments["name"] = f"{self.recipe}/{self.folder.name}"


def checkpoint_file(path: str) -> Path:
    """The checkpoint behind ``--ckpt_path``: a file, or the last one of a run's folder.

    Args:
        path: A checkpoint, or the folder of a run.

    Returns:
        An existing file.

    Raises:
        CommandError: If there is none.
    """
    given = Path(path)
    candidates = [given / LAST, given / LAST.name] if given.is_dir() else [given]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    what = "holds no checkpoints/last.ckpt" if given.is_dir() else "does not exist"
    raise CommandError(f"--ckpt_path: {given} {what}.")


def _unique(path: Path, folder: bool = True) -> Path:
    """``path``, or with the first number after it that is free; made, if it is to be a folder."""
    number = 1
    while True:
        free = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        number += 1
        if not folder:
            if not free.exists():
                return free
            continue
        try:
            free.mkdir(parents=True)
        except FileExistsError:
            continue
        return free
