"""The names that `from bitnet import ...` gives, each imported when it is first used."""

import subprocess
import sys

import pytest

import bitnet

HOMES = {
    "BitLinear": "bitnet.bitlinear",
    "Coverage": "bitnet.inventory",
    "Engine": "bitnet.engine.engine",
    "SamplingParams": "bitnet.engine.request",
    "TernaryLinear": "bitnet.linear",
    "Transformer": "bitnet.model",
    "coverage": "bitnet.inventory",
    "load": "bitnet.export.folder",
    "pack": "bitnet.linear",
    "replace_linear": "bitnet.linear",
    "weights_quantized": "bitnet.bitlinear",
}


@pytest.mark.parametrize("name", bitnet.__all__)
def test_a_public_name_is_the_object_of_its_module(name: str) -> None:
    assert getattr(bitnet, name).__module__ == HOMES[name]


def test_importing_bitnet_loads_neither_torch_nor_numpy() -> None:
    code = "import sys, bitnet; dir(bitnet); print(*sys.modules)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert "bitnet" in child.stdout.split()
    assert not {"torch", "numpy"} & set(child.stdout.split())
    code = "import sys; from bitnet import Engine; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
