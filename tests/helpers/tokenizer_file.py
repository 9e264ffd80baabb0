"""A small byte-pair tokenizer as the tokenizers library saves it. Not a test module."""


def byte_pairs(text: str, *added: str) -> bytes:
    """The tokenizer.json of 300 tokens trained on ``text``, like SmolLM2's, with ordinary ``added``
    tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([text] * 20, trainer)
    backend.add_tokens([AddedToken(content, special=False) for content in added])
    return backend.to_str().encode()
