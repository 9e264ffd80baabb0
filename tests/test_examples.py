"""Every script of examples/ runs, learns, and packs what it learned.

The scripts assert what they show, such as that the packed model gives the same logits.
"""

import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / name), run_name="example")


def test_every_example_has_a_test_and_is_short() -> None:
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    for path in EXAMPLES.glob("*.py"):
        assert path.stem in tests, path
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 100, path


def test_gpt(capsys: pytest.CaptureFixture[str]) -> None:
    losses = example("gpt.py")["main"](steps=6)
    assert losses[-1] < losses[0] - 0.5
    assert capsys.readouterr().out.endswith("the same logits, bit for bit: True\n")


def test_huggingface() -> None:
    script = example("huggingface.py")
    assert script["main"](steps=60) == script["TEXT"].decode()


def test_trainer() -> None:
    losses = example("trainer.py")["main"]()
    assert len(losses) == 20


def test_vit() -> None:
    assert example("vit.py")["main"]() > 0.9


def test_accelerate_loop() -> None:
    assert len(example("accelerate_loop.py")["main"]()) == 40


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*num_workers", "ignore:.*litlogger")
def test_lightning_loop() -> None:
    pytest.importorskip("lightning", reason="Lightning is not installed: pip install lightning")
    assert len(example("lightning_loop.py")["main"]()) == 40


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's call
def test_lora() -> None:
    pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    assert len(example("lora.py")["main"]()) == 40


def test_torch_export() -> None:
    assert "torch.ops.bitnet.ternary_linear" in example("torch_export.py")["main"]()
