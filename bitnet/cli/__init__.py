"""The ``bitnet`` command: one file per command; ``main`` collects them."""
