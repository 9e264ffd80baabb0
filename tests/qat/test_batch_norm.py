"""Folding batch norms: by trace, by name, before and after replace_linear."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitnet.linear import BitLinear, replace_linear
from bitnet.qat.batch_norm import batch_norm_pairs, fold_batch_norm
from bitnet.qat.prepare import prepare
from bitnet.qat.recipe import Recipe


class Branchy(nn.Module):
    """Batch norms that fold and batch norms that must not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.plain = nn.Conv2d(6, 6, 1)
        self.bn_plain = nn.BatchNorm2d(6, affine=False)
        self.shared = nn.Conv2d(6, 6, 1)
        self.bn_a, self.bn_b = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.used = nn.Conv2d(6, 6, 1)
        self.bn_used = nn.BatchNorm2d(6)
        self.bn_alone = nn.BatchNorm2d(6)
        self.batch_only = nn.Conv2d(6, 6, 1)
        self.bn_batch = nn.BatchNorm2d(6, track_running_stats=False)
        self.tied_a, self.tied_b = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.tied_b.weight = self.tied_a.weight
        self.bn_tied = nn.BatchNorm2d(6)
        self.conv1d, self.bn1d = nn.Conv1d(6, 5, 1, groups=1), nn.BatchNorm1d(5)
        self.fc, self.bn_fc = nn.Linear(5, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x)).relu()
        x = self.bn_plain(self.plain(x))
        x = self.bn_a(self.shared(x)) + self.bn_b(self.shared(x.relu()))
        y = self.used(x)
        x = self.bn_alone((self.bn_used(y) + y).relu())
        x = self.bn_batch(self.batch_only(x))
        x = self.tied_b(self.bn_tied(self.tied_a(x)))
        x = self.bn1d(self.conv1d(x.flatten(2)))
        return self.bn_fc(self.fc(x.mean(-1)))


FOLDABLE = [("conv", "bn"), ("plain", "bn_plain"), ("conv1d", "bn1d"), ("fc", "bn_fc")]


def trained_branchy() -> Branchy:
    model = Branchy().double()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and module.affine:
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    for _ in range(3):
        model(torch.randn(4, 3, 8, 8).double() * 2 + 1)
    return model.eval()


def test_batch_norms_fold() -> None:
    """A dozen float64 roundings of values of size 1 to 10 in a chain of ten layers."""
    model = trained_branchy()
    x = torch.randn(2, 3, 8, 8).double()
    y = model(x)
    pairs, left = batch_norm_pairs(model)
    assert pairs == FOLDABLE
    assert {name: reason.split(" ", 3)[:3] for name, reason in left.items()} == {
        "bn_a": ["shared", "or", "it"],
        "bn_b": ["shared", "or", "it"],
        "bn_used": ["the", "output", "of"],
        "bn_alone": ["what", "comes", "before"],
        "bn_batch": ["it", "has", "no"],
        "bn_tied": ["the", "weight", "of"],
    }
    weight = model.conv.weight
    folded = fold_batch_norm(model)
    assert folded is model
    assert model.conv.weight is weight
    assert model.conv.bias is not None
    assert isinstance(model.bn, nn.Identity)
    assert isinstance(model.bn_a, nn.BatchNorm2d)
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
    assert batch_norm_pairs(model)[0] == []


def test_batch_norm_without_statistics_yet_and_in_fp32() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3)).eval()
    x = torch.randn(4, 2, 6)
    y = model(x)
    fold_batch_norm(model)
    torch.testing.assert_close(model(x), y, rtol=1e-6, atol=1e-6)
    prepared = prepare(model, Recipe(weights="int", keep_first_last=False))
    with pytest.raises(ValueError, match="fold batch norms before prepare"):
        fold_batch_norm(prepared)


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        return y if x.sum() > 0 else -y


def test_pairs_by_name_where_fx_cannot_trace() -> None:
    model = Untraceable().eval()
    x = torch.rand(4, 2, 6)
    y = model(x)
    with pytest.raises(ValueError, match=r'pairs=\[\("conv1", "bn1"\)\]'):
        fold_batch_norm(model)
    for pairs, message in [
        ([("conv1", "bn2")], "pairs: no module is named 'bn2'"),
        ([("bn1", "conv1")], "pairs: conv1: a Conv1d does not fold into a BatchNorm1d"),
        ([("conv1", "bn1")] * 2, "pairs: a layer or batch norm is named twice"),
    ]:
        with pytest.raises(ValueError, match=message):
            fold_batch_norm(model, pairs)
    fold_batch_norm(model, [("conv1", "bn1")])
    assert isinstance(model.bn1, nn.Identity)
    torch.testing.assert_close(model(x), y, rtol=1e-6, atol=1e-6)


class Normed(nn.Module):
    """Batch norms behind a convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1 = nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6)
        self.fc, self.bn2 = nn.Linear(24, 40, bias=False), nn.BatchNorm1d(40)
        self.head = nn.Linear(40, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv(x)).relu().flatten(1)
        return self.head(self.bn2(self.fc(x)).relu())


def normed() -> Normed:
    torch.manual_seed(3)
    model = Normed()
    for norm in (model.bn1, model.bn2):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return model.eval()


@pytest.mark.parametrize("pairs", [None, [("conv", "bn1"), ("fc", "bn2")]])
@pytest.mark.parametrize("options", [{}, {"granularity": "row"}, {"norm": True}])
def test_batch_norms_fold_before_and_after_replace_linear(
    pairs: list[tuple[str, str]] | None, options: dict[str, Any]
) -> None:
    before = replace_linear(fold_batch_norm(normed(), pairs), **options)
    replaced = replace_linear(normed(), **options)
    x = torch.randn(5, 3, 6)
    after = fold_batch_norm(replaced, pairs)
    assert type(after.bn1) is type(after.bn2) is nn.Identity
    assert type(after.fc) is BitLinear
    assert before.state_dict().keys() == after.state_dict().keys()
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name]), name
    assert torch.equal(before(x), after(x))
    if options.get("granularity") == "row":  # codes only change their sign, scales their size
        codes, scale = replace_linear(normed(), **options).fc.quantize()
        new_codes, new_scale = after.fc.quantize()
        norm = normed().bn2
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()  # type: ignore[operator]
        assert torch.equal(new_codes, codes * factor.sign()[:, None].to(torch.int8))
        torch.testing.assert_close(new_scale, scale * factor.abs().detach())
