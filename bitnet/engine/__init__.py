"""Generation: a decoder that lays out weights and cache once, and the engine on top."""
