"""A small model that has learned, and tokens to calibrate on."""

from typing import cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bitnet.model import Block, Transformer
from bitnet.qat.ptq import sites
from tests.helpers.ptq import config, text_like


@pytest.fixture(scope="session")
def trained() -> Transformer:
    """A model that has learned the chain, with a few channels made large, as in large models."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Transformer(config())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for step in range(150):
        windows = text_like(16, 1000 + step)
        loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for block in model.layers:
            for site in sites(cast(Block, block)):
                scales = torch.ones(site.linears(cast(Block, block))[0].in_features)
                scales[:3] = 1 / 30
                site.fold(cast(Block, block), scales)
    return model.eval()


@pytest.fixture(scope="session")
def calibration() -> Tensor:
    return text_like(48, 1)[:, :-1]
