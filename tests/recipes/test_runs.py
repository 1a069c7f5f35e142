"""Run folders and configurations, as the command handles them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from cli_fixtures import groundwire, only_run, workplace

from groundwire.callbacks.reporting import read_metrics

__all__ = ["groundwire", "workplace"]  # fixtures

Command = Callable[..., tuple[int, str, str]]


def test_check_builds_and_leaves_nothing_behind(groundwire: Command, workplace: Path) -> None:
    before = sorted(workplace.iterdir())
    status, out, _ = groundwire("check", "tiny.yaml", "--model.lr", "0.5")
    assert (status, out.startswith("OK")) == (0, True)
    assert sorted(workplace.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["tiny.yaml", "--model.lrr=1"], "model (Net): Option 'lrr' is not accepted"),
        (["tiny.yaml", "--model.lr=fast"], "model.lr (Net): Expected a <class 'float'>. Got value: fast"),
        (["tiny.yaml", "--model=tiny_parts.Nett"], "module 'tiny_parts' has no attribute 'Nett'"),
        (["tiny.yaml", "--trainer.max_stepz=1"], "--trainer.max_stepz"),
        (["tiny.yaml", "--data.missing=true"], "The data are not there. Three ways to get them: one, two, three."),
        (["tiny.yaml", "--model.lr=-1"], "Invalid learning rate: -1.0"),
        (["tinny"], "There is no recipe or file 'tinny'"),
        (["error_free", "--trainer.strategy.num_devices=0"], "`num_devices` must be at least 1, got 0"),
        (["a_dsgd", "--trainer.strategy.uplink.bandwith=1"], "trainer.strategy.uplink (ADSGD): Option 'bandwith'"),
    ],
)
def test_check_says_the_innermost_cause_in_one_line(groundwire: Command, words: list[str], cause: str) -> None:
    status, out, err = groundwire("check", *words)
    (line,) = (line for line in err.splitlines() if "error" in line)
    assert status == 1
    assert "OK" not in out
    assert cause in line
    assert len(line) < 300


def test_fit_keeps_everything_in_its_own_folder(groundwire: Command, workplace: Path) -> None:
    status, out, _ = groundwire("fit", "--config", "tiny.yaml", "--model.lr", "0.2", "--seed_everything", 7)
    run = only_run(workplace / "runs" / "tiny")
    assert status == 0
    assert str(run.relative_to(workplace)) in out
    assert run.name.endswith("-seed7")
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "config.yaml", "metrics.csv", "run.json"]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["init_args"]["lr"] == 0.2
    assert config["seed_everything"] == 7
    assert sorted(path.name for path in workplace.iterdir()) == ["runs", "tiny.yaml", "tracked.yaml"]
    assert [row["step"] for row in read_metrics(run / "metrics.csv") if "train/loss" in row] == list(range(10))


def test_the_saved_configuration_makes_the_same_run_again(groundwire: Command, workplace: Path) -> None:
    groundwire("fit", "--config", "tiny.yaml", "--model.lr", "0.2", "--trainer.default_root_dir", "first")
    groundwire("fit", "--config", "first/config.yaml", "--trainer.default_root_dir", "second")
    for name in ("config.yaml", "metrics.csv"):
        assert Path("first", name).read_text() == Path("second", name).read_text()


def test_later_configs_and_overrides_win(groundwire: Command, workplace: Path) -> None:
    (workplace / "over.yaml").write_text("model: {init_args: {lr: 0.3}}\ntrainer: {max_steps: 3}\n")
    groundwire("fit", "--config=tiny.yaml", "--config=over.yaml", "--trainer.max_steps=2")
    config = yaml.safe_load((only_run(workplace) / "config.yaml").read_text())
    assert (config["model"]["init_args"]["lr"], config["trainer"]["max_steps"]) == (0.3, 2)


def test_a_folder_that_holds_a_run_is_not_overwritten(groundwire: Command, workplace: Path) -> None:
    fit = ("fit", "--config", "tiny.yaml", "--trainer.max_steps", "1", "--trainer.default_root_dir", "here")
    assert groundwire(*fit)[0] == 0
    before = Path("here", "metrics.csv").read_text()
    status, _, err = groundwire(*fit)
    assert status == 1
    assert "here holds a run already. Continue it with `--ckpt_path here`" in err
    assert Path("here", "metrics.csv").read_text() == before


def test_a_run_that_cannot_be_built_leaves_no_folder(groundwire: Command, workplace: Path) -> None:
    status, _, err = groundwire("fit", "--config", "error_free", "--trainer.strategy.num_devices", "0")
    assert status == 1
    assert "`num_devices` must be at least 1" in err
    assert list(workplace.rglob("run.json")) == []


def test_a_run_that_breaks_says_how_to_go_on(
    groundwire: Command, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError, match="the step is broken"):
        groundwire("fit", "--config", "tiny.yaml", "--model.broken_at", "5", "--trainer.default_root_dir", "here")
    assert "To go on: groundwire fit --ckpt_path here" in capsys.readouterr().out
    assert groundwire("fit", "--ckpt_path", "here", "--model.broken_at", "-1")[0] == 0
    assert [row["step"] for row in read_metrics(Path("here", "metrics.csv")) if "train/loss" in row] == list(range(10))
    assert len(list(Path("here").glob("config-resumed-*.yaml"))) == 1  # what was changed is kept beside the first


def test_help_and_unknown_commands(groundwire: Command) -> None:
    assert groundwire("--help")[0] == 0
    assert "compare" in groundwire()[1]
    status, _, err = groundwire("fly")
    assert status == 2
    assert "fly" in err
    assert groundwire("ls", "--nonsense")[0] == 2


def test_a_checkpoint_from_elsewhere_starts_a_run_of_its_own(groundwire: Command, workplace: Path) -> None:
    groundwire("fit", "--config", "tiny.yaml", "--trainer.default_root_dir", "here")
    Path("elsewhere.ckpt").write_bytes(Path("here", "checkpoints", "last.ckpt").read_bytes())
    words = ("--config", "tiny.yaml", "--ckpt_path", "elsewhere.ckpt", "--trainer.max_steps", 12)
    assert groundwire("fit", *words)[0] == 0
    assert len(list(workplace.rglob("run.json"))) == 2
