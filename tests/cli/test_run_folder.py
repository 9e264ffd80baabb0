"""Every command that takes a model folder takes a run, and says which model it takes."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bitnet.export.folder import read_config

Bitnet = Callable[..., tuple[int, str, str]]


def as_run(folder: Path, run: Path) -> Path:
    """The folder of a finished run with this model."""
    shutil.copytree(folder, run / "model")
    (run / "config.toml").write_text("")
    return run


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "RUN", "--prompt", "def", "--max-new-tokens", "4", "--temperature", "0"),
        ("eval", "RUN", "--text", "text.txt"),
        ("pack", "RUN", "--tokens", "2"),
        ("export", "RUN", "--to", "file", "--out", "out"),
        ("inspect", "model", "RUN"),
    ],
    ids=lambda words: words[0],
)
def test_a_run_stands_for_its_model(
    bitnet: Bitnet,
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(folders / "text.txt", tmp_path)
    as_run(folders / "model", tmp_path / "mine")
    code, out, err = bitnet(*(word.replace("RUN", "mine") for word in words))
    assert code == 0, err
    assert err.startswith("mine is a run: taking mine/model\n")
    if words[0] == "pack":
        assert read_config(tmp_path / "mine/model-packed").weights == "packed"
        return
    Path("out").unlink(missing_ok=True)
    _, same, err = bitnet(*(word.replace("RUN", "mine/model") for word in words))
    assert "is a run" not in err
    assert same.replace("mine/model", "mine") == out.replace("mine/model", "mine")


def test_full_precision_runs_can_be_rounded_and_converted(
    bitnet: Bitnet, folders: Path, tmp_path: Path
) -> None:
    run, text = as_run(folders / "fp", tmp_path / "mine"), folders / "text.txt"
    for words in (
        ("ptq", run, "--text", text, "--bits", "8", "--methods", "rtn"),
        ("convert", run, "quant.weights=int", "--out", tmp_path / "out"),
    ):
        code, _, err = bitnet(*words)
        assert code == 0, err
        assert err.startswith(f"{run} is a run: taking {run / 'model'}\n")


def test_chat_takes_a_run(
    bitnet: Bitnet, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = as_run(folders / "model", tmp_path / "mine")
    with (folders / "text.txt").open() as words:
        monkeypatch.setattr("sys.stdin", words)
        monkeypatch.setattr("bitnet.cli.chat._answer_lines", lambda chat: None)
        code, _, err = bitnet("chat", run)
    assert (code, err) == (0, f"{run} is a run: taking {run / 'model'}\n")


@pytest.mark.parametrize("command", ["generate", "chat", "eval", "pack", "export", "ptq"])
def test_a_run_that_has_not_ended(bitnet: Bitnet, tmp_path: Path, command: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.toml").write_text("")
    options = {"eval": ["--text", "x"], "export": ["--to", "hf", "--out", "x"]}.get(command, [])
    code, _, err = bitnet(command, tmp_path / "mine", *options)
    assert code == 2
    assert "mine: is a run without a model, which is written when training ends" in err


def test_inspect_says_how_to_look_at_a_run(bitnet: Bitnet, folders: Path, tmp_path: Path) -> None:
    run = as_run(folders / "model", tmp_path / "mine")
    code, _, err = bitnet("inspect", run)
    assert code == 2
    assert f"bitnet inspect {run}/config.toml, or bitnet inspect model {run}" in err
