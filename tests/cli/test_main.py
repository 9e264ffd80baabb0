"""The bitnet command, called as from a shell: what it prints, and how mistakes end."""

import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet.cli.generate import packed_bf16
from bitnet.engine.engine import Engine
from bitnet.evaluate import compressor_baselines
from bitnet.export.folder import load
from bitnet.generate import encode_prompt, generate
from bitnet.linear import BitLinear, TernaryLinear
from tests.helpers.folders import write_folders

Bitnet = Callable[..., tuple[int, str, str]]
LARGE = ("model.safetensors", "tokenizer.model")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text.txt, and a small untrained model in model/ and its full-precision baseline in fp/."""
    root = tmp_path_factory.mktemp("cli")
    write_folders(root)
    return root


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
    assert 2 < bits < 9  # untrained: ln(320) nats a token
    assert "gzip -9" in out
    assert "xz -9" in out
    assert bitnet("eval", folders / "model", "--data", data, "--split", "train")[0] == 0


def test_pack_proves_and_the_packed_model_evaluates_alike(
    bitnet: Bitnet, folders: Path, tmp_path: Path
) -> None:
    packed = tmp_path / "packed"
    code, out, _ = bitnet("pack", folders / "model", "--out", packed, "--tokens", "5")
    assert code == 0
    assert "proof: all equal, bit for bit" in out
    assert "7 matrices" in out
    assert "15 greedy tokens" in out
    model, _ = load(packed)
    assert any(isinstance(module, TernaryLinear) for module in model.modules())
    tables = [
        bitnet("eval", folder, "--text", folders / "text.txt")[1]
        for folder in (folders / "model", packed)
    ]
    numbers = [re.findall(r"\d+\.\d+", table) for table in tables]
    assert numbers[0] == numbers[1]
    assert len(numbers[0]) == 3


def test_pack_exits_1_when_the_proof_fails(
    bitnet: Bitnet, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaging(folder: Path | str) -> object:
        model, tokenizer = load(folder)
        if Path(folder) == tmp_path / "packed":
            model.layers[0].mlp.up_proj.scale.mul_(1.5)
        return model, tokenizer

    monkeypatch.setattr("bitnet.cli.pack.load", damaging)
    code, out, _ = bitnet("pack", folders / "model", "--out", tmp_path / "packed")
    assert code == 1
    assert "DIFFERS: layers.0.mlp.up_proj: scales differ" in out


def test_generate_streams_what_it_returns(bitnet: Bitnet, folders: Path) -> None:
    args = ("generate", folders / "model", "--prompt", "def f", "--max-new-tokens", "20")
    code, out, _ = bitnet(*args)
    assert code == 0
    assert out.startswith("def f")
    assert len(out) > len("def f\n")
    assert bitnet(*args)[1] == out
    assert bitnet(*args, "--seed", "5")[1] != out
    code, both, _ = bitnet(*args, "--prompt", "x = ☃", "--temperature", "0")
    assert code == 0
    assert "--- 1\ndef f" in both
    assert "--- 2\nx = ☃" in both


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


def test_extreme_sampling_is_greedy(bitnet: Bitnet, folders: Path) -> None:
    args = ("generate", folders / "model", "--prompt", "def f", "--max-new-tokens", "8")
    greedy = bitnet(*args, "--temperature", "0")[1]
    for options in (("--temperature", "5e-324"), ("--top-p", "1e-300"), ("--top-k", "1")):
        assert bitnet(*args, *options)[:2] == (0, greedy)


def test_inspect(bitnet: Bitnet) -> None:
    configs = Path(__file__).parents[2] / "configs"
    code, out, _ = bitnet("inspect", configs / "15m.toml")
    assert code == 0
    expected = ("15,447,168", "train.steps", "config", "model.depth", "weights in packed", "0.004")
    for part in expected:
        assert part in out
    assert "packed" not in bitnet("inspect", configs / "fp" / "15m.toml")[1]
    assert "d_model" in bitnet("inspect", configs / "15m.toml", "model.depth=8")[1]


MISTAKES = [
    (["generate", "{root}/none"], "none"),
    (["generate", "{root}/model", "--prompt", "x" * 500], "leaves no room"),
    (["generate", "{root}/model", "--temperature", "-1"], "temperature"),
    (["generate", "{root}/model", "--top-p", "2"], "top_p"),
    (["generate", "{root}/model", "--device", "tpu"], "tpu"),
    (["generate", "{root}"], "did you mean"),
    (["eval", "{root}/model"], "--text FILE or --data FOLDER"),
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


def test_every_help_has_a_text(bitnet: Bitnet) -> None:
    code, out, _ = bitnet("--help")
    assert code == 0
    for command in ("prepare", "inspect", "pack", "generate", "eval"):
        assert command in out
        code, text, _ = bitnet(command, "--help")
        assert code == 0
        assert len(text.splitlines()) > 8


def test_a_gpu_generates_in_bf16_with_the_codes_of_the_fp32_weights(folders: Path) -> None:
    """The cast itself, which works on any device."""
    model, _ = load(folders / "model")
    expected = load(folders / "model")[0].layers[0].self_attn.q_proj
    assert isinstance(expected, BitLinear)
    codes, scale = expected.quantize()
    cast = packed_bf16(model, "auto")
    layer = cast.layers[0].self_attn.q_proj
    assert isinstance(layer, TernaryLinear)
    assert torch.equal(layer.codes(), codes)
    assert layer.scale.dtype == torch.float32
    assert torch.equal(layer.scale, scale)
    floats = {p.dtype for name, p in cast.named_parameters() if not name.endswith("scale")}
    assert floats == {torch.bfloat16}
    assert {p.dtype for p in packed_bf16(load(folders / "fp")[0], "auto").parameters()} == {
        torch.bfloat16
    }


def test_generation_prints_a_replacement_character_once(bitnet: Bitnet, folders: Path) -> None:
    prompt = "def f1\N{REPLACEMENT CHARACTER}"
    args = ("generate", folders / "model", "--prompt", prompt, "--max-new-tokens", "0")
    assert bitnet(*args)[:2] == (0, prompt + "\n")
    _, out, _ = bitnet(*args[:-1], "8", "--temperature", "0")
    assert out.startswith(prompt)
    _, again, _ = bitnet(*args[:-1], "8", "--temperature", "0", "--prompt", "x")
    assert again.startswith(f"--- 1\n{out}--- 2\n")
    model, tokenizer = load(folders / "model")
    ids = encode_prompt(tokenizer, prompt)
    (new,) = generate(model, [ids], 8, eos_id=tokenizer.eos_id)
    assert out == tokenizer.decode([*ids, *new]) + "\n"


@pytest.mark.parametrize("spelling", [".", "./", "../model", "sub/..", "../link", "../model/."])
def test_pack_writes_beside_the_folder_however_it_is_spelt(
    bitnet: Bitnet, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(folders / "model", model)
    (model / "sub").mkdir()
    (tmp_path / "link").symlink_to(model)
    monkeypatch.chdir(model)
    code, _, err = bitnet("pack", spelling, "--tokens", "1")
    assert code == 0, err
    name = "link-packed" if "link" in spelling else "model-packed"
    assert {path.name for path in tmp_path.iterdir()} == {"model", "link", name}
    assert {path.name for path in model.iterdir()} == {"sub", "config.json", *LARGE}
