"""Models on disk: the model folder (folder.py) and the proof that packing it lost nothing
(proof.py)."""
