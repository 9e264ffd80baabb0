"""The contenders: the 16-bit matmul to beat, all our kernels, and the kernels of other projects.

All multiply by the same ternary matrix. Ours are timed twice: ``linear`` has float inputs and
outputs and quantizes the activations, as a layer does; ``matmul`` is the integer product alone. The
others have 16-bit inputs and outputs, so ratios of ``linear`` compare like with like. On a CPU,
``read`` reads the packed weights in order and only adds them up, as 64-bit integers. A kernel
whose weights come from memory takes about the same time, or less if it prefetches.

On a CPU the weights are in large pages, if the system allows it, like those of a loaded model.
"""

import ctypes
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from bitnet_kernels import KERNELS, bit_planes, pack_ternary, ternary_linear, ternary_matmul
from bitnet_kernels.available import takes_native
from bitnet_kernels.bench.timing import CALL
from bitnet_kernels.cpu import native
from bitnet_kernels.cpu.pages import use_large_pages
from bitnet_kernels.dispatch import FORMULATIONS
from bitnet_kernels.packing import packed_columns

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_FEW_TOKENS = {"addsub": 64, "sad": 64, "popcount": 64, "dp4a": 64, "read": 4}
"""Above this M the tables never choose these kernels, so timing them would be wasted."""


@dataclass
class Problem:
    """One matrix [N, K] and M tokens, the same for every contender."""

    device: torch.device
    m: int
    codes: Tensor
    """int8 [N, K], ternary."""
    packed: Tensor
    scale: Tensor
    """fp32 [], the scale of the weights."""
    seed: int = 0
    _floats: dict[str, Tensor] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """out_features."""
        return self.codes.shape[0]

    @property
    def k(self) -> int:
        """in_features."""
        return self.codes.shape[1]

    @cached_property
    def planes(self) -> Tensor:
        """The second layout of the weights, which popcount reads."""
        return bit_planes(self.packed)

    @cached_property
    def x_q(self) -> Tensor:
        """int8 [M, K] over the whole range, for the product alone."""
        draw = torch.Generator(self.device).manual_seed(self.seed + 1)
        shape = (self.m, self.k)
        return torch.randint(-128, 128, shape, dtype=torch.int8, device=self.device, generator=draw)

    def x(self, dtype: str) -> Tensor:
        """Activations [M, K]: the same draw, rounded to the dtype."""
        if dtype not in self._floats:
            draw = torch.Generator(self.device).manual_seed(self.seed + 2)
            x = torch.randn(self.m, self.k, device=self.device, generator=draw, dtype=torch.float32)
            self._floats[dtype] = x.to(DTYPES[dtype])
        return self._floats[dtype]

    def weight(self, dtype: str) -> Tensor:
        """codes * scale [N, K], for contenders that take floats."""
        return (self.codes * self.scale).to(DTYPES[dtype])


def make_problem(n: int, k: int, m: int, device: torch.device, seed: int = 0) -> Problem:
    """A random ternary matrix, a third of each code, and tokens; seeded."""
    draw = torch.Generator(device).manual_seed(seed)
    codes = torch.randint(-1, 2, (n, k), dtype=torch.int8, device=device, generator=draw)
    scale = torch.tensor(k**-0.5, device=device, dtype=torch.float32)
    return Problem(device, m, codes, pack_ternary(codes), scale, seed)


def same_matrix(problem: Problem, m: int) -> Problem:
    """The same matrix with another M."""
    other = Problem(problem.device, m, problem.codes, problem.packed, problem.scale, problem.seed)
    if "planes" in problem.__dict__:  # made once per matrix
        other.__dict__["planes"] = problem.planes
    return other


@dataclass(frozen=True)
class Contender:
    """Something that computes the layer, or the product, and can be timed."""

    who: str
    family: str
    formulation: str
    what: str
    dtype: str
    bits: float
    """Bits per weight, as stored."""
    tolerance: float | None
    """Relative error allowed, in the Frobenius norm; None: every bit must be right."""
    build: Callable[[Problem, int], CALL]
    """Makes ``copies`` copies of the weights, and the function that uses the i-th."""

    @property
    def label(self) -> str:
        """The contender's name in messages."""
        return f"{self.who} {self.formulation} {self.what} {self.dtype}"

    def weight_bytes(self, n: int, k: int) -> int:
        """Bytes of one copy of the weights; ours are padded in K."""
        return n * packed_columns(k) if self.who == "bitnet" else int(n * k * self.bits / 8)

    def bytes_moved(self, m: int, n: int, k: int) -> int:
        """A lower bound: weights, activations and outputs, each moved once."""
        if self.what == "read":
            return self.weight_bytes(n, k)
        if self.what == "matmul":
            return self.weight_bytes(n, k) + m * k + 4 * m * n
        return self.weight_bytes(n, k) + DTYPES[self.dtype].itemsize * m * (k + n)


def _ours(kernel: str, what: str, dtype: str) -> Callable[[Problem, int], CALL]:
    def build(problem: Problem, copies: int) -> CALL:
        packed = [problem.packed.clone() for _ in range(copies)]
        # auto gets no planes, as from a caller who keeps only one layout
        reads = kernel == "popcount" or (
            takes_native(kernel, problem.device) and kernel == "addsub"
        )
        planes = [problem.planes.clone() if reads else None for _ in range(copies)]
        _large_pages(packed, planes)
        if what == "matmul":
            x_q = problem.x_q
            return lambda i: ternary_matmul(x_q, packed[i], kernel, planes[i])
        x, scale = problem.x(dtype), problem.scale
        return lambda i: ternary_linear(x, packed[i], scale, None, kernel, planes=planes[i])

    return build


def _large_pages(*copies: list[Tensor] | list[Tensor | None]) -> None:
    tensors = [one for group in copies for one in group if one is not None]
    if tensors and tensors[0].device.type == "cpu":
        use_large_pages(tensors)


def _read(problem: Problem, copies: int) -> CALL:
    lib = native.library()
    assert lib is not None  # contenders() has asked
    packed = [problem.packed.clone() for _ in range(copies)]
    _large_pages(packed)

    def call(i: int) -> Tensor:
        total = lib.bn_read(packed[i].data_ptr(), packed[i].nbytes, native.threads())
        return torch.tensor(ctypes.c_int64(total).value, dtype=torch.int64, device=problem.device)

    return call


READ = Contender("bitnet", "read", "sum", "read", "int64", 2, None, _read)
"""The time of a plain read of the packed weights, on a CPU with the native library."""


def _torch(dtype: str) -> Callable[[Problem, int], CALL]:
    def build(problem: Problem, copies: int) -> CALL:
        x = problem.x(dtype)
        weight = problem.weight(dtype)
        weights = [weight.clone() for _ in range(copies)]
        _large_pages(weights)
        return lambda i: nn.functional.linear(x, weights[i])

    return build


def _layers(
    dtype: str, make: Callable[[Problem, str], Callable[[Tensor], Tensor]]
) -> Callable[[Problem, int], CALL]:
    def build(problem: Problem, copies: int) -> CALL:
        x = problem.x(dtype)
        torch.compiler.reset()  # one graph per shape; torch stops compiling a function after eight
        layers = [make(problem, dtype) for _ in range(copies)]
        return lambda i: layers[i](x)

    return build


def _gemlite(name: str) -> Callable[[Problem, str], Callable[[Tensor], Tensor]]:
    def make(problem: Problem, dtype: str) -> Callable[[Tensor], Tensor]:
        processor = getattr(importlib.import_module("gemlite.helper"), name)
        codes = problem.codes.to(DTYPES[dtype])
        layer = processor(device=str(problem.device)).from_weights(codes, problem.scale)
        return layer.to(problem.device)  # one of its processors leaves the scales on the CPU

    return make


def _torchao(config: str, **options: Any) -> Callable[[Problem, str], Callable[[Tensor], Tensor]]:
    def make(problem: Problem, dtype: str) -> Callable[[Tensor], Tensor]:
        torchao = importlib.import_module("torchao.quantization")
        layer = nn.Linear(
            problem.k, problem.n, bias=False, device=problem.device, dtype=DTYPES[dtype]
        ).requires_grad_(False)
        layer.weight.copy_(problem.weight(dtype))
        torchao.quantize_(layer, getattr(torchao, config)(**options))
        return torch.compile(layer)

    return make


_INT4 = {"group_size": 128, "int4_packing_format": "tile_packed_to_4d"}
_OTHERS = (
    ("gemlite", "A16W158_INT", 2, 0.01, ("bf16", "fp16"), _gemlite("A16W158_INT")),
    ("gemlite", "A8W158_INT_dynamic", 2, 0.03, ("bf16", "fp16"), _gemlite("A8W158_INT_dynamic")),
    ("torchao", "int8wo", 8, 0.01, ("bf16", "fp16"), _torchao("Int8WeightOnlyConfig")),
    # its 16 levels from -scale to scale miss zero by scale/15: 4.7% of the outputs' norm
    ("torchao", "int4wo", 4.25, 0.1, ("bf16",), _torchao("Int4WeightOnlyConfig", **_INT4)),
)
"""Package, its name for the method, bits per weight, tolerance, dtypes, maker. Written for the
public interfaces of gemlite 0.6 and torchao 0.18; not yet run."""


def few_enough(kernel: str, m: int) -> bool:
    """Whether a kernel is worth timing at M = ``m``."""
    return m <= _FEW_TOKENS.get(kernel, m)


def choices() -> tuple[str, ...]:
    """The values that ``--kernel`` accepts."""
    return tuple(dict.fromkeys((*KERNELS, *(other[0] for other in _OTHERS))))


def missing(kernels: tuple[str, ...], device: torch.device) -> list[str]:
    """One line for each kernel or package that was asked for but cannot take part."""
    lines = []
    if device.type != "cuda" and (named := [name for name in FORMULATIONS if name in kernels]):
        lines.append(f"{', '.join(named)}: timed on GPUs only; a CPU runs the reference")
    for package in dict.fromkeys(other[0] for other in _OTHERS):
        if package in kernels and device.type != "cuda":
            lines.append(f"{package} is left out: it is timed on GPUs only")
        elif package in kernels and find_spec(package) is None:
            lines.append(f"{package} is left out: it is not installed (pip install {package})")
    return lines


def baselines(device: torch.device, dtypes: tuple[str, ...]) -> list[Contender]:
    """torch's own matmul, at least once in 16 bits, which is the baseline of all ratios."""
    names = [dtype for dtype in dtypes if device.type != "cuda" or dtype != "fp32"]
    if not {"bf16", "fp16"} & set(names):
        names.append("bf16")
    return [_torch_contender(dtype) for dtype in names]


def _torch_contender(dtype: str) -> Contender:
    bits = 8 * DTYPES[dtype].itemsize
    tolerance = 1e-5 if dtype == "fp32" else 0.01
    return Contender("torch", f"{bits}-bit", dtype, "linear", dtype, bits, tolerance, _torch(dtype))


def contenders(
    device: torch.device,
    kernels: tuple[str, ...],
    dtypes: tuple[str, ...],
    whats: tuple[str, ...],
    m: int,
) -> list[Contender]:
    """Everything to be timed at M = ``m``, the baselines first.

    On a CPU the reference, ``auto`` and the families of the native library run. Triton's
    interpreter is not timed.
    """
    found = baselines(device, dtypes)
    ours = {"auto": "auto", "reference": "reference"}
    if device.type == "cuda":
        ours |= FORMULATIONS
    ours |= {name: name for name in ("addsub", "dot") if takes_native(name, device)}
    for kernel, family in ours.items():
        asked = kernel in kernels or family in kernels
        if not asked or not few_enough(kernel, m):
            continue
        pairs = [("linear", dtype) for dtype in dtypes] + [("matmul", "int8")]
        found += [
            Contender("bitnet", family, kernel, what, dtype, 2, None, _ours(kernel, what, dtype))
            for what, dtype in pairs
            if what in whats
        ]
    ours_run = any(one.who == "bitnet" for one in found)
    if ours_run and takes_native("auto", device) and few_enough("read", m):
        found.append(READ)
    if device.type == "cuda":
        for who, name, bits, tolerance, theirs, make in _OTHERS:
            if who in kernels and find_spec(who) is not None:
                found += [
                    Contender(
                        who, "other", name, "linear", dtype, bits, tolerance, _layers(dtype, make)
                    )
                    for dtype in dtypes
                    if dtype in theirs
                ]
    return found
