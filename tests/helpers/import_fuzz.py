"""Hostile model folders and GGUF files, made from a seed. Not a test module."""

import hashlib
import json
import random
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bitnet.data.tokenizer import train_tokenizer
from bitnet.export.facts import Facts
from bitnet.export.folder import load, save_model
from bitnet.export.gguf_write import save_gguf
from bitnet.export.hf import load_hf
from bitnet.export.hf_write import KINDS, save_hf
from bitnet.export.one_file import save_one_file
from bitnet.export.source import load_source
from bitnet.linear import pack
from bitnet.model import ModelConfig, Transformer
from bitnet.qat.prepare import convert, prepare
from bitnet.qat.recipe import Recipe
from bitnet.schema import UserError
from tests.helpers import hf_folder
from tests.helpers.gguf_file import write as write_gguf
from tests.helpers.gguf_models import model as small_ternary
from tests.helpers.hostile import damaged, odd_file, somewhere

TEXT = "to be or not to be, that is the question\n" * 20
NUMBERS = (0, 1, -1, 2**31, 2**40, 2**63, 255)


def odd_text(data: bytes, rng: random.Random) -> bytes:
    """Invalid or unusual JSON."""
    deep = b'{"a":' * 5000 + b"1" + b"}" * 5000
    double = data.rstrip()[:-1] + b', "model_type": "llama", "hidden_size": 7}'
    latin = data.replace(b"{", b'{"\xff\xe9": 1, ', 1)
    choices = [
        b"",
        b"null",
        b"[]",
        b"[" * 5000,
        deep,
        double,
        latin,
        data.decode().encode("utf-16"),
    ]
    return rng.choice(choices)


def odd_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header says something else."""
    size = int.from_bytes(data[:8], "little")
    header = somewhere(json.loads(data[8 : 8 + size]), rng)
    if rng.random() < 0.5 and isinstance(header, dict) and header:
        entry = header[rng.choice(sorted(header))]
        if isinstance(entry, dict):
            entry["dtype"] = rng.choice(["C64", "I8", "BOOL", "F8_E4M3", "F64", "F4", "U64", "X"])
    text = json.dumps(header).encode()
    length = rng.choice([len(text), len(text), len(text), 2**63 - 1, 10**8, 0, len(text) - 1])
    return length.to_bytes(8, "little") + text + data[8 + size :]


def change(path: Path, rng: random.Random) -> None:
    """One mutation of one file, of a kind that fits it."""
    if rng.random() < 0.15:
        odd_file(path, rng)
        return
    data = path.read_bytes() if path.is_file() else b"{}"
    kind = rng.random()
    if path.suffix == ".json" and kind < 0.7:
        content = json.loads(data)
        for _ in range(rng.choice([1, 1, 2, 5])):
            content = somewhere(content, rng)
        path.write_text(json.dumps(content))
    elif path.suffix == ".json" and kind < 0.85:
        path.write_bytes(odd_text(data, rng))
    elif path.suffix == ".safetensors" and kind < 0.6:
        path.write_bytes(odd_header(data, rng))
    else:
        path.write_bytes(damaged(data, rng))


def sign(folder: Path) -> None:
    """Make the checksums of our folder agree with its current files, where possible."""
    path = folder / "config.json"
    try:
        if not path.is_file() or path.stat().st_size > 10**8:
            return
        config = json.loads(path.read_text())
        small = {p.name: p for p in folder.iterdir() if p.is_file() and p.stat().st_size < 10**8}
        config["sha256"] = {
            name: hashlib.sha256(p.read_bytes()).hexdigest()
            for name, p in small.items()
            if name != "config.json"
        }
        config.pop("config_sha256", None)
        text = json.dumps(config, sort_keys=True).encode()
        config["config_sha256"] = hashlib.sha256(text).hexdigest()
        path.write_text(json.dumps(config))
    except (ValueError, OSError, TypeError, AttributeError, RecursionError):
        pass


REGEXES = ("(", "(?i", "a{99999999}", "(a*)*b", "\\p{Nope}", "[", "(?<=a+)b", "x" * 100_000)


def make_folders(root: Path) -> list[Path]:
    """Intact folders to start from: Hugging Face's, with one file and with shards, and ours."""

    folders = [hf_folder.write(hf_folder.llama(), root / "hf")]
    hf_folder.llama().save_pretrained(root / "shards", max_shard_size="100KB")
    for name in ("tokenizer.json", "generation_config.json"):
        shutil.copy(root / "hf" / name, root / "shards" / name)
    folders.append(root / "shards")
    tokenizer = train_tokenizer([TEXT], 300, root / "tokenizer.model", 1)
    shape: dict[str, Any] = {"d_model": 24, "n_layers": 2, "vocab_size": 300, "max_seq_len": 32}
    recipe = Recipe(weights="int", granularity="group", group_size=7)
    for name, linear, quant in (
        ("latent", "fp", Recipe()),
        ("packed", "ternary", Recipe()),
        ("integer", "fp", recipe),
    ):
        model = Transformer(ModelConfig(**shape, linear=linear))  # type: ignore[arg-type]
        if name == "packed":
            model = pack(model)  # type: ignore[assignment]
        if quant.enabled:
            model = convert(prepare(model, quant))  # type: ignore[assignment]
        folders.append(save_model(root / name, model, tokenizer, quant))
    for kind in KINDS:
        model = Transformer(ModelConfig(**shape, d_ff=64))
        save_hf(model, tokenizer, root / f"hf-{kind}", kind, Facts("model"))
        folders.append(root / f"hf-{kind}")
    return folders


def check(load_it: Callable[[], Any], what: str) -> bool:
    """Whether it loads; anything but a running model or a one-line error is a failure."""
    begun = time.process_time()
    try:
        model, tokenizer = load_it()
    except UserError as error:
        loaded, message = False, str(error)
    else:
        tokenizer.decode(tokenizer.encode("to be")[:4])
        with torch.no_grad():
            model(torch.tensor([[tokenizer.eos_id]]))
        loaded, message = True, ""
    assert "\n" not in message, what
    assert time.process_time() - begun < 10, what
    return loaded


def fuzz_folders(root: Path, count: int, seed: int) -> int:
    """Try ``count`` folders; returns how many of them loaded."""
    rng, loaded = random.Random(seed), 0
    originals = make_folders(root / "whole")
    for folder in originals:
        read = load_hf if folder.name.startswith(("hf", "shards")) else load
        assert check(lambda: read(folder), folder.name)  # noqa: B023
    for number in range(count):
        original = rng.choice(originals)
        folder = root / "mutant"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder)
        what = f"seed {seed}, folder {number}, of {original.name}"
        if rng.random() < 0.08:
            (folder / rng.choice(["adapter_config.json", "adapter_model.safetensors"])).touch()
        elif rng.random() < 0.1 and (folder / "tokenizer.json").is_file():
            content = json.loads((folder / "tokenizer.json").read_text())
            pattern = {"Regex": rng.choice(REGEXES)}
            split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
            parts = [split, content["pre_tokenizer"]]
            content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
            (folder / "tokenizer.json").write_text(json.dumps(content))
        else:
            names = sorted(path.name for path in folder.iterdir())
            for name in rng.sample(names, rng.choice([1, 1, 1, 2])):
                change(folder / name, rng)
        if rng.random() < 0.8:
            sign(folder)
        coded = original.name in ("packed", "integer")
        read = load if coded else load_hf if original.name.startswith("hf-") else load_source
        loaded += check(lambda: read(folder), what)  # noqa: B023
    shutil.rmtree(folder, ignore_errors=True)
    return loaded


def odd_keys(rng: random.Random) -> Callable[[dict[str, Any]], object]:
    """Metadata with one value replaced by any that GGUF can express, or removed."""
    plain: list[Any] = [0, 1, 3, -1, 2**24 + 1, 10**9, 2**62, True, 1.5, float("nan"), "x", "é😀"]
    plain += [float("inf"), [1], ["x"], [1.5], "llama", "yarn", "none", [1, 2, 3], ["a b", "b"]]
    more = ["rope.scaling.factor", "expert_count", "attention.scale", "logit_scale", "new.key"]

    def mutate(keys: dict[str, Any]) -> None:
        names = [*sorted(keys), *(f"llama.{name}" for name in more), "general.type"]
        for key in rng.sample(names, rng.choice([1, 1, 2])):
            value = keys.get(key)
            if rng.random() < 0.15:
                keys.pop(key, None)
            elif isinstance(value, list) and rng.random() < 0.7:
                at = rng.randrange(len(value))
                keys[key] = value[:at] + rng.choice([[], value[:1], value[at : at + 1] * 2])
                keys[key] = keys[key] or ["x"]
            else:
                keys[key] = rng.choice(plain)

    return mutate


def fuzz_ternary(root: Path, count: int, seed: int) -> int:
    """Try ``count`` ternary models, in GGUF and in one file of ours; returns how many loaded."""
    rng, loaded = random.Random(seed), 0
    root.mkdir()
    tokenizer = train_tokenizer([TEXT], 300, root / "tokenizer.model", 1)
    ours = small_ternary()
    originals = [save_one_file(root / "whole.safetensors", ours, tokenizer)]
    for kind in ("tq2_0", "i2_s"):
        originals.append(save_gguf(ours, tokenizer, root / f"{kind}.gguf", kind))  # type: ignore[arg-type]
    contents = {path: path.read_bytes() for path in originals}

    def read(path: Path) -> Any:
        return load(path) if path.suffix == ".safetensors" else load_hf(path)

    for path in originals:
        assert check(lambda: read(path), path.name)  # noqa: B023
    for number in range(count):
        original = rng.choice(originals)
        whole, path = contents[original], original.with_stem("mutant")
        kind = rng.random()
        path.unlink(missing_ok=True)
        path.write_bytes(whole)
        if kind < 0.1:
            odd_file(path, rng)
        elif kind < 0.5 and path.suffix == ".gguf":
            data, at = bytearray(whole), rng.choice([8, 16, *range(24, 20_000, 4)])
            data[at : at + 8] = struct.pack("<q", rng.choice([n for n in NUMBERS if n < 2**63]))
            path.write_bytes(bytes(data))
        elif kind < 0.5:
            path.write_bytes(odd_header(whole, rng))
        else:
            path.write_bytes(damaged(whole, rng))
        loaded += check(lambda: read(path), f"seed {seed}, {original.name} {number}")  # noqa: B023
        if path.is_dir():
            path.rmdir()
    return loaded


def fuzz_gguf(root: Path, count: int, seed: int) -> int:
    """Try ``count`` GGUF files; returns how many of them loaded."""
    rng, loaded = random.Random(seed), 0
    root.mkdir()
    path = root / "model.gguf"
    whole = write_gguf(path).read_bytes()
    assert check(lambda: load_source(path), "whole")
    for number in range(count):
        kind = rng.random()
        path.unlink(missing_ok=True)
        if kind < 0.35:
            write_gguf(path, odd_keys(rng))
        elif kind < 0.45:
            odd_file(path, rng)
        elif kind < 0.65:
            data, at = bytearray(whole), rng.choice([8, 16, *range(24, 20_000, 4)])
            data[at : at + 8] = struct.pack("<q", rng.choice([n for n in NUMBERS if n < 2**63]))
            path.write_bytes(bytes(data))
        else:
            path.write_bytes(damaged(whole, rng))
        loaded += check(lambda: load_source(path), f"seed {seed}, GGUF {number}")
        if path.is_dir():
            path.rmdir()
    return loaded
