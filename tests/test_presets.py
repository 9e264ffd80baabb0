"""The configs by name, and what a name that is none says."""

from pathlib import Path

import pytest

from bitnet.cli.common import split_args
from bitnet.config import load_config
from bitnet.presets import presets, root
from bitnet.schema import UserError

ROOT = Path(__file__).parents[1]


def test_every_config_of_the_checkout_is_a_preset_and_loads() -> None:
    found = presets()
    assert set(found.values()) == set((ROOT / "configs").rglob("*.toml"))
    assert found["15m"] == ROOT / "configs/15m.toml"
    assert found["fp/15m"] == ROOT / "configs/fp/15m.toml"
    names = list(found)
    assert names.index("15m") < names.index("125m") < names.index("fp/15m") < names.index("fp/125m")
    assert names[-2:] == ["gguf", "qat"]
    for path in found.values():
        load_config([path])


def test_an_overlay_is_no_run_by_itself(tmp_path: Path) -> None:
    for words, message in (
        (["gguf"], "gguf: needs a config before it, .*: bitnet train 15m gguf"),
        (["gguf", "train.steps=3"], "gguf: needs a config before it"),
        (["qat", "train.steps=3"], "qat: needs a model to start from: bitnet train qat train.init"),
        (
            ["16mm"],
            "of quickstart, 15m, .*boundary, fp/.*; gguf, with a config .*; qat, with a model",
        ),
    ):
        with pytest.raises(UserError, match=message):
            split_args(words)
    (tmp_path / "mine.toml").write_text("")
    for words in (
        ["60m", "gguf"],
        [str(tmp_path / "mine.toml"), "qat"],
        ["qat", "train.init_from=runs/fp/model"],
        ["qat", "qat.start=auto"],
        [str(ROOT / "configs/qat.toml")],  # by its path: said to be a config
    ):
        assert len(split_args(words)[0]) == sum("=" not in word for word in words)
    assert load_config(*split_args(["60m", "gguf"])).model.width_multiple == 256


def test_an_installed_package_has_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert root() == ROOT
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.toml").write_text("[model]\ndepth = 3\n")
    monkeypatch.setattr("bitnet.presets._CARRIED", tmp_path)
    assert presets() == {"mine": tmp_path / "configs" / "mine.toml"}


def test_a_word_is_a_file_before_it_is_a_preset(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["quickstart", "train.steps=3"]
    preset = str(ROOT / "configs/quickstart.toml")
    assert split_args(words) == ([preset], words[1:])
    assert load_config(*split_args(words)).run.name == "quickstart"
    (tmp_path / "quickstart").mkdir()  # a folder, such as a run's, is no config
    assert split_args(words) == ([preset], words[1:])
    (tmp_path / "quickstart").rmdir()
    (tmp_path / "quickstart").write_text("[model]\ndepth = 2\n")
    assert split_args(words) == (words[:1], words[1:])


@pytest.mark.parametrize(
    ("word", "near"),
    [("quikstart", "quickstart"), ("16m", "15m"), ("1b", "700m"), ("../15m", ""), ("x" * 5000, "")],
)
def test_a_wrong_name_is_one_line_with_the_nearest(word: str, near: str) -> None:
    with pytest.raises(
        UserError, match=r"expected section\.key=value .* quickstart, 15m"
    ) as caught:
        split_args([word])
    assert str(caught.value).endswith(f"; did you mean {near}?") == bool(near)
