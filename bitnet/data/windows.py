"""Windows of tokens for evaluation or calibration, cut from a text or a prepared folder.

    T tokens that a window predicts    S windows

An evaluation window is int64 ``[T + 1]``: its inputs are ``[:-1]``, its targets ``[1:]``.
:func:`bitnet.data.loader.sequential_windows` cuts the windows of a prepared folder.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from bitnet.data.loader import SplitName, TokenDataset, window_starts
from bitnet.data.tokenizer import Tokenizer
from bitnet.schema import UserError


def split_of(folder: Path, split: SplitName, tokenizer: Tokenizer) -> TokenDataset:
    """A split of a prepared folder, for the model that has this tokenizer.

    Raises:
        UserError: not a prepared folder, or prepared with another tokenizer.
    """
    dataset = TokenDataset(folder, split)
    if dataset.tokenizer().hash != tokenizer.hash:
        raise UserError(f"{folder}: was tokenized with another tokenizer than the model's")
    return dataset


def text_windows(
    tokenizer: Tokenizer, text: str, seq_len: int, max_tokens: int = 0
) -> list[Tensor]:
    """Cut a text, taken as one document, as ``sequential_windows`` cuts a split.

    Arguments:
        seq_len: T. max_tokens: approximate number of tokens to predict, in windows spread evenly
            over the text; 0: all.
    Returns:
        int64 ``[T + 1]`` each; the last one may be shorter. The first token's context is the
        end-of-document token.
    """
    ids = _document(tokenizer, text)
    starts = window_starts(len(ids) - 1, seq_len, max_tokens)
    return [ids[start : start + seq_len + 1] for start in starts]


def whole_inputs(windows: Iterable[Tensor], seq_len: int) -> Tensor:
    """Stack the inputs of windows ``[T + 1]``, leaving out shorter ones: int64 ``[S, T]``."""
    whole = [window[:-1] for window in windows if len(window) == seq_len + 1]
    return torch.stack(whole) if whole else torch.empty(0, seq_len, dtype=torch.int64, device="cpu")


def first_inputs(tokenizer: Tokenizer, text: str, seq_len: int, max_tokens: int) -> list[Tensor]:
    """The first ``max_tokens`` tokens of a text, as batches of one window: int64 ``[1, T]`` each;
    the last one may be shorter."""
    ids = _document(tokenizer, text)[:max_tokens]
    return list(ids.unsqueeze(0).split(seq_len, 1))


def _document(tokenizer: Tokenizer, text: str) -> Tensor:
    ids = [tokenizer.eos_id, *tokenizer.encode(text)]
    return torch.tensor(ids, dtype=torch.int64, device="cpu")
