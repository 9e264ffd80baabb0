"""Values that no option can have: one line that names the option, and exit code 2."""

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Never

import pytest
import typer

from bitnet.cli import bench_decode as cli_bench_decode
from bitnet.cli import bench_exact as cli_bench_exact
from bitnet.cli import bench_kernels as cli_bench_kernels
from bitnet.cli import bench_train as cli_bench_train
from bitnet.cli import inspect_kernels as cli_kernels
from bitnet.cli import ptq as cli_ptq
from bitnet.config import describe, load_config
from bitnet.data.tokenizer import train_tokenizer
from bitnet.evaluate import EvalResult
from bitnet.export.folder import save_model
from bitnet.model import ModelConfig, Transformer
from bitnet.schema import UserError
from tests.helpers.training_script import train

Bitnet = Callable[..., tuple[int, str, str]]
TEXT = "\n\n".join(f"def f{i}(x):\n    return x + {i}" for i in range(300))
HUGE, LONG = "1" + "0" * 30, "9" * 400
SURROGATE = os.fsdecode(b"a\xff")
"""What an argument that is no UTF-8 becomes."""
WORDS = ["", " ", "nonsense", "a\nb", "a\0b", SURROGATE, "x" * 5000, "-1", "é😀"]
NUMBERS = ["", "x", "-1", "nan", "inf", "-inf", "1e400", HUGE, LONG, "-" + HUGE, "²", "1\n"]
DEVICES = ["cuda:99", "cuda:-1", "cuda:", "meta", "xpu", "mps", "cpu:3", "cpu:" + HUGE, *WORDS]
SHARES = 4
"""Of the values, one of so many is tried unless slow tests are."""
PATHS = ["", "a\0b", SURROGATE + "/x", "a\nb/x", "x" * 5000, "/dev/null/x", "/dev/zero", "/"]

# a line that works, and values for its options; "": for an argument
COMMANDS: dict[str, tuple[str, dict[str, list[str]]]] = {
    "prepare": (
        "prepare {root}/text.txt --path {new}/set --tokenizer {root}/tokenizer.model",
        {
            "--config": PATHS,
            "--path": PATHS[1:],
            "--vocab-size": NUMBERS,
            "--tokenizer": PATHS[1:],
            "--val-fraction": NUMBERS,
            "--text-field": WORDS,
        },
    ),
    "inspect config": ("inspect config", {"": [*PATHS, *WORDS]}),
    "inspect ranks": (
        "inspect config data.vocab_size=300 --world-size 2",
        dict.fromkeys(("--world-size", "--local-size", "--bandwidth", "--network"), NUMBERS),
    ),
    "inspect model": ("inspect model {root}/model", {"--context": NUMBERS}),
    "inspect kernels": (
        "inspect kernels",
        {"--arch": WORDS, "--kernel": WORDS, "--sass": PATHS, "--csv": PATHS},
    ),
    "pack": ("pack {root}/model --out {new}/packed", {"--out": PATHS, "--tokens": NUMBERS}),
    "generate": (
        "generate {root}/model --max-new-tokens 2",
        {
            "--prompt": WORDS,
            "--max-new-tokens": NUMBERS,
            "--temperature": NUMBERS,
            "--top-k": NUMBERS,
            "--top-p": NUMBERS,
            "--seed": NUMBERS,
            "--stop": WORDS,
            "--device": DEVICES,
            "--kernel": WORDS,
            "--kv": WORDS,
            "--head": WORDS,
        },
    ),
    "eval": (
        "eval {root}/model --text {root}/text.txt",
        {
            "--text": PATHS,
            "--split": WORDS,
            "--stride": NUMBERS,
            "--context": NUMBERS,
            "--limit": NUMBERS,
            "--fewshot": NUMBERS,
            "--include-path": PATHS,
            "--device": DEVICES,
            "--kernel": WORDS,
        },
    ),
    "chat": (
        "chat {root}/model",
        {
            "--system": WORDS,
            "--max-new-tokens": NUMBERS,
            "--temperature": NUMBERS,
            "--top-k": NUMBERS,
            "--top-p": NUMBERS,
            "--seed": NUMBERS,
            "--stop": WORDS,
            "--context": NUMBERS,
        },
    ),
    "eval data": ("eval {root}/model", {"--data": PATHS}),
    "ptq": (
        "ptq {root}/fp --text {root}/text.txt --methods rtn --bits 8 --eval-tokens 64",
        {
            "--text": PATHS,
            "--calibration": PATHS,
            "--bits": WORDS + NUMBERS,
            "--methods": WORDS,
            "--group-size": NUMBERS,
            "--activation-bits": NUMBERS,
            "--calibration-tokens": NUMBERS,
            "--eval-tokens": NUMBERS,
            "--csv": PATHS,
            "--out": PATHS,
            "--device": DEVICES,
        },
    ),
    "ptq data": ("ptq {root}/fp", {"--data": PATHS}),
    "convert": (
        "convert {root}/fp --out {new}/converted",
        {"--out": PATHS, "--context": NUMBERS, "--calibration": PATHS, "--text": PATHS},
    ),
    "export": (
        "export {root}/model --to hf --out {new}/exported",
        {"--to": WORDS, "--kind": WORDS, "--out": PATHS},
    ),
    "bench kernels": (
        "bench kernels --quick --no-estimate --out {new}/k.csv",
        {
            "--shape": WORDS + NUMBERS + [f"{HUGE}x{HUGE}", "0x0", "4x-4"],
            "--model": WORDS,
            "--m": NUMBERS,
            "--kernel": WORDS,
            "--dtype": WORDS,
            "--cache": WORDS,
            "--out": PATHS,
            "--device": DEVICES,
            "--threads": NUMBERS,
            "--replays": NUMBERS,
            "--arch": WORDS,
        },
    ),
    "bench exact": (
        "bench exact --quick --out {new}/e.csv",
        {
            "--shape": WORDS,
            "--m": NUMBERS,
            "--jobs": NUMBERS,
            "--limit": NUMBERS,
            "--device": DEVICES,
            "--out": PATHS,
        },
    ),
    "bench tune": (
        "bench tune",
        {"--shape": WORDS, "--model": WORDS, "--m": NUMBERS, "--device": DEVICES},
    ),
    "bench report": ("bench report --check", {"--root": PATHS}),
    "bench train": (
        "bench train --quick",
        {
            "": WORDS,
            "--size": WORDS + NUMBERS,
            "--config": PATHS[1:],
            "--variant": WORDS,
            "--tokens": NUMBERS,
            "--micro-batches": NUMBERS,
            "--steps": NUMBERS,
            "--warmup": NUMBERS,
            "--device": DEVICES,
            "--dtype": WORDS,
            "--threads": NUMBERS,
            "--seed": NUMBERS,
            "--out": PATHS,
        },
    ),
    "bench decode": (
        "bench decode --quick --contender ours-auto",
        {
            "--size": WORDS + NUMBERS,
            "--model": PATHS,
            "--contender": WORDS,
            "--batch": NUMBERS,
            "--prompt": NUMBERS,
            "--new": NUMBERS,
            "--rounds": NUMBERS,
            "--device": DEVICES,
            "--threads": NUMBERS,
            "--seed": NUMBERS,
            "--out": PATHS,
        },
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text.txt, tokenizer.model, and small models in model/ and fp/."""
    root = tmp_path_factory.mktemp("hostile")
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    tokenizer = train_tokenizer([TEXT], 300, root / "tokenizer.model", 1)
    shape: dict[str, Any] = {"d_model": 32, "n_layers": 1, "n_heads": 2, "d_ff": 48}
    for name, linear in (("model", "ternary"), ("fp", "fp")):
        config = ModelConfig(**shape, vocab_size=300, max_seq_len=32, linear=linear)  # type: ignore[arg-type]
        save_model(root / name, Transformer(config), tokenizer)
    return root


@pytest.fixture
def nothing_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes time ends the command, or is done at once."""

    def reached(*args: object, **options: object) -> Never:
        raise typer.Exit(0)

    for module, name in (
        (cli_bench_kernels, "_measure"),
        (cli_bench_exact, "check_all"),
        (cli_bench_train, "_race"),
        (cli_bench_decode, "Race"),
        (cli_kernels, "inspect"),
    ):
        monkeypatch.setattr(module, name, reached)
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # nobody talks
    monkeypatch.setattr("bitnet_kernels.gpu.common.INTERPRETED", False)
    monkeypatch.setattr(cli_ptq, "evaluate_windows", lambda *_: EvalResult(1.0, 1.0, 1, 1))


def names(message: str, option: str, value: str) -> bool:
    """Whether a line says which option, config key or file is meant."""
    key, shown = option.strip("-").replace("-", "_"), value.encode(errors="backslashreplace")
    path = " ".join(shown.decode().split()).replace("\0", "\\x00").removesuffix("/x")[:1000]
    return option in message or key in message or (bool(path) and path in message)


def attack(line: str, option: str, value: str, bitnet: Bitnet) -> None:
    """The command takes the value, or refuses it as a mistake of the user's."""
    words = line.split()
    if option in words:
        at = words.index(option)
        del words[at : at + 2]
    code, _, err = bitnet(*words, *([option] if option else []), value)
    what = f"{words} {option} {value[:50]!r}: {code}\n{err}"
    assert code in (0, 2), what
    if code == 2:
        last = err.splitlines()[-1]
        assert last.lower().startswith("error: "), what
        assert "Traceback" not in err, what
        assert names(last, option, value) or "lone surrogate" in last, what


@pytest.mark.usefixtures("nothing_long")
@pytest.mark.parametrize(
    "share", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, SHARES))]
)
@pytest.mark.parametrize("command", COMMANDS)
def test_options(
    command: str,
    share: int,
    root: Path,
    tmp_path: Path,
    bitnet: Bitnet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A share of the values for each option; other options have other values of the same kind."""
    monkeypatch.chdir(tmp_path)
    line, options = COMMANDS[command]
    for number, (option, values) in enumerate(options.items()):
        for at, value in enumerate(values):
            if (at + number) % SHARES == share:
                new = tmp_path / f"{number}-{at}"
                attack(line.format(root=root, new=new), option, value, bitnet)


VALUES = ["", "-1", "0", "nan", "-inf", "1e400", HUGE, LONG, "-" + LONG, "true", "[[[]]]"]
VALUES += ["'a\\u0000b'", SURROGATE, "a\nb", "x" * 5000, "{a = 1}", "1979-05-27", "cuda:99", "meta"]


@pytest.mark.parametrize("section", sorted({section for section, *_ in describe()}))
def test_overrides(section: str) -> None:
    """Each key of a config takes each value, or one line names it."""
    refused, unnamed = 0, []
    for name, key, *_ in describe():
        for value in VALUES * (name == section):
            try:
                load_config([], [f"{name}.{key}={value}"]).resolve()
            except UserError as error:
                refused += 1
                if f"{name}.{key}" not in str(error) and not names(str(error), key, value):
                    unnamed.append(f"{name}.{key}={value[:50]!r}: {error}")
    assert refused
    assert not unnamed


@pytest.mark.parametrize("key", ["train.device", "distill.device"])
@pytest.mark.parametrize("device", ["cuda:99", "meta", "xpu", "cpu:3", "cpu:" + HUGE, " ", "a\0"])
def test_devices_of_a_config_are_named(key: str, device: str) -> None:
    with pytest.raises(UserError, match=f"^{key}: .* cannot be used here"):
        train.pick_device(device, key)
