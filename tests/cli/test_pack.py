"""``bitnet pack``, called as from a shell."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bitnet.export.folder import load
from bitnet.linear import TernaryLinear

Bitnet = Callable[..., tuple[int, str, str]]
LARGE = ("model.safetensors", "tokenizer.model")


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
    assert len(numbers[0]) == 4


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
