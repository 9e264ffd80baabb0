"""Scores of sequence ends, against one forward a sequence and a sum by hand."""

import pytest
import torch

import bitnet.scoring
from bitnet.model import Transformer
from bitnet.scoring import Ending, log_likelihoods
from tests.helpers.model_folders import VOCAB, make, packed


def endings(seed: int = 0) -> list[Ending]:
    """Of odd lengths, from nothing predicted to all but the first token."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(2, 1), (33, 32), (7, 3), (33, 1), (1, 0), (19, 0), (7, 6), (2, 1), (12, 5)]
    return [Ending(torch.randint(VOCAB, (n,), generator=generator), k) for n, k in sizes]


def slowly(model: Transformer, ending: Ending) -> tuple[float, bool]:
    """One token after the other, in float64."""
    ids, predicted = ending
    total, greedy = 0.0, True
    with torch.no_grad():
        for place in range(len(ids) - predicted, len(ids)):
            log_p = model(ids[:place].unsqueeze(0))[0, -1].double().log_softmax(-1)
            total += float(log_p[ids[place]])
            greedy = greedy and int(log_p.argmax()) == int(ids[place])
    return total, greedy


@pytest.mark.parametrize("batch_size", [0, 1, 2, 4])
def test_scores_are_those_of_one_token_after_the_other(batch_size: int) -> None:
    model = make(linear="fp").train()
    texts = endings()
    # an answer that greedy decoding gives
    ids = texts[2].ids
    with torch.no_grad():
        best = model(ids[:-1].unsqueeze(0))[0, -1].argmax()
    texts.append(Ending(torch.cat([ids[:-1], best.view(1)]), 1))
    got = log_likelihoods(model, texts, batch_size)
    assert model.training
    want = [slowly(model.eval(), ending) for ending in texts]
    assert [one.greedy for one in got] == [greedy for _, greedy in want]
    assert got[-1].greedy
    for one, (log_p, _) in zip(got, want, strict=True):
        assert one.log_p == pytest.approx(log_p, abs=1e-4)


def test_a_packed_model_scores_as_the_one_it_was_packed_from() -> None:
    model = make()
    assert log_likelihoods(model, endings()) == log_likelihoods(packed(model), endings())


def test_the_longest_come_first_and_a_batch_has_a_bounded_number_of_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bitnet.scoring, "_CPU_TOKENS", 40)
    monkeypatch.setattr("bitnet.evaluate._CPU_LOGITS", 4 * VOCAB)
    model, shapes, heads = make(linear="fp"), [], []
    model.embed_tokens.register_forward_hook(lambda _, args, out: shapes.append(args[0].shape))
    model.lm_head.register_forward_hook(lambda _, args, out: heads.append(len(out)))
    log_likelihoods(model, endings())
    assert [tuple(shape) for shape in shapes] == [(1, 32), (1, 32), (3, 11), (2, 1)]
    assert max(heads) == 4


def test_nothing_to_score() -> None:
    assert log_likelihoods(make(), []) == []
    assert log_likelihoods(make(), [Ending(torch.tensor([3]), 0)]) == [(0.0, True)]
