"""BitLinear in a small GPT of plain torch modules, trained on the bytes of Python's own library.

    python examples/gpt.py

Three lines make the model ternary: replace_linear before training, weights_quantized around the
micro-batches of a step, pack after training.

Shapes: B sequences, T tokens, H heads, D channels.
"""

import argparse
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet import coverage, pack, replace_linear, weights_quantized

CONTEXT, WIDTH, HEADS, LAYERS = 64, 128, 4, 2
BATCH, MICRO_BATCHES = 8, 2


class Block(nn.Module):
    """Attention and MLP, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """``[B, T, D]`` -> ``[B, T, D]``."""
        qkv = self.qkv(self.norms[0](x_BTD))
        q, k, v = rearrange(qkv, "b t (three h e) -> three b h t e", three=3, h=HEADS)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.out(rearrange(attended, "b h t e -> b t (h e)"))
        return x_BTD + self.down(F.gelu(self.up(self.norms[1](x_BTD))))


class GPT(nn.Module):
    """A decoder-only model of bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits ``[B, T, 256]``."""
        x_BTD = self.tokens(tokens_BT) + self.positions.weight[: tokens_BT.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x_BTD)))
        return logits


def main(steps: int) -> list[float]:
    """Train, pack and compare; returns the loss of each step in nats per byte."""
    torch.manual_seed(0)
    text = Path(argparse.__file__).read_bytes()
    data = torch.tensor(list(text))
    model = replace_linear(GPT(), skip=("head",))
    print(coverage(model))

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    losses = []
    for step in range(steps):
        starts = torch.randint(len(data) - CONTEXT - 1, (MICRO_BATCHES, BATCH)).unsqueeze(-1)
        total = 0.0
        with weights_quantized(model):  # once per step, not once per micro-batch
            for windows_BT in data[starts + torch.arange(CONTEXT + 1)]:
                logits = model(windows_BT[:, :-1])
                loss = F.cross_entropy(logits.flatten(0, 1), windows_BT[:, 1:].flatten())
                (loss / MICRO_BATCHES).backward()
                total += loss.item() / MICRO_BATCHES
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: {total:.3f} nats per byte")

    model.eval()
    prompt_BT = data[None, :CONTEXT]
    before = model(prompt_BT)
    model = pack(model)  # 2 bits per weight
    print("packed; the same logits, bit for bit:", torch.equal(model(prompt_BT), before))
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    main(parser.parse_args().steps)
