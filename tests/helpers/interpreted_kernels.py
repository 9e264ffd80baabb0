"""Runs the matmul kernels in Triton's interpreter and prints the findings as JSON.

Not a test module: ``test_ternary.py`` starts it in a separate process with TRITON_INTERPRET=1,
because that variable is read when Triton is imported and would change every other test that
imports Triton.

The interpreter has no inline assembly, so ``ptx_emulator`` executes the kernels' PTX, instruction
by instruction. So the comparison covers the code that a GPU would run, and then the plain branch.
The oracle is numpy: int64 products, and fp32 arithmetic one operation at a time.
"""

import json
import math
import random
import sys

import numpy as np
import ptx_emulator
import torch
from findings import findings, hostile_rows, oracle_quant, report, same
from interpreter import patch_once
from torch import Tensor

from bitnet.linear import BitLinear, TernaryLinear
from bitnet_kernels import (
    available,
    bit_planes,
    pack_ternary,
    quant,
    quantized_linear,
    reference,
    ternary_linear,
    ternary_matmul,
)
from bitnet_kernels.cpu import int_mm
from bitnet_kernels.dispatch import FORMULATIONS, TileConfig, shipped
from bitnet_kernels.gpu import matmul
from bitnet_kernels.gpu.common import INTERPRETED, Rescale
from bitnet_kernels.gpu.popcount import activation_planes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
N_SHAPES, CHOSEN = int(sys.argv[1]), sys.argv[2:]
"""The number of shapes, and the kernels that this process checks."""
N_ACCUMULATORS = N_SHAPES // 3
"""The number of those shapes that are also checked without the rescale."""
THOROUGH = N_SHAPES >= 200
"""Whether to take the time for long rows and more configurations."""
N_PLAIN = {False: 8, True: 14}


def oracle_matmul(x_q: Tensor, codes: Tensor) -> Tensor:
    acc = x_q.numpy().astype(np.int64) @ codes.numpy().astype(np.int64).T
    return torch.from_numpy(acc.astype(np.int32))


def oracle_linear(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None
) -> Tensor:
    x_q, s_x, _ = oracle_quant(x)
    y = oracle_matmul(x_q, codes).numpy().astype(np.float32) * s_x.numpy()[:, None]
    y = y * scale.numpy()
    if bias is not None:
        y = y + bias.float().numpy()
    return torch.from_numpy(y).to(dtype or x.dtype)


def random_codes(n: int, k: int) -> Tensor:
    """Random codes; in some rows all have the same value."""
    codes = torch.randint(-1, 2, (n, k), dtype=torch.int8)
    for row, value in enumerate((1, -1, 0)):
        codes[row + 5 : row + 6] = value
    return codes


def any_int8(m: int, k: int) -> Tensor:
    """[M, K] of all values, with a row of the lowest."""
    x_q = torch.randint(-128, 128, (m, k), dtype=torch.int8)
    x_q[1:2] = -128
    return x_q


def random_shapes() -> list[tuple[int, int, int]]:
    """M in 1..64, N and K in 1..700: corners, then log-uniform shapes, because small sizes are
    where masks and padding go wrong; every eighth is uniform in N and K, every 16th has an M above
    8. The interpreter takes 10 ms per token and kernel."""
    shapes = [(1, 1, 1), (64, 70, 300), (1, 700, 700), (1, 700, 1), (64, 1, 64), (2, 3, 65)]
    rng = random.Random(20240217)

    def log_uniform(most: int) -> int:
        return round(math.exp(rng.uniform(0, math.log(most))))

    while len(shapes) < N_SHAPES:
        if len(shapes) % 8:
            n, k = log_uniform(700), log_uniform(700)
        else:
            n, k = rng.randint(1, 700), rng.randint(1, 700)
        shapes.append((rng.randint(9, 64) if len(shapes) % 16 == 15 else log_uniform(8), n, k))
    return shapes


def check_shape(index: int, branch: str, m: int, n: int, k: int) -> None:
    dtype = DTYPES[index % 3]
    codes, x = random_codes(n, k), torch.randn(m, k).to(dtype)
    packed = pack_ternary(codes)
    planes = bit_planes(packed)
    hostile = hostile_rows(k, dtype)[torch.randperm(9)[: min(m, 3)]]
    x[: hostile.shape[0]] = hostile
    x_q = any_int8(min(m, 2), k)
    scale = torch.rand(()) if index % 4 == 3 else torch.rand(n)
    bias = None if index % 3 == 2 else torch.randn(n).to(DTYPES[index % 2])
    out_dtype = DTYPES[index % 5 % 3]
    case = f"{branch}, M, N, K = {m}, {n}, {k}"
    acc, y = oracle_matmul(x_q, codes), oracle_linear(x, codes, scale, bias, out_dtype)
    more = f"{case}, {dtype} -> {out_dtype}, scale {list(scale.shape)}, bias {bias is not None}"
    for kernel in CHOSEN:
        if index < N_ACCUMULATORS:
            got = ternary_matmul(x_q, packed, kernel, planes)
            report(f"{kernel} accumulators", case, same(got, acc))
        got = ternary_linear(x, packed, scale, bias, kernel, 128, planes, out_dtype)
        report(f"{kernel} outputs", more, same(got, y))
    if branch == "assembly":
        check_layers(f"{case}, index {index}", x[:2], codes, index % 10 == 0)


def check_layers(case: str, x: Tensor, codes: Tensor, every_family: bool) -> None:
    """BitLinear's training forward, and its packed form through each family, on the same codes."""
    layer = BitLinear(codes.shape[1], codes.shape[0], bias=False)
    layer.weight = torch.nn.Parameter(codes.float())  # quantizes to the codes themselves
    accumulators: list[Tensor] = []
    exact = int_mm.codes_matmul

    def spy(a: Tensor, b: Tensor) -> Tensor:
        acc = exact(a, b)
        accumulators.append(acc.clone())  # the outputs take its memory
        return acc

    int_mm.codes_matmul = spy
    trained = layer(x).detach()
    int_mm.codes_matmul = exact
    want = oracle_matmul(oracle_quant(x)[0], codes)
    report("training accumulators", case, len(accumulators) == 1 and same(accumulators[0], want))
    families = {FORMULATIONS.get(kernel, kernel) for kernel in CHOSEN}
    for kernel in sorted(families if every_family else {"reference"}):
        packed = TernaryLinear.from_bitlinear(layer, kernel)  # type: ignore[arg-type]
        report(f"packed layer, {kernel}", case, same(packed(x), trained))


def check_configurations() -> None:
    """Check the shipped GPU configurations, which the interpreter's own replace above, and each
    with K split, on shapes that fit none of them."""
    shapes = ((1, 9, 300), (3, 5, 4500), (5, 3, 130), (5, 7, 2200))
    for formulation in FORMULATIONS.keys() & CHOSEN:
        entries = (entry for entry in shipped(90).entries if entry.formulation == formulation)
        # Shuffled, so that the few that time allows are of all kinds.
        configs = sorted({entry.config for entry in entries}, key=lambda one: hash(tuple(one)))
        split = [one._replace(split_k=2 + i % 3) for i, one in enumerate(configs)]
        half = 6 if THOROUGH else 2
        for i, config in enumerate(configs[:half] + split[half : 2 * half]):
            m, n, k = shapes[i % 4]
            codes, x, scale, bias = random_codes(n, k), torch.randn(m, k), torch.rand(n), None
            packed = pack_ternary(codes)
            x_q, s_x, row_sum = reference.quant(x)
            run = (formulation, config, x_q, packed, bit_planes(packed))
            case = f"{formulation}, {tuple(config)}, M, N, K = {m}, {n}, {k}"
            acc = matmul.matmul(*run)
            y = matmul.matmul(*run, row_sum, Rescale(s_x, scale, bias, x.dtype), full_range=False)
            ok = same(acc, oracle_matmul(x_q, codes))
            report("configurations", case, ok and same(y, oracle_linear(x, codes, scale, bias)))


def check_long_rows() -> None:
    """Check accumulators that fp32 could not hold."""
    k = 140_001
    x = torch.full((1, k), 127, dtype=torch.int8)
    packed = pack_ternary(torch.ones(1, k, dtype=torch.int8))
    for kernel in CHOSEN:
        got = ternary_matmul(x, packed, kernel, bit_planes(packed))
        report("long rows", f"{kernel}, K = {k}, all 127", got.item() == 127 * k)
    if "dp4a" in CHOSEN:  # each lane sums more columns than its upper plane could hold
        k = 8192 * 64 + 64
        x = torch.full((1, k), -128, dtype=torch.int8)
        packed = pack_ternary(torch.ones(1, k, dtype=torch.int8))
        got = matmul.matmul("dp4a", TileConfig(1, 32, 64), x, packed)
        report("long rows", f"dp4a, K = {k}, all -128", got.item() == -128 * k)


def check_activation_planes() -> None:
    for m, k in ((1, 16), (3, 64), (2, 4096), (2, 4160)):
        x_q = any_int8(m, k)
        words = activation_planes(x_q).numpy().view(np.uint32)
        bits = (words[..., None] >> np.arange(32, dtype=np.uint32)) & 1
        values = np.array([1, 2, 4, 8, 16, 32, 64, -128])
        codes = np.einsum("mbpwi,p->mbwi", bits.astype(np.int64), values).reshape(m, -1)
        ok = np.array_equal(codes[:, :k], x_q.numpy()) and not codes[:, k:].any()
        report("activation planes", f"M, K = {m}, {k}", ok)


def check_ops() -> None:
    """Check leading dimensions, layouts, empty batches and float64 through the public op, and the
    CUDA implementations, which run on the CPU with interpreted kernels."""
    n, k = 37, 70
    codes, scale, bias = random_codes(n, k), torch.rand(n), torch.randn(n)
    packed = pack_ternary(codes)
    planes = bit_planes(packed)
    for kernel in CHOSEN:
        x = torch.randn(2, 5, k)
        want = oracle_linear(x.view(-1, k), codes, scale, bias).view(2, 5, n)

        def linear(x: Tensor, p: Tensor = packed, n: int = n, kernel: str = kernel) -> Tensor:
            return ternary_linear(x, p, scale[:n], bias[:n], kernel, 128, planes[:n])

        report("ops", f"{kernel}, leading dimensions", same(linear(x), want))
        for dtype in DTYPES:
            rows = hostile_rows(k, dtype)
            y = oracle_linear(rows, codes, scale, bias)
            report("ops", f"{kernel}, {dtype}", same(linear(rows), y))
        report("ops", f"{kernel}, one token, no dimensions", same(linear(x[1, 2]), want[1, 2]))
        report("ops", f"{kernel}, float64", same(linear(x.double()), want.double()))
        strided = [t.repeat_interleave(2, -1)[..., ::2] for t in (x, packed, scale, bias, planes)]
        x_s, packed_s, scale_s, bias_s, planes_s = strided
        got = ternary_linear(x_s, packed_s, scale_s, bias_s, kernel, 128, planes_s)
        report("ops", f"{kernel}, strided", same(got, want))
        got = linear(x.mT.contiguous().mT, packed.t().contiguous().t())
        report("ops", f"{kernel}, transposed", same(got, want))
        shifted = torch.cat([packed.flatten()[:3], packed.flatten()])[3:].view(packed.shape)
        report("ops", f"{kernel}, unaligned", same(linear(x, shifted), want))
        report("ops", f"{kernel}, no tokens", same(linear(x[:, :0]), want[:, :0]))
        report("ops", f"{kernel}, no outputs", same(linear(x, packed[:0], 0), want[..., :0]))
        tokens = quant(x)
        got = quantized_linear(*tokens, packed, scale, bias, kernel, planes, torch.float32)
        report("ops", f"{kernel}, quantized before", same(got, want))
        x_q = torch.cat([any_int8(1, 3)[0], any_int8(3, k).flatten()])[3:].view(3, k)
        got = ternary_matmul(x_q, packed, kernel, planes)
        report("ops", f"{kernel}, unaligned codes", same(got, oracle_matmul(x_q, codes)))


def check_cuda_implementations() -> None:
    """Check the kernels of ``"auto"`` on a GPU, and the quantizer's CUDA implementation."""
    n, k = 37, 70
    codes, scale, bias = random_codes(n, k), torch.rand(n), torch.randn(n)
    packed = pack_ternary(codes)
    planes = bit_planes(packed)
    available.triton_by_default = lambda device: True
    for m in (1, 8, 300):
        x = torch.randn(m, k)
        got = ternary_linear(x, packed, scale, bias, out_dtype=torch.float16)
        want = oracle_linear(x, codes, scale, bias, torch.float16)
        report("CUDA implementations", f"ternary_linear, M = {m}", same(got, want))
        x_q = reference.quant(x)[0]
        for given in (None, planes):
            got = ternary_matmul(x_q, packed, planes=given)
            case = f"ternary_matmul, M = {m}, planes {given is not None}"
            report("CUDA implementations", case, same(got, oracle_matmul(x_q, codes)))
    x = torch.randn(2, 3, k)
    pairs = zip(quant(x.mT.contiguous().mT), reference.quant(x), strict=True)
    report("CUDA implementations", "quant", all(same(a, b) for a, b in pairs))
    groups = torch.rand(n, 3)
    got = ternary_linear(x, packed, groups, None, "auto", 32)
    want = ternary_linear(x, packed, groups, None, "reference", 32)
    report("CUDA implementations", "ternary_linear, group-wise scales", same(got, want))


if __name__ == "__main__":
    assert INTERPRETED, "TRITON_INTERPRET=1 is not set"
    patch_once()
    np.seterr(all="ignore")  # the interpreter computes in numpy; infinities are intended
    ptx_emulator.install()
    for branch in ("plain", "assembly"):
        torch.manual_seed(0)
        matmul.ASSEMBLY = branch == "assembly"
        shapes = random_shapes()
        if not matmul.ASSEMBLY:  # the slow branch
            shapes = [shape for shape in shapes if THOROUGH or shape[0] <= 8][: N_PLAIN[THOROUGH]]
        for index, shape in enumerate(shapes):
            check_shape(index, branch, *shape)
    check_configurations()
    if THOROUGH:
        check_long_rows()
    check_ops()
    if "reference" in CHOSEN:
        check_activation_planes()
        check_cuda_implementations()
    json.dump(findings, sys.stdout)
