"""The ``bitnet`` command: one file per command; ``main`` gathers them."""
