"""A small network with a layer of every kind that can be quantized. Not a test module."""

import torch
from torch import Tensor, nn

EVERYTHING = ["linear", "conv1d", "conv2d", "embedding"]


class Net(nn.Module):
    """A layer of every kind; float and integer inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 12)
        self.conv1 = nn.Conv1d(12, 8, 3, padding="same")
        self.norm = nn.LayerNorm(8)
        self.conv2 = nn.Conv2d(1, 4, 3, stride=2)
        self.mlp = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 6))
        self.head = nn.Linear(6, 10, bias=False)

    def forward(self, ids: Tensor, shift: float = 0.0) -> Tensor:
        x = self.norm(self.conv1(self.embed(ids).mT).mT) + shift
        x = self.conv2(x.unsqueeze(1)).mean(-2).flatten(1)
        return self.head(self.mlp(x))


def ids(seed: int = 0) -> Tensor:
    return torch.randint(0, 10, (5, 7), generator=torch.Generator().manual_seed(seed))


def kinds(model: nn.Module) -> dict[str, str]:
    return {
        name: type(module).__name__
        for name, module in model.named_modules()
        if type(module).__name__.startswith(("QAT", "Int", "Ternary", "Linear", "Conv", "Emb"))
    }
