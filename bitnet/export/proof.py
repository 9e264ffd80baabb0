"""The proof that a packed model computes the same as the trained one, bit for bit.

Packing keeps integers and one fp32 scale per tensor (or row, or group), so nothing may differ: the
codes, the int32 accumulators of each layer (on the layer's real activations, and on random int8 of
the whole range), the logits, and the greedy tokens. The accumulators are also compared with a
float64 product, exact below 2^53, since the two integer paths could have the same error. The
integer form of a model quantized by a recipe (bitnet/qat) must pass the same comparison: codes,
scales and zero points of each layer, logits and tokens. The int32 product of its codes with random
int8 activations must equal the float64 product.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bitnet.evaluate import evaluation_mode
from bitnet.generate import generate
from bitnet.linear import BitLinear, TernaryLinear
from bitnet.model import Transformer
from bitnet.qat.integer import IntLayer
from bitnet.qat.layers import QATEmbedding, QATLayer
from bitnet.qat.product import int_matmul
from bitnet.schema import UserError
from bitnet_kernels import ternary_matmul
from bitnet_kernels.reference import absmax_int8, int8_matmul

RANDOM_TOKENS = 16
"""Rows of random int8 activations for each layer, in addition to those of the prompts."""


@dataclass
class Proof:
    """Counts of the comparisons, and every difference found."""

    matrices: int = 0
    """Quantized matrices whose codes and scales were compared."""
    weights: int = 0
    """Codes in them."""
    accumulators: int = 0
    """int32 accumulators compared."""
    logits: int = 0
    """Logits compared."""
    tokens: int = 0
    """Greedily generated tokens compared."""
    differences: list[str] = field(default_factory=list)
    """One line each, naming the layer."""

    @property
    def holds(self) -> bool:
        """Whether nothing differs."""
        return not self.differences


def prove(
    latent: Transformer, packed: Transformer, prompts: list[list[int]], new_tokens: int
) -> Proof:
    """Compare a trained model with its packed form.

    Arguments:
        latent: with BitLinear or QAT layers. packed: the same with TernaryLinear or Int layers, on
            the same device; neither is changed.
        prompts: token ids; each prompt has at least one and leaves room for ``new_tokens``.
        new_tokens: greedy tokens per prompt.
    Raises:
        UserError: ``latent`` has no quantized layer. ValueError: no prompts, or an empty one.
    """
    if not prompts or not all(prompts):
        raise ValueError("prompts: expected at least one, and none empty")
    trained = {n: module for n, module in latent.named_modules() if isinstance(module, BitLinear)}
    by_recipe = {n: module for n, module in latent.named_modules() if isinstance(module, QATLayer)}
    if not trained and not by_recipe:
        raise UserError("the model has no ternary layers and no recipe: there is nothing to pack")
    proof = Proof()
    with evaluation_mode(latent), evaluation_mode(packed):
        seen = _compare_logits(latent, packed, prompts, trained, proof)
        for name, linear in trained.items():
            _compare_layer(name, linear, dict(packed.named_modules()).get(name), seen[name], proof)
        for name, layer in by_recipe.items():
            _compare_integer(name, layer, dict(packed.named_modules()).get(name), proof)
        _compare_rest(latent, packed, proof)
    texts = zip(
        generate(latent, prompts, new_tokens), generate(packed, prompts, new_tokens), strict=True
    )
    for row, (ours, theirs) in enumerate(texts):
        proof.tokens += len(ours)
        if ours != theirs:
            proof.differences.append(f"prompt {row}: greedy tokens differ: {ours} and {theirs}")
    return proof


def _compare_logits(
    latent: Transformer,
    packed: Transformer,
    prompts: list[list[int]],
    trained: dict[str, BitLinear],
    proof: Proof,
) -> dict[str, list[Tensor]]:
    """Run the prompts through both; returns the int8 activations that each layer saw."""
    seen: dict[str, list[Tensor]] = {name: [] for name in trained}

    def record(name: str, linear: BitLinear) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            (x,) = args
            if linear.rms_norm is not None:
                x = linear.rms_norm(x)
            seen[name].append(absmax_int8(x.flatten(0, -2))[0])

        return linear.register_forward_pre_hook(hook)

    handles = [record(name, linear) for name, linear in trained.items()]
    try:
        for row, prompt in enumerate(prompts):
            tokens = torch.tensor([prompt], device=latent.norm.weight.device, dtype=torch.int64)
            ours, theirs = latent(tokens), packed(tokens)
            proof.logits += ours.numel()
            if not torch.equal(ours, theirs):
                proof.differences.append(f"prompt {row}: logits differ")
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _compare_layer(
    name: str, linear: BitLinear, packed: nn.Module | None, seen: list[Tensor], proof: Proof
) -> None:
    if not isinstance(packed, TernaryLinear):
        proof.differences.append(f"{name}: is not packed")
        return
    codes, scale = linear.quantize()
    proof.matrices += 1
    proof.weights += codes.numel()
    if not torch.equal(packed.codes(), codes):
        proof.differences.append(f"{name}: codes differ")
    if not torch.equal(packed.scale, scale):
        proof.differences.append(f"{name}: scales differ")
    x_q = torch.cat([*seen, _random_int8(codes)])
    ours = int8_matmul(x_q, codes)
    proof.accumulators += ours.numel()
    if not torch.equal(ternary_matmul(x_q, packed.packed, packed.kernel, packed.planes), ours):
        proof.differences.append(f"{name}: integer accumulators differ")
    if not torch.equal(x_q.double() @ codes.double().t(), ours.double()):
        proof.differences.append(f"{name}: integer accumulators are not the exact product")


def _compare_integer(name: str, layer: QATLayer, packed: nn.Module | None, proof: Proof) -> None:
    if isinstance(packed, TernaryLinear):
        theirs: tuple[Tensor | None, ...] = (packed.codes(), packed.scale, None)
    elif isinstance(packed, IntLayer):
        theirs = tuple(packed.quantize())
    else:
        proof.differences.append(f"{name}: is not packed")
        return
    codes, scale, zero_point = layer.quantize()
    proof.matrices += 1
    proof.weights += codes.numel()
    for what, ours, stored in zip(
        ("codes", "scales", "zero points"), (codes, scale, zero_point), theirs, strict=True
    ):
        same = ours is stored if ours is None or stored is None else torch.equal(ours, stored)
        if not same:
            proof.differences.append(f"{name}: {what} differ")
    if isinstance(layer, QATEmbedding) or layer.recipe.weights_only:
        return
    x_q = _random_int8(codes)
    product = int_matmul(x_q, codes)
    proof.accumulators += product.numel()
    if not torch.equal(product.double(), x_q.double() @ codes.double().t()):
        proof.differences.append(f"{name}: integer accumulators are not the exact product")


def _random_int8(codes: Tensor) -> Tensor:
    """Activations for codes ``[N, K]``: int8 ``[RANDOM_TOKENS, K]``, uniform in -128..127."""
    shape = (RANDOM_TOKENS, codes.shape[1])
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator, device="cpu").to(
        codes.device
    )


def _compare_rest(latent: Transformer, packed: Transformer, proof: Proof) -> None:
    """Compare embeddings, norms and head: everything that packing leaves unchanged."""
    theirs = dict(packed.named_parameters())
    for name, parameter in latent.named_parameters():
        owner = latent.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, BitLinear | QATLayer) and name.endswith((".weight", ".weight_step")):
            continue
        if name not in theirs or not torch.equal(theirs[name], parameter):
            proof.differences.append(f"{name}: differs")
