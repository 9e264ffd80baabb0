"""The bitnet command, called as from a shell: what it prints, and how mistakes end."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitnet.engine.engine import Engine
from bitnet.evaluate import compressor_baselines

Bitnet = Callable[..., tuple[int, str, str]]


def test_prepare_then_eval_with_baselines(bitnet: Bitnet, folders: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    tokenizer = folders / "model" / "tokenizer.model"
    code, out, _ = bitnet("prepare", folders / "text.txt", "--path", data, "--tokenizer", tokenizer)
    assert code == 0
    assert "train" in out
    assert "val" in out
    assert "bytes per token" in out
    code, out, err = bitnet("eval", folders / "model", "--data", data, "--baselines")
    assert code == 0, err
    bits = float(re.search(r"model\s*│\s*([\d.]+)", out)[1])  # type: ignore[index]
    assert 2 < bits < 9  # untrained: ln(320) nats per token
    assert "gzip -9" in out
    assert "xz -9" in out
    assert bitnet("eval", folders / "model", "--data", data, "--split", "train")[0] == 0


def test_long_work_is_reported_where_there_is_no_terminal(
    bitnet: Bitnet, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitnet.progress.EVERY", 0.05)
    generated, compressed = Engine.generate, compressor_baselines

    def slow_generate(*args: Any, **options: Any) -> Any:
        time.sleep(0.2)
        return generated(*args, **options)

    def slow_baselines(text: bytes) -> dict[str, float]:
        time.sleep(0.2)
        return compressed(text)

    monkeypatch.setattr(Engine, "generate", slow_generate)
    monkeypatch.setattr("bitnet.cli.eval.compressor_baselines", slow_baselines)
    words = ("generate", folders / "model", "--max-new-tokens", "2", "--prompt", "def")
    assert "generating 2 texts after 0 s\n" in bitnet(*words, "--prompt", "x")[2]
    assert "generating" not in bitnet(*words)[2]  # its text comes as it is generated
    text = ("--text", folders / "text.txt", "--baselines")
    assert "compressing by gzip and xz after" in bitnet("eval", folders / "model", *text)[2]


def test_inspect_shows_a_configs_sizes(bitnet: Bitnet) -> None:
    configs = Path(__file__).parents[2] / "configs"
    code, out, _ = bitnet("inspect", configs / "15m.toml")
    assert code == 0
    expected = ("15,447,168", "train.steps", "config", "model.depth", "weights in packed", "0.004")
    for part in expected:
        assert part in out
    assert "packed" not in bitnet("inspect", configs / "fp" / "15m.toml")[1]
    assert "d_model" in bitnet("inspect", configs / "15m.toml", "model.depth=8")[1]
    words = "--world-size", "4", "--local-size", "2"
    code, out, _ = bitnet("inspect", configs / "15m.toml", *words, "--bandwidth", "10")
    assert code == 0
    assert all(part in out for part in ("4 processes", "hsdp over 2", "sent: gathered", "seconds"))
    assert bitnet("inspect", configs / "15m.toml", *words[2:])[0] == 2


MISTAKES = [
    (["generate", "{root}/none"], "none"),
    (["generate", "{root}/model", "--prompt", "x" * 500], "leaves no room"),
    (["generate", "{root}/model", "--temperature", "-1"], "temperature"),
    (["generate", "{root}/model", "--top-p", "2"], "top_p"),
    (["generate", "{root}/model", "--device", "tpu"], "tpu"),
    (["generate", "{root}"], "did you mean"),
    (["eval", "{root}/model"], "--text FILE or --data FOLDER"),
    (["eval", "{root}/model", "--data", "x", "--stride", "5"], "--stride: is for --text FILE"),
    (["eval", "{root}/model", "--text", "x", "--limit", "5"], "--limit: is for --tasks NAMES"),
    (["eval", "{root}/model", "--tasks", "x", "--baselines"], "--baselines: is for --text FILE"),
    (["eval", "{root}/model", "--tasks", "x", "--include-path", "{root}/no"], "no such folder"),
    (["eval", "{root}/model", "--text", "{root}/none.txt"], "none.txt"),
    (["eval", "{root}/model", "--text", "{root}/empty.txt"], "empty"),
    (["eval", "{root}/model", "--text", "{root}/latin1.txt"], "not UTF-8"),
    (["eval", "{root}/model", "--data", "{root}/none"], "none"),
    (["pack", "{root}/fp"], "is full precision"),
    (["inspect", "{root}/model"], "bitnet inspect model"),
    (["pack", "{root}/model", "--out", "{root}/text.txt"], "text.txt"),
    (["pack", "{root}/model", "--out", "{root}/model"], "which packing would overwrite"),
    (["pack", "{root}/model", "--out", "{root}/fp"], "which packing would overwrite"),
    (["generate", "{root}/model", "--device", "meta"], "meta"),
    (["prepare", "{root}/text.txt", "--path", "/proc/none/x"], "/proc"),
    (["inspect", "{root}/none.toml"], "none.toml"),
    (["inspect", "model.depth=4", "modl.depth=4"], "modl"),
    (["prepare"], "nothing to prepare"),
    (["prepare", "{root}/text.txt"], "--path"),
    (["prepare", "{root}/text.txt", "--path", "{root}/p", "--vocab-size", "9"], "data.vocab_size"),
    (["prepare", "{root}/text.txt", "--path", "{root}/p", "--val-fraction", "2"], "val_fraction"),
    (["prepare", "{root}/none", "--path", "{root}/p"], "none"),
]


@pytest.mark.parametrize(("args", "message"), MISTAKES, ids=[" ".join(m[0])[:40] for m in MISTAKES])
def test_mistakes_are_one_line_and_exit_code_2(
    bitnet: Bitnet, folders: Path, args: list[str], message: str
) -> None:
    (folders / "empty.txt").touch()
    (folders / "latin1.txt").write_bytes(b"caf\xe9 au lait\n" * 10)
    before = sorted(folders.glob("[!.]*"))  # a lock file may stay
    code, _, err = bitnet(*(arg.format(root=folders) for arg in args))
    assert code == 2
    *_, line = err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert "Traceback" not in err
    assert sorted(folders.glob("[!.]*")) == before


def test_a_wrong_option_is_the_parsers_error(bitnet: Bitnet, folders: Path) -> None:
    code, _, err = bitnet("generate", folders / "model", "--max-token", "3")
    assert code == 2
    assert "--max-new-tokens" in err
