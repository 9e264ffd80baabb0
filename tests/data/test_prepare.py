"""A prepared set holds exactly the text, split as documented, whole or not at all."""

import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import pytest

from bitnet.data.loader import DataConfig, TokenDataset, sequential_windows
from bitnet.data.prepare import _SplitWriter, prepare
from bitnet.data.tokenizer import Tokenizer, train_tokenizer
from bitnet.schema import UserError

_WORDS = random.Random(0)
WORDS = ["".join(_WORDS.choices("etaoinshrdlu", k=_WORDS.randint(2, 8))) for _ in range(300)]


def prose(n_words: int, seed: int) -> str:
    rng = random.Random(seed)
    endings = [" "] * 12 + [".\n", ".\n\n", ",  "]
    return "".join(rng.choice(WORDS) + rng.choice(endings) for _ in range(n_words)) + "é.\r\n"


def write_documents(folder: Path, texts: list[str], name: str = "docs.jsonl") -> str:
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / name
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def make(path: Path, *sources: str, **options: Any) -> Path:
    config = DataConfig(path=str(path), sources=list(sources), **({"vocab_size": 320} | options))
    return prepare(config, progress=False)


def texts_of(path: Path, split: str) -> list[str]:
    """The documents; of the code under test, only the tokenizer's decode reads them."""
    index = json.loads((path / "index.json").read_text())
    tokenizer = Tokenizer(path / "tokenizer.model")
    shards = [path / shard["file"] for shard in index["splits"][split]["shards"]]
    dtype = {"uint16": "<u2", "uint32": "<u4"}[index["dtype"]]
    tokens = np.concatenate([np.fromfile(shard, dtype) for shard in shards])
    assert tokens[-1] == tokenizer.eos_id
    ends = np.flatnonzero(tokens == tokenizer.eos_id)
    return [
        tokenizer.decode(part[part != tokenizer.eos_id]) for part in np.split(tokens, ends)[:-1]
    ]


def fingerprint(path: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}


@pytest.fixture(scope="module")
def many() -> list[str]:
    """300 documents of 20 to 200 words."""
    return [prose(random.Random(seed).randint(20, 200), seed) for seed in range(300)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, many: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    return make(folder / "set", write_documents(folder, many), val_fraction=0.1)


def test_nothing_is_lost(prepared: Path, many: list[str]) -> None:
    train, val = texts_of(prepared, "train"), texts_of(prepared, "val")
    assert sorted(train + val) == sorted(many)
    assert train == [text for text in many if text in set(train)]  # in order
    for split, texts in {"train": train, "val": val}.items():
        dataset = TokenDataset(prepared, split)  # type: ignore[arg-type]
        assert dataset.n_bytes == sum(len(text.encode()) for text in texts)
        assert dataset.n_documents == len(texts)
        assert dataset.held_out == "documents"
        for seq_len in (16, 1000):
            windows = sequential_windows(dataset, seq_len)
            assert sum(map(dataset.tokenizer().count_bytes, windows)) == dataset.n_bytes


def test_the_index_describes_the_files(prepared: Path) -> None:
    index = json.loads((prepared / "index.json").read_text())
    files = {"index.json", "tokenizer.model"}
    for split in index["splits"].values():
        for shard in split["shards"]:
            content = (prepared / shard["file"]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == shard["sha256"]
            assert len(content) == 2 * shard["n_tokens"]
            files.add(shard["file"])
    assert set(os.listdir(prepared)) == files  # noqa: PTH208
    assert index["tokenizer_sha256"] == Tokenizer(prepared / "tokenizer.model").hash
    assert index["settings"]["val_fraction"] == 0.1


def test_shards_and_threads_do_not_change_the_tokens(
    prepared: Path, many: list[str], tmp_path: Path
) -> None:
    source = write_documents(tmp_path, many)
    other = make(tmp_path / "set", source, val_fraction=0.1, shard_tokens=1000, threads=3)
    assert len(list(other.glob("train_*.bin"))) > 5
    for split in ("train", "val"):
        one, two = (TokenDataset(path, split) for path in (prepared, other))  # type: ignore[arg-type]
        assert one.n_tokens == two.n_tokens
        assert np.array_equal(one.tokens(0, one.n_tokens), two.tokens(0, two.n_tokens))
    sizes = {path.stat().st_size for path in sorted(other.glob("train_*.bin"))[:-1]}
    assert sizes == {2000}


def test_the_split_is_a_hash_of_the_text(prepared: Path, many: list[str], tmp_path: Path) -> None:
    def is_val(text: str) -> bool:
        digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"split").digest()
        return int.from_bytes(digest, "little") / 2**64 < 0.1

    assert texts_of(prepared, "val") == [text for text in many if is_val(text)]

    shuffled = random.Random(1).sample(many, len(many))
    halves = [
        write_documents(tmp_path, shuffled[:140], "z.jsonl"),
        write_documents(tmp_path, [*shuffled[140:], *many[:20]], "a.jsonl"),  # with copies
    ]
    other = make(tmp_path / "set", *halves, val_fraction=0.1)
    assert set(texts_of(other, "val")) == set(texts_of(prepared, "val"))
    assert set(texts_of(other, "train")) == set(texts_of(prepared, "train"))


def test_the_order_of_sources_does_not_change_the_tokenizer(
    many: list[str], tmp_path: Path
) -> None:
    one = write_documents(tmp_path, many[:150], "one.jsonl")
    two = write_documents(tmp_path, many[150:], "two.jsonl")
    options = {"val_fraction": 0.1, "max_tokenizer_mb": 1}
    paths = [make(tmp_path / "a", one, two, **options), make(tmp_path / "b", two, one, **options)]
    assert len({(path / "tokenizer.model").read_bytes() for path in paths}) == 1


def test_the_tokenizer_never_sees_validation_text(tmp_path: Path) -> None:
    """Each document has its own letter; the letters of validation documents are no tokens."""
    texts = [f"{chr(0x4E00 + number)} " * 400 for number in range(60)]
    path = make(tmp_path / "set", write_documents(tmp_path, texts), val_fraction=0.2)
    tokenizer = Tokenizer(path / "tokenizer.model")
    for split, n_tokens in {"train": 1, "val": 3}.items():
        for text in texts_of(path, split):
            assert len(tokenizer.encode("." + text[0])) == 2 + n_tokens


def test_the_tokenizer_sample_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def spy(texts: Iterator[str], *args: Any) -> Tokenizer:
        kept = list(texts)
        sizes.append(sum(map(len, kept)))
        return train_tokenizer(kept, *args)

    monkeypatch.setattr("bitnet.data.prepare.train_tokenizer", spy)
    texts = [prose(1500, seed) for seed in range(200)]
    make(tmp_path / "set", write_documents(tmp_path, texts), max_tokenizer_mb=1, val_fraction=0.1)
    assert 800_000 < sizes[0] < 1_010_000 < sum(map(len, texts))


@pytest.mark.parametrize("n_words", [2000, 20_000, 200_000])
def test_one_text_file_gets_a_validation_split(tmp_path: Path, n_words: int) -> None:
    text = prose(n_words, 1)
    (tmp_path / "book.txt").write_bytes(text.encode())
    path = make(tmp_path / "set", str(tmp_path / "book.txt"))
    train, val = texts_of(path, "train"), texts_of(path, "val")
    assert TokenDataset(path, "val").held_out == "passages"
    assert all(part in text for part in train + val)
    assert sum(map(len, train + val)) == len(text)
    assert sum(map(len, val)) < max(0.05 * len(text), 4200)
    assert len(train) <= len(val) + 1  # what lies between two passages stays together
    assert all(part.endswith("\n") for part in train + val)


def test_a_folder_of_three_files_gets_a_validation_split(tmp_path: Path) -> None:
    texts = [prose(30_000, seed) for seed in range(3)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.md").write_bytes(text.encode())
    path = make(tmp_path / "set", str(tmp_path))
    assert TokenDataset(path, "val").held_out == "passages"
    assert 1000 < TokenDataset(path, "val").n_bytes < 0.03 * sum(map(len, texts))
    parts = texts_of(path, "train") + texts_of(path, "val")
    assert sum(map(len, parts)) == sum(map(len, texts))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("val_fraction", [0.001, 0.5])
def test_two_passages_are_enough(tmp_path: Path, seed: int, val_fraction: float) -> None:
    text = prose(900, seed)  # 4.1 to 8.2 KiB
    (tmp_path / "a.txt").write_bytes(text.encode())
    path = make(tmp_path / "set", str(tmp_path / "a.txt"), val_fraction=val_fraction)
    assert texts_of(path, "train")
    assert texts_of(path, "val")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no text in"),
        (" \n\n\t ", "there is no text in"),
        ("short", "5 bytes of text are too little for a training and a validation split"),
        ("x" * 4096 * 9, "too little for a training and a validation split"),  # all passages equal
    ],
)
def test_too_little_text_is_refused_and_leaves_nothing(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        make(tmp_path / "set", str(tmp_path / "a.txt"))
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", ".set.lock"}


def test_mistakes_leave_nothing(tmp_path: Path, many: list[str]) -> None:
    source = write_documents(tmp_path, many)
    for options, message in [
        ({"vocab_size": 60_000}, r"data\.vocab_size = 60000: .* set it to \d+ or less"),
        ({"vocab_size": 260}, r"data\.vocab_size = 260: at least \d+ are needed"),
        ({"text_field": "content"}, r"docs\.jsonl:1: no field 'content'"),
        ({"tokenizer": source}, r"docs\.jsonl: not a tokenizer\.json"),
        ({"tokenizer": str(tmp_path / "no.model")}, r"no\.model: no such tokenizer file"),
    ]:
        with pytest.raises(UserError, match=message):
            make(tmp_path / "set", source, **options)
        assert {path.name for path in tmp_path.iterdir()} <= {"docs.jsonl", ".set.lock"}


def test_a_set_is_reused(
    tmp_path: Path, many: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = DataConfig(
        path=str(tmp_path / "set"),
        sources=[write_documents(tmp_path, many)],
        vocab_size=320,
        val_fraction=0.1,
    )
    prepare(config)
    assert "prepared" in capsys.readouterr().err
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()}
    prepare(config)
    captured = capsys.readouterr()
    assert captured.err.startswith("using")
    assert "changed" not in captured.err
    assert captured.out == ""
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()} == before

    write_documents(tmp_path, many[1:])
    prepare(config)
    assert "files of data.sources have changed since; delete" in capsys.readouterr().err
    (tmp_path / "docs.jsonl").unlink()
    prepare(config, progress=False)
    assert capsys.readouterr() == ("", "")


def test_other_settings_are_refused(prepared: Path) -> None:
    options = {"val_fraction": 0.1}
    source = str(prepared.parent / "docs.jsonl")
    assert make(prepared, source, **options, seq_len=7, threads=1, shard_tokens=9) == prepared
    for changed, message in [
        ({"vocab_size": 321}, "vocab_size is 320 there and 321 here; delete the folder or choose"),
        ({"val_fraction": 0.2}, r"val_fraction is 0\.1 there and 0\.2 here"),
        (
            {"text_field": "x", "max_tokenizer_mb": 7},
            "text_field is 'text' .*; max_tokenizer_mb is",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            make(prepared, source, **options | changed)
    with pytest.raises(UserError, match=r"sources is \['.*docs\.jsonl'\] there and \['x'\] here"):
        make(prepared, "x", **options)
    own = str(prepared / "tokenizer.model")
    assert make(prepared, source, **options, tokenizer=own) == prepared
    other = train_tokenizer(["some other words " * 50], 270, prepared.parent / "other.model")
    with pytest.raises(UserError, match=r"tokenizer is '\w{64}' there and '\w{64}' here"):
        make(prepared, source, **options, tokenizer=str(other.path))


def test_folders_of_others_are_left_alone(tmp_path: Path, many: list[str]) -> None:
    source = write_documents(tmp_path / "own", many)
    for path in (tmp_path / "own", Path(source)):
        with pytest.raises(UserError, match="exists and is not a prepared set; choose another"):
            make(path, source)
    assert len(list((tmp_path / "own").iterdir())) == 1
    (tmp_path / "empty").mkdir()
    path = make(tmp_path / "empty", source, val_fraction=0.1)
    (path / "index.json").write_text("{")
    with pytest.raises(UserError, match=r"index\.json: damaged"):
        make(path, source, val_fraction=0.1)


def test_a_given_tokenizer_is_copied_and_used(
    prepared: Path, many: list[str], tmp_path: Path
) -> None:
    source = write_documents(tmp_path, many)
    given = str(prepared / "tokenizer.model")
    path = make(tmp_path / "set", source, tokenizer=given, val_fraction=0.1, vocab_size=8192)
    dataset = TokenDataset(path, "train")
    assert dataset.vocab_size == 320
    assert (path / "tokenizer.model").read_bytes() == Path(given).read_bytes()
    assert texts_of(path, "train") == texts_of(prepared, "train")
    copy = tmp_path / "copy.model"
    copy.write_bytes(Path(given).read_bytes())
    make(path, source, tokenizer=str(copy), val_fraction=0.1, vocab_size=500)  # the same tokenizer


def test_another_tokenizer_in_the_folder_is_detected(
    prepared: Path, many: list[str], tmp_path: Path
) -> None:
    source = write_documents(tmp_path, many)
    path = make(tmp_path / "set", source, val_fraction=0.1, vocab_size=330)
    (path / "tokenizer.model").write_bytes((prepared / "tokenizer.model").read_bytes())
    with pytest.raises(UserError, match=r"tokenizer\.model: is not the tokenizer this set"):
        TokenDataset(path, "train").tokenizer()


def test_wide_vocabularies_are_stored_in_32_bits(tmp_path: Path) -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices(ascii_lowercase, k=9)) for _ in range(30_000)]
    texts = [" ".join(words[start : start + 100]) for start in range(0, 30_000, 100)]
    source = write_documents(tmp_path, texts)
    path = make(tmp_path / "set", source, vocab_size=66_000, val_fraction=0.1)
    assert json.loads((path / "index.json").read_text())["dtype"] == "uint32"
    assert sorted(texts_of(path, "train") + texts_of(path, "val")) == sorted(texts)
    dataset = TokenDataset(path, "train")
    assert dataset.tokens(0, dataset.n_tokens).max() > 65_535


@contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    """The kernel refuses to write more into one file, as it does when a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_write_names_the_file_and_leaves_nothing(
    prepared: Path, many: list[str], tmp_path: Path
) -> None:
    source = write_documents(tmp_path, many)
    options = {"tokenizer": str(prepared / "tokenizer.model"), "val_fraction": 0.1}
    with largest_file(20_000), pytest.raises(OSError, match=r"train_00000\.bin") as error:
        make(tmp_path / "set", source, **options)
    assert not isinstance(error.value, UserError)
    assert {path.name for path in tmp_path.iterdir()} == {"docs.jsonl", ".set.lock"}
    with pytest.raises(UserError, match=r"docs\.jsonl"):
        make(Path(source) / "deep" / "set", source, **options)
    make(tmp_path / "set", source, **options)


def test_an_interruption_leaves_nothing(
    tmp_path: Path, many: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_documents(tmp_path, many)

    append = _SplitWriter.append

    def interrupted(writer: _SplitWriter, tokens: list[int], n_bytes: int) -> None:
        append(writer, tokens, n_bytes)
        if len(list(tmp_path.glob(".tmp-set/*.bin"))) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_SplitWriter, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "set", source, val_fraction=0.1)
    assert {path.name for path in tmp_path.iterdir()} == {"docs.jsonl", ".set.lock"}
    make(tmp_path / "set", source, val_fraction=0.1)


KILL = """
import os, random, shutil, signal, sys, time
from pathlib import Path
from bitnet.data.loader import DataConfig, TokenDataset
from bitnet.data.prepare import prepare

source, path = sys.argv[1], Path(sys.argv[2])
config = DataConfig(path=str(path), sources=[source], vocab_size=320, val_fraction=0.1, threads=1)
start = time.perf_counter()
prepare(config, progress=False)
usual = time.perf_counter() - start
path.rename(path.with_name("uninterrupted"))
rng, outcomes = random.Random(0), []
for _ in range(int(sys.argv[3])):
    child = os.fork()
    if child == 0:
        prepare(config, progress=False)
        os._exit(0)
    time.sleep(rng.uniform(0, 1.1) * usual)
    os.kill(child, signal.SIGKILL)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    if path.exists():
        TokenDataset(path, "train"), TokenDataset(path, "val")
        shutil.rmtree(path)
    outcomes.append(killed and path.with_name(f".tmp-{path.name}").exists())
prepare(config, progress=False)
print(sum(outcomes))
"""


@pytest.mark.parametrize(
    ("kills", "at_least"), [(5, 1), pytest.param(12, 3, marks=pytest.mark.slow)]
)
def test_killed_at_any_moment(tmp_path: Path, kills: int, at_least: int) -> None:
    source = write_documents(tmp_path, [prose(150, seed) for seed in range(2000)])
    command = [sys.executable, "-c", KILL, source, str(tmp_path / "set"), str(kills)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, "")
    assert int(run.stdout) >= at_least  # kills that left a half-written set
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"docs.jsonl", ".set.lock", "set", "uninterrupted"}
    assert fingerprint(tmp_path / "set") == fingerprint(tmp_path / "uninterrupted")


TOGETHER = """
import sys
from bitnet.data.loader import DataConfig
from bitnet.data.prepare import prepare
config = DataConfig(path=sys.argv[2], sources=[sys.argv[1]], vocab_size=320, val_fraction=0.1)
sys.stdin.readline()
prepare(config)
"""


def test_two_processes_prepare_once(tmp_path: Path) -> None:
    source = write_documents(tmp_path, [prose(150, seed) for seed in range(1000)])
    command = [sys.executable, "-c", TOGETHER, source, str(tmp_path / "set")]
    pipe = subprocess.PIPE
    runs = [subprocess.Popen(command, stdin=pipe, stderr=pipe, text=True) for _ in range(2)]
    for run in runs:
        assert run.stdin
        run.stdin.write("go\n")
        run.stdin.flush()
    said = [run.communicate(timeout=120)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert sorted("prepared" in text for text in said) == [False, True]
    assert sum("using" in text for text in said) == 1
    TokenDataset(tmp_path / "set", "train")
    assert {path.name for path in tmp_path.iterdir()} == {"docs.jsonl", ".set.lock", "set"}


def test_the_standard_library_is_prepared_whole(tmp_path: Path) -> None:
    path = make(tmp_path / "set", "python-stdlib", vocab_size=4096, val_fraction=0.03)
    train, val = TokenDataset(path, "train"), TokenDataset(path, "val")
    assert 5e6 < train.n_bytes < 50e6
    assert 0.015 < val.n_bytes / (train.n_bytes + val.n_bytes) < 0.06
    assert train.n_bytes / train.n_tokens > 3
    known = Path(sysconfig.get_path("stdlib"), "textwrap.py").read_bytes().decode()
    assert known in texts_of(path, "train") + texts_of(path, "val")


def test_a_source_whose_name_is_no_utf8(tmp_path: Path, many: list[str]) -> None:
    source = tmp_path / os.fsdecode(b"\xff.txt")
    source.write_text("\n\n".join(many), encoding="utf-8")
    for _ in range(2):  # made, and used as it is
        path = make(tmp_path / "set", str(source), vocab_size=300)
    assert json.loads((path / "index.json").read_bytes())["settings"]["sources"] == [
        str(tmp_path / "\\udcff.txt")
    ]


def test_what_is_left_out_is_reported(
    tmp_path: Path, many: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / os.fsdecode(b"\xff.txt")).write_text("\n\n".join(many), encoding="utf-8")
    for name in ("a.csv", "b.csv", "c.pdf", ".hidden.txt"):
        (texts / name).touch()
    (texts / "rows.jsonl").write_text('{"text": null}\n{"text": " "}\n')
    prepare(DataConfig(path=str(tmp_path / "set"), sources=[str(texts)], vocab_size=300))
    err = " ".join(capsys.readouterr().err.split())
    assert "not read in the folders of data.sources: 2 .csv, 1 hidden, 1 .pdf" in err
    assert "2 documents have no text" in err
