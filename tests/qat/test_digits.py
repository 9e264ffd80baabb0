"""The digits study, in small: training through fake quantization, and integers that agree with it.

The data are real and come with scikit-learn. The whole study (docs/results/digits.py) takes
minutes; here is one seed, few epochs, the widest and the narrowest weights.
"""

import copy
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bitnet.config import load_config

DOCS = Path(__file__).parents[2] / "docs"
STUDY: dict[str, Any] = runpy.run_path(str(DOCS / "results" / "digits.py"), run_name="digits")


@pytest.fixture(scope="module")
def data() -> Any:
    return STUDY["digits"]()


@pytest.fixture(scope="module")
def pretrained(data: Any) -> nn.Module:
    model: nn.Module = STUDY["pretrain"](0, data, 6)
    return model


def test_the_split_is_fixed_and_whole(data: Any) -> None:
    assert len(data.test[1]) == 600
    assert len(data.train[1]) == 1197
    both = torch.cat((data.train[0], data.test[0])).flatten(1)
    assert both.min() == -1
    assert both.max() == 1
    assert torch.equal(STUDY["digits"]().test[0], data.test[0])


def test_full_precision_is_accurate(data: Any, pretrained: nn.Module) -> None:
    assert not any(isinstance(module, nn.BatchNorm2d) for module in pretrained.modules())
    assert STUDY["accuracy"](STUDY["outputs"](pretrained, data), data) > 0.96


@pytest.fixture(scope="module")
def forms(data: Any, pretrained: nn.Module) -> dict[tuple[str, int], tuple[nn.Module, nn.Module]]:
    """Fake-quantized and integer models by weights and epochs of training (0: PTQ)."""
    before = copy.deepcopy(pretrained.state_dict())
    runs = [("int8", 0), ("int8", 2), ("ternary", 0), ("ternary", 3)]
    recipes = STUDY["recipes"]()
    found = {run: STUDY["quantized"](pretrained, recipes[run[0]], data, run[1], 0) for run in runs}
    for name, tensor in pretrained.state_dict().items():
        assert torch.equal(tensor, before[name]), "the pretrained model is left alone"
    return found


def test_integers_give_the_outputs_of_fake_quantization(data: Any, forms: Any) -> None:
    for fake, integer in forms.values():
        expected, found = STUDY["outputs"](fake, data), STUDY["outputs"](integer, data)
        assert torch.equal(expected, found)  # all 600 images, every logit, to the last bit
        names = {type(module).__name__ for module in integer.modules()}
        assert {"IntConv2d", "IntLinear"} <= names
        assert not any("QAT" in name for name in names)


def test_every_integer_form_stays_accurate(data: Any, forms: Any) -> None:
    accuracies = {
        run: STUDY["accuracy"](STUDY["outputs"](integer, data), data)
        for run, (_, integer) in forms.items()
    }
    assert accuracies["int8", 0] > 0.96
    assert accuracies["int8", 2] > 0.96
    assert accuracies["ternary", 3] > 0.93
    assert accuracies["ternary", 3] > accuracies["ternary", 0]


def test_sizes_by_hand(forms: Any) -> None:
    """By hand: conv 1x16 and the head 64x10 stay fp32; 32x144, 64x288 and 64x256 are quantized."""
    kept = 4 * (16 * 9 + 16 + 640 + 10)
    codes = 32 * 144 + 64 * 288 + 64 * 256
    rows = 32 + 64 + 64
    input_ranges = 3 * 8  # a scale and a zero point each
    for (weights, _), (fake, integer) in forms.items():
        bits = {"int8": 8, "ternary": 2}[weights]
        stored = STUDY["size_report"](integer).total.stored
        assert stored == kept + codes * bits // 8 + 8 * rows + input_ranges  # scales and biases
        assert STUDY["size_report"](fake).total.fp32 == kept + 4 * (codes + rows)


def test_the_guide_shows_the_table_of_the_csv() -> None:
    guide = (DOCS / "qat.md").read_text(encoding="utf-8")
    shown = guide.partition("<!-- digits:begin -->\n")[2].partition("\n<!-- digits:end -->")[0]
    assert shown == STUDY["table"]()


def test_the_guide_runs(capsys: pytest.CaptureFixture[str]) -> None:
    guide = (DOCS / "qat.md").read_text(encoding="utf-8")
    guide = guide.partition("\n## Add a quantizer\n")[0]  # see test_quantizers.py
    blocks = [block.partition("```")[0] for block in guide.split("```python\n")[1:]]
    assert blocks
    for block in blocks:
        exec(block, {})
    before, _, after = capsys.readouterr().out.partition(" -> ")
    assert int(before) > 3 * int(after.split()[0])


def test_the_guide_names_what_exists() -> None:
    """Every section.key=value of the guide is a key that takes that value."""
    guide = (DOCS / "qat.md").read_text(encoding="utf-8")
    pattern = r"\b((?:quant|qat|distill|adapter|train|data|eval|run)\.[a-z_]+=[^\s`]+)"
    settings = sorted(set(re.findall(pattern, guide)) - {"quant.weights=..."})
    assert len(settings) > 10
    for setting in settings:
        load_config([], [setting])
