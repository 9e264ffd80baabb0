"""Does held-out text occur in the training text? Whole documents, and every long shared run.

    python docs/results/overlap.py TRAIN HELD_OUT          # prints a line per finding

White space is collapsed and case ignored first, so another line length or edition hides nothing. A
run of ``RUN`` characters contains a whole block of ``RUN // 2`` whose start is a multiple of that,
wherever the run begins. So the blocks of the held-out text are hashed, and the hash of the text at
every position of each training document is looked up among them. Hashes only propose: each place is
compared as text and extended both ways, so a collision cannot be reported, and equal text has equal
hashes, so nothing is missed.

The hash of c[i:i+L] is sum c[i+j] r^j modulo 2^64, by differences of running sums: r is odd and so
has an inverse.
"""

import hashlib
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from bitnet.data.sources import documents

RUN = 200
"""Characters of a run that counts as shared."""
_R = 0x9E3779B97F4A7C15
_TABLE_BITS = 22
Array = np.ndarray


class Shared(NamedTuple):
    """A stretch of text that a training and a held-out document share."""

    held_out: int
    """number of the held-out document"""
    train: int
    """number of the training document"""
    start: int
    """where it begins in the normalized held-out document"""
    length: int
    """characters"""
    text: str
    """its first 80 characters"""


class Report(NamedTuple):
    """What was compared, and what was found."""

    train_documents: int
    train_characters: int
    held_out_documents: int
    held_out_characters: int
    same_documents: list[int]
    """held-out documents that are training documents as a whole"""
    shared: list[Shared]

    def affected(self) -> list[int]:
        """The held-out documents with any finding, sorted."""
        return sorted({*self.same_documents, *(found.held_out for found in self.shared)})


def normalized(text: str) -> str:
    """Text in lower case, with single spaces."""
    return " ".join(text.lower().split())


def search(train: Iterable[str], held_out: Sequence[str], run: int = RUN) -> Report:
    """Find held-out text in training text.

    Arguments:
        train: documents, read once. held_out: documents.
        run: characters of the shortest run that is reported.
    """
    held = [normalized(text) for text in held_out]
    digests = {_digest(text): i for i, text in enumerate(held)}
    length = run // 2
    codes = [_codes(text) for text in held]
    blocks = [(i, at) for i, c in enumerate(codes) for at in range(0, len(c) - length + 1, length)]
    hashes = [_hashes(c, length)[::length] for c in codes if len(c) >= length]
    block_hash = np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)
    order = np.argsort(block_hash, kind="stable")
    ordered = block_hash[order]
    seen = np.zeros(2**_TABLE_BITS, bool)
    seen[_slot(ordered)] = True

    same, shared, n_train, n_characters = [], list[Shared](), 0, 0
    for number, document in enumerate(train):
        text = normalized(document)
        n_train, n_characters = n_train + 1, n_characters + len(text)
        if _digest(text) in digests:
            same.append(digests[_digest(text)])
        if len(text) < length or not len(ordered):
            continue
        own = _codes(text)
        found = _hashes(own, length)
        places = np.flatnonzero(seen[_slot(found)])
        first = np.searchsorted(ordered, found[places], "left")
        last = np.searchsorted(ordered, found[places], "right")
        reported: dict[tuple[int, int], int] = {}
        hit = first < last
        for place, low, high in zip(places[hit], first[hit], last[hit], strict=True):
            for index in order[low:high]:
                document_number, at = blocks[index]
                diagonal = (document_number, int(place) - at)
                if at < reported.get(diagonal, -1):
                    continue  # inside a run that is known
                start, end = _extend(own, codes[document_number], int(place), at, length)
                reported[diagonal] = end
                if end - start >= run:
                    words = held[document_number][start : min(end, start + 80)]
                    shared.append(Shared(document_number, number, start, end - start, words))
    sizes = len(held), sum(map(len, held))
    return Report(n_train, n_characters, *sizes, sorted(set(same)), sorted(set(shared)))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _codes(text: str) -> Array:
    """Code points, uint32 ``[characters]``."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _hashes(codes: Array, length: int) -> Array:
    """The hash at every position: uint64 ``[characters - length + 1]``."""
    n = len(codes)
    powers = np.full(n + 1, _R, np.uint64)
    powers[0] = 1
    inverse = np.full(n + 1, pow(_R, -1, 2**64), np.uint64)
    inverse[0] = 1
    with np.errstate(over="ignore"):
        powers, inverse = np.cumprod(powers), np.cumprod(inverse)
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(codes * powers[:n])])
        hashes = (sums[length:] - sums[:-length]) * inverse[: n - length + 1]
        mixed: Array = hashes * np.uint64(0xD6E8FEB86659FD93)
    return mixed


def _slot(hashes: Array) -> Array:
    """A row of the table of what occurs at all, from the well mixed upper bits."""
    slots: Array = (hashes >> np.uint64(64 - _TABLE_BITS)).astype(np.int64)
    return slots


def _extend(one: Array, other: Array, i: int, j: int, length: int) -> tuple[int, int]:
    """The run around equal text at ``one[i]`` and ``other[j]``: its bounds in ``other``; empty if
    the text differs."""
    if not np.array_equal(one[i : i + length], other[j : j + length]):
        return j, j
    back = min(i, j)
    before = np.flatnonzero(one[i - back : i][::-1] != other[j - back : j][::-1])
    ahead = min(len(one) - i, len(other) - j)
    after = np.flatnonzero(one[i : i + ahead] != other[j : j + ahead])
    start = j - (int(before[0]) if len(before) else back)
    return start, j + (int(after[0]) if len(after) else ahead)


def main() -> None:
    """Search, and print."""
    train, held_out = sys.argv[1:3]
    report = search(documents([train], "text"), list(documents([held_out], "text")))
    print(
        f"{report.held_out_documents} held-out documents, {report.held_out_characters:,} "
        f"characters; {report.train_documents} training documents, {report.train_characters:,}"
    )
    print(f"the same documents: {report.same_documents}; with a shared run: {report.affected()}")
    for found in report.shared:
        print(*found[:4], repr(found.text))


if __name__ == "__main__":
    main()
