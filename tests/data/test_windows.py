"""Windows of tokens, cut from a text or a prepared folder."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from bitnet.data.loader import DataConfig, sequential_windows
from bitnet.data.prepare import prepare
from bitnet.data.tokenizer import Tokenizer, train_tokenizer
from bitnet.data.windows import first_inputs, split_of, text_windows, whole_inputs
from bitnet.schema import UserError

TEXT = "\n\n".join(f"def f{i % 97}(x):\n    return x + {i}  # naïve ☃" for i in range(50))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer([TEXT] * 5, 300, tmp_path_factory.mktemp("windows") / "t.model", 1)


def test_text_windows_predict_every_token_once(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    windows = text_windows(tokenizer, TEXT, 7)
    assert torch.cat([window[1:] for window in windows]).tolist() == ids
    assert int(windows[0][0]) == tokenizer.eos_id
    assert all(a[-1] == b[0] for a, b in pairwise(windows))
    some = text_windows(tokenizer, TEXT, 7, 35)
    assert len(some) == 5
    assert all(any(torch.equal(one, window) for window in windows) for one in some)


def test_whole_inputs_leave_short_windows_out(tokenizer: Tokenizer) -> None:
    windows = text_windows(tokenizer, TEXT, 64)
    assert len(windows[-1]) < 65
    inputs = whole_inputs(windows, 64)
    assert torch.equal(inputs, torch.stack([window[:-1] for window in windows[:-1]]))
    assert whole_inputs(windows[-1:], 64).shape == (0, 64)


def test_first_inputs(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.eos_id, *tokenizer.encode(TEXT)]
    for most in (100, 65_536):
        windows = first_inputs(tokenizer, TEXT, 64, most)
        assert torch.cat(windows, 1)[0].tolist() == ids[:most]
        assert {tuple(window.shape) for window in windows[:-1]} == {(1, 64)}


def test_a_split_of_the_models_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source, folder = tmp_path / "text.txt", tmp_path / "data"
    source.write_text(TEXT * 5, encoding="utf-8")
    sources, model = [str(source)], str(tokenizer.path)
    prepare(DataConfig(path=str(folder), sources=sources, tokenizer=model, val_fraction=0.1))
    train = split_of(folder, "train", tokenizer)
    assert sum(len(window) - 1 for window in sequential_windows(train, 7)) == train.n_tokens
    other = train_tokenizer([TEXT] * 5, 310, tmp_path / "other.model", 1)
    with pytest.raises(UserError, match=r"data: was tokenized with another tokenizer"):
        split_of(folder, "train", other)
