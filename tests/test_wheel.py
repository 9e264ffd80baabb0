"""The wheel as a stranger gets it: built from the sdist, in an environment without Triton."""

import email
import json
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.helpers.installs import COMPILER, LIBRARY, ROOT, build, install, new_environment, run
from tests.helpers.shared import Shared

PLATFORM = sysconfig.get_platform().translate(str.maketrans("-.", "__"))

USE = """
import importlib.util, json, sys
from pathlib import Path

import torch
from torch import nn

import bitnet
import bitnet_kernels
from bitnet import BitLinear, TernaryLinear, pack, replace_linear
from bitnet_kernels.cpu import native

assert importlib.util.find_spec("triton") is None
torch.manual_seed(0)
torch.set_num_threads(1)
layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(32, 5))
replace_linear(model)
bit_linears = sum(isinstance(module, BitLinear) for module in model.modules())
inputs, labels = torch.randn(24, 6, 32), torch.randint(5, (24, 6))
optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
losses = []
for _ in range(20):
    loss = nn.functional.cross_entropy(model(inputs).flatten(0, 1), labels.flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
model.eval()
with torch.no_grad():
    trained = model(inputs)
    packed = pack(model)(inputs)
print(json.dumps({
    "files": [bitnet.__file__, bitnet_kernels.__file__],
    "typed": all(Path(m.__file__).with_name("py.typed").exists() for m in (bitnet, bitnet_kernels)),
    "bit_linears": bit_linears,
    "ternary_linears": sum(isinstance(module, TernaryLinear) for module in model.modules()),
    "losses": losses,
    "equal": torch.equal(trained, packed),
    "finite": bool(packed.isfinite().all()),
    "native": native.available(),
}))
"""


@pytest.fixture(scope="session")
def built(shared: Shared) -> Path:
    """A folder with the sdist of the working tree and the wheel made from that sdist."""
    return shared("dist", build)


@pytest.fixture(scope="session")
def environment(built: Path, shared: Shared) -> Path:
    """A fresh environment with the wheel installed."""
    (wheel,) = built.glob("*.whl")
    return shared("environment", lambda folder: install(new_environment(folder), wheel))


def test_wheel_holds_the_packages_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        str(path.relative_to(root))
        for root in (ROOT, ROOT / "kernels")
        for package in ("bitnet", "bitnet_kernels")
        for path in (root / package).rglob("*")
        if path.suffix in (".py", ".css") or path.name == "py.typed" or path.parent.name == "tables"
    }
    checkout = ["train.py", *sorted((ROOT / "configs").rglob("*.toml"))]
    expected |= {f"bitnet/checkout/{(ROOT / path).relative_to(ROOT)}" for path in checkout}
    expected.add("bitnet/scaling.json")  # what bitnet plan knows
    assert names == expected | ({LIBRARY} if COMPILER else set())
    assert wheel.stem.split("-", 2)[2] == f"cp311-abi3-{PLATFORM}"


def test_wheel_metadata(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
        licenses = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    assert metadata["Name"] == "bitnet-train"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert len(licenses) == 1
    triton = [text for text in metadata.get_all("Requires-Dist", []) if "triton" in text]
    assert len(triton) == 1
    assert 'sys_platform == "linux"' in triton[0]


def test_sdist_builds_alone(built: Path) -> None:
    """The wheel came from it; its files are those of the tree, under one folder."""
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "bitnet/linear.py"} <= names
    assert "kernels/bitnet_kernels/packing.py" in names
    native = ROOT / "kernels/bitnet_kernels/cpu/native"
    sources = {str(path.relative_to(ROOT)) for path in native.iterdir()}
    configs = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.toml")}
    assert {"setup.py", "train.py", *configs, *sources} <= names


def test_wheel_trains_and_packs_away_from_the_repository(environment: Path, tmp_path: Path) -> None:
    python = environment / "bin" / "python"
    result = json.loads(run(python, "-I", "-W", "error", "-c", USE, cwd=tmp_path))
    for file in result["files"]:
        assert Path(file).is_relative_to(environment)
    assert result["typed"]
    # linear1 and linear2 of two layers and the head; attention's own projections are no nn.Linear
    assert result["bit_linears"] == result["ternary_linears"] == 5
    assert result["losses"][-1] < 0.7 * result["losses"][0]
    assert result["equal"]
    assert result["finite"]
    assert result["native"][-1:] == (["portable"] if COMPILER else [])


def test_console_script(environment: Path, tmp_path: Path) -> None:
    assert "Usage: bitnet" in run(environment / "bin" / "bitnet", "--help", cwd=tmp_path)


SHORT = ("train.steps=5", "train.batch_tokens=512", "train.micro_batch=1", "eval.max_tokens=1024")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_wheel_trains_a_preset_away_from_the_repository(
    environment: Path, tmp_path: Path, processes: int
) -> None:
    """As a script and under torchrun; the data are those that every Python has."""
    command = [environment / "bin" / "bitnet"]
    if processes > 1:
        torchrun = ("-I", "-m", "torch.distributed.run", "--nproc-per-node", str(processes))
        command = [environment / "bin" / "python", *torchrun, "-m", "bitnet"]
    (tmp_path / "quickstart").mkdir()  # a folder of that name is in nobody's way
    out = run(*command, "train", "quickstart", *SHORT, cwd=tmp_path)
    assert "done: the model is in runs/quickstart/model" in out
    rows = (tmp_path / "runs/quickstart/metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["step"] == 5
    text = run(
        *(environment / "bin" / "bitnet", "generate", "runs/quickstart/model"),
        *("--prompt", "def ", "--max-new-tokens", "3"),
        cwd=tmp_path,
    )
    assert text.startswith("def ")
