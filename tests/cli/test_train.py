"""``bitnet train``: train.py itself, by another name."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bitnet.training.distributed import Launch

Bitnet = Callable[..., tuple[int, str, str]]
TINY = """
[model]
d_model = 16
n_layers = 1
n_heads = 2
d_ff = 16
[data]
path = "data"
sources = ["{folders}/text.txt"]
tokenizer = "{folders}/model/tokenizer.model"
seq_len = 16
[train]
device = "cpu"
batch_tokens = 32
micro_batch = 2
[log]
every = 1
wandb = "disabled"
"""


def test_its_help_is_that_of_the_script(bitnet: Bitnet) -> None:
    code, out, err = bitnet("train", "--help")
    assert code == 0, err
    assert out.startswith("Usage: bitnet train [OPTIONS] {CONFIG... [SECTION.KEY=VALUE...]}")
    assert "batch_tokens = 0" in out


def test_mistakes_are_one_line_and_exit_code_2(bitnet: Bitnet) -> None:
    code, _, err = bitnet("train", "quikstart")
    assert code == 2
    assert err.startswith("error: 'quikstart': expected")
    assert err.endswith("did you mean quickstart?\n")
    code, _, err = bitnet("train", "quickstart", "optim.lrr=1")
    assert (code, err.splitlines()) == (
        2,
        ["error: command line: unknown key optim.lrr; the nearest is optim.lr"],
    )
    assert bitnet("train", "--steps", "5")[0] == 2
    assert bitnet("train")[0] == 2


def test_the_command_that_resumes_a_run_is_the_one_that_began_it() -> None:
    several = Launch(rank=1, size=4, local_rank=1, local_size=2)
    console, module = ["/venv/bin/bitnet", "train", "15m"], ["-u", "-m", "bitnet", "train", "15m"]
    assert Launch().command(console) == "bitnet train 15m"
    assert Launch().command(module[1:]) == "python -m bitnet train 15m"
    assert Launch().command(["train.py", "a b.toml"]) == "python train.py 'a b.toml'"
    torchrun = "torchrun --nproc-per-node 2 --nnodes 2"
    assert several.command(module) == f"{torchrun} -m bitnet train 15m"
    assert several.command(["-u", "train.py", "x"]) == f"{torchrun} train.py x"


def test_it_trains_and_resumes(
    bitnet: Bitnet, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script as it is: its own signal handlers, its exit code, its sys.modules entry."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.toml").write_text(TINY.format(folders=folders))
    main = sys.modules["__main__"]
    for steps in (2, 3):
        code, out, err = bitnet("train", "tiny.toml", f"train.steps={steps}")
        assert code == 0, err
        assert "done: the model is in runs/tiny/model" in out
    rows = Path("runs/tiny/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 2, 3, 3]
    assert sys.modules["__main__"] is main
