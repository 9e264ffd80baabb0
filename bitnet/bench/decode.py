"""Speed of generation: packed models against their full-precision baseline and transformers.

    bitnet bench decode --size 110m --batch 1

Every contender (bitnet/bench/decode_worker.py) runs in its own process (bitnet/bench/worker.py).
All contenders of a model are alive together and take turns generating from the same random prompts,
in one order and then in the reverse. A machine that slows down slows adjacent turns alike, so the
ratios *within* a round are reliable even if times alone are not.

A turn is a whole generation, timed as a user sees it, when the tokens arrive. The time to the first
token is spent on the prompt. Decoding is everything after it, while attention grows with the
context. It is greedy and has no end token, so that every turn does the same work.

A file has one row per contender and case, written when the case is done. Rows of the same sources
and versions are not measured again, so an interrupted run continues where it stopped.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bitnet.bench.decode_table import Outcome
from bitnet.bench.decode_worker import (
    BF16_HEAD,
    CONTENDERS,
    LLAMA,
    LLAMA_FA,
    STATIC,
    Case,
    Job,
    Turn,
    unfit_for_transformers,
)
from bitnet.bench.worker import Worker
from bitnet.export.gguf_write import unfit
from bitnet.model import ModelConfig
from bitnet_kernels.cpu import native

_OURS, _LLAMA = {"vocab_size": 32_768}, {"vocab_size": 128_256}
_GGUF = {"norm_placement": "pre_norm", "activation": "silu", "vocab_size": 32_000}
SIZES: dict[str, dict[str, Any]] = {
    "60m": {"depth": 10, **_OURS},
    "110m": {
        "d_model": 768,
        "n_layers": 12,
        "n_heads": 12,
        "n_kv_heads": 12,
        "d_ff": 2048,
        "vocab_size": 32_000,
    },
    "350m": {"depth": 20, **_OURS},
    "700m": {"depth": 24, **_OURS},
    "2b": {
        "d_model": 2560,
        "n_layers": 30,
        "n_heads": 20,
        "n_kv_heads": 5,
        "d_ff": 6912,
        **_LLAMA,
    },
    "8b": {
        "d_model": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 8,
        "d_ff": 14_336,
        "tie_embeddings": False,
        **_LLAMA,
    },
    "110m-silu": {
        "d_model": 768,
        "n_layers": 12,
        "n_heads": 12,
        "n_kv_heads": 12,
        "d_ff": 2048,
        **_GGUF,
    },
    "730m-silu": {
        "d_model": 1536,
        "n_layers": 24,
        "n_heads": 24,
        "n_kv_heads": 24,
        "d_ff": 4096,
        **_GGUF,
    },
}
"""Shapes of configs/, BERT-base, BitNet 2B4T (arXiv 2504.12285) and Llama 3 8B (arXiv 2407.21783),
with BitNet's norms and activation; and two with Llama's, which GGUF supports."""
PEERS = (
    BF16_HEAD,
    "ours-int8-head",
    "ours-dot-bf16-head",
    "ours-addsub-bf16-head",
    LLAMA,
    LLAMA_FA,
)
"""The contenders when compared with llama.cpp, whose head has 16 bits."""
ENERGY_SECONDS = 2.0
"""Seconds of decoding over which the joules per token are measured."""
_PROCESS = {"cpu": 2**29, "cuda": 3 * 2**29}
"""Bytes of a process besides its model: libraries, workspaces, a GPU's context. On a CPU
transformers and its compiler take twice as much."""


def usual(device: torch.device) -> tuple[str, ...]:
    """The default contenders, including those that cannot run here. A GPU has none in fp32; a CPU
    has none with transformers' static cache, which is for compiled code on a GPU."""
    out = "fp32" if device.type == "cuda" else STATIC
    others = set(PEERS) - {BF16_HEAD}
    return tuple(name for name in CONTENDERS if not name.endswith(out) and name not in others)


def refusals(names: Sequence[str], device: torch.device, config: ModelConfig) -> dict[str, str]:
    """Contender -> why it cannot take part here."""
    found = {}
    for name in names:
        if {"addsub", "dot"} & set(name.split("-")):
            if device.type != "cuda" and (why := native.missing()):
                found[name] = why
            elif device.type == "cuda" and find_spec("triton") is None:
                found[name] = "Triton is not installed"
        if name.endswith("-head") and device.type == "cuda":
            found[name] = "on a GPU the head of every contender is in bf16"
        if name in (LLAMA, LLAMA_FA) and (why := _no_llama(device, config)):
            found[name] = why
        if name.startswith("transformers"):
            missing = [name for name in ("transformers", "accelerate") if find_spec(name) is None]
            if missing:
                found[name] = f'{missing[0]} is not installed (pip install "bitnet-train[hf]")'
            elif unfit := unfit_for_transformers(config):
                found[name] = unfit
    return found


def _no_llama(device: torch.device, config: ModelConfig) -> str:
    """Why llama.cpp cannot take part; "" if it can."""
    if device.type == "cuda":
        return "it is measured on a CPU"
    for module, package in (("llama_cpp", "llama-cpp-python"), ("gguf", "gguf")):
        if find_spec(module) is None:
            return f'{package} is not installed (pip install "bitnet-train[peers]")'
    return unfit(config)


def held_bytes(job: Job, config: ModelConfig, cases: Sequence[Case]) -> int:
    """Estimate the bytes that a contender holds in its largest case."""
    sizes, width = config.num_parameters(), job.dtype.itemsize
    each: float = width
    if job.family == LLAMA:
        each = 66 / 256
    elif job.family == "ours":
        layouts = 1 + job.device.startswith("cuda") + (job.kernel == "addsub")
        each = 0.25 * layouts
        if job.device == "cpu" and native.library() is None:
            each += 1  # codes, unpacked
    if job.head != "auto":
        sizes["total"] += config.vocab_size * config.d_model // 2  # besides the embedding in fp32
    cache = 2 * config.n_layers * config.n_kv_heads * config.head_dim * width
    columns = max(case.batch * (case.prompt + case.new) for case in cases)
    weights = sizes["matrices"] * each + (sizes["total"] - sizes["matrices"]) * width
    beside = _PROCESS["cuda" if job.device.startswith("cuda") else "cpu"]
    if job.family == "transformers" and job.device == "cpu":
        beside *= 2
    return int(weights + columns * cache) + beside


def free_bytes(device: torch.device) -> int | None:
    """Free bytes of the device now; None if the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def fitting(jobs: Sequence[Job], sizes: Sequence[int], free: int | None) -> list[Job]:
    """The jobs that fit into memory together, the most important first. A model takes twice its
    size while it is made; models are made one at a time."""
    kept: list[Job] = []
    total = largest = 0
    for job, size in sorted(
        zip(jobs, sizes, strict=True), key=lambda pair: CONTENDERS.index(pair[0].contender)
    ):
        if free is None or total + size + max(largest, size) <= 0.95 * free:
            kept.append(job)
            total, largest = total + size, max(largest, size)
    return kept


class Race:
    """The processes of one model's contenders, alive until the end of the ``with`` block.

    Entering raises Inexact if llama.cpp is among them and does not compute the same model."""

    def __init__(self, jobs: Sequence[Job], tick: Callable[[str], None]) -> None:
        self._jobs, self._tick = jobs, tick
        self._stack = ExitStack()
        self._workers: dict[str, Worker] = {}

    def __enter__(self) -> "Race":
        folder = Path(self._stack.enter_context(TemporaryDirectory(prefix="bench-decode-")))
        try:
            jobs = [replace(job, gguf=str(folder / "model.gguf")) for job in self._jobs]
            for job in [job for job in jobs if job.family == LLAMA][:1]:
                self._check(job, folder)
            for job in jobs:
                self._workers[job.contender] = worker = _worker(job, job.contender, folder)
                self._stack.callback(worker.close)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _check(self, job: Job, folder: Path) -> None:
        """Write llama.cpp's file and compare its logits with ours, in a process that ends before
        the timing."""
        self._tick(f"{job.contender}: checking")
        with ExitStack() as stack:
            worker = _worker(job, "check", folder)
            stack.callback(worker.close)
            if why := worker.ask("check"):
                raise Inexact(f"{job.contender}: {why}")

    def run(self, case: Case, rounds: int) -> dict[str, Outcome]:
        """Measure a case: prepare every contender, then run ``rounds`` rounds.

        Raises:
            WorkerDied: a contender's process ended; the message names the contender.
            Inexact: two kernels of ours chose different tokens.
        """
        memory = {}
        for name, worker in self._workers.items():
            self._tick(f"{name}: getting ready")
            memory[name] = worker.ask("prepare", *case)
        turns: dict[str, list[Turn]] = {name: [] for name in self._workers}
        for i in range(rounds):
            for name in list(self._workers)[:: -1 if i % 2 else 1]:
                self._tick(name)
                turns[name].append(Turn(*self._workers[name].ask("turn", i + 1)))
            _check_tokens({name: mine[i] for name, mine in turns.items()})
        peaks = {name: worker.ask("peak") for name, worker in self._workers.items()}
        joules = {}
        for name, worker in self._workers.items():
            joules[name] = worker.ask("joules", ENERGY_SECONDS)
        bases = {name: worker.ask("base") for name, worker in self._workers.items()}
        return {
            name: Outcome(turns[name], memory[name], peaks[name], joules[name], bases[name])
            for name in self._workers
        }


def _worker(job: Job, name: str, folder: Path) -> Worker:
    arguments = [json.dumps(asdict(job))]
    return Worker(name, "bitnet.bench.decode_worker", arguments, folder, "--contender")


class Inexact(RuntimeError):
    """Raised when kernels that compute the same integers gave different tokens, or llama.cpp
    computes another model."""


def _check_tokens(turns: Mapping[str, Turn]) -> None:
    """Compare our contenders that differ only in the kernel: those with the same kind of head."""
    first: dict[str, str] = {}
    for name, turn in turns.items():
        if not name.startswith("ours"):
            continue
        head = next((one for one in ("bf16", "int8") if name.endswith(f"-{one}-head")), "")
        other = first.setdefault(head, name)
        if turn.tokens != turns[other].tokens:
            raise Inexact(f"{name} and {other} chose different tokens from the same prompts")
