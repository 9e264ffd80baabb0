"""The project, built and installed as a new user does it. Not a test module.

There is no network in a test, so a new environment has links to the third-party packages of this
one; of the project itself it has only what pip installed.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIBRARY = "bitnet_kernels/cpu/_native.abi3.so"
COMPILER = shutil.which((os.environ.get("CC") or sysconfig.get_config_var("CC")).split()[0])
"""The C compiler that setuptools uses, or None: then there is no native library to test."""
NOT_BORROWED = ("triton", "bitnet", "__editable__", "__pycache__", "pip")


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """The standard output of a command that succeeds."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    child = subprocess.run(command, cwd=cwd, env=environment | env, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr
    return child.stdout


def copy_source(folder: Path) -> Path:
    """Copy the working tree's files that an installation needs, without build leftovers."""
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "train.py"):
        shutil.copy(ROOT / name, source)
    for name in ("bitnet", "configs", "kernels"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    return source


def build(out: Path) -> None:
    """Fill a folder with the sdist of the working tree and the wheel made from that sdist."""
    source = copy_source(out)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=out)


def new_environment(folder: Path) -> Path:
    """The Python of a new environment with everything that the project needs except Triton."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    show = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site_packages = Path(run(python, "-c", show, cwd=folder).strip())
    for borrowed in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(borrowed).iterdir():
            if not entry.name.startswith(NOT_BORROWED) and entry.suffix != ".pth":
                (site_packages / entry.name).symlink_to(entry)
    return python


def install(python: Path, *what: str | Path, **env: str) -> None:
    """``pip install`` into the environment of that Python, without a network."""
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--quiet")
    pip = (sys.executable, "-m", "pip", "--python", python, "install")
    run(*pip, *options, *what, cwd=python.parents[1], **env)
