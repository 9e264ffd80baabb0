"""Every kind of source gives its texts exactly; errors name the file that cannot be read."""

import gzip
import json
import lzma
import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from bitnet.data.sources import cut, documents, local_files
from bitnet.schema import UserError

TEXTS = ["one\n", "naïve  café\r\n\ttab", "日本語 😀", "a\0b", '"quoted" \\ \u2028 line']
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


def read(*sources: Path | str, field: str = "text") -> list[str]:
    return list(documents([str(source) for source in sources], field))


def jsonl(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_text_file_is_one_document(tmp_path: Path, ending: str) -> None:
    for kind in (".txt", ".md", ".py"):
        for number, text in enumerate(TEXTS[:3]):
            path = tmp_path / f"{number}{kind}{ending}"
            path.write_bytes(COMPRESS[ending](text.encode()))
            assert read(path) == [text]
    assert read(tmp_path) == [text for text in TEXTS[:3] for _ in range(3)]


@pytest.mark.parametrize("ending", COMPRESS)
def test_jsonl_gives_the_texts_of_a_field(tmp_path: Path, ending: str) -> None:
    rows = [{"n": 1, "text": text} for text in TEXTS] + [{"text": None}, {"text": " \n"}]
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(COMPRESS[ending](b"\xef\xbb\xbf" + jsonl(*rows) + b"\n\n"))
    assert read(path) == TEXTS
    path.write_bytes(COMPRESS[ending](jsonl({"content": "x"}).rstrip()))
    assert read(path, field="content") == ["x"]


def test_parquet_gives_the_texts_of_a_column(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"n": range(6), "text": [*TEXTS, None]}), path, row_group_size=2)
    assert read(path) == TEXTS
    parquet.write_table(pa.table({"text": pa.array(TEXTS).dictionary_encode()}), path)
    assert read(path) == TEXTS


def test_archives_of_several_members(tmp_path: Path) -> None:
    for ending, compress in COMPRESS.items():
        path = tmp_path / f"a.txt{ending}"
        path.write_bytes(compress(b"one ") + compress(b"") + compress(b"two"))
        assert read(path) == ["one two"]


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".py"])
def test_damaged_archives_are_named(tmp_path: Path, ending: str, kind: str) -> None:
    rows = jsonl(*({"text": os.urandom(40).hex()} for _ in range(2000)))
    whole = COMPRESS[ending](rows)
    path = tmp_path / f"a{kind}{ending}"
    for content in [whole[:-3], whole[: len(whole) // 2], whole[:5], b"no archive at all"]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"a{kind}{ending}: damaged or truncated"):
            read(path)


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst"])
def test_archives_hold_nothing_but_whole_members(tmp_path: Path, ending: str) -> None:
    """One of the libraries' own readers accepts each of these as a whole archive."""
    one = COMPRESS[ending](b"one" * 50)
    path = tmp_path / f"a.txt{ending}"
    for content in (
        b"",
        b"\0" * 64,
        one + b"garbage",
        one + one[:-2],
        one + one[:4] + b"damaged header" + one[18:],
        b"\0\0\0\0" + one,
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"a\.txt{ending}: damaged or truncated: \S"):
            read(path)
    path.write_bytes(one + b"\0" * 8 + one + b"\0" * 8)  # padding, as tape drives and xz write it
    assert read(path) == ["one" * 100]


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst"])
def test_an_archive_of_zeros_does_not_fill_the_memory(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.py{ending}"
    path.write_bytes(COMPRESS[ending](bytes(2**20)) * 160)
    with pytest.raises(UserError, match="more than 134,217,728 bytes"):
        read(path)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.xz", "a.jsonl.zst"])
def test_gigabytes_of_zeros_are_not_read(tmp_path: Path, name: str) -> None:
    """A download that allocates its size at the beginning leaves them."""
    path = tmp_path / name
    pack = COMPRESS.get(path.suffix)
    path.write_bytes(pack(b'{"text": "one"}') if pack else b"")
    os.truncate(path, 20 * 2**30)
    with pytest.raises(UserError, match="zeros"):
        read(path)


def test_zeros_within_a_text_are_kept(tmp_path: Path) -> None:
    text = "a" + "\0" * 500_000 + "b"
    (tmp_path / "a.txt").write_text(text)
    assert read(tmp_path) == [text]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet file at all", None])
def test_damaged_parquet_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": TEXTS * 1000}), path)
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(UserError, match=r"a\.parquet: damaged or truncated: \S"):
        read(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"content": "x", "n": 1}', "no field 'text' .* there is 'content', 'n'"),
        (b'{"txt": "x"}', r"did you mean data\.text_field = 'txt'"),
        (b"{}", "there is none"),
        (b'{"text": 3}', "field 'text' is no text but int"),
        (b'{"text": ["x"]}', "is no text but list"),
        (b'{"text": "x"', "not JSON"),
        (b"plain text", "not JSON"),
        (b'["x"]', "expected a JSON object, got list"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_bad_rows_are_named_by_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl({"text": "fine"}) + b"\n" + line + b"\n")
    with pytest.raises(UserError, match=rf"a\.jsonl:3: {message}|a\.jsonl:3: .*{message}"):
        read(path)


def test_parquet_columns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"content": ["x"], "n": [1]}), path)
    with pytest.raises(UserError, match=r"a\.parquet: no field 'text' .* 'content', 'n'"):
        read(path)
    with pytest.raises(UserError, match=r"a\.parquet: field 'n' is no text but int"):
        read(path, field="n")


def test_utf8_and_declared_encodings_are_read_others_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfwith a mark")
    (tmp_path / "b.py").write_bytes(b"# coding: latin-1\nname = '\xe9'\r\n")
    assert read(tmp_path) == ["with a mark", "# coding: latin-1\nname = 'é'\r\n"]
    for name, content in {
        "c.txt": b"caf\xe9",
        "c.md": "utf-16".encode("utf-16"),
        "c.jsonl": b'{"text": "caf\xe9"}',
        "c.py": b"name = '\xe9'",
        "d.py": b"# coding: klingon\n",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name[0]}\{name[1:]}: .*(utf-8|UTF-8|klingon)"):
            read(tmp_path / name)


def test_lone_surrogates_are_replaced_and_pairs_joined(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a\\ud800b\\ud83d\\ude00c\\udfff"}\n')
    assert read(path) == ["a\ufffdb😀c\ufffd"]


@pytest.mark.parametrize(
    "coding",
    ["rot13", "undefined", "punycode", "base64", "hex", "zip", "idna", "utf-16", "cp037", "no-such",
     "x" * 5000],
)  # fmt: skip
def test_coding_lines_that_are_no_encoding_of_source(tmp_path: Path, coding: str) -> None:
    path = tmp_path / "a.py"
    path.write_text(f"# -*- coding: {coding} -*-\nx = 'a-b' # caf\n")
    with pytest.raises(UserError, match=r"a\.py: \S"):
        read(path)


@pytest.mark.parametrize("coding", ["latin-1", "koi8-r", "cp1252", "utf8", "euc_jp", "shift_jis"])
def test_coding_lines_that_are(tmp_path: Path, coding: str) -> None:
    text = f"# -*- coding: {coding} -*-\nx = 'a-b'\n"
    (tmp_path / "a.py").write_bytes(text.encode(coding))
    assert read(tmp_path) == [text]


def test_long_documents_are_cut_and_none_is_lost(tmp_path: Path) -> None:
    paragraph = "The quick brown fox jumps over the lazy dog. " * 20 + "\n\n"
    text = paragraph * 6000
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_bytes(jsonl({"text": text}))
    for name in ("a.txt", "b.jsonl"):
        parts = read(tmp_path / name)
        assert "".join(parts) == text
        assert len(parts) == 2
        assert all(part.endswith("\n\n") for part in parts)


@pytest.mark.parametrize("text", ["", "x", "word " * 999, "line\n" * 999, "x" * 5000, "\n\n" * 999])
def test_cut_loses_nothing_and_keeps_its_bounds(text: str) -> None:
    parts = list(cut(text, 100))
    assert "".join(parts) == text
    assert all(100 <= len(part) <= 200 for part in parts[:-1])
    assert len(parts[-1]) <= 200


def test_cut_prefers_paragraphs() -> None:
    assert list(cut("a" * 120 + "\n" + "b" * 20 + "\n\n" + "c" * 200, 100)) == [
        "a" * 120 + "\n" + "b" * 20 + "\n\n",
        "c" * 200,
    ]
    assert list(cut("a" * 120 + "\n" + "b" * 90, 100)) == ["a" * 120 + "\n", "b" * 90]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in (
        "b.txt", "a.md", "sub/deep/c.py", "sub/d.jsonl", "skipped.csv", "noending",
        ".hidden.txt", ".git/e.txt", "sub/__pycache__/f.py", "B.txt", "sub/[x].txt",
    ):  # fmt: skip
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jsonl({"text": name}) if name.endswith("jsonl") else name.encode())
    (tmp_path / "tree" / "dangling").symlink_to(tmp_path / "nowhere")
    return tmp_path / "tree"


def test_folders_are_walked_in_order(tree: Path) -> None:
    assert read(tree) == ["B.txt", "a.md", "b.txt", "sub/[x].txt", "sub/d.jsonl", "sub/deep/c.py"]


def test_globs_match_as_a_shell_does(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(f"{tree}/*.txt") == ["B.txt", "b.txt"]
    assert read(f"{tree}/**/c.py") == ["sub/deep/c.py"]
    assert read(f"{tree}/sub/[x].txt") == ["sub/[x].txt"]  # it exists as written
    monkeypatch.chdir(tree)
    monkeypatch.setenv("HOME", str(tree))
    assert read("*/[dx].jsonl") == read("~/sub/*.jsonl") == ["sub/d.jsonl"]
    with pytest.raises(UserError, match=r"no file matches 'sub/\*\.txt\?'"):
        read("sub/*.txt?")


def test_a_file_reached_twice_is_read_once(tree: Path) -> None:
    assert read(tree / "b.txt", tree, f"{tree}/*.md") == [
        "b.txt",
        *(t for t in read(tree) if t != "b.txt"),
    ]
    assert [path.name for path in local_files([str(tree / "b.txt"), f"{tree}/b*", "hf:x"])] == [
        "b.txt"
    ]


def test_linked_folders_are_read_and_circles_end(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "else" / "deep").mkdir(parents=True)
    (tmp_path / "else" / "deep" / "x.txt").write_text("linked")
    before = read(tree)
    (tree / "z").symlink_to(tmp_path / "else")
    assert read(tree) == [*before, "linked"]
    for link, target in [
        ("again", "z"), ("up", ".."), ("sub/self", "."), ("sub/top", "../.."), ("loop", "loop"),
    ]:  # fmt: skip
        (tree / link).symlink_to(target)
    assert sorted(read(tree)) == sorted([*before, "linked"])
    assert sorted(read(f"{tree}/**/*.txt")) == ["B.txt", "b.txt", "linked", "sub/[x].txt"]
    assert read(f"{tree}/*/deep/*") == ["linked", "sub/deep/c.py"]
    assert read(f"{tree}/sub/**/c.py") == ["sub/deep/c.py"]


def test_many_links_to_the_folder_itself_take_no_time(tmp_path: Path) -> None:
    """Forty of them would be 40^40 paths."""
    (tmp_path / "a.txt").write_text("one")
    for number in range(40):
        (tmp_path / f"link{number}").symlink_to(".")
    assert read(tmp_path) == ["one"]
    assert read(f"{tmp_path}/**/*.txt") == ["one"]


@pytest.mark.parametrize("source", ["", "/**/*.txt", "/sub/*/c.py"])
def test_a_folder_that_cannot_be_listed_is_an_error(
    tree: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permissions do not bind root, which tests may run as: so the system call is made to fail."""

    def refusing(listing: Callable[[Any], Any], path: Any = ".") -> Any:
        if Path(path).name in ("deep", "sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, partial(refusing, getattr(os, name)))
    with pytest.raises(UserError, match=r"data\.sources: .*Permission denied"):
        read(f"{tree}{source}")


@pytest.mark.parametrize("name", ["A.TXT", "b.Md", "C.PY", "d.JsonL", "e.TXT.GZ", "f.jsonl.ZST"])
def test_upper_case_endings_count(tmp_path: Path, name: str) -> None:
    data = jsonl({"text": "x"}) if "jsonl" in name.lower() else b"x"
    path = tmp_path / name
    path.write_bytes(COMPRESS[path.suffix.lower() if name.count(".") > 1 else ""](data))
    assert read(path) == read(tmp_path) == ["x"]


def test_an_upper_case_parquet_ending_counts(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": ["x"]}), tmp_path / "A.PARQUET")
    assert read(tmp_path) == ["x"]


def test_what_is_left_out_is_counted(tree: Path) -> None:
    left_out: Counter[str] = Counter()
    local_files([str(tree)], left_out)
    assert left_out == {".csv": 1, "without an ending": 2, "hidden": 2}
    rows = jsonl({"text": None}, {"text": " "}, {"text": "x"}, {"text": ""})
    (tree / "e.jsonl").write_bytes(rows)
    (tree / "blank.txt").write_text("\n")
    left_out = Counter()
    list(documents([str(tree)], "text", left_out=left_out))
    assert left_out == {"without text": 4}


def test_what_is_no_file_is_an_error(tree: Path) -> None:
    os.mkfifo(tree / "sub" / "fifo.txt")
    (tree / "sub" / "deep" / "gone.txt").symlink_to("nowhere")
    for source, message in [
        (tree / "sub", r"fifo\.txt: is not a regular file"),
        (tree / "sub" / "fifo.txt", "not a regular file"),
        (f"{tree}/*/*.txt", "not a regular file"),
        (tree / "sub" / "deep", r"gone\.txt: is a link to nowhere, which does not exist"),
        (tree / "sub" / "deep" / "gone.txt", "does not exist"),
        (f"{tree}/**/gone.txt", "does not exist"),
        ("/dev/zero", "not a regular file"),
    ]:
        with pytest.raises(UserError, match=message):
            read(source)


def test_names_that_are_no_utf8_are_read(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff\xe9.txt")
    (tmp_path / name).write_text("x")
    assert read(tmp_path) == read(f"{tmp_path}/*.txt") == ["x"]


@pytest.mark.parametrize("source", ["a" * 300, "~nobody-here/x", "x\0y.txt", "a/" * 2000, "\udcff"])
def test_absurd_sources_are_one_line(source: str) -> None:
    with pytest.raises(UserError, match=r"data\.sources"):
        read(source)


def test_missing_files_are_named_with_the_nearest(tree: Path) -> None:
    for source, message in [
        (tree / "c.txt", r"no 'c\.txt' in .*tree, .* did you mean '[bB]\.txt'\?"),
        (tree / "subb" / "deep" / "c.py", r"no 'subb' in .* did you mean 'sub'"),
        (tree / "b.txt" / "x", "no 'b.txt'|no 'x'"),
        ("python-stdlb", "did you mean 'python-stdlib'"),
        ("roneneldan/TinyStories", "is written hf:roneneldan/TinyStories"),
    ]:
        with pytest.raises(UserError, match=message):
            read(source)


def test_files_of_unknown_kind(tree: Path) -> None:
    for name in ("skipped.csv", "noending"):
        with pytest.raises(
            UserError, match=rf"{name}: cannot tell what it holds; expected \.txt, "
        ):
            read(tree / name)
    (tree / "sub" / "deep" / "c.py").unlink()
    with pytest.raises(UserError, match=r"the folder .*deep holds no \.txt"):
        read(tree / "sub" / "deep")


def test_the_standard_library_is_found_without_its_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = local_files(["python-stdlib"])
    assert len(real) > 300
    assert {"argparse.py", "textwrap.py"} <= {path.name for path in real}
    parts = {part for path in real for part in path.parts[:-1]}
    root = set(Path(sysconfig.get_path("stdlib")).parts)
    assert not (parts - root) & {"site-packages", "test", "tests", "idle_test", "__pycache__"}
    for name in (
        "a.py",
        "json/b.py",
        "test/c.py",
        "site-packages/d.py",
        "lib/tests/e.py",
        "f.txt",
        "encodings/g.py",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: {"stdlib": str(tmp_path)}[name])
    assert read("python-stdlib") == ["a.py", "json/b.py"]


class FakeHub(ModuleType):
    """Stands for the package `datasets`, which the tests do not install."""

    def __init__(self, rows: list[dict[str, Any]], error: Exception | None = None) -> None:
        super().__init__("datasets")
        self.rows, self.error, self.calls, self.given = rows, error, [], 0  # type: ignore[var-annotated]

    def load_dataset(self, *args: Any, **options: Any) -> Iterator[dict[str, Any]]:
        self.calls.append((args, options))
        if self.error and not self.rows:
            raise self.error
        return self.stream()

    def stream(self) -> Iterator[dict[str, Any]]:
        for row in self.rows:
            self.given += 1
            yield row
        if self.error:
            raise self.error


def test_hub_datasets_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub([{"text": text} for text in [*TEXTS, "", None]])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert read("hf:some/name", "hf:some/name:config") == TEXTS * 2
    options = {"split": "train", "streaming": True}
    assert hub.calls == [(("some/name", None), options), (("some/name", "config"), options)]
    with pytest.raises(UserError, match="hf:some/name: no field 'txt'"):
        read("hf:some/name", field="txt")


def test_a_survey_of_a_hub_dataset_stops_early(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub([{"text": "x" * 100}] * 1000)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert len(list(documents(["hf:name"], "text", hub_bytes=950))) == 10
    assert hub.given == 10


@pytest.mark.parametrize("rows", [[], [{"text": "one"}]])
def test_hub_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]
) -> None:
    error = ConnectionError("Couldn't reach 'x'\nand a long story")
    monkeypatch.setitem(sys.modules, "datasets", FakeHub(rows, error))
    with pytest.raises(
        UserError, match=r"cannot read 'hf:x': ConnectionError: Couldn't reach 'x'$"
    ):
        read("hf:x")


def test_missing_extras_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").touch()
    for package, source in [("datasets", "hf:x"), ("pyarrow", str(tmp_path / "a.parquet"))]:
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match=f"needs {package}; install it: pip install {package}"):
            read(source)
