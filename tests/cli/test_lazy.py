"""Commands are imported when they are looked up."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from typer.core import TyperGroup

from bitnet.cli.lazy import Commands
from bitnet.cli.main import bitnet as program

Bitnet = Callable[..., tuple[int, str, str]]


def commands(group: Any, words: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """All commands of a group and its groups, each with the words that call it."""
    found = []
    for name, one in group.commands.items():
        inner = isinstance(one, TyperGroup)
        found += commands(one, (*words, name)) if inner else [((*words, name), one)]
    return found


def test_a_command_imports_no_other() -> None:
    """In a fresh process: the others, and what only they need, stay out."""
    code = (
        "import sys\nfrom bitnet.cli.main import bitnet\n"
        "bitnet.commands['generate']\nprint(*sys.modules)"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True
    ).stdout.split()
    assert "bitnet.cli.generate" in loaded
    others = {".".join(("bitnet.cli", "_".join(words))) for words, _ in commands(program)}
    assert len(others) > 12
    assert not (others - {"bitnet.cli.generate"}) & set(loaded)
    assert not {"bitnet.qat.ptq", "bitnet.bench.train", "bitnet_kernels.sass"} & set(loaded)


@pytest.mark.parametrize("words", [words for words, _ in commands(program)], ids=" ".join)
def test_help_of_every_command(words: tuple[str, ...], bitnet: Bitnet) -> None:
    code, out, err = bitnet(*words, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: bitnet {' '.join(words)} ")
    assert len(out.splitlines()) > 8


@pytest.mark.parametrize("words", [(), ("inspect",), ("bench",)], ids=" ".join)
def test_help_of_a_group_lists_its_commands_in_full_sentences(
    words: tuple[str, ...], bitnet: Bitnet
) -> None:
    code, out, _ = bitnet(*words, "--help")
    assert code == 0
    group = program.commands[words[0]] if words else program
    listed = out.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed] == list(group.commands)
    longest = max(map(len, group.commands))
    for command in group.commands.values():  # on a terminal of 80 columns, 6 of them for spaces
        short = command.get_short_help_str(78 - 6 - longest)
        assert short.endswith(".")
        assert not short.endswith("...")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evla"], "No such command 'evla'. Did you mean 'eval'?"),
        (["bench", "trian"], "No such command 'trian'. Did you mean 'train'?"),
    ],
)
def test_an_unknown_command(words: list[str], said: str, bitnet: Bitnet) -> None:
    code, _, err = bitnet(*words)
    assert code == 2
    assert said in err


def test_a_missing_command() -> None:
    with pytest.raises(KeyError):
        Commands({"a": "bitnet.cli.pack:pack_command"})["b"]
