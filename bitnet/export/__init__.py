"""Models on disk, in our formats (contents.py, folder.py, one_file.py) and other programs' formats
(formats.py lists them), and the proof that packing lost nothing (proof.py)."""
