"""Generation from static memory: a decoder whose step allocates nothing, and the engine on top."""
