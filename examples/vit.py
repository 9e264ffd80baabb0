"""BitLinear in a vision transformer: transformers' ViT learns the direction of stripes.

    pip install -e ".[examples]"
    python examples/vit.py

Patch embedding (a convolution) and classifier stay in full precision; the six matrices of each
layer become ternary.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from bitnet import coverage, pack, replace_linear

SIZE, ANGLES = 16, 4


def stripes(n: int) -> tuple[Tensor, Tensor]:
    """Noisy images ``[n, 1, 16, 16]`` of stripes in one of 4 directions, and the directions
    ``[n]``."""
    labels = torch.randint(ANGLES, (n,))
    angle = (labels * math.pi / ANGLES).view(-1, 1, 1)
    axis = torch.arange(SIZE).float()
    across = axis * angle.cos() + axis.unsqueeze(1) * angle.sin()
    images = torch.sin(across + 2 * math.pi * torch.rand(n, 1, 1))
    return (images + 0.3 * torch.randn_like(images)).unsqueeze(1), labels


def main(steps: int = 30) -> float:
    """Train, pack and compare; returns the packed model's accuracy on unseen images."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=SIZE,
        patch_size=4,
        num_channels=1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    config.num_labels = ANGLES
    model = ViTForImageClassification(config)
    replace_linear(model, skip=("classifier",))
    print(coverage(model))

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        images, labels = stripes(32)
        loss = F.cross_entropy(model(images).logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

    images, labels = stripes(200)
    with torch.no_grad():
        before = model.eval()(images).logits
        pack(model)  # 2 bits per weight
        logits = model(images).logits
    assert torch.equal(logits, before)
    right = (logits.argmax(-1) == labels).float().mean().item()
    print(f"packed; the same logits, bit for bit; {right:.0%} of 200 unseen images are right")
    assert right > 0.6, "chance is 25%"
    return right


if __name__ == "__main__":
    main()
