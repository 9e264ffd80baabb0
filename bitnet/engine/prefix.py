"""Find the computed tokens that a call can reuse.

A row of the cache holds keys and values of known tokens, and the keys and values of a prefix depend
on nothing after it. So a prompt must be computed only from the first token that differs from all
rows (:func:`place`), and a prefix that several prompts of a call share, such as a system prompt,
only once (:func:`share`). A call runs in the first rows, so tokens there that it does not use are
first moved to other rows (:func:`keep`). The last token of a prompt is always computed, because the
call needs its logits, and no row keeps them.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


class Copy(NamedTuple):
    """Copy the first ``n`` tokens of row ``source`` over row ``target``."""

    source: int
    target: int
    n: int


def place(
    held: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]]
) -> tuple[list[int], list[int], list[Copy]]:
    """Give each prompt a row, so that as many tokens as possible stay where they are.

    Prompts and rows are paired greedily, the longest common prefix first. A prompt whose longest
    prefix is in another row gets it by a copy. The order of the copies does not matter: a row's own
    prompt shares at least as long a prefix with the row as any prompt that reads the row, so it
    overwrites none of the tokens that are read.

    Arguments:
        held: the tokens of each row. prompts: none empty, and not more than rows.

    Returns:
        The row of each prompt, a permutation of ``range(len(prompts))``; how many tokens of the
        prompt that row holds before the copies; the copies, which add more.
    """
    rows = _padded(held)
    common = [_common(rows, prompt[:-1]) for prompt in prompts]
    n = len(prompts)
    pairs = sorted((-common[i][row], i != row, i, row) for i in range(n) for row in range(n))
    row_of: dict[int, int] = {}
    taken: set[int] = set()
    for _, _, i, row in pairs:
        if i not in row_of and row not in taken:
            row_of[i] = row
            taken.add(row)
    kept = [common[i][row_of[i]] for i in range(n)]
    copies = [
        Copy(common[i].index(longest), row_of[i], longest)
        for i in range(n)
        if (longest := max(common[i])) > kept[i]
    ]
    return [row_of[i] for i in range(n)], kept, copies


def keep(
    held: Sequence[Sequence[int]], used: Sequence[int], lost: Iterable[int], spare: Iterable[int]
) -> list[Copy]:
    """Find places for the tokens of rows that are about to be overwritten.

    The best place is a row that is empty or holds a prefix of them; else the least recently used
    row, unless it was used later than the row to be overwritten.

    Arguments:
        held: the tokens of each row. used: when each row was last used, as any ascending number.
        lost: rows about to be overwritten. spare: rows that may be overwritten instead.
    """
    copies = []
    free = sorted(spare, key=lambda row: used[row])
    for row in sorted(lost, key=lambda row: -used[row]):
        tokens = held[row]
        prefixes = [other for other in free if tokens[: len(held[other])] == held[other]]
        older = [other for other in free if used[other] <= used[row]]
        if target := (prefixes or older)[:1]:
            free.remove(target[0])
            copies.append(Copy(row, target[0], len(tokens)))
    return copies


def share(prompts: Sequence[Sequence[int]], held: Sequence[int]) -> list[list[Copy]]:
    """Find prefixes that prompts have in common beyond the tokens that their rows already hold.

    A prompt takes the longest prefix that it shares with an earlier prompt, from the first such
    prompt.

    Arguments:
        prompts: none empty. held: how many tokens of each prompt its row holds.

    Returns:
        Rounds of copies between *prompts*. Before a round, the copies of earlier rounds must be
        done, and the sources computed as far as they are read.
    """
    wanted = [prompt[:-1] for prompt in prompts]
    rows = _padded(wanted)
    depth = [0] * len(prompts)
    rounds: list[list[Copy]] = []
    for target in range(len(prompts)):
        common = _common(rows[:target], wanted[target])
        longest = max(common, default=0)
        if longest <= held[target]:
            continue
        source = common.index(longest)
        depth[target] = depth[source] + 1
        rounds += [[] for _ in range(depth[target] - len(rounds))]
        rounds[depth[target] - 1].append(Copy(source, target, longest))
    return rounds


def _padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Rows of tokens as one int64 array, padded with -1, which is not a token."""
    padded = np.full((len(rows), max(map(len, rows), default=0)), -1, dtype=np.int64)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return padded


def _common(rows: np.ndarray, tokens: Sequence[int]) -> list[int]:
    """The length of the common prefix of ``tokens`` with each padded row."""
    n = min(len(tokens), rows.shape[1])
    same = np.ones((len(rows), n + 1), dtype=bool)
    same[:, :n] = rows[:, :n] == np.array(tokens[:n], dtype=np.int64)
    same[:, n] = False
    lengths: list[int] = same.argmin(1).tolist()
    return lengths
