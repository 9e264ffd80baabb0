"""Kernels interpreted, or compiled for GPUs that are not present, once per run of the tests."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.scripts import CompiledBy, Interpreted, run_script
from tests.helpers.shared import Shared


@pytest.fixture(scope="session")
def interpreted(shared: Shared) -> Interpreted:
    """Returns what a script prints as JSON when it runs kernels in Triton's interpreter."""

    def found(script: str, *arguments: str) -> Any:
        def make(folder: Path) -> None:
            output = run_script(script, *arguments, TRITON_INTERPRET="1")
            (folder / "found.json").write_text(output)

        folder = shared("-".join([script, *arguments]), make)
        return json.loads((folder / "found.json").read_text())

    return found


@pytest.fixture(scope="session")
def compiled_by(shared: Shared, pytestconfig: pytest.Config) -> CompiledBy:
    """Runs a script once per run of the tests and returns a folder with what it printed as JSON,
    found.json, and what it wrote; the folder is its last argument. Compiled kernels stay in
    pytest's cache."""
    assert pytestconfig.cache is not None
    cache = str(pytestconfig.cache.mkdir("triton"))

    def folder(script: str, *arguments: str) -> Path:
        def make(folder: Path) -> None:
            env = {"TRITON_CACHE_DIR": cache, "COLUMNS": "200"}
            output = run_script(script, *arguments, str(folder), **env)
            (folder / "found.json").write_text(output)

        return shared("-".join([script, *arguments]), make)

    return folder
