from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parents[4] / "docs"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, whose measurements are those that were written down."""
    spec = importlib.util.spec_from_file_location("influence_study", DOCS / "studies" / "influence.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with (DOCS / "studies" / "results" / "influence.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    monkeypatch.setattr(module, "measure", lambda seed: [row for row in rows if row["seed"] == str(seed)])
    return module


@pytest.mark.parametrize("told", [True, False])
def test_the_picture_lies_beside_the_output_unless_told(
    told: bool, study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_docs = DOCS / "unlearning_influence.png"
    before = of_docs.stat().st_mtime_ns
    picture = tmp_path / ("pictures/one.png" if told else "out/table.png")
    arguments = ["--output", str(tmp_path / "out" / "table.csv"), *(["--picture", str(picture)] if told else [])]
    monkeypatch.setattr(sys, "argv", ["influence.py", *arguments])
    study.main()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.rglob("*.png"))) == 1
    assert (tmp_path / "out" / "table.csv").exists()
    assert of_docs.stat().st_mtime_ns == before
