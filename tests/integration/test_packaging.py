"""The package as users get it."""

from __future__ import annotations

import ast
import importlib
import inspect
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

import groundwire

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("plugins", "callbacks", "datamodules", "recipes")


@pytest.mark.parametrize("room", ROOMS)
def test_links_lead_to_the_top_level_folders(room: str) -> None:
    link = ROOT / "src" / "groundwire" / room
    assert link.is_symlink()
    assert link.resolve() == ROOT / room


def test_every_public_name_exists() -> None:
    for room in ROOMS:
        for file in (ROOT / room).rglob("__init__.py"):
            name = ".".join(("groundwire", *file.parent.relative_to(ROOT).parts))
            module = importlib.import_module(name)
            for public in getattr(module, "__all__", []):
                assert hasattr(module, public), f"{name}.{public}"


def test_imports_point_one_way() -> None:
    allowed = {"plugins": set(), "callbacks": {"plugins"}, "datamodules": {"plugins", "callbacks"}}
    for room, below in allowed.items():
        for file in (ROOT / room).rglob("*.py"):
            imported = {
                name
                for node in ast.walk(ast.parse(file.read_text()))
                for name in (
                    [alias.name for alias in node.names] if isinstance(node, ast.Import)
                    else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                )
            }  # fmt: skip
            for other in set(ROOMS) - below - {room}:
                wrong = [name for name in imported if name.startswith(f"groundwire.{other}")]
                assert not wrong, f"{file.relative_to(ROOT)} imports {wrong}"
            assert not any(name.partition(".")[0] == "wandb" for name in imported), f"{file} knows W&B"


def test_wheel_contains_everything_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy, since a build leaves files behind that the next one would pack
    source.mkdir()
    for name in (*ROOMS, "src"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("*.egg-info"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {"groundwire/__init__.py", "groundwire/cli.py", "groundwire/py.typed"}
    for room in ROOMS:
        for file in (ROOT / room).rglob("*"):
            if file.suffix in {".py", ".yaml", ".md"} and "__pycache__" not in file.parts:
                expected.add(f"groundwire/{file.relative_to(ROOT).as_posix()}")
    assert {name for name in inside if not name.endswith("/")} == expected


def test_version_is_the_distributions() -> None:
    assert groundwire.__version__ == "0.1.0"


def test_private_names_of_lightning_that_are_relied_on() -> None:
    """Lightning's minor version is bounded because of these; if one goes, this says so first."""
    from lightning.pytorch.trainer.connectors import accelerator_connector

    connector = inspect.getsource(accelerator_connector._AcceleratorConnector)
    assert 'hasattr(self.strategy, "parallel_devices")' in connector
    assert callable(torch._C._storage_Use_Count), "large rounds would take fresh memory every time"
    assert "_register_ddp_hooks" in inspect.getsource(pl.strategies.DDPStrategy.configure_ddp), "what ours replaces"
    assert "closure" in inspect.signature(pl.strategies.Strategy.optimizer_step).parameters
