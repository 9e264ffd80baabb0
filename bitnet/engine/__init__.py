"""Generation: a decoder whose weights and cache are laid out once, and the engine on top."""
