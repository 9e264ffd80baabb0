"""Implementations in torch operators that are faster than the reference, with the same bits."""
