"""Cost of a generated token: operations by dtype, bytes moved, and energy by published tables.

    fp16 = token_cost(model, context=1024, ternary=False)
    w158 = token_cost(model, context=1024, ternary=True)
    arithmetic(fp16, NODES["7 nm"]) / arithmetic(w158, NODES["7 nm"])

One token is decoded alone (batch 1) and attends to ``context`` positions, including its own. The
ternary model differs from the 16-bit one only in its layers' matrices. Each of their weights costs

    FP16      one fp16 multiplication and one addition
    W1.58A8   one int8 addition where the code is +1 or -1, nothing where it is 0

W1.58A8 also computes the activations' scale and applies both scales. Everything else (attention
over the cache, head, norms, softmax, rotary positions, residual stream) is the same in both. A
comparison counts as an addition; roots, exponentials and divisions are left out.

The result depends on the price of an addition, so there are two. *narrow*: by the width of its
inputs (an int8 add costs 0.007 pJ at 7 nm), as in BitNet b1.58 (arXiv 2402.17764); a lower bound.
The paper's "71.4 times less" for the layers' matrices is exactly this ratio of three constants:
(fp16 mul 0.34 + fp16 add 0.16) / int8 add 0.007. It skips no zero, accumulates nothing in more
than 8 bits, applies no scale and reads nothing from memory. *wide*: by the accumulator of real
kernels (fp16 products into fp32, int8 values into int32); an upper bound for the ternary sum, whose
adders may grow with their depth.

Memory costs more than any arithmetic. At batch 1 each weight is fetched for one use, and fetching
16 bits from DRAM costs hundreds of times as much as one multiply-add with them. The saving at
batch 1 is therefore about the ratio of the bytes. Batching divides the weight fetches by the batch
size, in both models. Nothing here models batching, SRAM, wires, instructions, leakage or idle
hardware; the last five outweigh the arithmetic on real machines.

The constants are estimates for single operators, not measurements of a chip:

    45 nm   M. Horowitz, "Computing's energy problem", ISSCC 2014, figure 1.1.9
    7 nm    arXiv 2112.00133 (PokeBNN), table 1, the one that BitNet b1.58 uses
    DRAM    1.3 to 2.6 nJ per 64 bits (Horowitz, same figure): the lower end, at both nodes, since
            the 7 nm table has no memory. HBM2 costs about a fifth (0.25 nJ; O'Connor et al.,
            "Fine-grained DRAM", MICRO 2017).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from bitnet.linear import BitLinear, TernaryLinear
from bitnet.model import ModelConfig
from bitnet.qat.integer import IntLinear
from bitnet.qat.layers import QATLinear
from bitnet_kernels.packing import packed_columns

Operation = Literal["int8_add", "int32_add", "fp16_add", "fp16_mul", "fp32_add", "fp32_mul"]
Accumulator = Literal["narrow", "wide"]

NODES: dict[str, dict[Operation, float]] = {
    "45 nm": {
        "int8_add": 0.03,
        "int32_add": 0.1,
        "fp16_add": 0.4,
        "fp16_mul": 1.1,
        "fp32_add": 0.9,
        "fp32_mul": 3.7,
    },
    "7 nm": {
        "int8_add": 0.007,
        "int32_add": 0.03,
        "fp16_add": 0.16,
        "fp16_mul": 0.34,
        "fp32_add": 0.38,
        "fp32_mul": 1.31,
    },
}
"""pJ per operation."""
DRAM = 1300 / 8
"""pJ per byte."""
EXPECTED_ZEROS = 0.315
"""Share of zeros under absmean: 31% of Gaussian weights, 31 to 34% of trained ones."""
_WIDE: dict[Operation, Operation] = {"int8_add": "int32_add", "fp16_add": "fp32_add"}


@dataclass(frozen=True)
class Part:
    """Operations of one part of the model, by dtype."""

    name: str
    operations: Mapping[Operation, int]
    skipped: int = 0
    """Additions saved by codes of 0."""

    def count(self, kind: Literal["mul", "add"]) -> int:
        """Multiplications or additions, of any dtype."""
        return sum(n for operation, n in self.operations.items() if operation.endswith(kind))


@dataclass(frozen=True)
class TokenCost:
    """Cost of one generated token."""

    parts: tuple[Part, ...]
    traffic: Mapping[str, int]
    """Bytes read from and written to memory, by kind; activations stay on the chip."""

    def part(self, name: str) -> Part:
        """The part with this name."""
        return next(part for part in self.parts if part.name == name)


MATRICES, SCALES, ATTENTION, HEAD, REST = (
    "layers' matrices",
    "activation and weight scales",
    "attention (QK, PV)",
    "head",
    "norms, softmax, rotary, residual",
)


def token_cost(
    model: ModelConfig, context: int, *, ternary: bool, zeros: float = EXPECTED_ZEROS
) -> TokenCost:
    """Operations and bytes of one token, decoded alone. All but ternary matrices are in 16 bits.

    Arguments:
        model: resolved. context: positions attended to, including the token's own.
        ternary: True: W1.58A8 with packed 2-bit codes. False: the 16-bit baseline.
            ``model.linear`` is not read.
        zeros: share of zero codes.
    Raises:
        ValueError: context < 1 or zeros outside [0, 1].
    """
    if context < 1:
        raise ValueError(f"context: expected >= 1, got {context}")
    if not 0 <= zeros <= 1:
        raise ValueError(f"zeros: expected a share in [0, 1], got {zeros}")
    weights = model.num_parameters()["matrices"]
    scores = model.n_layers * model.n_heads * context
    attended = 2 * scores * model.head_dim  # Q K^T and P V
    head = model.vocab_size * model.d_model
    if ternary:
        skipped = round(zeros * weights)
        matrices = Part(MATRICES, {"int8_add": weights - skipped}, skipped)
        scales = Part(SCALES, _scales(model))
    else:
        matrices = Part(MATRICES, {"fp16_mul": weights, "fp16_add": weights})
        scales = Part(SCALES, {})
    position = 2 * model.n_layers * model.n_kv_heads * model.head_dim
    high_precision = head + model.num_parameters()["norms"] + model.d_model  # and one embedding
    return TokenCost(
        (
            matrices,
            scales,
            Part(ATTENTION, {"fp16_mul": attended, "fp16_add": attended}),
            Part(HEAD, {"fp16_mul": head, "fp16_add": head}),
            Part(REST, _rest(model, scores)),
        ),
        {
            MATRICES: packed_matrix_bytes(model) if ternary else 2 * weights,
            "head, embedding, norms": 2 * high_precision,
            "KV cache": 2 * position * context,  # writes the token's own, reads the others
        },
    )


def _scales(model: ModelConfig) -> dict[Operation, int]:
    """Operations of the scales. Each matrix: max|x| and x / s_x over its inputs, then s_x and gamma
    on each output."""
    multiplications = additions = 0
    for n, k in model.matrices().values():
        groups = -(-k // model.group_size) if model.granularity == "group" else 1
        multiplications += k + 2 * n * groups
        additions += k + n * (groups - 1)
    return {"fp32_mul": model.n_layers * multiplications, "fp32_add": model.n_layers * additions}


def _rest(model: ModelConfig, scores: int) -> dict[Operation, int]:
    heads = model.n_heads + model.n_kv_heads
    normed = model.num_parameters()["norms"]  # 1 weight per element; all heads share qk_norm's
    if model.qk_norm:
        normed += model.n_layers * (heads - 2) * model.head_dim
    rotated = model.n_layers * heads * model.head_dim
    gated, residual = model.n_layers * model.d_ff, 2 * model.n_layers * model.d_model
    return {
        # square, times the root, times the weight; scale, normalize; cos and sin; gate, times up
        "fp32_mul": 3 * normed + 2 * scores + 2 * rotated + 2 * gated,
        # mean; find and subtract the maximum, sum up; the rotated pair; gate; the residual stream
        "fp32_add": normed + 3 * scores + rotated + gated + residual,
    }


def packed_matrix_bytes(model: ModelConfig) -> int:
    """Bytes of the layers' matrices at 2 bits per weight, with their fp32 scales, in memory."""
    codes = scales = 0
    for n, k in model.matrices().values():
        codes += n * packed_columns(k)
        groups = -(-k // model.group_size)
        scales += {"tensor": 1, "row": n, "group": n * groups}[model.granularity]
    return model.n_layers * (codes + 4 * scales)


def energy(part: Part, node: Mapping[Operation, float], accumulator: Accumulator = "wide") -> float:
    """pJ of a part's operations; additions are priced by their inputs or by their accumulator."""
    prices = {
        operation: node[_WIDE.get(operation, operation) if accumulator == "wide" else operation]
        for operation in part.operations
    }
    return sum(n * prices[operation] for operation, n in part.operations.items())


def arithmetic(
    cost: TokenCost, node: Mapping[Operation, float], accumulator: Accumulator = "wide"
) -> float:
    """pJ of all operations."""
    return sum(energy(part, node, accumulator) for part in cost.parts)


def memory(cost: TokenCost) -> float:
    """pJ of all traffic, at DRAM's price."""
    return DRAM * sum(cost.traffic.values())


def zero_share(model: nn.Module) -> float | None:
    """Share of zero codes in a model's ternary linear layers, trained or packed; None if it has no
    such layer."""
    zeros = weights = 0
    for module in model.modules():
        if (codes := _ternary_codes(module)) is not None:
            zeros += codes.numel() - int(codes.count_nonzero())
            weights += codes.numel()
    return zeros / weights if weights else None


def _ternary_codes(module: nn.Module) -> Tensor | None:
    if isinstance(module, TernaryLinear):
        return module.codes()
    if isinstance(module, QATLinear | IntLinear) and not module.recipe.quantizer.ternary:
        return None
    return module.quantize()[0] if isinstance(module, BitLinear | QATLinear | IntLinear) else None
