"""A folder with a tiny recipe in it, and the command ``groundwire`` in this or in another process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from filelock import FileLock

from groundwire.cli import main
from groundwire.recipes.catalog import Recipe, all_recipes

RECIPES = [recipe for recipe in all_recipes() if not recipe.is_overlay]
FEW = ("qsgd", "rqm", "cmic", "pgd_at", "mesgc", "dp_sgd", "random_labels")  # one of each family, with draws of its own
FAMILIES = {  # the overlay that needs no data to be there, and arguments for epochs of two steps, each of them logged
    "compression": ("digits", ["--data.rounds_per_epoch=2"]),
    "edge": ("digits", ["--data.rounds_per_epoch=2"]),
    "information": ("digits_central", ["--trainer.limit_train_batches=2", "--trainer.log_every_n_steps=1"]),
    "adversarial": ("digits_central", ["--trainer.limit_train_batches=2", "--trainer.log_every_n_steps=1"]),
    "optimizers": ("text", ["--trainer.limit_train_batches=2", "--trainer.log_every_n_steps=1"]),
    "privacy": ("digits_central", ["--trainer.limit_train_batches=2", "--trainer.log_every_n_steps=1"]),
    "unlearning": ("digits_central", ["--trainer.limit_train_batches=2", "--trainer.log_every_n_steps=1"]),
}
TO_FORGET = 0.2  # share of the digits that the model of the unlearning family is trained on
NO_STEPS = ("win_u", "ssd")  # recipes that change the weights once, before the first step
OF_SEVERAL_PROCESSES = ("compressed_ddp",)  # forked from this one, where W&B is in use already
NEEDED_HERE = {  # what a recipe for more data needs on the digits
    "original": [f"--data.train_fraction={TO_FORGET}"],  # whose curvature takes its time
    "bc_bn2": ["--trainer.strategy.uplink.num_candidates=10"],
    "dp_film_few_shot": ["--data.train_fraction=1.0"],
    "rqm": ["--trainer.strategy.uplink.compressor.num_shares=1"],  # rounds of few devices, or of none
    "film_few_shot": ["--data.train_fraction=1.0"],
}
UNTRACKED = ("--trainer.logger", "groundwire.callbacks.reporting.MetricsCSV")  # W&B is tested once, elsewhere


def one_of_each_family(recipes: Sequence[Recipe]) -> pytest.MarkDecorator:
    """All recipes, most of them in slow runs only."""
    marked = [
        pytest.param(recipe, marks=() if recipe.name in (*FEW, *NO_STEPS) else pytest.mark.slow) for recipe in recipes
    ]
    return pytest.mark.parametrize("recipe", marked, ids=lambda recipe: recipe.name)


TINY = """\
# A tiny recipe.
# Run: groundwire fit --config tiny.yaml
seed_everything: 1
trainer:
  max_steps: 10
  accelerator: cpu
  log_every_n_steps: 1
  num_sanity_val_steps: 0
  enable_model_summary: false
  callbacks:
    - {class_path: groundwire.callbacks.reporting.RoundProgressBar}
    - {class_path: groundwire.callbacks.reporting.ResumableCheckpoint, init_args: {every_n_steps: 3}}
  logger:
    - {class_path: groundwire.callbacks.reporting.MetricsCSV}
model: {class_path: tiny_parts.Net}
data: {class_path: tiny_parts.Data}
"""
WANDB = "    - {class_path: lightning.pytorch.loggers.WandbLogger, init_args: {project: groundwire, offline: true}}\n"


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seeded: Callable[[int], None]) -> Iterator[Path]:
    """The current folder, with ``tiny.yaml`` and ``tracked.yaml`` (the same with W&B), where the parts import."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "tracked.yaml").write_text(TINY.replace("model:", WANDB + "model:", 1))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield tmp_path
    for name in ("WANDB_SERVICE", "WANDB_MODE", "MASTER_PORT"):  # W&B and Lightning leave these behind
        os.environ.pop(name, None)


@pytest.fixture
def groundwire(workplace: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process: exit status, standard output, standard error."""

    def run(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main([str(word) for word in argv])
        finally:
            wandb.finish()  # a process of its own would end here
        output = capsys.readouterr()
        return status, output.out, output.err

    return run


def is_federated(recipe: Recipe) -> bool:
    """Whether a recipe's data is dealt out to simulated devices."""
    return str(yaml.safe_load(recipe.path.read_text())["data"]["class_path"]).endswith(".Federated")


def overlay_of(recipe: Recipe) -> tuple[str, list[str]]:
    """The overlay and the arguments of a recipe's family; others for data that is to be forgotten."""
    overlay, few = FAMILIES[recipe.family]
    if recipe.name in OF_SEVERAL_PROCESSES:
        return FAMILIES["information"]
    if not forgets(recipe):
        return overlay, few
    return "digits_forget", [*few, f"--data.datamodule.train_fraction={TO_FORGET}"]


def forgets(recipe: Recipe) -> bool:
    """Whether a recipe takes a trained model that is to forget."""
    return str(yaml.safe_load(recipe.path.read_text())["data"]["class_path"]).endswith(".ForgetRetain")


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of ``original``, with its curvature."""
    words = ("--config=original", "--config=digits_central", f"--data.train_fraction={TO_FORGET}")
    return trained_once(tmp_path_factory, "original", *words)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of ``cross_entropy``, long enough to be better than chance: other teachers are refused."""
    overlay, _ = FAMILIES["information"]
    return trained_once(tmp_path_factory, "teacher", "--config=cross_entropy", f"--config={overlay}")


def trained_once(factory: pytest.TempPathFactory, name: str, *words: str) -> Path:
    """Folder of a run of 40 steps, which the first of the processes that test makes; the others wait for it."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"trained-{name}"
    with FileLock(f"{folder}.lock"):
        if not (folder / "checkpoints" / "last.ckpt").exists():
            limits = ("--trainer.max_steps=40", f"--trainer.default_root_dir={folder}")
            _, err = (process := start("fit", *words, *UNTRACKED, *limits)).communicate(timeout=120)
            assert process.returncode == 0, err
    return folder


@pytest.fixture
def short(request: pytest.FixtureRequest) -> Callable[[Recipe], list[str]]:
    """What lets a recipe run here, within seconds: overlay, epochs of two steps, and a teacher where it needs one."""

    def words(recipe: Recipe) -> list[str]:
        overlay, few = overlay_of(recipe)
        trained = "original" if forgets(recipe) else "teacher"
        given = teachers_argument(recipe, request.getfixturevalue(trained)) if teachers_of(recipe) else []
        return [f"--config={overlay}", *few, *NEEDED_HERE.get(recipe.name, []), *given]

    return words


def teachers_of(recipe: Recipe) -> list[str]:
    """Where a recipe looks for its teachers: ``checkpoint``, ``checkpoints`` or ``pretrained`` of its last callback."""
    options = yaml.safe_load(recipe.path.read_text())["trainer"]["callbacks"][-1].get("init_args", {})
    one = options.get("checkpoint") or options.get("pretrained")
    return options.get("checkpoints") or ([one] if one else [])


def teachers_argument(recipe: Recipe, path: Path) -> list[str]:
    """Another teacher, for each place; of a list of callbacks, such an argument is for the last."""
    number = len(teachers_of(recipe))
    if number == 1:
        name = "pretrained" if recipe.family == "privacy" else "checkpoint"
        return [f"--trainer.callbacks.init_args.{name}={path}"]
    return [f"--trainer.callbacks.init_args.checkpoints=[{', '.join([str(path)] * number)}]"]


def start(*argv: object, **kwargs: Any) -> subprocess.Popen[str]:
    """Start the command in a process of its own."""
    command = [sys.executable, "-m", "groundwire.cli", *(str(word) for word in argv)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ, **kwargs
    )


def only_run(folder: Path) -> Path:
    """The one run folder below."""
    (run,) = (path.parent for path in folder.rglob("run.json"))
    return run
