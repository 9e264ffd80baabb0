"""Every command, given a path that leads nowhere or to no plain file: one line, at once."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bitnet.data.loader import TokenDataset
from bitnet.data.prepare import prepare
from bitnet.export.folder import load
from bitnet.schema import UserError
from bitnet.training.metrics import MetricsFile
from bitnet_kernels import dispatch
from tests.helpers.folders import write_folders
from tests.helpers.training_script import train

Bitnet = Callable[..., tuple[int, str, str]]
STATIC = ("quant.weights=int", "quant.activations=static")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, two small models, prepared data, and what is neither file nor folder."""
    from bitnet.config import load_config

    root = tmp_path_factory.mktemp("paths")
    tokenizer = write_folders(root)
    data = {"sources": [str(root / "text.txt")], "path": str(root / "data")}
    data["tokenizer"] = str(tokenizer.path)
    prepare(load_config([], data=data).data, progress=False)
    (root / "bare").mkdir()
    (root / "circle").symlink_to("round")
    (root / "round").symlink_to("circle")
    (root / "broken").symlink_to("nowhere")
    os.mkfifo(root / "fifo")
    with (root / "sparse").open("wb") as file:
        file.truncate(20 * 2**30)
    return root


@pytest.fixture(autouse=True)
def at_once() -> Iterator[None]:
    """Whoever waits for a FIFO's writer, or for the end of /dev/zero, is interrupted."""

    def interrupt(*_: object) -> None:
        raise SystemExit("it took more than 20 s")  # no user_input() takes it for a mistake

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


NEITHER = ["{root}/circle", "{root}/broken", "{root}/fifo", "{root}/sparse", "/dev/zero"]
ABSURD = ["a" * 5000, "a/" * 3000, "\udcff", "no[/x]"]
READING = [
    ("generate", "{path}"),
    ("pack", "{path}"),
    ("inspect", "model", "{path}"),
    ("eval", "{path}", "--text", "{root}/text.txt"),
    ("eval", "{root}/model", "--data", "{path}"),
    ("convert", "{path}", "--out", "{root}/new"),
    ("export", "{path}", "--to", "hf", "--out", "{root}/new"),
    ("ptq", "{path}", "--text", "{root}/text.txt"),
    ("ptq", "{root}/fp", "--data", "{path}"),
    ("inspect", "model.depth=1", "train.init_from={path}"),
    ("inspect", "model.depth=1", "data.tokenizer={path}"),
    ("prepare", "{root}/text.txt", "--path", "{root}/new", "--tokenizer", "{path}"),
    ("prepare", "--config", "{path}"),
    ("prepare", "{path}", "--path", "{root}/new"),
    ("eval", "{root}/model", "--text", "{path}"),
    ("convert", "{root}/fp", "--out", "{root}/new", "--text", "{path}"),
    ("convert", "{root}/fp", "--out", "{root}/new", *STATIC, "--calibration", "{path}"),
    ("ptq", "{root}/fp", "--text", "{path}"),
    ("ptq", "{root}/fp", "--data", "{root}/data", "--calibration", "{path}"),
    ("bench", "train", "--quick", "--config", "{path}"),
    ("bench", "decode", "--quick", "--contender", "ours-auto", "--model", "{path}"),
    ("bench", "report", "--check", "--root", "{path}"),
]
WRITING = [
    ("prepare", "{root}/text.txt", "--path", "{path}", "--tokenizer", "{root}/tokenizer.model"),
    ("pack", "{root}/model", "--out", "{path}"),
    ("convert", "{root}/fp", "--out", "{path}"),
    ("export", "{root}/model", "--to", "hf", "--out", "{path}"),
    ("ptq", "{root}/fp", "--text", "{root}/text.txt", "--csv", "{path}"),
    ("ptq", "{root}/fp", "--text", "{root}/text.txt", "--out", "{path}"),
    ("inspect", "kernels", "--csv", "{path}"),
    ("inspect", "kernels", "--sass", "{path}"),
    ("bench", "exact", "--quick", "--out", "{path}"),
    ("bench", "kernels", "--quick", "--out", "{path}"),
    ("bench", "train", "--quick", "--out", "{path}"),
    ("bench", "decode", "--quick", "--out", "{path}"),
]


def is_refused(bitnet: Bitnet, root: Path, words: tuple[str, ...], path: str) -> None:
    path = path.format(root=root)
    code, _, err = bitnet(*(word.format(root=root, path=path) for word in words))
    assert code == 2, path
    *_, line = err.splitlines()
    assert line.startswith("error: "), path
    assert len(line) < 2100, path
    assert "Traceback" not in err, path
    assert not (root / "new").exists(), path


@pytest.mark.parametrize("words", READING, ids=" ".join)
def test_what_is_read(
    bitnet: Bitnet, root: Path, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root / "bare")
    for path in (".", *NEITHER, *ABSURD):
        is_refused(bitnet, root, words, path)


@pytest.mark.parametrize("words", WRITING, ids=" ".join)
def test_what_is_written(
    bitnet: Bitnet, root: Path, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root / "bare")
    for path in ("{root}/circle", "{root}/fifo", "/dev/zero", *ABSURD[:2], "{root}/text.txt/x"):
        is_refused(bitnet, root, words, path)
    assert not list((root / "bare").iterdir())


@pytest.mark.parametrize("name", ["[/x]", "[bold]x[/bold]", ":smile:", "a b"])
def test_names_are_printed_as_they_are(
    bitnet: Bitnet, root: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(exist_ok=True)
    shutil.copytree(root / "model", name)
    options = ("--tokenizer", root / "tokenizer.model")
    for words in (
        ("prepare", root / "text.txt", "--path", f"data{name}", *options),
        ("eval", name, "--data", f"data{name}"),
        ("pack", name, "--tokens", "1", "--prompt", name),
        ("inspect", "model.depth=1", f"run.name={name.replace('/', '')}"),
    ):
        code, out, err = bitnet(*words)
        assert code == 0, err
        assert (name.replace("/", "") if words[0] == "inspect" else name) in out


def test_one_damaged_byte_of_a_tokenizer(root: Path, tmp_path: Path) -> None:
    """The hash is compared before the library parses the file."""
    for name in ("data", "model"):
        folder = tmp_path / name
        shutil.copytree(root / name, folder)
        path = folder / "tokenizer.model"
        whole = path.read_bytes()
        for at in range(0, len(whole), 97):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
            with pytest.raises(UserError, match=r"tokenizer\.model: .*(prepared with|sha256)"):
                TokenDataset(folder, "val").tokenizer() if name == "data" else load(folder)


def test_files_that_a_run_keeps(root: Path, tmp_path: Path) -> None:
    for name in ("metrics.jsonl", ".lock"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="not a regular file"):
        MetricsFile(tmp_path / "metrics.jsonl").rewind(3)
    with pytest.raises(UserError, match="not a regular file"), train.locked(tmp_path):
        pass
    for path in (root / "circle", root / "text.txt" / "x", Path("a" * 5000), Path("\0")):
        with pytest.raises(UserError, match=r"run\.dir"), train.locked(path):
            pass


def test_measurements_that_are_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = dispatch.cache_file("no such GPU")
    path.parent.mkdir()
    os.mkfifo(path)
    assert dispatch.tuned("no such GPU").entries == ()
