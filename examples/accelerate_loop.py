"""BitLinear in an Accelerate loop with gradient accumulation.

    pip install -e ".[examples]"
    accelerate launch examples/accelerate_loop.py      # or python, on one device

`weights_quantized` encloses the micro-batches of a step, so each weight is quantized once per step,
not once per micro-batch. The model predicts a byte of Python source from the eight before it.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from bitnet import pack, replace_linear, weights_quantized

CONTEXT, WIDTH, MICRO_BATCHES = 8, 64, 2


def byte_model() -> nn.Module:
    """``[B, 8]`` bytes -> logits ``[B, 256]``; the last layer stays in full precision."""
    model = nn.Sequential(
        nn.Embedding(256, WIDTH),
        nn.Flatten(),
        nn.LayerNorm(CONTEXT * WIDTH),
        nn.Linear(CONTEXT * WIDTH, 256),
        nn.GELU(),
        nn.LayerNorm(256),
        nn.Linear(256, 256),
        nn.GELU(),
        nn.Linear(256, 256),
    )
    return replace_linear(model, skip=("8",))


def main(steps: int = 40) -> list[float]:
    """Train, pack and compare; returns the loss of each step in nats per byte."""
    set_seed(0)
    data = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    windows = data.unfold(0, CONTEXT + 1, 1)
    dataset = TensorDataset(windows[:, :-1], windows[:, -1])
    accelerator = Accelerator()
    net = byte_model()
    model, optimizer, loader = accelerator.prepare(
        net,
        torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.0),
        DataLoader(dataset, batch_size=32, shuffle=True),
    )
    batches, losses = iter(loader), []
    for _ in range(steps):
        total = 0.0
        with weights_quantized(net):
            for _ in range(MICRO_BATCHES):
                context, target = next(batches)
                loss = F.cross_entropy(model(context), target) / MICRO_BATCHES
                accelerator.backward(loss)
                total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    accelerator.print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < losses[0] - 1.5, "it has not learned"

    probe = windows[:100, :-1].to(accelerator.device)
    with torch.no_grad():
        before = net.eval()(probe)
        pack(net)  # 2 bits per weight
        assert torch.equal(net(probe), before)
    accelerator.print("packed; the same logits, bit for bit")
    return losses


if __name__ == "__main__":
    main()
