"""``groundwire unlearn``: a trained checkpoint and a forget set in, a checkpoint that has forgotten and a report out."""

from __future__ import annotations

import pydoc
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule

from groundwire.callbacks.unlearning import UnlearningMethod, UnlearningReport
from groundwire.callbacks.weights import find_checkpoint
from groundwire.recipes.cli.errors import CommandError
from groundwire.recipes.cli.lightning_cli import GroundwireCLI, say

_OWN = {"--ckpt_path": "the trained model", "--reference": "the model retrained without the forget set"}
_REPORT = "groundwire.callbacks.unlearning.UnlearningReport"


class UnlearnCLI(GroundwireCLI):
    """``fit`` with a method of unlearning that starts from a trained checkpoint, and an ``UnlearningReport``.

    ``--ckpt_path`` names the trained model (a checkpoint, or the folder of its run), ``--reference`` a model retrained
    without the forget set, with which the report compares. Both become settings of the callbacks, so that the run's
    configuration has them, and ``groundwire fit --ckpt_path RUN`` goes on with a run that was interrupted. A report is
    added where the configuration has none.

    Args:
        args: What follows ``unlearn`` on the command line.
    """

    def __init__(self, args: list[str]) -> None:
        given, rest = _taken(args)
        if "--ckpt_path" not in given:
            raise CommandError(
                "Which model is to forget? Give its checkpoint, or the folder of its run, as --ckpt_path."
            )
        self._files = {name: _file(name, path) for name, path in given.items()}
        super().__init__("fit", [*rest, f"--trainer.callbacks+={_REPORT}"])

    def before_instantiate_classes(self) -> None:
        """Hand the checkpoints to the callbacks."""
        nodes: list[Any] = self.config["fit"].trainer.callbacks
        added = nodes.pop()
        reports = [node for node in nodes if _is_a(node, UnlearningReport)]
        if not reports:
            reports = [added]
            nodes.append(added)
        methods = [node for node in nodes if _is_a(node, UnlearningMethod)]
        if not methods:
            raise CommandError(
                "The configuration has no method of unlearning among `trainer.callbacks`: `groundwire ls` lists the recipes "
                "of the family unlearning."
            )
        for node in methods:
            node.init_args["checkpoint"] = self._files["--ckpt_path"]
        if "--reference" in self._files:
            for node in reports:
                node.init_args["reference"] = self._files["--reference"]
        super().before_instantiate_classes()

    def fit(self, model: LightningModule, datamodule: LightningDataModule | None = None, **kwargs: Any) -> None:
        """Unlearn, and show the report."""
        super().fit(model, datamodule, **kwargs)
        assert self.run is not None
        for report in sorted(self.run.folder.rglob("unlearning.md")):
            say(f"\n{report.read_text()}")


def _file(name: str, path: str) -> str:
    try:
        return str(find_checkpoint(path).absolute())
    except FileNotFoundError as error:
        raise CommandError(f"{name}: there is no checkpoint at {path}: give {_OWN[name]}.") from error


def _taken(args: list[str]) -> tuple[dict[str, str], list[str]]:
    """The command's own options, and the rest."""
    own: dict[str, str] = {}
    rest: list[str] = []
    words = iter(args)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in _OWN:
            rest.append(word)
            continue
        given = value if equals else next(words, "")
        if not given:
            raise CommandError(f"{name} needs a checkpoint or the folder of a run: {_OWN[name]}.")
        own[name] = given
    return own, rest


def _is_a(node: Any, kind: type) -> bool:
    found = pydoc.locate(node.class_path)
    return isinstance(found, type) and issubclass(found, kind)
