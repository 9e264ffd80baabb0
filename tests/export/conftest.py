"""A small Llama as Hugging Face saves it."""

from pathlib import Path

import pytest

from tests.helpers.hf_folder import llama, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(llama(), tmp_path / "llama")
