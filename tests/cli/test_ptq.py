"""``bitnet ptq``, called as from a shell."""

import csv
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from bitnet.config import DataConfig
from bitnet.data.loader import TokenDataset, sequential_windows
from bitnet.data.prepare import prepare
from bitnet.data.tokenizer import train_tokenizer
from bitnet.data.windows import text_windows
from bitnet.evaluate import evaluate_text, evaluate_windows
from bitnet.export.folder import load, read_config, save_model
from bitnet.model import ModelConfig, Transformer
from bitnet.qat.comparison import CALIBRATED, ENOUGH, WORTH
from bitnet.qat.gptq import gptq
from bitnet.qat.recipe import Recipe

Ptq = Callable[..., tuple[int, str, str]]
TEXT = "\n\n".join(f"def f{i % 97}(x):\n    return x + {i}  # naïve ☃" for i in range(500))
SPAN = 32


@pytest.fixture
def ptq(bitnet: Ptq) -> Ptq:
    """Runs ``bitnet ptq ...``; returns exit code, stdout and stderr."""
    return partial(bitnet, "ptq")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text.txt, other.txt, data/ prepared from text, and models: fp/ (trained a little), ternary/,
    inside/ (norms in the linear layers)."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("ptq")
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    (root / "other.txt").write_text(TEXT[::-1][:3000], encoding="utf-8")
    tokenizer = train_tokenizer([TEXT], 300, root / "tokenizer.model", 1)
    prepare(
        DataConfig(
            path=str(root / "data"),
            sources=[str(root / "text.txt")],
            tokenizer=str(root / "tokenizer.model"),
            val_fraction=0.1,
        )
    )
    shape: dict[str, Any] = {
        "n_layers": 2,
        "d_model": 48,
        "n_heads": 2,
        "d_ff": 80,
        "vocab_size": 300,
        "max_seq_len": SPAN,
    }
    save_model(root / "ternary", Transformer(ModelConfig(**shape)), tokenizer)
    inside = ModelConfig(linear="fp", norm_placement="in_linear", **shape)
    save_model(root / "inside", Transformer(inside), tokenizer)
    model = Transformer(ModelConfig(linear="fp", **shape))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    windows = torch.stack(text_windows(tokenizer, TEXT, SPAN)[:-1])
    for _ in range(80):
        batch = windows[torch.randint(len(windows), (8,))]
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_model(root / "fp", model, tokenizer)
    return root


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_all_methods_on_a_data_folder(ptq: Ptq, root: Path, tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    code, out, err = ptq(
        *(root / "fp", "--data", root / "data", "--bits", "8,2,1.58", "--csv", table),
        *("--group-size", "20", "--calibration-tokens", "512", "--eval-tokens", "1024"),
    )
    assert code == 0, err
    rows = rows_of(table)
    methods = ["rtn", "gptq", "awq", "smoothquant"]
    assert [row["method"] for row in rows] == ["full precision", *methods, *methods, *methods]
    assert [float(row["bits"]) for row in rows] == [32, *[8] * 4, *[2] * 4, *[1.58] * 4]
    for row in rows:
        assert math.exp(float(row["loss"])) == pytest.approx(float(row["perplexity"]))
        growth = float(row["perplexity"]) / float(rows[0]["perplexity"]) - 1
        assert float(row["growth"]) == pytest.approx(growth, abs=1e-9)
        assert f"{float(row['loss']):.4f}" in out
        assert int(row["tokens"]) == 1024
    growths = {(row["method"], row["bits"]): float(row["growth"]) for row in rows}
    assert abs(growths["gptq", "8.0"]) < 0.01 < growths["rtn", "2.0"]
    assert growths["gptq", "2.0"] < growths["rtn", "2.0"]
    assert "8 bits: PTQ is enough" in out
    assert re.search(r"^1\.58 bits: QAT (is likely worth it|needed) \(", out, re.M)
    model, tokenizer = load(root / "fp")
    windows = sequential_windows(TokenDataset(root / "data", "val"), SPAN, 1024)
    expected = evaluate_windows(model, windows, tokenizer.count_bytes)
    assert float(rows[0]["loss"]) == pytest.approx(expected.loss)
    assert float(rows[0]["bits_per_byte"]) == pytest.approx(expected.bits_per_byte)


def test_text_and_calibration_files_and_the_saved_model(
    ptq: Ptq, root: Path, tmp_path: Path
) -> None:
    saved, table = tmp_path / "w3", tmp_path / "rows.csv"
    code, out, err = ptq(
        *(root / "fp", "--text", root / "text.txt", "--calibration", root / "other.txt"),
        *("--bits", "3", "--methods", "gptq", "--group-size", "0", "--eval-tokens", "0"),
        *("--out", saved, "--csv", table),
    )
    assert code == 0, err
    assert "weights only" not in out
    model, tokenizer = load(saved)
    assert read_config(saved).quant == Recipe("int", bits=3, granularity="row")
    result = evaluate_text(model, tokenizer, TEXT)
    assert float(rows_of(table)[1]["loss"]) == pytest.approx(result.loss, rel=1e-6)
    assert float(rows_of(table)[1]["bits_per_byte"]) == pytest.approx(result.bits_per_byte)
    source, _ = load(root / "fp")
    calibration = text_windows(tokenizer, (root / "other.txt").read_text(encoding="utf-8"), SPAN)
    ids = torch.stack([window[:-1] for window in calibration if len(window) == SPAN + 1])
    expected = gptq(source, read_config(saved).quant, ids).state_dict()
    assert expected.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_rounding_needs_no_calibration(ptq: Ptq, root: Path) -> None:
    code, out, err = ptq(
        *(root / "fp", "--text", root / "text.txt", "--methods", "rtn", "--bits", " 6, 6 "),
        *("--activation-bits", "0", "--eval-tokens", "100"),
    )
    assert code == 0, err
    assert "weights only, 96 tokens" in out
    assert len(re.findall(r"^ *rtn ", out, re.M)) == 1


def test_progress_on_a_terminal(ptq: Ptq, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = (root / "fp", "--text", root / "text.txt", "--methods", "rtn", "--bits", "4")
    code, _, err = ptq(*args)
    assert code == 0
    lines = [line.partition(": perplexity ")[0] for line in err.splitlines()]
    assert lines == ["full precision, 32 bits", "rtn, 4 bits"]  # each as it is had
    monkeypatch.setenv("FORCE_COLOR", "1")
    code, out, err = ptq(*args)
    assert code == 0
    for stage in ("full precision: evaluation", "rtn, 4 bits: evaluation"):
        assert stage in err
        assert stage not in out


def test_rows_survive_a_failure(ptq: Ptq, root: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("something is NaN")

    monkeypatch.setitem(CALIBRATED, "gptq", broken)
    table = tmp_path / "rows.csv"
    args = ("--data", root / "data", "--methods", "rtn,gptq", "--eval-tokens", "64")
    code, _, err = ptq(root / "fp", *args, "--bits", "4,3", "--csv", table)
    assert code == 2
    assert err.splitlines()[-1] == "error: gptq, 4 bits: something is NaN"
    assert [row["method"] for row in rows_of(table)] == ["full precision", "rtn"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fp"], "either --text FILE or --data FOLDER"),
        (["fp", "--text", "text.txt", "--data", "data"], "either --text FILE or --data FOLDER"),
        (["fp", "--text", "text.txt"], "gptq, awq, smoothquant: needs text to calibrate on"),
        (
            ["fp", "--data", "data", "--bits", "5"],
            "--bits: '5' is none of 8, 6, 4, 3, 2, 1.58; did you mean 6?",
        ),
        (["fp", "--data", "data", "--bits", "1"], "did you mean 1.58?"),
        (["fp", "--data", "data", "--bits", "7.2"], "did you mean 8?"),
        (["fp", "--data", "data", "--bits", "four"], "--bits: 'four' is none of"),
        (["fp", "--data", "data", "--bits", ","], "--bits: names nothing; expected some of 8, 6"),
        (["fp", "--data", "data", "--methods", "gtpq"], "did you mean gptq?"),
        (["fp", "--data", "data", "--activation-bits", "3"], "expected 0 or 4 to 8; nearest: 4"),
        (["fp", "--data", "data", "--out", "new"], "--out: saves one model: name one method"),
        (
            ["fp", "--data", "data", "--bits", "4", "--methods", "rtn", "--out", "fp"],
            "exists already; choose another folder",
        ),
        (["ternary", "--data", "data"], "expected a full-precision model"),
        (["inside", "--data", "data"], "inside: norm_placement = 'in_linear'"),
        (["fp", "--text", "empty.txt", "--methods", "rtn"], "empty.txt: is empty"),
        (["fp", "--text", "text.txt", "--calibration", "empty.txt"], "empty.txt: is empty"),
        (
            ["fp", "--text", "text.txt", "--calibration", "short.txt"],
            "short.txt: too short to calibrate on: one window takes 33 tokens",
        ),
        (["fp", "--text", "text.txt", "--calibration", "latin.txt"], "latin.txt: not UTF-8 text"),
        (["fp", "--text", "none.txt", "--methods", "rtn"], "none.txt: No such file"),
        (["fp", "--data", "none"], "none does not exist"),
        (["nothing", "--data", "data"], "no such model folder"),
        (["fp", "--data", "data", "--device", "tpu"], "--device: 'tpu' cannot be used"),
        (["fp", "--data", "data", "--csv", "no/where.csv"], "there is no folder no"),
        (["fp", "--data", "data", "--csv", "fp/config.json"], "is no result of bitnet ptq"),
        (["fp", "--data", "data", "--text", "fp/config.json"], "not both"),
    ],
)
def test_mistakes_are_one_line(
    ptq: Ptq, root: Path, args: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    Path("empty.txt").write_text(" \n", encoding="utf-8")
    Path("short.txt").write_text("def f", encoding="utf-8")
    Path("latin.txt").write_bytes(b"\xe9")
    code, _, err = ptq(*args)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_quantized_model_is_refused(ptq: Ptq, root: Path, tmp_path: Path) -> None:
    options = ("--methods", "rtn", "--bits", "4", "--eval-tokens", "64", "--data", root / "data")
    assert ptq(root / "fp", *options, "--out", tmp_path / "w4")[0] == 0
    code, _, err = ptq(tmp_path / "w4", *options)
    assert code == 2
    assert "expected a full-precision model" in err


def test_help_states_the_thresholds(ptq: Ptq) -> None:
    code, out, _ = ptq("--help")
    assert code == 0
    text = " ".join(out.split())
    assert f"less than {ENOUGH:.0%}" in text
    assert f"{ENOUGH:.0%} to {WORTH:.0%}" in text
    assert f"by {WORTH:.0%} or more" in text
