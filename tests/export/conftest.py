"""A small packed model in a folder, and its tokenizer."""

from pathlib import Path

import pytest

from bitnet.data.tokenizer import Tokenizer, train_tokenizer
from bitnet.export.folder import save_model
from tests.helpers.model_folders import VOCAB, make, packed


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer(["to be or not to be, that is the question\n" * 20], VOCAB, path)


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """A packed model's."""
    return save_model(tmp_path / "model", packed(make()), tokenizer)
