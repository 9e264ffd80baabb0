"""The memory of a process with a loaded model: its weights once, and nothing left by loading."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet.bench.decode import SIZES
from bitnet.bench.decode_worker import random_model
from bitnet.export.folder import save_model
from bitnet.model import ModelConfig
from bitnet_kernels.cpu import native

SMALL = SIZES["110m-silu"] | {"n_layers": 2}
"""14 million ternary weights, and an embedding of 94 MB in fp32."""
CHILD = """
import sys
from pathlib import Path
import torch
from bitnet import Engine
from bitnet.export.folder import load_model

def held():  # MB
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024

torch.ones(64, 64) @ torch.ones(64, 64)
before = held()
engine = Engine(load_model(sys.argv[1]), max_batch=1, max_len=256, head=sys.argv[2])
assert len(engine.generate([[1, 2, 3] * 40], 128)[0]) == 128
known = {kind: size / 2**20 for kind, size in engine.decoder.memory().items()}
print(held() - before - sum(known.values()), known["head"] + known["embedding"])
assert "torch._dynamo" not in sys.modules, "loading imports torch's compiler"
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.skipif(native.library() is None, reason=native.missing())
@pytest.mark.parametrize("head", ["auto", "bf16"])
@pytest.mark.parametrize(
    "size", [SMALL, pytest.param(SIZES["730m-silu"], marks=pytest.mark.slow)], ids=["small", "730m"]
)
def test_a_process_holds_its_model_once(size: dict[str, Any], head: str, tmp_path: Path) -> None:
    """Beside weights, head, cache and workspace there is room for code and small objects, not for
    the fp32 embedding a second time, nor for torch's compiler."""
    config = ModelConfig(**size, max_seq_len=256)
    model = random_model(config, 0, torch.device("cpu"), torch.float32, "auto")
    save_model(tmp_path / "model", model, None)
    command = [sys.executable, "-c", CHILD, str(tmp_path / "model"), head]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rest, rows = map(float, done.stdout.split())
    elements = config.vocab_size * config.d_model / 2**20
    assert rows == pytest.approx(elements * (4 if head == "auto" else 2), rel=0.01)
    assert rest < 60, f"{rest:.0f} MB more than the decoder knows of"
