"""Documents kept apart in a sequence give the losses and gradients of documents alone."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from bitnet.export.folder import load_model, save_model
from bitnet.generate import generate
from bitnet.linear import pack
from bitnet.model import Transformer, apart
from bitnet.schema import UserError
from tests.helpers.small_training import small

END = 3
VARIANTS: list[dict[str, Any]] = [
    {"linear": "fp"},
    {"linear": "ternary"},
    {"linear": "ternary", "qk_norm": True, "norm_placement": "in_linear", "n_kv_heads": 4},
]


def sequences(seed: int) -> Tensor:
    """``[5, 17]`` with a separator in a quarter of the places, and rows that are hard cases."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, 50, (5, 17), generator=generator)
    tokens[torch.rand(5, 17, generator=generator) < 0.25] = END
    tokens[1, :2] = END  # begins with an empty document
    tokens[2, -2:] = END
    tokens[3][tokens[3] == END] = 4  # one document
    tokens[4] = END
    return tokens


def documents(row: list[int]) -> list[tuple[list[int], list[int]]]:
    """Inputs and targets of the documents of a row, cut by hand: each input but the first begins
    with the separator, and its last target is one, unless the row ends there."""
    pieces: list[tuple[list[int], list[int]]] = []
    for token, target in pairwise(row):
        if token == END or not pieces:
            pieces.append(([], []))
        pieces[-1][0].append(token)
        pieces[-1][1].append(target)
    return pieces


def gradients(model: Transformer) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_losses_and_gradients_are_those_of_documents_alone(
    options: dict[str, Any], seed: int
) -> None:
    model = small(**options).double()
    tokens = sequences(seed)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in tokens.tolist():
        for inputs, targets in documents(row):
            loss = model(torch.tensor([inputs]), torch.tensor([targets]))
            total, count = total + loss * len(inputs), count + len(inputs)
    assert count == 5 * 16, "every token is a target"
    (total / count).backward()
    expected = gradients(model)

    model.document_separator = END
    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    assert loss.item() == pytest.approx(total.item() / count, abs=1e-12)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-10, rtol=1e-8, msg=name)

    model.document_separator = None
    together = model(tokens[:, :-1], tokens[:, 1:])
    assert abs(together.item() - loss.item()) > 1e-4, "they do see each other otherwise"


@pytest.mark.parametrize("options", VARIANTS)
def test_no_other_document_matters(options: dict[str, Any]) -> None:
    model = small(**options)
    model.document_separator = END
    tokens = torch.randint(4, 50, (2, 16))
    tokens[:, 6] = tokens[:, 11] = END
    before = model(tokens)
    changed = tokens.clone()
    changed[:, :6] = torch.randint(4, 50, (2, 6))
    after = model(changed)
    assert torch.equal(before[:, 6:], after[:, 6:])
    assert not torch.equal(before[:, :6], after[:, :6])


def test_positions_and_mask_by_hand() -> None:
    positions, mask = apart(torch.tensor([[7, END, 8, 9, END, END, 7]]), END)
    assert positions.tolist() == [[0, 0, 1, 2, 0, 0, 1]]
    assert mask.int().tolist() == [
        [
            [
                [1, 0, 0, 0, 0, 0, 0],
                [0, 1, 0, 0, 0, 0, 0],
                [0, 1, 1, 0, 0, 0, 0],
                [0, 1, 1, 1, 0, 0, 0],
                [0, 0, 0, 0, 1, 0, 0],
                [0, 0, 0, 0, 0, 1, 0],
                [0, 0, 0, 0, 0, 1, 1],
            ]
        ]
    ]


def test_without_a_separator_all_is_one_document() -> None:
    model = small().double()
    tokens = torch.randint(4, 50, (2, 16))
    plain = model(tokens)
    model.document_separator = END
    torch.testing.assert_close(model(tokens), plain, atol=1e-12, rtol=1e-10)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("linear", ["fp", "ternary"])
def test_documents_are_apart_in_one_graph(linear: str) -> None:
    model = small(linear=linear, n_layers=1)
    model.document_separator = END
    graph = torch.compile(model, fullgraph=True, backend="aot_eager")
    tokens = sequences(2)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    torch.testing.assert_close(graph(inputs, targets), model(inputs, targets), rtol=1e-5, atol=1e-6)


def test_generation_sees_one_document(tmp_path: Any) -> None:
    """With a cache there is no mask; a prompt begins with the separator, as a document does."""
    model = small().eval()
    prompt = [END, 9, 17, 30]
    expected = generate(model, [prompt], 6)
    model.document_separator = END
    assert generate(model, [prompt], 6) == expected


def test_a_model_folder_remembers(tmp_path: Any) -> None:
    model = small()
    assert load_model(save_model(tmp_path / "plain", model, None)).document_separator is None
    assert "separator" not in (tmp_path / "plain" / "config.json").read_text()
    model.document_separator = END
    loaded = load_model(save_model(tmp_path / "apart", model, None))
    assert loaded.document_separator == END
    tokens = sequences(3)[:, :-1]
    assert torch.equal(loaded(tokens), model(tokens))
    again = load_model(save_model(tmp_path / "packed", pack(loaded), None))
    assert again.document_separator == END
    text = (tmp_path / "apart" / "config.json").read_text()
    (tmp_path / "apart" / "config.json").write_text(text.replace(": 3,", ": 4,", 1))
    with pytest.raises(UserError, match="damaged or edited"):
        load_model(tmp_path / "apart")
