"""The parts of a mixture have exact shares, one tokenizer, and tables that are checked."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitnet.config import load_config, to_dict, to_toml
from bitnet.data.loader import DataConfig, Loader, TokenDataset
from bitnet.data.mixture import Schedule, Source, completed, shares
from bitnet.data.parts import hash_of, open_parts
from bitnet.data.prepare import prepare, prepare_all
from bitnet.evaluate import EvalResult, mixed
from bitnet.schema import UserError
from tests.helpers.prepared_sets import windows_of, write_set

WEIGHTS = [(1, 1), (0.7, 0.3), (1 / 3, 2 / 3), (7, 2, 1), (0.5, 0.25, 0.125, 0.125), (1, 999_000)]
AWKWARD = (0.1234567890123, 3.3333333333333335, 1e-3, 17, 5)


@pytest.mark.parametrize("weights", [*WEIGHTS, AWKWARD])
@pytest.mark.parametrize("seed", [0, 1, 2**62])
def test_shares_are_exact_at_every_moment(weights: tuple[float, ...], seed: int) -> None:
    sources = Schedule(weights, seed).sources(0, 20_000)
    drawn = np.cumsum(np.eye(len(weights))[sources], axis=0)
    expected = np.outer(np.arange(1, 20_001), np.array(weights) / sum(weights))
    assert np.abs(drawn - expected).max() < len(weights) - 1


@pytest.mark.parametrize("weights", [*WEIGHTS, AWKWARD])
def test_shares_are_exact_after_a_trillion_sequences(weights: tuple[float, ...]) -> None:
    n = 10**12 + 7
    counts = Schedule(weights, 3).counts(n)
    assert sum(counts) == n
    for count, share in zip(counts, shares(weights), strict=True):
        assert abs(count - n * share) < len(weights)


def test_sources_do_not_depend_on_where_one_begins() -> None:
    rng = random.Random(0)
    for weights in (*WEIGHTS, AWKWARD):
        schedule = Schedule(weights, 5)
        base = 10**11 + rng.randrange(1000)
        sources = schedule.sources(base, 500)
        before = schedule.counts(base)
        for _ in range(20):
            i, j = sorted(rng.choices(range(501), k=2))
            assert np.array_equal(schedule.sources(base + i, j - i), sources[i:j])
            drawn = np.bincount(sources[:i], minlength=len(weights))
            assert schedule.counts(base + i) == (before + drawn).tolist()


def test_another_seed_is_another_order() -> None:
    orders = {tuple(Schedule((0.7, 0.2, 0.1), seed).sources(0, 50)) for seed in range(20)}
    assert len(orders) > 10


def test_sources_are_spread_and_not_in_runs() -> None:
    sources = Schedule((0.75, 0.25), 0).sources(0, 4000)
    assert set(np.diff(np.flatnonzero(sources == 1)).tolist()) == {4}


def test_the_order_of_a_mixture_never_changes() -> None:
    """A run resumed by a later version must see the same data."""
    drawn = Schedule((5, 3, 2), 0).sources(0, 20).tolist()
    assert drawn == ORDER


ORDER = [0, 2, 0, 1, 0, 1, 0, 2, 0, 1, 0, 2, 0, 1, 0, 1, 0, 2, 0, 1]


@pytest.fixture
def datasets(tmp_path: Path) -> list[TokenDataset]:
    return [
        TokenDataset(write_set(tmp_path / str(n), n, dtype="uint32"), "train")
        for n in (1000, 70_000, 333)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_any_world_size_divides_the_same_batch(
    datasets: list[TokenDataset], world_size: int
) -> None:
    loader = Loader(datasets, 7, 12, seed=0, weights=(5, 3, 2))
    for step in (0, 1, 10, 11, 12, 10**9):
        whole = loader.batch(step)
        parts = [loader.batch(step, rank, world_size) for rank in range(world_size)]
        for k in (0, 1):
            assert torch.equal(torch.cat([part[k] for part in parts]), whole[k])


def test_each_source_is_read_as_alone(datasets: list[TokenDataset]) -> None:
    """A source's sequences, in order, are those that a run of it alone reads."""
    loader = Loader(datasets, 7, 10, seed=3, weights=(5, 3, 2))
    steps = 60
    sources = Schedule((5, 3, 2), 3).sources(0, 10 * steps)
    mixed_rows = torch.cat([loader.batch(step)[0] for step in range(steps)])
    for number, dataset in enumerate(datasets):
        mine = mixed_rows[torch.from_numpy(sources == number)]
        alone = Loader(dataset, 7, len(mine), seed=3).batch(0)[0]
        assert torch.equal(mine, alone)
    assert loader.epochs(steps) == pytest.approx([300 / 142, 180 / 9999, 120 / 47], rel=0.02)


def test_every_epoch_of_a_source_is_whole(datasets: list[TokenDataset]) -> None:
    loader = Loader([datasets[0], datasets[2]], 7, 10, seed=3, weights=(0.5, 0.5))
    sources = Schedule((0.5, 0.5), 3).sources(0, 10 * 60)
    rows = torch.cat([loader.batch(step)[0] for step in range(60)])
    small = windows_of(rows[torch.from_numpy(sources == 1)])
    assert sorted(small[:47]) == sorted(small[47:94]) == list(range(47))
    assert small[:47] != small[47:94]


def test_datasets_and_weights_belong_together(datasets: list[TokenDataset]) -> None:
    with pytest.raises(ValueError, match="one per dataset, got 1"):
        Loader(datasets, 7, 10, seed=0)


def test_one_dataset_is_read_as_before(datasets: list[TokenDataset]) -> None:
    one = Loader(datasets[0], 7, 12, seed=9)
    assert [windows_of(one.batch(step)[0]) for step in (0, 12)] == BEFORE


BEFORE = [
    [101, 24, 73, 121, 20, 67, 9, 11, 35, 30, 4, 68],
    [108, 130, 20, 79, 91, 119, 27, 64, 46, 83, 50, 113],
]
"""As read before there were mixtures."""


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([{"path": "a", "wieght": 2}], "table 1: unknown key wieght; the nearest is weight"),
        (
            [{"path": "a"}, {"path": "b", "weight": 0}],
            ": table 2: weight = 0: expected greater than 0$",
        ),
        ([{"path": "a", "weight": -1.0}], "table 1: weight = -1.0"),
        ([{"path": "a", "weight": float("nan")}], "table 1: weight = nan"),
        ([{"path": "a", "weight": "2"}], "table 1: weight = '2'"),
        ([{"path": "a"}, "b"], "expected strings, or tables"),
        ([3], "expected strings, or tables"),
        ("python-stdlib", "expected a list of strings, or tables"),
        (
            [{"path": f"p{i}"} for i in range(300)] + [{"weight": -1}],
            r"^.{120,160}: table 301: .{,50}$",
        ),
        ([], "at least 1 item"),
    ],
)
def test_tables_that_cannot_be(tables: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config([], data={"sources": tables})


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([Source()], "table 1 has neither a name nor a path"),
        ([Source(name="a")], "'a', has neither texts nor the path"),
        ([Source(path="x/a"), Source(path="y/a")], "the name 'a' stands twice"),
        (
            [Source(name="a", texts=["x"]), Source(name="b", path="data/./a")],
            "a stands twice; add up",
        ),
        ([Source(name="a b", path="x")], "'a b' is no single word"),
        ([Source(name="../b", path="x")], "no single word"),
        ([Source(path="a"), Source(path="b", weight=1e-9)], "'b' has weight = 1e-09, a share of"),
    ],
)
def test_sources_that_cannot_be(sources: list[Source], message: str) -> None:
    with pytest.raises(UserError, match=rf"^data\.sources: .*{message}"):
        completed(sources, Path("data"))


def test_tables_come_from_toml_and_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "mix.toml"
    file.write_text(
        '[data]\npath = "data/mix"\n'
        '[[data.sources]]\nname = "code"\ntexts = ["python-stdlib"]\nweight = 3\n'
        '[[data.sources]]\npath = "data/books"\n'
    )
    config = load_config([file]).resolve()
    assert config.data.is_mixture
    assert config.data.mixture() == [
        Source(name="code", path="data/mix/code", weight=3.0, texts=["python-stdlib"]),
        Source(name="books", path="data/books"),
    ]
    again = tmp_path / "again.toml"
    again.write_text(to_toml(config))
    assert to_dict(load_config([again])) == to_dict(config)
    one = load_config([file], ['data.sources=[{path = "a"}, {path = "b", weight = 2}]'])
    assert [source.path for source in one.data.mixture()] == ["a", "b"]


def test_one_set_is_a_mixture_of_itself() -> None:
    assert DataConfig(path="data/x", sources=["a"]).mixture() == [
        Source(name="x", path="data/x", texts=["a"])
    ]


def texts(folder: Path, name: str, words: str, count: int = 400) -> str:
    rng = random.Random(name)
    rows = [" ".join(rng.choices(words.split(), k=rng.randint(5, 40))) for _ in range(count)]
    file = folder / f"{name}.jsonl"
    file.write_text("\n".join(json.dumps({"text": row}) for row in rows))
    return str(file)


@pytest.fixture
def two(tmp_path: Path) -> DataConfig:
    return DataConfig(
        path=str(tmp_path / "mix"),
        sources=[
            Source(name="a", texts=[texts(tmp_path, "a", "alpha beta gamma delta epsilon")]),
            Source(name="b", texts=[texts(tmp_path, "b", "uno dos tres quatro cinco")], weight=3),
        ],
        vocab_size=300,
        val_fraction=0.1,
    )


def test_parts_are_prepared_with_one_tokenizer(two: DataConfig, tmp_path: Path) -> None:
    parts = open_parts(two, progress=False)
    assert [(part.name, part.weight) for part in parts] == [("a", 1.0), ("b", 3.0)]
    assert [part.train.path for part in parts] == [tmp_path / "mix/a", tmp_path / "mix/b"]
    tokenizers = [part.train.tokenizer() for part in parts]
    assert tokenizers[0].hash == tokenizers[1].hash
    pieces = {tokenizers[0].decode([i]).strip() for i in range(300)}
    for words in ("alpha beta gamma delta epsilon", "uno dos tres quatro cinco"):
        assert any(len(piece) > 1 and piece in words for piece in pieces), "learned from both"
    for part, word in zip(parts, ("beta", "tres"), strict=True):
        text = tokenizers[0].decode(part.val.tokens(0, 200).tolist())
        assert word in text
        assert Counter(text.split())["tres" if word == "beta" else "beta"] == 0
    assert len({hash_of(parts), hash_of(parts[:1]), hash_of(parts[::-1])}) == 3
    again = open_parts(two, progress=False)
    assert hash_of(again) == hash_of(parts)


def test_an_interrupted_preparation_goes_on_with_its_tokenizer(
    two: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bitnet.data.prepare as module

    make, made = module._make, []

    def once(*args: Any) -> Any:
        if made:
            raise KeyboardInterrupt
        made.append(1)
        return make(*args)

    monkeypatch.setattr(module, "_make", once)
    with pytest.raises(KeyboardInterrupt):
        prepare_all(two, progress=False)
    monkeypatch.setattr(module, "_make", make)
    monkeypatch.setattr(module, "_trained", None)
    parts = open_parts(two, progress=False)
    assert len({part.train.tokenizer().hash for part in parts}) == 1


def test_a_set_prepared_alone_joins_by_its_tokenizer(two: DataConfig, tmp_path: Path) -> None:
    first, second = (source for source in two.sources if isinstance(source, Source))
    alone = DataConfig(
        path=str(tmp_path / "alone"), sources=first.texts, vocab_size=300, val_fraction=0.1
    )
    folder = prepare(alone, progress=False)
    for joined in (Source(path=str(folder)), Source(path=str(folder), texts=first.texts)):
        config = DataConfig(
            path=two.path, sources=[second, joined], vocab_size=300, val_fraction=0.1
        )
        parts = open_parts(config, progress=False)
        assert [part.name for part in parts] == ["b", "alone"]
    wrong = DataConfig(path=two.path, sources=[Source(path=str(folder)), second], vocab_size=512)
    with pytest.raises(UserError, match=r"data\.vocab_size = 512, but .*alone .* 300 tokens"):
        prepare_all(wrong, progress=False)


def test_sets_of_two_tokenizers_are_refused(two: DataConfig, tmp_path: Path) -> None:
    folders = []
    for source in two.sources:
        assert isinstance(source, Source)
        path = str(tmp_path / f"alone-{source.name}")
        one = DataConfig(path=path, sources=source.texts, vocab_size=300, val_fraction=0.1)
        folders.append(Source(path=str(prepare(one, progress=False))))
    with pytest.raises(UserError, match=r"'alone-b': .* has another tokenizer than .*alone-a"):
        prepare_all(DataConfig(path=two.path, sources=folders, vocab_size=300), progress=False)


def test_a_part_made_with_another_tokenizer_is_refused(two: DataConfig, tmp_path: Path) -> None:
    first, second = (source for source in two.sources if isinstance(source, Source))
    for source in (first, second):
        path = str(tmp_path / "mix" / source.name)
        one = DataConfig(path=path, sources=source.texts, vocab_size=300, val_fraction=0.1)
        prepare(one, progress=False)
    with pytest.raises(UserError, match=r"b was prepared with other settings: tokenizer is '\w+"):
        prepare_all(two, progress=False)


def test_missing_parts_are_named(two: DataConfig, tmp_path: Path) -> None:
    here = Source(path=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"'nowhere': .*nowhere is not a prepared set, and there"):
        prepare_all(DataConfig(path=two.path, sources=[*two.sources, here]), progress=False)  # type: ignore[list-item]
    assert not (tmp_path / "mix").exists()
    set_there = write_set(tmp_path / "set", 100)
    inside = DataConfig(path=str(set_there), sources=two.sources, vocab_size=300)
    with pytest.raises(UserError, match=r"set is a prepared set; a mixture needs a folder of its"):
        prepare_all(inside, progress=False)


def test_the_overall_result_is_that_of_mixed_tokens() -> None:
    """An oracle that counts: texts of 300 and 100 tokens, of which 3 to 1 are drawn."""
    a = EvalResult(loss=2.0, bits_per_byte=2.0 / np.log(2) / 4, tokens=50, bytes=200)
    b = EvalResult(loss=4.0, bits_per_byte=4.0 / np.log(2) / 2, tokens=7000, bytes=14_000)
    result = mixed([a, b], [3, 1])
    nats, n_bytes = 300 * 2.0 + 100 * 4.0, 300 * 4 + 100 * 2
    assert result.loss == pytest.approx(nats / 400)
    assert result.bits_per_byte == pytest.approx(nats / np.log(2) / n_bytes)
    assert (result.tokens, result.bytes) == (7050, 14_200)
    assert mixed([b], [0.3]) is b
