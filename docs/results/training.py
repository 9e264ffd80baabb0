"""The tables of docs/training.md, from train_*.csv, which `bitnet bench train` writes;
`bitnet bench report` puts them there.

python docs/results/training.py    # prints them
"""

from pathlib import Path

from bitnet.bench.train_rows import load
from bitnet.bench.train_rows import table as draw

FOLDER = Path(__file__).parent


def table() -> str:
    """All of them, in Markdown."""
    return draw(load(FOLDER))


if __name__ == "__main__":
    print(table())
