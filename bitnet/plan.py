"""What to train in a given time: the size and the tokens, by speeds measured on this machine.

The rule is that of the configs: 20 tokens per parameter (Chinchilla, arXiv 2203.15556). Given the
time, the largest depth is proposed whose tokens fit; given the tokens too, the largest depth with
20 of them per parameter. Speed is measured by real optimizer steps at small depths. Above those it
is the same FLOP/s, which is rather too low: larger products run better.

What to expect of such a run is what the study predicts (docs/evidence.md), and only near to what it
measured. ``scaling.json``, which docs/results/scaling.py writes, has the study's tuned cells and,
where those are enough, fits of what ternary costs and of the bits per byte of ternary models. They
speak for runs within the range of the measured cells, in weights and in tokens per weight, and up
to a doubling beyond; of others nothing is predicted.
"""

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import torch

from bitnet.build import build_model
from bitnet.config import Config, load_config
from bitnet.linear import weights_quantized
from bitnet.schema import UserError
from bitnet.training.optim import build_optimizer, clip_gradients

TOKENS_PER_PARAMETER = 20
TRAINING = 0.9
"""Share of the time that is training; the rest goes to evaluations and checkpoints."""
REACH = 1.0
"""Doublings beyond the range of the study up to which it predicts."""
STUDY_BATCH = 2048
"""Tokens per step in the study, on which the best rate depends."""
MEASURED = (1, 2, 3, 4)
"""Depths whose speed is measured."""
_DEEPEST = 48


class Cell(NamedTuple):
    """What the study measured at one size and number of tokens."""

    weights: int
    """in the matrices"""
    tokens_per_weight: float
    seeds: int
    gap: float
    """ternary minus full precision, nats per token: the median of the seeds"""
    low: float
    high: float
    muon_lr: float
    """the best rate of ternary there, at 2,048 tokens per step"""


class Fit(NamedTuple):
    """A quantity as a product of powers of the weights and of the tokens per weight."""

    coefficients: Sequence[float]
    """[3]: logarithm of the value at ``at``, and its change per doubling of the weights and of the
    tokens per weight"""
    covariance: Sequence[Sequence[float]]
    """[3, 3], of the coefficients"""
    deviation: float
    """of a cell's mean from the fit"""
    t: float
    """Student's, for intervals of 95%"""
    at: Sequence[float]
    """weights, tokens per weight"""

    def predict(self, weights: float, tokens: float) -> tuple[float, float]:
        """The value for a new run, and half the width of its 95% prediction interval (least
        squares, to first order)."""
        x = (1.0, math.log2(weights / self.at[0]), math.log2(tokens / weights / self.at[1]))
        value = math.exp(sum(a * b for a, b in zip(x, self.coefficients, strict=True)))
        of_fit = sum(x[i] * self.covariance[i][j] * x[j] for i in range(3) for j in range(3))
        return value, self.t * math.sqrt(self.deviation**2 + value**2 * of_fit)


class Study(NamedTuple):
    """What the study found."""

    cells: list[Cell]
    gap: Fit | None
    """ternary minus full precision, nats per token; None: too few cells"""
    bits_per_byte: Fit | None
    """of packed ternary models, on books"""


class Plan(NamedTuple):
    """A run that fits."""

    config: Config
    """resolved, with its tokens and steps"""
    tokens_per_second: float
    measured: bool
    """whether this depth was measured itself"""
    hours: float

    @property
    def weights(self) -> int:
        """Weights in the matrices."""
        return self.config.model.num_parameters()["matrices"]


def load_study() -> Study:
    """The study's findings, which come with the package."""
    text = files("bitnet").joinpath("scaling.json").read_text(encoding="utf-8")
    found = json.loads(text)
    fits = (found[name] for name in ("gap", "bits_per_byte"))
    gap, bits = (Fit(**fit, at=found["at"]) if fit else None for fit in fits)
    return Study([Cell(**cell) for cell in found["cells"]], gap, bits)


def nearest(cells: Sequence[Cell], weights: float, tokens: float) -> Cell | None:
    """The cell closest to a run of so many weights and tokens; None if the run lies more than
    ``REACH`` doublings outside the range of the cells."""
    run = (weights, tokens / weights)
    places = [(cell.weights, cell.tokens_per_weight) for cell in cells]
    for value, measured in zip(run, zip(*places, strict=True), strict=True):
        if not min(measured) / 2**REACH <= value <= max(measured) * 2**REACH:
            return None

    def doublings(cell: Cell) -> float:
        place = (cell.weights, cell.tokens_per_weight)
        return sum(abs(math.log2(a / b)) for a, b in zip(run, place, strict=True))

    return min(cells, key=doublings)


def shape_words(paths: Sequence[Path | str], overrides: Sequence[str], depth: int) -> list[str]:
    """The overrides that give a config another depth: shape keys that its files set follow from the
    depth again; those of ``overrides`` stay."""
    given = load_config(paths).model
    named = {override.partition("=")[0].strip() for override in overrides}
    followed = ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_ff")
    reset = [f"model.{key}" for key in followed if getattr(given, key)]
    return [f"model.depth={depth}", *(f"{key}=0" for key in reset if key not in named)]


def at_depth(paths: Sequence[Path | str], overrides: Sequence[str], depth: int) -> Config:
    """The config at another depth, resolved, with 20 tokens per parameter.

    Raises:
        UserError: a mistake in the config.
    """
    config = load_config(paths, [*overrides, *shape_words(paths, overrides, depth)])
    train = dataclasses.replace(config.train, steps=0, tokens=0)
    return dataclasses.replace(config, train=train).resolve()


def measured_speed(config: Config, seconds: float) -> float:
    """Tokens per second of optimizer steps on this CPU, with torch's threads, on random tokens.

    The median step counts, so that a pause does not; the first, which warms up, does not either.
    """
    batch, seq_len = config.train.batch_tokens, config.data.seq_len
    micro = config.micro_batch(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(config, "", fresh=True)
        tokens = torch.randint(
            config.model.vocab_size, (micro, seq_len + 1), dtype=torch.int64, device="cpu"
        )
    optimizers = build_optimizer(model, config.optim)
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begun < seconds:
        mark = time.perf_counter()
        with weights_quantized(model):
            for _ in range(batch // (micro * seq_len)):
                model(tokens[:, :-1], tokens[:, 1:]).backward()
        clip_gradients(model.parameters(), 1.0)
        optimizers.step()
        optimizers.zero_grad()
        times.append(time.perf_counter() - mark)
    return batch / sorted(times[1:])[len(times[1:]) // 2]


def propose(
    configs: Sequence[Config], speeds: Sequence[float], hours: float, tokens: int = 0
) -> Plan:
    """The largest run of 20 tokens per parameter that fits.

    Arguments:
        configs: of depths 1, 2, ..., each resolved with its 20 tokens per parameter.
        speeds: tokens per second of the first of them; the others have the FLOP/s of the last.
        hours: of the whole run.
        tokens: of the run; 0: as many as the size wants.
    Raises:
        UserError: nothing fits; says what would.
    """
    last = configs[len(speeds) - 1]
    flops = speeds[-1] * last.model.flops_per_token(last.data.seq_len)
    best: Plan | None = None
    refused = ""
    for i, config in enumerate(configs):
        speed = flops / config.model.flops_per_token(config.data.seq_len)
        speed = speeds[i] if i < len(speeds) else speed
        wanted = config.train.tokens
        if tokens and wanted > tokens and best is not None:
            break
        train = config.train
        if tokens:
            steps = math.ceil(tokens / train.batch_tokens)
            train = dataclasses.replace(train, tokens=tokens, steps=steps)
        needed = train.steps * train.batch_tokens / speed / 3600 / TRAINING
        if needed > hours:
            refused = f"{train.tokens:,} tokens at depth {i + 1} take {needed:.3g} hours here"
            break
        chosen = dataclasses.replace(config, train=train)
        best = Plan(chosen, speed, i < len(speeds), needed)
    if best is None:
        raise UserError(f"--hours {hours:g}: is too short; {refused}")
    return best


def all_depths(paths: Sequence[Path | str], overrides: Sequence[str]) -> list[Config]:
    """The config at each depth that may be proposed."""
    return [at_depth(paths, overrides, depth) for depth in range(1, _DEEPEST + 1)]
