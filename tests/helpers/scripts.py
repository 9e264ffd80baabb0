"""Run a script of this folder, or Python code, in a separate process. Not a test module.

Triton reads TRITON_INTERPRET when it is imported. So kernels are interpreted in processes in which
it is set, and compiled for GPUs that are not present in processes in which it is not.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Interpreted = Callable[..., Any]
"""The fixture ``interpreted`` of tests/kernels/conftest.py."""
CompiledBy = Callable[..., Path]
"""The fixture ``compiled_by`` of tests/kernels/conftest.py."""
HELPERS = Path(__file__).parent
# By default glibc returns each large array to the system, which doubles the interpreter's time.
MALLOC = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "1000000000")


def run_script(source: str, *arguments: str, stdin: str | None = None, **env: str) -> str:
    """The output of ``source``, which is a script's name or code; warnings are errors.

    TRITON_INTERPRET is unset unless ``env`` sets it.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    code = [str(HELPERS / source)] if source.endswith(".py") else ["-c", source]
    run = subprocess.run(
        [sys.executable, "-W", "error", *code, *arguments],
        env=inherited | MALLOC | env,
        input=stdin,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout
