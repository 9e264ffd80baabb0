"""A run that goes on in another number of processes, from the checkpoint of the ones before."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.checkpoints import names
from tests.helpers.training_script import read_metrics, train_ranks


@pytest.mark.slow
def test_two_processes_one_and_two_again(config_file: Path, tmp_path: Path) -> None:
    """FSDP2 with Muon, then one process, then DDP. Each resumes at the step where the last ended,
    and its first loss, which is that of the saved weights, is the same in either of two."""
    args = [str(config_file), "optim.optimizer=muon", "optim.lr_schedule=constant", "eval.every=50"]
    first, second = tmp_path / "first", tmp_path / "second"

    def losses(folder: Path) -> dict[int, Any]:
        rows = read_metrics(folder / "tiny")
        return {row["step"]: row["loss"] for row in rows if "loss" in row}

    train_ranks(2, *args, f"run.dir={first}", "train.steps=9", "distributed.strategy=fsdp")
    newest = first / "tiny" / "checkpoints" / "step_00000009"
    assert {"model.00000.safetensors", "model.00001.safetensors"} <= names(newest)
    shutil.copytree(first, second)
    out = train_ranks(1, *args, f"run.dir={first}", "train.steps=12")
    assert "resumed at step 9" in out
    ddp = "distributed.strategy=ddp"
    out = train_ranks(2, *args, f"run.dir={second}", "train.steps=12", ddp)
    assert out.count("resumed at step 9") == 1, "the main process speaks for all"
    assert losses(first).keys() == losses(second).keys() == set(range(1, 13))
    assert abs(losses(first)[10] - losses(second)[10]) < 1e-6
    out = train_ranks(2, *args, f"run.dir={first}", "train.steps=14", "distributed.strategy=fsdp")
    assert "resumed at step 12" in out
    assert losses(first).keys() == set(range(1, 15))
