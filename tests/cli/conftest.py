"""A folder of small models for the tests of commands."""

from pathlib import Path

import pytest

from tests.helpers.folders import write_folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text.txt, and a small untrained model in model/ and its full-precision baseline in fp/."""
    root = tmp_path_factory.mktemp("cli")
    write_folders(root)
    return root
