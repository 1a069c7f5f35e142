"""``groundwire unlearn``: from a trained run and a forget set to a checkpoint that has forgotten, and a report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from cli_fixtures import TO_FORGET, UNTRACKED, groundwire, only_run, original, workplace

from groundwire.callbacks.reporting import read_metrics
from groundwire.callbacks.weights import read_checkpoint

__all__ = ["groundwire", "original", "workplace"]  # fixtures

Run = Callable[..., tuple[int, str, str]]
DATA = ("--config", "digits_forget", f"--data.datamodule.train_fraction={TO_FORGET}")


@pytest.fixture
def unlearn(groundwire: Run, original: Path) -> Run:
    """The command on the digits, from the trained model unless ``--ckpt_path`` says otherwise."""

    def run(recipe: str, *words: object) -> tuple[int, str, str]:
        start = () if "--ckpt_path" in words else ("--ckpt_path", original)
        return groundwire("unlearn", "--config", recipe, *DATA, *UNTRACKED, *start, *words)

    return run


@pytest.mark.parametrize(("recipe", "setting"), [("win_u", "damping=1.0"), ("ssd", "alpha=1.2")])
def test_the_forget_set_alone_is_enough(
    unlearn: Run, workplace: Path, original: Path, recipe: str, setting: str
) -> None:
    before = (original / "checkpoints" / "last.ckpt").read_bytes()
    status, out, err = unlearn(recipe, "--data.retain_access", "false", f"--trainer.callbacks.{setting}")
    assert status == 0, err
    run = only_run(workplace / "runs" / recipe)
    assert "| unlearned |" in out
    certificate = json.loads((run / "unlearning" / "certificate.json").read_text())
    assert certificate["forget"]["number"] == round(0.05 * read_checkpoint(original)["curvature"]["num_records"])
    assert certificate["records_read"]["retain"] == 0
    assert (original / "checkpoints" / "last.ckpt").read_bytes() == before
    forgotten = read_checkpoint(run)
    assert len(forgotten["ForgetRetain"]["forget"]) == certificate["forget"]["number"]
    changed = [
        not torch.equal(a, b)
        for a, b in zip(forgotten["state_dict"].values(), read_checkpoint(original)["state_dict"].values(), strict=True)
    ]
    assert any(changed)
    assert any("unlearn/forget_acc" in row for row in read_metrics(run / "metrics.csv"))


def test_a_second_request_follows_from_the_first_ones_run(unlearn: Run, workplace: Path, original: Path) -> None:
    assert unlearn("win_u", "--trainer.default_root_dir", "first")[0] == 0
    words = ("--ckpt_path", "first", "--data.forget", "class", "--data.label", 3, "--trainer.callbacks.damping", 1.0)
    status, _, err = unlearn("win_u", *words, "--trainer.default_root_dir", "second")
    assert status == 0, err
    first, second = read_checkpoint("first"), read_checkpoint("second")
    assert torch.equal(second["ForgetRetain"]["earlier"], first["ForgetRetain"]["forget"])
    counts = [read_checkpoint(folder)["curvature"]["num_records"] for folder in (original, "first", "second")]
    removed = [len(checkpoint["ForgetRetain"]["forget"]) for checkpoint in (first, second)]
    assert counts == [counts[0], counts[0] - removed[0], counts[0] - sum(removed)]


def test_a_reference_is_compared_with_and_an_interrupted_run_goes_on(
    unlearn: Run, groundwire: Run, workplace: Path, original: Path
) -> None:
    steps = ("--trainer.max_steps", 3)
    assert unlearn("retrain", *steps, "--trainer.default_root_dir", "reference")[0] == 0
    status, out, err = unlearn("npo", *steps, "--reference", "reference", "--trainer.default_root_dir", "npo")
    assert status == 0, err
    assert "| reference |" in out
    config = yaml.safe_load(Path("npo", "config.yaml").read_text())
    report, method = (config["trainer"]["callbacks"][number]["init_args"] for number in (-1, -2))
    assert report["reference"].endswith("reference/checkpoints/last.ckpt")
    assert method["checkpoint"] == str((original / "checkpoints" / "last.ckpt").absolute())
    status, _, err = groundwire("fit", "--ckpt_path", "npo", "--trainer.max_steps", 5)
    assert status == 0, err
    assert read_checkpoint("npo")["global_step"] > 3


def test_a_report_that_is_there_is_kept(unlearn: Run, workplace: Path) -> None:
    added = '{"class_path": "groundwire.callbacks.unlearning.UnlearningReport", "init_args": {"relearn": false}}'
    words = (f"--trainer.callbacks+={added}", "--trainer.default_root_dir", "run")
    status, _, err = unlearn("ssd", *words)
    assert status == 0, err
    callbacks = yaml.safe_load(Path("run", "config.yaml").read_text())["trainer"]["callbacks"]
    reports = [node["init_args"] for node in callbacks if node["class_path"].endswith("UnlearningReport")]
    assert [report["relearn"] for report in reports] == [False]


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (("--config", "win_u"), "Which model is to forget?"),
        (("--config", "win_u", "--ckpt_path"), "--ckpt_path needs a checkpoint"),
        (("--config", "win_u", "--ckpt_path", "nowhere"), "there is no checkpoint at nowhere"),
        (("--config", "cross_entropy", "--ckpt_path", "{original}"), "no method of unlearning"),
        (
            ("--config", "win_u", *DATA, "--ckpt_path", "{original}", "--data.forget", "class", "--data.label", "77"),
            "no training sample has the label 77",
        ),
        (
            ("--config", "win_u", "--config", "digits_forget", "--ckpt_path", "{original}"),
            "recorded on other training data",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    groundwire: Run, workplace: Path, original: Path, words: tuple[str, ...], cause: str
) -> None:
    filled = [word.format(original=original) if word == "{original}" else word for word in words]
    status, _, err = groundwire("unlearn", *filled)
    assert status == 1
    (line,) = [line for line in err.splitlines() if line.startswith("groundwire: error:")]
    assert cause in line
