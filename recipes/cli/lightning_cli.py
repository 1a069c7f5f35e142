"""LightningCLI with run folders: one process, one run."""

from __future__ import annotations

import logging
import shlex
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.trainer.states import TrainerStatus
from lightning_utilities.core.rank_zero import rank_zero_only

from groundwire.callbacks.reporting import ResumableCheckpoint
from groundwire.recipes.catalog import resolve_config
from groundwire.recipes.cli.errors import CommandError, innermost_cause
from groundwire.recipes.cli.runs import CONFIG, Run, checkpoint_file

INTERRUPTED = 130  # the shell's 128 + SIGINT
_LIGHTNING_KEYWORDS = ("best", "last", "hpc", "registry")


class GroundwireCLI(LightningCLI):
    """Builds trainer, model and data from recipes and overrides, and runs one of the Trainer's methods.

    ``fit`` gives each run its own folder and keeps the resolved configuration there; a run given by ``--ckpt_path``
    goes on in its own. The other methods write nothing.

    Args:
        subcommand: ``fit``, ``validate``, ``test`` or ``predict``.
        args: What follows it on the command line.
    """

    makes_folders: ClassVar[bool] = True

    def __init__(self, subcommand: str, args: list[str]) -> None:
        self.requested = subcommand
        self.run: Run | None = None
        self.checkpoint: Path | None = None
        self.recipe, arguments = self._resolve(args)
        raising = {"exit_on_error": False}
        super().__init__(
            args=[subcommand, *arguments],
            save_config_callback=None,  # it clashes with WandbLogger, which shares its folder; `fit` saves it
            parser_kwargs=raising | {subcommand: dict(raising)},
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the requested one: each parser costs time to build."""
        return {self.requested: LightningCLI.subcommands()[self.requested]}

    def _parse_ckpt_path(self) -> None:
        """Nothing: the configuration says what to build, not hyperparameters found in a checkpoint."""

    def before_instantiate_classes(self) -> None:
        """Give the run its folder, and point Trainer and loggers to it."""
        config = self.config[self.requested]
        trainer = config.trainer
        if self.requested != "fit" or not self.makes_folders:
            trainer.logger = False
            return
        self.run = Run.of_checkpoint(self.checkpoint) if self.checkpoint is not None else Run.of_first_process()
        if self.run is None:
            folder = Path(trainer.default_root_dir) if trainer.default_root_dir is not None else None
            self.run = Run.create(recipe=self.recipe, seed=config.seed_everything, folder=folder)
        lasting = config.clone()  # what makes the run, not where it happens to be: can be run again as it is
        lasting.trainer.default_root_dir = None
        if self.run.resumed:
            lasting.ckpt_path = None
        self.config_text = self._parser(self.requested).dump(lasting, skip_none=False)
        trainer.default_root_dir = str(self.run.folder)
        self.run.fill_loggers(trainer.logger)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, with one line for what is wrong."""
        with _one_line():
            self.config = parser.parse_args(args)  # type: ignore[arg-type]

    def instantiate_classes(self) -> None:
        """Build everything; a run that cannot be built leaves no folder."""
        try:
            with _one_line():
                super().instantiate_classes()
        except BaseException:
            if self.run is not None:
                self.run.discard_if_empty()
            raise

    def fit(self, model: LightningModule, datamodule: LightningDataModule | None = None, **kwargs: Any) -> None:
        """Train; a run that does not come to its end says how to go on with it."""
        assert self.run is not None
        self._record()
        try:
            with self.run.shared():
                self.trainer.fit(model, datamodule=datamodule, **kwargs)
        except SystemExit as error:
            if self.trainer.state.status != TrainerStatus.INTERRUPTED:
                raise
            self._say_how_to_resume("Interrupted")
            raise SystemExit(INTERRUPTED) from error
        except BaseException:
            self._say_how_to_resume("Failed")
            raise
        say(f"Run: {self.run.folder}")

    @rank_zero_only
    def _record(self) -> None:
        assert self.run is not None
        self.run.save_config(self.config_text)
        for logger in self.trainer.loggers:
            logger.log_hyperparams(yaml.safe_load(self.config_text))

    def _say_how_to_resume(self, what: str) -> None:
        assert self.run is not None
        checkpoints = [one for one in self.trainer.checkpoint_callbacks if isinstance(one, ResumableCheckpoint)]
        path = checkpoints[0].path(self.trainer) if checkpoints else None
        if path is not None and path.is_file():
            folder = shlex.quote(str(self.run.folder))
            say(f"{what} after {self.trainer.global_step} steps. To go on: groundwire fit --ckpt_path {folder}")
        else:
            say(f"{what} before the first checkpoint. Run: {self.run.folder}")

    def _resolve(self, args: list[str]) -> tuple[str, list[str]]:
        """Names of recipes to files, the folder of a run to its checkpoint; the recipe's name and the arguments."""
        arguments, recipes = [], []
        words = iter(_split_equals(args))
        for word in words:
            if word in ("--config", "-c") and (name := next(words, None)) is not None:
                path = resolve_config(name)
                recipes.append(path.stem)
                arguments += ["--config", str(path)]
            elif word == "--ckpt_path" and (name := next(words, None)) is not None:
                if name not in (*_LIGHTNING_KEYWORDS, "null"):
                    self.checkpoint = checkpoint_file(name)
                    name = str(self.checkpoint)
                arguments += ["--ckpt_path", name]
            else:
                arguments.append(word)
        run = Run.of_checkpoint(self.checkpoint) if self.checkpoint is not None else None
        if run is not None and not recipes:
            if not (run.folder / CONFIG).is_file():
                raise CommandError(f"{run.folder} holds no {CONFIG}: say with --config which recipe to continue.")
            arguments = ["--config", str(run.folder / CONFIG), *arguments]
        return (run.recipe if run is not None else recipes[0] if recipes else "run"), arguments


class CheckCLI(GroundwireCLI):
    """Builds all that ``fit`` would, down to optimizer and data, and runs nothing."""

    makes_folders = False

    def fit(self, model: LightningModule, datamodule: LightningDataModule | None = None, **kwargs: Any) -> None:
        """Set up what only shows its mistakes when it is."""
        with _one_line():
            model.configure_optimizers()
            if datamodule is not None:
                datamodule.trainer = self.trainer
                datamodule.prepare_data()
                datamodule.setup("fit")
                datamodule.train_dataloader()


def quiet_process() -> None:
    """Keep what Lightning says about itself out of a process that is a command of ours."""
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.pytorch.{name}").addFilter(_is_news)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # of Lightning's own making


def _is_news(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(("💡 Tip", "`weights_only` was not set"))


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except CommandError:
        raise
    except Exception as error:
        raise CommandError(innermost_cause(error)) from error


def _split_equals(args: list[str]) -> list[str]:
    words: list[str] = []
    for arg in args:
        name, equals, value = arg.partition("=")
        words += [name, value] if equals and name in ("--config", "-c", "--ckpt_path") else [arg]
    return words


@rank_zero_only
def say(text: str) -> None:
    """Print, from the first process alone."""
    print(text, flush=True)
