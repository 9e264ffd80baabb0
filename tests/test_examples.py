"""Every script of examples/ runs, learns, and packs what it learned."""

import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / name), run_name="example")


def test_every_example_has_a_test() -> None:
    tested = {"gpt.py", "huggingface.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


def test_gpt(capsys: pytest.CaptureFixture[str]) -> None:
    losses = example("gpt.py")["main"](steps=6)
    assert losses[-1] < losses[0] - 0.5
    assert capsys.readouterr().out.endswith("the same logits, bit for bit: True\n")


def test_huggingface() -> None:
    script = example("huggingface.py")
    assert script["main"](steps=60) == script["TEXT"].decode()
