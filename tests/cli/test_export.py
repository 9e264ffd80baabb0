"""``bitnet export``, called as from a shell."""

import errno
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bitnet.export.facts import read_facts
from bitnet.export.folder import load, save_model
from bitnet.export.formats import FORMATS
from bitnet.export.hf import load_hf

pytest.importorskip("transformers")
Bitnet = Callable[..., tuple[int, str, str]]


@pytest.mark.filterwarnings("ignore")  # of transformers, about itself
def test_a_model_is_exported_and_verified(bitnet: Bitnet, folders: Path, tmp_path: Path) -> None:
    code, out, err = bitnet(
        "export", folders / "model", "--to", "hf", "--out", tmp_path / "hf", "--verify"
    )
    assert (code, err) == (0, "")
    assert "hf, offline: " in out
    assert "7 matrices read back" in out
    assert "texts have the same ids" in out
    assert "greedy tokens are equal" in out
    assert out.endswith("verified\n")
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "README.md"),
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    }


def test_a_run_names_its_model_and_gives_the_card_its_numbers(
    bitnet: Bitnet, folders: Path, tmp_path: Path
) -> None:
    run = tmp_path / "my-run"
    shutil.copytree(folders / "model", run / "model")
    (run / "config.toml").write_text(
        '[run]\ndir = "/home/ada/secret/runs"\nname = "my-run"\n'
        '[data]\nsources = ["/home/ada/secret/texts/", "hf:org/set:part", "python-stdlib"]\n'
        'path = "..\\\\secret\\\\set"\ntokenizer = "secret/tokenizer.json"\n'
        '[train]\ninit_from = "~/secret/start/model"\n[distill]\nteacher = "/secret/big"\n'
        '[eval]\nsample_prompt = "a/b"\n[optim]\nlr = 1e-3\n'
    )
    rows: list[dict[str, object]] = [
        {"step": 5, "tokens": 500, "val_loss": 3.5, "val_bpb": 1.5},
        {"step": 9, "tokens": 900, "val_loss": 3.25, "val_bpb": 1.25},
        {"step": 9, "loss": 3.0},
    ]
    text = "\n".join(map(json.dumps, rows)) + '\n{"step": 10, "val_lo'
    (run / "metrics.jsonl").write_text(text)
    code, _, err = bitnet("export", run, "--to", "hf", "--kind", "online", "--out", run / "hf")
    assert code == 0, err
    card = (run / "hf" / "README.md").read_text()
    for part in ("# my-run", "900 in 9 steps", "3.2500 nats", "| 1.2500 |", "lr = 0.001"):
        assert part in card
    assert "| trained on | texts, hf:org/set:part, python-stdlib |" in card
    assert "secret" not in card, "paths are private"
    assert "ada" not in card
    for line in ('path = "set"', 'tokenizer = "tokenizer.json"', 'sample_prompt = "a/b"'):
        assert line in card
    (run / "config.toml").write_text("secret [")
    assert read_facts(run / "model").config == ""
    assert load_hf(run / "hf")[0].config.linear == "ternary"
    shutil.rmtree(run / "model")
    code, _, err = bitnet("export", run, "--to", "hf", "--out", tmp_path / "hf")
    assert (code, "is a run without a model" in err) == (2, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "name the format with --to: hf"),
        (("--to", "gugf", "--out", "x"), "--to: 'gugf' is none of "),
        (("--to", "hf"), "name what to write with --out"),
        (("--to", "hf", "--out", "x", "--kind", "of"), "--kind: 'of' is none of offline, packed"),
        (("--to", "hf", "--out", "there"), "--out there: exists already"),
        (("--to", "hf", "--out", "there/x/y"), "there: "),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    bitnet: Bitnet,
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").touch()
    code, out, err = bitnet("export", folders / "model", *words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_model_that_the_format_cannot_carry(
    bitnet: Bitnet, folders: Path, tmp_path: Path
) -> None:
    code, _, err = bitnet("export", folders / "fp", "--to", "hf", "--out", tmp_path / "hf")
    assert code == 2
    assert "carries model.linear = 'ternary', not 'fp'" in err
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(
    bitnet: Bitnet, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "README.md")

    monkeypatch.setattr("bitnet.export.hf_write.card", full)
    code, _, err = bitnet("export", folders / "model", "--to", "hf", "--out", tmp_path / "hf")
    assert (code, err) == (2, "error: README.md: No space left on device\n")
    assert not list(tmp_path.iterdir())


def test_an_export_that_differs_exits_1(
    bitnet: Bitnet, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaging(path: Path) -> object:
        model, tokenizer = load_hf(path)
        model.layers[0].mlp.up_proj.scale.mul_(1.5)
        return model, tokenizer

    monkeypatch.setattr("bitnet.export.hf_verify.load_hf", damaging)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    code, out, _ = bitnet(
        "export", folders / "model", "--to", "hf", "--out", tmp_path / "hf", "--verify"
    )
    assert code == 1
    assert "DIFFERS: layers.0.mlp.up_proj: scales differ" in out
    assert "not compared: transformers is not here" in out
    assert 'pip install "bitnet-train[hf]"' in out


def test_the_help_explains_every_kind(bitnet: Bitnet) -> None:
    code, out, _ = bitnet("export", "--help")
    assert code == 0
    words = " ".join(out.split())
    for format in FORMATS.values():
        for kind, about in format.kinds.items():
            assert f"--kind {kind}: {about}" in words


def test_one_file_runs_like_a_folder(bitnet: Bitnet, folders: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "model.safetensors"
    code, out, err = bitnet("export", folders / "model", "--to", "file", "--out", path, "--verify")
    assert code == 0, err
    assert "7 matrices read back" in out
    words = ("--prompt", "The ", "--max-new-tokens", "4", "--temperature", "0")
    spoken = bitnet("generate", path, *words)
    assert spoken[:2] == bitnet("generate", folders / "model", *words)[:2]
    assert spoken[0] == 0, spoken
    code, out, err = bitnet("export", path, "--to", "folder", "--out", tmp_path / "f", "--verify")
    assert code == 0, err


def test_gguf_names_every_setting_that_does_not_fit(
    bitnet: Bitnet, folders: Path, tmp_path: Path
) -> None:
    code, _, err = bitnet("export", folders / "model", "--to", "gguf", "--out", tmp_path / "m.gguf")
    assert code == 2
    for part in ("model.activation = 'relu2'", "model.d_model", "configs/gguf.toml"):
        assert part in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["layers.0.mlp.up_proj.weight", "embed_tokens.weight"])
def test_a_model_that_diverged_is_not_exported(
    bitnet: Bitnet, folders: Path, tmp_path: Path, name: str
) -> None:
    model, tokenizer = load(folders / "model")
    model.get_parameter(name).data[1, 2] = float("nan")
    save_model(tmp_path / "model", model, tokenizer)
    for to in FORMATS:
        code, _, err = bitnet("export", tmp_path / "model", "--to", to, "--out", tmp_path / "out")
        assert (code, f"model: {name} holds NaN or infinity" in err) == (2, True)
    code, _, err = bitnet("pack", tmp_path / "model", "--out", tmp_path / "out")
    assert (code, f"model: {name} holds NaN or infinity" in err) == (2, True)
    assert not (tmp_path / "out").exists()
