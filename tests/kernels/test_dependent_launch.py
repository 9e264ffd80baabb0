"""Kernels that may start before the preceding one has ended: each waits before it touches memory,
in the machine code of all of them (``compiled_dependent.py`` compiles them in a separate process);
and which of them are launched early."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.scripts import CompiledBy

ROOT = Path(__file__).parents[2]
CONTROL = ["griddepcontrol.wait", "griddepcontrol.launch_dependents"]


@pytest.fixture(scope="module")
def compiled(compiled_by: CompiledBy) -> dict[str, Any]:
    return json.loads((compiled_by("compiled_dependent.py") / "found.json").read_text())


def test_every_kernel_waits_before_it_touches_memory(compiled: dict[str, Any]) -> None:
    """One form of each here, and all others where the ``compiled_*.py`` make them."""
    assert compiled["checked"] == compiled["kernels"]
    assert {"gemv_kernel", "combine_kernel", "unpack_kernel"} <= set(compiled["kernels"])


@pytest.mark.parametrize(
    ("form", "control", "ptx", "sass"),
    [
        ("right", CONTROL, "", ""),
        ("never", [], "ld.global st.global", "LDG STG"),
        ("late", CONTROL, "ld.global", "LDG"),
        ("store first", CONTROL, "st.global", "STG"),
        ("atomic first", CONTROL, "atom.global", "ATOMG CCTL"),  # its release has caches flushed
        ("some programs", CONTROL, "", "LDG STG"),
    ],
)
def test_the_check_can_be_failed(
    compiled: dict[str, Any], form: str, control: list[str], ptx: str, sass: str
) -> None:
    """The order of PTX does not tell what a branch goes around; the flow of the SASS does."""
    found = compiled["wrong"][form]
    assert found["control"] == control
    assert sorted({".".join(one.split(".")[:2]) for one in found["ptx"]}) == ptx.split()
    assert sorted({one.split(".")[0] for one in found["sass"]}) == sass.split()


def test_the_compiler_knows_the_option(compiled: dict[str, Any]) -> None:
    """An option that it does not know is an error at the first launch on such a GPU."""
    assert compiled["options"]["launch_pdl"] is True


def test_every_launch_asks_for_its_options() -> None:
    """In every ``kernel[grid](...)`` of the kernels' files."""
    launches = 0
    for path in sorted((ROOT / "kernels/bitnet_kernels/gpu").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                given = [ast.unparse(one.value) for one in node.keywords if one.arg is None]
                where = f"{path.name}:{node.lineno}"
                assert any(one.startswith("launch_options(") for one in given), where
                launches += 1
    assert launches >= 9


@pytest.mark.parametrize(
    ("capability", "early"),
    [((7, 5), False), ((8, 0), False), ((8, 9), False), ((9, 0), True), ((12, 0), True)],
)
def test_which_gpus_launch_early(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], early: bool
) -> None:
    common = pytest.importorskip("bitnet_kernels.gpu.common")
    asked: list[torch.device] = []

    def fake(device: torch.device) -> tuple[int, int]:
        asked.append(device)
        return capability

    device = torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", fake)
    monkeypatch.setattr(common, "ASSEMBLY", True)
    exact = {"enable_fp_fusion": False}
    assert common.launch_options(device) == exact | ({"launch_pdl": True} if early else {})
    assert asked == [device]
    assert common.launch_options(torch.device("cpu")) == exact
    monkeypatch.setattr(common, "ASSEMBLY", False)  # interpreted, or HIP
    assert common.launch_options(device) == exact
    assert asked == [device]
