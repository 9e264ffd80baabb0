"""What train.py says to a mistake: one line and exit code 2."""

import sys
from pathlib import Path

import pytest

from tests.helpers.training_script import TRAIN, start, train

MISTAKES: list[tuple[str, list[str], str]] = [
    ("typo in a key", ["optim.lrr=1"], "unknown key optim.lrr; the nearest is optim.lr"),
    ("typo in a section", ["optm.lr=1"], "did you mean 'optim'"),
    ("wrong type", ["train.steps=many"], "train.steps = 'many': expected a valid integer"),
    ("out of range", ["optim.beta1=1.5"], "optim.beta1 = 1.5"),
    ("a seed beyond 64 bits", ["run.seed=99999999999999999999999"], "run.seed"),
    ("a width beyond reason", ["model.d_model=99999999999999"], "model.d_model"),
    ("wrong choice", ["model.activation=relu"], "the nearest is 'relu2'"),
    ("no value", ["optim.lr"], "expected section.key=value"),
    ("missing config", ["no/such.toml"], "no/such.toml: no such config file"),
    ("missing file", ["data.path={tmp}/p", "data.sources={tmp}/none.txt"], "none.txt"),
    ("empty file", ["data.path={tmp}/p", "data.sources={tmp}/empty.txt"], "empty"),
    ("empty folder", ["data.path={tmp}/p", "data.sources={tmp}/folder"], "folder"),
    ("tiny data", ["data.path={tmp}/p", "data.sources={tmp}/tiny.txt"], "18 bytes of text"),
    (
        "too large a vocabulary for the text",
        ["data.path={tmp}/p", "data.sources={tmp}/dull.txt", "data.vocab_size=5000"],
        "data.vocab_size",
    ),
    ("bad JSON", ["data.path={tmp}/p", "data.sources={tmp}/bad.jsonl"], "bad.jsonl"),
    ("another field", ["data.path={tmp}/p", "data.text_field=body"], "body"),
    ("unknown data set", ["data.path={tmp}/p", "data.sources=hf:no/such"], "no/such"),
    ("not a tokenizer", ["data.tokenizer={tmp}/tiny.txt"], "tiny.txt"),
    ("vocabulary mismatch", ["model.vocab_size=77"], "model.vocab_size = 77 differs"),
    ("data of other settings", ["data.vocab_size=300"], "vocab_size"),
    ("heads that do not divide", ["model.n_heads=5"], "the nearest that does is"),
    ("batch that does not divide", ["train.batch_tokens=100"], "train.batch_tokens = 100"),
    ("sequences longer than the data", ["data.seq_len=100000", "train.batch_tokens=0"], "tokens"),
    ("a prompt beyond the context", ["eval.sample_prompt=" + 200 * "x "], "eval.sample_prompt has"),
    ("a path for a name", ["run.name=../x"], "run.name = '../x'"),
    ("no such device", ["train.device=tpu"], "tpu"),
    ("no such model to start from", ["train.init_from={tmp}/none"], "none"),
    ("read-only run folder", ["run.dir=/proc"], "/proc"),
    ("run folder under a file", ["run.dir={tmp}/tiny.txt"], "tiny.txt"),
    ("damaged data", ["data.path={tmp}/damaged"], "damaged"),
]


@pytest.mark.parametrize(("case", "overrides", "message"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_mistakes_are_one_line_and_exit_code_2(
    case: str,
    overrides: list[str],
    message: str,
    config_file: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "tiny.txt").write_text("three little words")
    (tmp_path / "dull.txt").write_text("all work and no play\n" * 1000)
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in (texts / "prepared").iterdir():
        data = bytearray(file.read_bytes())
        if file.name == "train_00000.bin":
            data[100] ^= 4
        (damaged / file.name).write_bytes(data)
    if case == "missing config":
        args = overrides
    else:
        args = [str(config_file), f"run.dir={tmp_path}/runs"]
        args += [override.format(tmp=tmp_path) for override in overrides]
    monkeypatch.setattr(sys, "argv", ["train.py", *args])
    with pytest.raises(SystemExit) as caught:
        train.command()
    assert caught.value.code == 2
    *notes, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert not any("error" in line or "Traceback" in line for line in notes), notes


def test_the_same_from_the_shell() -> None:
    process = start([str(TRAIN.parent / "configs/quickstart.toml"), "optim.lrr=1"])
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err == "error: command line: unknown key optim.lrr; the nearest is optim.lr\n"
    assert out == ""


def test_help_teaches() -> None:
    process = start(["--help"])
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    lines = [line.strip() for line in out.splitlines()]
    for line in (
        "[optim]",
        "lr = 0.0",
        'linear = "ternary"',
        "every = 10",
        "[data]",
        "[quant]",
        "start = 0.0",
    ):
        assert line in lines
    assert "CONFIG..." in out
    assert "resumes" in out
