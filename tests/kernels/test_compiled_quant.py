"""The quantization kernels compiled for GPUs that are not present: exact arithmetic, wide loads, no
spills. ``compiled_quant.py`` compiles them in a separate process."""

import json
from typing import Any

import pytest

from tests.helpers.scripts import CompiledBy

pytestmark = pytest.mark.slow  # it compiles for half a minute


@pytest.fixture(scope="module")
def compiled(compiled_by: CompiledBy) -> dict[str, dict[str, Any]]:
    return json.loads((compiled_by("compiled_quant.py") / "found.json").read_text())


def regular(compiled: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: form for name, form in compiled.items() if not name.startswith(("ones ", "odd "))}


def test_every_form_is_there(compiled: dict[str, dict[str, Any]]) -> None:
    names = {name.split()[0] for name in regular(compiled)}
    norms = {"rmsnorm_quant", "add_rmsnorm_quant", "relu2_mul_rmsnorm_quant"}
    assert names == {"quant"} | norms
    for sm in (80, 90):
        assert f"rmsnorm_quant bf16 K=4096 sm_{sm}" in compiled
        assert f"quant fp32 K=8192 sm_{sm}" in compiled
    assert len(compiled) - len(regular(compiled)) == 2 + 4


def test_nothing_spills(compiled: dict[str, dict[str, Any]]) -> None:
    for name, form in compiled.items():
        assert form["spills"] == form["local"] == 0, name
        assert form["registers"] <= 65536, name  # of an SM: a program fits


def test_loads_are_of_16_bytes(compiled: dict[str, dict[str, Any]]) -> None:
    for name, form in regular(compiled).items():
        assert form["loads"] == [".128"], name
    # It can be failed: with rows that are not aligned nothing is wide.
    assert compiled["odd fp16 quant bf16 K=4096 sm_90"]["loads"] == [".U16"]


def test_arithmetic_is_exact(compiled: dict[str, dict[str, Any]]) -> None:
    """Divisions and roots round to nearest; nothing fuses; nothing is flushed."""
    norm = ["div.rn.f32", "div.rn.f64", "sqrt.rn.f32"]
    for name, form in regular(compiled).items():
        if name.startswith("quant"):
            assert form["floats"] == ["div.rn.f32"], name
        else:
            assert form["floats"] == norm, name
    for name, form in compiled.items():
        assert set(form["floats"]) <= set(norm), name
        assert not form["ftz"], name
