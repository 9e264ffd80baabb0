"""A text and two small untrained models in folders, for tests of commands. Not a test module."""

from pathlib import Path

import torch

from bitnet.data.tokenizer import Tokenizer, train_tokenizer
from bitnet.export.folder import save_model
from bitnet.model import ModelConfig, Transformer

TEXT = "\n\n".join(f"def f{i}(x):\n    return x + {i}  # naïve ☃" for i in range(400))


def write_folders(root: Path) -> Tokenizer:
    """text.txt, a ternary model in model/ and its full-precision baseline in fp/; returns the
    tokenizer of both, which is in tokenizer.model."""
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    tokenizer = train_tokenizer([TEXT], 320, root / "tokenizer.model", 1)
    for name, linear in (("model", "ternary"), ("fp", "fp")):
        torch.manual_seed(0)
        config = ModelConfig(depth=1, vocab_size=320, max_seq_len=64, linear=linear)  # type: ignore[arg-type]
        save_model(root / name, Transformer(config), tokenizer)
    return tokenizer
