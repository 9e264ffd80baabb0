"""Builds the native library's own checks, which need neither Python nor torch. Not a test module.

``tests/native/`` compares every function of every instruction set with plain C. Linked with the
library's sources it is a program that any compiler for any machine can build. So it also runs where
the tests cannot: under an emulator of another CPU, or with a sanitizer in every line.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.installs import ROOT

LIBRARY = ROOT / "kernels" / "bitnet_kernels" / "cpu" / "native"
CHECKS = ROOT / "tests" / "native"
FLAGS = ("-std=c11", "-g", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror")
PACKAGES = {
    "gcc": "gcc",
    "clang": "clang",
    "aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu libc6-dev-arm64-cross",
    "qemu-aarch64": "qemu-user",
}
"""The package of a program on Debian and Ubuntu; .ci/run installs it."""


def needs(*programs: str) -> None:
    """Skip the test, and say what to install, unless these programs exist."""
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"needs {program} (Debian, Ubuntu: apt install {PACKAGES[program]})")


def compile_native(output: Path, *compiler: str, checks: bool = True) -> Path:
    """Compile the library, or a program of it and its ``checks``; a warning is an error."""
    sources = [*LIBRARY.glob("*.c"), *(CHECKS.glob("*.c") if checks else ())]
    command = [*compiler, *FLAGS, "-I", LIBRARY, *sources, "-o", output, "-lm", "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


def run_checks(program: Path, cases: int, *emulator: str) -> list[str]:
    """The instruction sets that passed ``cases`` random cases."""
    command = [*emulator, program, str(cases)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.split(":")[0] for line in done.stdout.splitlines()]
