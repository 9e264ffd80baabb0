"""Which run is better, by how much, and whether its ternary weights have settled: in words.

*Better* compares the loss on validation text, in bits per byte, after the same number of tokens, at
the last evaluation that both runs have. Runs without such an evaluation are compared at the last of
each, with a caveat. A difference below :data:`CHANCE` does not count.

*Settled* reads two curves of the telemetry: the share of codes that changed between two readings
(flip rate), and the share of zeros. Weights have settled when the flip rate has fallen to
:data:`FALLEN` of its highest value and the zeros have stayed within :data:`STABLE` over the last
quarter of the readings. They are settling when the flip rate is below that of the second quarter. A
flip rate that was never above :data:`FROZEN` is not settling: those codes have hardly moved since
the start, which usually means that the learning rate is too low.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Literal, NamedTuple

from bitnet.report.runs import RunRecord

CHANCE = 0.025
"""As a share of the loss: the standard deviation over three seeds of the quickstart model (1.852,
1.853 and 1.771 bits per byte, docs/results/quickstart.csv)."""
FALLEN = 0.25
STABLE = 0.01
FROZEN = 0.001
READINGS = 5
"""Fewest readings that allow a verdict."""


class Comparison(NamedTuple):
    """Two runs on validation text."""

    other: RunRecord
    step: int
    """The step of the first run."""
    ours: float
    theirs: float
    unit: str
    caveats: list[str]
    """Why the two numbers may not be comparable."""

    @property
    def gap(self) -> float:
        """The first run's loss minus the other's: below 0 is better."""
        return self.ours - self.theirs

    @property
    def share(self) -> float:
        """The gap as a share of the other's loss."""
        return self.gap / self.theirs if self.theirs else math.inf

    @property
    def verdict(self) -> Literal["better", "worse", "as good"]:
        """The verdict on the first run."""
        if abs(self.share) < CHANCE:
            return "as good"
        return "better" if self.gap < 0 else "worse"


def evaluations(run: RunRecord) -> tuple[str, str]:
    """The name of a run's validation loss and its unit."""
    return ("val_bpb", "bits per byte") if "val_bpb" in run.curves else ("val_loss", "nats")


def compare(run: RunRecord, other: RunRecord) -> Comparison | None:
    """Compare after as many tokens as both were trained on; None if one has no evaluation."""
    name, unit = evaluations(run)
    ours = {run.tokens(step): (step, value) for step, value in run.points(name)}
    theirs = {other.tokens(step): value for step, value in other.points(name)}
    if not ours or not theirs:
        return None
    caveats = []
    if common := ours.keys() & theirs.keys():
        step, value = ours[max(common)]
        against = theirs[max(common)]
    else:
        step, value = ours[max(ours)]
        against = theirs[max(theirs)]
        caveats.append(f"after {max(ours):,} against {max(theirs):,} tokens")
    if any(_text(run, key) != _text(other, key) for key in ("path", "sources", "val_fraction")):
        caveats.append("on different text")
    if run.config.eval.max_tokens != other.config.eval.max_tokens:
        caveats.append("on different parts of the validation text")
    if unit == "nats" and run.config.model.vocab_size != other.config.model.vocab_size:
        caveats.append("in tokens of different size")
    return Comparison(other, step, value, against, unit, caveats)


def _text(run: RunRecord, key: str) -> object:
    return getattr(run.config.data, key)


class Settling(NamedTuple):
    """How far the ternary weights have settled."""

    state: Literal["settled", "settling", "moving", "frozen", "unknown"]
    reason: str


WORDS = {
    "settled": "have settled",
    "settling": "are settling",
    "moving": "have not settled",
    "frozen": "hardly moved",
    "unknown": "cannot be judged yet",
}
"""The words that follow "Its ternary weights ..."."""


def settling(run: RunRecord) -> Settling | None:
    """Judge the ternary weights of a run; None if it has none (no telemetry of them)."""
    zeros = [value for _, value in run.points("ternary/zeros")]
    flips = [value for _, value in run.points("ternary/flip_rate")]
    if not zeros:
        return None
    every = run.config.log.telemetry_every
    if len(flips) < READINGS:
        return Settling(
            "unknown",
            f"{len(zeros)} readings of the weights, one every {every} steps; "
            f"it takes {READINGS + 1} to judge them",
        )
    highest, now = max(flips), statistics.median(flips[-3:])
    quarter = zeros[-max(2, len(zeros) // 4) :]
    spread = max(quarter) - min(quarter)
    flip = (
        f"Of the codes, {now:.2%} change in {every} steps now ({highest:.2%} at the most) and "
        f"{zeros[-1]:.1%} are zero, which moved by {100 * spread:.1f} points in the last quarter"
    )
    if rates := [value for _, value in run.points("lr")]:
        flip += f"; the learning rate is at {rates[-1] / (max(rates) or 1):.0%} of its peak"
    if highest < FROZEN:
        return Settling("frozen", flip)
    if now <= FALLEN * highest and spread <= STABLE:
        return Settling("settled", flip)
    fell = now < statistics.median(_second_quarter(flips))
    return Settling("settling" if fell else "moving", flip)


def _second_quarter(values: Sequence[float]) -> Sequence[float]:
    """The values of the second quarter, at least one."""
    return values[len(values) // 4 : max(len(values) // 2, len(values) // 4 + 1)]


def headline(run: RunRecord, comparisons: Sequence[Comparison]) -> str:
    """One or more sentences: the answer before any figure."""
    name, unit = evaluations(run)
    sentences = []
    for one in comparisons:
        difference = f"{abs(one.gap):.3f} {one.unit} ({abs(one.share):.1%})"
        if one.verdict == "as good":
            sentences.append(
                f"{run.name} is as good as {one.other.name}: they differ by {difference}, "
                "no more than another seed would change."
            )
        else:
            sentences.append(f"{run.name} is {one.verdict} than {one.other.name} by {difference}.")
    if not comparisons and (value := run.last(name)) is not None:
        sentences.append(f"{run.name} reached {value:.3f} {unit} on validation text.")
    if judged := settling(run):
        sentences.append(f"Its ternary weights {WORDS[judged.state]}.")
    return " ".join(sentences) or f"{run.name} has not been evaluated yet."
