"""Several sources in one run, each with an exact share of the training sequences.

There are K sources in the order of the config, with shares p_1 ... p_K that sum to 1. Source 1
takes its share of all sequences, source 2 its share of the rest, and so on:

    r_0(n) = n,    c_k(n) = floor(n_k q_k + u_k),    r_k(n) = r_(k-1)(n) - c_k(n)

where c_k(n) is the number of source k's sequences among the first n, n_k = r_(k-1)(n) the number
that earlier sources leave, q_k = p_k / (p_k + ... + p_K), and u_k in [0, 1) an offset chosen by the
seed. When n grows by one, exactly one c_k grows by one. So the source of a sequence, and its number
within the source, are a pure function of (seed, number of the sequence), like the order within a
source (loader.py). Any number of processes divides the same batch; a resumed run needs no state.

Each step of the recursion adds less than one to |c_k - n p_k|. So after any number of sequences
every source is fewer than K - 1 sequences away from its share; with two sources, fewer than one.
(Random draws would be sqrt(n p (1 - p)) away. The usual table with one entry per sequence, filled
greedily, is equally exact, but takes memory for the whole run.) All arithmetic is on integers:
weights are read as the decimal numbers in the config.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, ValidationError
from pydantic.dataclasses import dataclass

from bitnet.schema import STRICT, UserError, nearest

MIN_SHARE = Fraction(1, 10**6)
"""A smaller share is an error: it is a mistake, or a source that hardly any run would read."""
MAX_EPOCHS = 4
"""Repeating text up to this often is nearly as good as new text (arXiv 2305.16264)."""
_DENOMINATOR = 2**40
"""Largest denominator of a q_k; int64 then holds the products of 2^20 sequences."""


@dataclass(frozen=True, config=STRICT)
class Source:
    """A table of ``[[data.sources]]``: one part of a mixture."""

    name: str = ""
    """name of the part in metrics (val_loss/NAME); "" = the last component of path"""
    path: str = ""
    """folder of its prepared data; "" = data.path/NAME"""
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """its share of the training sequences, relative to the other weights"""
    texts: list[str] = Field(default_factory=list)
    """sources to make path from if it is missing; a list as in data.sources"""
    text_field: str = ""
    """field of its rows that holds the text; "" = data.text_field"""


def source_tables(value: Any) -> Any:
    """Turn the tables of ``data.sources`` into :class:`Source` objects; strings stay.

    Raises:
        ValueError: one line on an invalid key or value.
    """
    if not isinstance(value, list | tuple):
        raise ValueError("expected a list of strings, or tables [[data.sources]]")
    if all(isinstance(item, str) for item in value):
        return list(value)
    if not all(isinstance(item, dict | Source) for item in value):
        raise ValueError("expected strings, or tables [[data.sources]], and not both")
    return [_source(i, item) if isinstance(item, dict) else item for i, item in enumerate(value, 1)]


def _source(number: int, table: dict[str, Any]) -> Source:
    keys = [field.name for field in dataclasses.fields(Source)]
    for key in table:
        if key not in keys:
            near = nearest(str(key), keys, 0.4)
            hint = f"the nearest is {near}" if near else f"valid are {', '.join(keys)}"
            raise ValueError(f"table {number}: unknown key {key}; {hint}")
    try:
        return Source(**table)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = str(first["loc"][0])
        message = first["msg"].replace("Input should be", "expected")
        raise ValueError(f"table {number}: {key} = {table[key]!r}: {message}") from None


def completed(sources: Sequence[Source], folder: Path) -> list[Source]:
    """The sources with ``name`` and ``path`` filled in.

    Arguments:
        folder: ``data.path``.
    Raises:
        UserError: a table names no text, a name is not a word, a name or a folder occurs twice, or
            a share is too small.
    """
    found: list[Source] = []
    for number, source in enumerate(sources, 1):
        name = source.name or Path(source.path).name
        where = f"data.sources: table {number}"
        if not name:
            raise UserError(f"{where} has neither a name nor a path")
        if name in (".", "..") or not name.isprintable() or set(name) & set("/\\ "):
            raise UserError(f"{where}: name = {name!r} is no single word, as metrics need")
        if name in [other.name for other in found]:
            raise UserError(f"{where}: the name {name!r} stands twice; give each source another")
        if not source.path and not source.texts:
            raise UserError(f"{where}, {name!r}, has neither texts nor the path of prepared data")
        path = source.path or str(folder / name)
        if any(Path(path).resolve() == Path(other.path).resolve() for other in found):
            raise UserError(f"{where}: the folder {path} stands twice; add up the weights instead")
        found.append(dataclasses.replace(source, name=name, path=path))
    for source, share in zip(found, shares([source.weight for source in found]), strict=True):
        if share < MIN_SHARE:
            raise UserError(
                f"data.sources: {source.name!r} has weight = {source.weight:g}, a share of "
                f"{float(share):.1g}; at least {float(MIN_SHARE):g} is needed, or leave it out"
            )
    return found


def shares(weights: Sequence[float]) -> list[Fraction]:
    """Weights divided by their sum, exactly: each weight is read as the decimal number written."""
    exact = [Fraction(repr(float(weight))) for weight in weights]
    return [weight / sum(exact) for weight in exact]


class Schedule:
    """The source of each training sequence in an endless series.

    Arguments:
        weights: K positive numbers. seed: of the offsets.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        rest, left = shares(weights), Fraction(1)
        self._n_sources = len(rest)
        self._steps: list[tuple[int, int, int]] = []  # numerator, denominator, offset
        for number, share in enumerate(rest[:-1]):
            q = (share / left).limit_denominator(_DENOMINATOR)
            left -= share
            digest = hashlib.blake2b(f"{seed}/source {number}".encode(), digest_size=8).digest()
            offset = int.from_bytes(digest, "little") % q.denominator
            self._steps.append((q.numerator, q.denominator, offset))

    def counts(self, n: int) -> list[int]:
        """Number of sequences of each source among the first ``n``."""
        counts, rest = [], n
        for numerator, denominator, offset in self._steps:
            counts.append((rest * numerator + offset) // denominator)
            rest -= counts[-1]
        return [*counts, rest]

    def sources(self, first: int, count: int) -> np.ndarray:
        """The sources of sequences ``first`` to ``first + count - 1``: int64 ``[count]``, from 0.

        Raises:
            ValueError: more than 2^20 sequences at once.
        """
        if not 0 <= count <= 2**20:
            raise ValueError(f"count: expected at most 2^20 sequences, got {count}")
        rest, more = first, np.arange(count + 1)  # rest + more: left to later sources
        sources = np.full(count, self._n_sources - 1)
        undecided = np.ones(count, dtype=bool)
        for number, (numerator, denominator, offset) in enumerate(self._steps):
            taken, remainder = divmod(rest * numerator + offset, denominator)
            taken_more = (remainder + more * numerator) // denominator
            its_own = np.diff(taken_more) > 0
            sources[undecided & its_own] = number
            undecided &= ~its_own
            rest, more = rest - taken, more - taken_more
        return sources
