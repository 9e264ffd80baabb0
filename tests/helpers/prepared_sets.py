"""Prepared sets whose tokens are their own positions. Not a test module."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor


def write_set(
    folder: Path, n_tokens: int, shard_tokens: int = 10**9, dtype: str = "uint16"
) -> Path:
    """Write a prepared set: token number i of train is i, val is 0..9."""
    folder.mkdir()
    splits: dict[str, Any] = {}
    for split, count in {"train": n_tokens, "val": 10}.items():
        tokens = np.arange(count).astype(np.dtype(dtype).newbyteorder("<"))
        shards = []
        for start in range(0, count, shard_tokens):
            part = tokens[start : start + shard_tokens].tobytes()
            file = f"{split}_{len(shards):05d}.bin"
            (folder / file).write_bytes(part)
            shards.append(
                {
                    "file": file,
                    "n_tokens": len(tokens[start : start + shard_tokens]),
                    "sha256": hashlib.sha256(part).hexdigest(),
                }
            )
        splits[split] = {"n_tokens": count, "n_bytes": 7, "n_documents": 1, "shards": shards}
    index = {
        "version": 1,
        "dtype": dtype,
        "vocab_size": 300,
        "eos_id": 2,
        "tokenizer_sha256": "00",
        "held_out": "documents",
        "sources_digest": "",
        "settings": {},
        "splits": splits,
    }
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def windows_of(inputs: Tensor) -> list[int]:
    """The windows of a batch, in which each token is its own position."""
    return [int(first) // inputs.shape[1] for first in inputs[:, 0]]
