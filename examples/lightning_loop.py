"""BitLinear under Lightning: an ordinary LightningModule, packed after training.

    pip install -e ".[examples]"
    python examples/lightning_loop.py

The model predicts a byte of Python source from the eight before it (Bengio et al., 2003).
"""

import argparse
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from bitnet import pack, replace_linear

CONTEXT, WIDTH = 8, 64


class ByteModel(L.LightningModule):
    """``[B, 8]`` bytes -> logits ``[B, 256]``; the hidden layers are ternary, the head is not."""

    def __init__(self) -> None:
        super().__init__()
        hidden = nn.Sequential(
            nn.LayerNorm(CONTEXT * WIDTH),
            nn.Linear(CONTEXT * WIDTH, 256),
            nn.GELU(),
            nn.LayerNorm(256),
            nn.Linear(256, 256),
            nn.GELU(),
        )
        self.embed, self.hidden = nn.Embedding(256, WIDTH), replace_linear(hidden)
        self.head = nn.Linear(256, 256)
        self.losses: list[float] = []

    def forward(self, context: Tensor) -> Tensor:
        """Logits of the next byte."""
        logits: Tensor = self.head(self.hidden(self.embed(context).flatten(1)))
        return logits

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """The loss of a batch in nats per byte."""
        context, target = batch
        loss = F.cross_entropy(self(context), target)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, with latent weights among its parameters."""
        return torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=0.0)


def main(steps: int = 40) -> list[float]:
    """Train, pack, compare; returns the loss of each step."""
    L.seed_everything(0)
    data = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    windows = data.unfold(0, CONTEXT + 1, 1)
    dataset = TensorDataset(windows[:, :-1], windows[:, -1])
    model = ByteModel()
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, DataLoader(dataset, batch_size=64, shuffle=True))
    print(f"loss {model.losses[0]:.3f} -> {model.losses[-1]:.3f}")
    assert model.losses[-1] < model.losses[0] - 1.5, "it has not learned"

    with torch.no_grad():
        before = model.eval()(windows[:100, :-1])
        pack(model)  # 2 bits per weight
        assert torch.equal(model(windows[:100, :-1]), before)
    print("packed; the same logits, bit for bit")
    return model.losses


if __name__ == "__main__":
    main()
