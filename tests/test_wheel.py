"""The wheel as a stranger gets it: built from the sdist, in a separate environment without Triton.

There is no network in a test, so the new environment borrows the third-party packages of this one
by links, each but Triton; the project itself is there only as what pip unpacked from the wheel.
"""

import email
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from functools import partial
from pathlib import Path

import pytest

from tests.helpers.shared import Shared

ROOT = Path(__file__).parents[1]
PLATFORM = sysconfig.get_platform().translate(str.maketrans("-.", "__"))
NOT_BORROWED = ("triton", "bitnet", "__editable__", "__pycache__", "pip", "setuptools")

USE = """
import importlib.util, json, sys
from pathlib import Path

import torch
from torch import nn

import bitnet
import bitnet_kernels
from bitnet import BitLinear, TernaryLinear, pack, replace_linear

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
}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    child = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr
    return child.stdout


@pytest.fixture(scope="session")
def built(shared: Shared) -> Path:
    """A folder with the sdist of the working tree and the wheel made from that sdist."""
    return shared("dist", build)


def build(out: Path) -> None:
    source = out / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("bitnet", "kernels"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=out)


@pytest.fixture(scope="session")
def environment(built: Path, shared: Shared) -> Path:
    """A fresh environment with the wheel installed."""
    return shared("environment", partial(install_into, built))


def install_into(built: Path, folder: Path) -> None:
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    install = (
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
    )
    run(*install, "--quiet", wheel, cwd=folder)
    site_packages = Path(
        run(
            python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
        ).strip()
    )
    for borrowed in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(borrowed).iterdir():
            if not entry.name.startswith(NOT_BORROWED) and entry.suffix != ".pth":
                (site_packages / entry.name).symlink_to(entry)


def test_wheel_holds_the_packages_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        str(path.relative_to(root))
        for root in (ROOT, ROOT / "kernels")
        for package in ("bitnet", "bitnet_kernels")
        for path in (root / package).rglob("*")
        if path.suffix == ".py" or path.name == "py.typed" or path.parent.name == "tables"
    }
    assert names == expected | {"bitnet_kernels/cpu/_native.abi3.so"}
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
    assert {"setup.py", *sources} <= names


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


def test_console_script(environment: Path, tmp_path: Path) -> None:
    assert "Usage: bitnet" in run(environment / "bin" / "bitnet", "--help", cwd=tmp_path)
