"""From text to batches: sources, tokenizer, token shards, loader."""
