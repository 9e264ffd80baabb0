"""The results of ``bitnet export --verify``, and the comparison that all formats share.

A format stores or recomputes codes (integers) and scales (fp32); in every format they must be
equal. How much the logits of another program may differ depends on its arithmetic, so each format's
own verifier sets the bound.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bitnet.linear import BitLinear, TernaryLinear
from bitnet.model import Transformer


@dataclass
class Verification:
    """One line per comparison."""

    compared: list[str] = field(default_factory=list)
    """Comparisons that agree, with their numbers."""
    differences: list[str] = field(default_factory=list)
    """Comparisons that differ."""
    skipped: list[str] = field(default_factory=list)
    """Comparisons that are impossible here, and what to install for them."""

    @property
    def holds(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    def record(self, agrees: bool, line: str) -> None:
        """Add a line to ``compared`` or ``differences``."""
        (self.compared if agrees else self.differences).append(line)


def ternary_matrices(model: Transformer) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, codes int8 ``[N, K]`` and fp32 scale of each ternary matrix, latent or packed."""
    for name, module in model.named_modules():
        if isinstance(module, BitLinear):
            yield name, *module.quantize()
        elif isinstance(module, TernaryLinear):
            yield name, module.codes(), module.scale


def compare_codes(
    model: Transformer,
    loaded: Transformer,
    result: Verification,
    fp16: Collection[str] = (),
) -> None:
    """Compare codes, scales and the other parameters with those of the model read back from the
    file.

    Arguments:
        fp16: parameters that the file may hold rounded to fp16.
    """
    theirs = {name: (codes, scale) for name, codes, scale in ternary_matrices(loaded)}
    matrices = weights = 0
    for name, codes, scale in ternary_matrices(model):
        codes_read, scale_read = theirs.pop(name, (None, None))
        if codes_read is None or scale_read is None:
            result.differences.append(f"{name}: is not there, or is not ternary")
            continue
        if not torch.equal(codes, codes_read):
            result.differences.append(f"{name}: codes differ")
        if not torch.equal(scale, scale_read):
            result.differences.append(f"{name}: scales differ: {scale} and {scale_read}")
        matrices, weights = matrices + 1, weights + codes.numel()
    result.differences += [f"{name}: is ternary in the file only" for name in theirs]
    rest = dict(loaded.named_parameters())
    for name, parameter in model.named_parameters():
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and isinstance(model.get_submodule(layer), BitLinear):
            continue
        found = rest.get(name)
        rounded = parameter.half().float() if name in fp16 else parameter
        if found is None or not (torch.equal(found, parameter) or torch.equal(found, rounded)):
            result.differences.append(f"{name}: differs")
    if not result.differences:
        result.compared.append(
            f"{matrices} matrices read back: {weights:,} codes and their scales are equal, and so "
            f"are all other parameters{' (within fp16)' if fp16 else ''}"
        )
