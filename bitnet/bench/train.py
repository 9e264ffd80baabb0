"""The speed of a training step: variants of one model, measured in turns.

    bitnet bench train --size 15m

A *variant* is a way to compute the layers' matrices, eager or compiled:

    fp          nn.Linear: the full-precision baseline of the ratios
    naive       BitLinear the usual way: fake quantization in floats, x + (q(x) - x).detach()
    ours        BitLinear of this package
    ours-int8   the same with model.int8_backward = "both", an approximation
    torchao     torchao's bitnet_training, if that package is installed

All start from the same weights and see the same random tokens in every step. The step is the one
of train.py (bitnet/training/step.py).

Each variant is a separate process (bitnet/bench/worker.py). All processes exist together and run
one step in turn, in one order and then in the reverse. A slow moment of the machine slows adjacent
turns alike, so the *paired* ratios of one round are reliable even if times alone are not. On a GPU
a worker frees its cached memory after its turn, so that all fit, and begins the next turn with a
micro-batch that is not timed.
"""

import dataclasses
import importlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._autograd import DeviceType
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from bitnet.bench.worker import Worker, serve
from bitnet.config import Config, load_config, to_toml
from bitnet.model import Transformer
from bitnet.modules import replace_modules
from bitnet.schema import UserError
from bitnet.training.distributed import World
from bitnet.training.optim import build_optimizer
from bitnet.training.step import add_gradients, compiled, cross_entropy, split, train_step
from bitnet.training.throughput import peak_memory, reset_peak_memory
from bitnet_kernels.bench.machine import find_meter

FAMILIES = ("fp", "naive", "ours", "ours-int8", "torchao")
COMPILED = "-compiled"
VARIANTS = tuple(family + mode for mode in ("", COMPILED) for family in FAMILIES)
USUAL = ("fp", "naive", "ours", *(family + COMPILED for family in FAMILIES))
"""The variants measured on a GPU by default."""

_TEXT = ["data.vocab_size=32768", "data.seq_len=1024", "train.batch_tokens=65536"]
SIZES = {
    "15m": ["model.depth=6", "data.vocab_size=16384", "data.seq_len=512"],
    "60m": ["model.depth=10", *_TEXT],
    "350m": ["model.depth=20", *_TEXT],
    "1b": ["model.depth=32", "model.n_layers=8", *_TEXT],
}
"""Models without a config file: the models of configs/, the larger ones with 8 micro-batches per
step, and one with layers as wide as a 1.5B model's (2,048; 8 of its 32 layers, so that the
optimizers of all variants fit on one GPU)."""

MIN_SECONDS_FOR_ENERGY = 0.2
"""Shortest step whose energy is measured: the board's counter advances every few tens of ms."""


def family_of(variant: str) -> str:
    """``"ours-compiled"`` -> ``"ours"``."""
    return variant.removesuffix(COMPILED)


def choose_variants(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The variants of ``names`` that can be measured here, and a line for each of the others.

    Raises:
        UserError: none can be measured.
    """
    chosen, absent = list(names), list[str]()
    if find_spec("torchao") is None:
        absent = [name for name in chosen if family_of(name) == "torchao"]
        chosen = [name for name in chosen if name not in absent]
    why = "torchao is not installed (pip install torchao)"
    if not chosen:
        raise UserError(f"--variant: {why}")
    return chosen, [f"{name} is not measured: {why}" for name in absent]


def variant_config(paths: Sequence[Path], overrides: Sequence[str], variant: str) -> Config:
    """The resolved config of a variant.

    Raises:
        UserError: the config has a section that is not timed or that the variant does not support.
    """
    family = family_of(variant)
    own = [
        f"model.linear={'fp' if family == 'fp' else 'ternary'}",
        f"model.int8_backward={'both' if family == 'ours-int8' else 'none'}",
    ]
    config = load_config(paths, [*overrides, *own]).resolve()
    extra = {
        "quant.weights": config.quant.enabled,
        "distill.teacher": bool(config.distill.teacher),
        "adapter.kind": config.adapter.kind != "none",
        "train.init_from": bool(config.train.init_from),
    }
    for key, used in extra.items():
        if used:
            raise UserError(f"{key} is set: only training from scratch without it is timed")
    model = config.model
    plain = (model.granularity, model.grad_mask) == ("tensor", "none")
    if family in ("naive", "torchao") and (not plain or model.norm_placement == "in_linear"):
        raise UserError(
            f"{variant} knows only model.granularity = tensor, model.grad_mask = none and norms "
            "outside the layer; name other variants with --variant"
        )
    return config


class NaiveBitLinear(nn.Linear):
    """BitLinear as printed in papers (BitNet b1.58 Training Tips, figure 3): quantized values kept
    as floats, in nn.Linear's own product; without a bias."""

    def forward(self, input: Tensor) -> Tensor:
        """float ``[..., in_features]`` -> ``[..., out_features]``."""
        x, w = input, self.weight
        s_x = 127.0 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        x_hat = (x * s_x).round().clamp(-128, 127) / s_x
        s_w = 1.0 / w.abs().mean().clamp(min=1e-5)
        w_hat = (w * s_w).round().clamp(-1, 1) / s_w
        return F.linear(x + (x_hat - x).detach(), w + (w_hat - w).detach())


def build(config: Config, variant: str) -> Transformer:
    """Build the variant's model; the config's seed decides the initial weights of all variants."""
    torch.manual_seed(config.run.seed)
    family = family_of(variant)
    if family not in ("naive", "torchao"):
        return Transformer(config.model)
    model = Transformer(dataclasses.replace(config.model, linear="fp"))
    if family == "naive":
        replace_modules(model.layers, _naive)
    else:
        quantize = importlib.import_module("torchao.quantization").quantize_
        recipe = importlib.import_module("torchao.prototype.quantized_training").bitnet_training
        quantize(model.layers, recipe())
    return model


def _naive(name: str, module: nn.Module) -> nn.Module | None:
    if not isinstance(module, nn.Linear):
        return None
    naive = NaiveBitLinear(module.in_features, module.out_features, bias=False, device="meta")
    naive.weight = module.weight
    return naive


class Reply(NamedTuple):
    """The figures of a worker's turn."""

    seconds: float
    """Seconds of the step."""
    turn_seconds: float
    """Seconds of the turn: on a GPU with the micro-batch before the step; the first turn includes
    compilation."""
    loss: float
    """Mean over the step's tokens, in nats, before the update."""
    peak_bytes: int
    """Peak of all tensors: on a GPU during the step; on a CPU, where this needs a profiler, once,
    for two micro-batches beside the optimizer's state."""
    resident_bytes: int | None
    """Peak resident memory of the process during the step; None on a GPU, and if the system does
    not tell (:func:`reset_peak_memory`)."""
    joules: float | None
    """Energy of the whole board for the step."""


class Stepper:
    """Runs optimizer steps of train.py, all on the same random tokens."""

    def __init__(self, config: Config, variant: str) -> None:
        self.config, train = config, config.train
        self.device = torch.device(train.device)
        self.autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=train.dtype == "bf16"
        )
        self.world = World(self.device)
        self.model: nn.Module = build(config, variant).to(self.device).train()
        self.optimizers = build_optimizer(self.model, config.optim)
        if variant.endswith(COMPILED):
            self.model = compiled(self.model)
        draw = torch.Generator().manual_seed(config.run.seed)
        shape = (config.batch_sequences, config.data.seq_len + 1)
        tokens = torch.randint(config.model.vocab_size, shape, generator=draw, device="cpu").to(
            self.device
        )
        self.micro_batches = split(tokens[:, :-1], tokens[:, 1:], train.micro_batch)
        self.meter, _ = find_meter(self.device)
        self.steps = 0
        self.peak = 0

    def turn(self) -> Reply:
        """Run and time one step."""
        begun = time.perf_counter()
        if self.device.type == "cuda":
            self._add_gradients(1)
            torch.cuda.synchronize(self.device)
        is_reset = reset_peak_memory(self.device)
        energy = self._millijoules()
        start = time.perf_counter()
        loss = self.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - start
        joules = None
        if energy is not None and seconds >= MIN_SECONDS_FOR_ENERGY:
            joules = ((self._millijoules() or 0.0) - energy) / 1e3
        peak = peak_memory(self.device) if is_reset else None
        turn_seconds = time.perf_counter() - begun
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            return Reply(seconds, turn_seconds, loss, peak or 0, None, joules)
        self.peak = self.peak or self._held_bytes() + most_allocated(self._two_micro_batches)
        return Reply(seconds, turn_seconds, loss, self.peak, peak, joules)

    def _held_bytes(self) -> int:
        """Bytes of weights, optimizer state and tokens."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        tensors += [tokens for tokens, _ in self.micro_batches]
        for optimizer in self.optimizers.optimizers:
            for state in optimizer.state.values():
                tensors += [value for value in state.values() if isinstance(value, Tensor)]
        storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}
        return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())

    def _two_micro_batches(self) -> None:
        """The part of a step that needs the most memory: the second micro-batch, with the first's
        gradients in memory."""
        self._add_gradients(2)

    def step(self) -> float:
        """Run one step; returns the loss before the update."""
        config = self.config
        result = train_step(
            self.model,
            self.optimizers,
            self.micro_batches,
            self.steps,
            config.train.steps,
            config.optim,
            self.autocast,
            self.world,
        )
        self.steps += 1
        return result.loss

    def _add_gradients(self, n: int) -> None:
        """Forward and backward of the first micro-batches, without an update."""
        add_gradients(self.model, self.micro_batches[:n], self.autocast, cross_entropy)
        self.optimizers.zero_grad()

    def _millijoules(self) -> float | None:
        try:
            return None if self.meter is None else self.meter.millijoules()
        except Exception:  # a GPU without a counter: NVMLError, of a package that may be absent
            return None


def most_allocated(function: Callable[[], object]) -> int:
    """Peak bytes of tensors on the CPU while a function runs, beyond those that existed before.
    torch's profiler reports them from its allocator.

    The resident memory of the process is larger by the memory that malloc keeps between blocks, a
    share that varies from run to run by a twentieth.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    held = most = 0
    events = recorded.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU:
            held += event.nbytes()
            most = max(most, held)
    return most


def _start(variant: str, config: Config, folder: Path) -> Worker:
    """Start a variant's process, with an empty compiler cache, so that compilation is timed."""
    path = folder / f"{variant}.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    return Worker(
        variant,
        "bitnet.bench.train",
        [variant, str(path)],
        folder,
        "--variant or --tokens",
        {"TORCHINDUCTOR_CACHE_DIR": str(folder / f"{variant}-cache")},
    )


def race(
    configs: Mapping[str, Config], rounds: int, warmup: int, tick: Callable[[str], None]
) -> dict[str, list[Reply]]:
    """Run ``warmup`` and then ``rounds`` turns of each variant.

    Arguments:
        configs: variant -> its resolved config.
        tick: called with the variant before each turn.
    Raises:
        WorkerDied: the message names the variant. Whatever is raised, no process is left behind.
    """
    replies: dict[str, list[Reply]] = {name: [] for name in configs}
    workers: dict[str, Worker] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="bench-train-")))

        def turn(name: str) -> None:
            tick(name)
            replies[name].append(Reply(*workers[name].ask("turn")))

        for name, config in configs.items():
            workers[name] = _start(name, config, folder)
            stack.callback(workers[name].close)
            for _ in range(warmup):
                turn(name)
        for i in range(rounds):
            for name in list(configs)[:: -1 if i % 2 else 1]:
                turn(name)
    return replies


def main(variant: str, path: str) -> None:
    """Run a worker: a variant of a resolved config, one step per request."""

    def make() -> dict[str, Callable[..., Any]]:
        config = load_config([path]).resolve()
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        return {"turn": Stepper(config, variant).turn}

    serve(make)


if __name__ == "__main__":
    main(*sys.argv[1:])
