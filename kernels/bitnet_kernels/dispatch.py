"""Choose the formulation and its configuration for a shape on a device, from tables kept as data.

The package ships ``tables/sm_NN.json``, one per GPU architecture. A file of the same form in the
user's cache (``$XDG_CACHE_HOME/bitnet``, else ``~/.cache/bitnet``), named after the GPU, holds the
measurements of :func:`bitnet_kernels.tune.tune`. It takes precedence for its shapes and M.
Every entry gives the time of one formulation for one shape:

    {"m": 1, "n": 4096, "k": 4096, "formulation": "sad", "config": [1, 8, 2048, 1, 1, 1], "us": 4.2}

Any shape is looked up at the next power of two of M and at the nearest N and K. A configuration
that fits the device's shared memory can be slow, but never wrong: every kernel takes every shape.
"""

import hashlib
import json
import math
import os
import re
from contextlib import suppress
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

FORMULATIONS = {
    "sad": "addsub",
    "popcount": "addsub",
    "dp4a": "dot",
    "gemm": "dot",
    "unpacked": "dot",
}
"""Every way to compute the product, and its family."""
KERNELS = ("auto", "addsub", "dot", *FORMULATIONS, "reference")
"""The values of ``kernel=``. ``addsub``: multiplication-free; ``dot``: multiplier units on decoded
codes; or the name of a formulation of either. All of these are Triton kernels, on CUDA or in the
interpreter. ``reference``: plain torch, on any device. ``auto``: the fastest, by device and shape.
"""
ARCHITECTURES = (80, 89, 90, 100)
"""Compute capabilities with a table of their own."""
LANE_COLUMNS = {"sad": 2048, "dp4a": 2048, "popcount": 4096}
"""Columns of a row that a warp loads at once: 32 lanes times 16 bytes (of each of two planes)."""
_SHARED_BYTES = {80: 166_912, 87: 166_912, 90: 232_448, 100: 232_448, 103: 232_448}
"""Shared memory of a block by compute capability (CUDA C++ Programming Guide); the others have
99 KiB."""
MAX_M = 4096
_LARGEST = 1 << 20
"""Most bytes of a user's table: thousands of entries. Reading more would take seconds at every
start."""


class TileConfig(NamedTuple):
    """How a kernel is split into programs: each computes ``block_m`` by ``block_n`` outputs over a
    ``split_k``-th of K, ``block_k`` columns at a time."""

    block_m: int
    block_n: int
    block_k: int
    split_k: int = 1
    num_warps: int = 1
    num_stages: int = 1

    def blocks(self) -> dict[str, int]:
        """The constexprs of a kernel."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}


class Entry(NamedTuple):
    """A row of a table: the time of a formulation for a shape, in microseconds."""

    m: int
    n: int
    k: int
    formulation: str
    config: TileConfig
    us: float


class Table(NamedTuple):
    """Entries and their source ("measured ..." or "static model ...")."""

    source: str
    entries: tuple[Entry, ...]


def bucket(m: int) -> int:
    """The power of two that stands for M = ``m``, at most 4096."""
    return min(1 << max(m - 1, 0).bit_length(), MAX_M)


def table_from_json(text: str) -> Table:
    """Read a table; raises ValueError where the text is not one."""
    try:
        data = json.loads(text)
        entries = tuple(
            Entry(**(row | {"config": TileConfig._make(row["config"])})) for row in data["entries"]
        )
        source = data["source"]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"not a table of kernel configurations: {error!r}") from error
    for entry in entries:
        _check(entry)
    return Table(str(source), entries)


def _check(entry: Entry) -> None:
    """Refuse a configuration that cannot be launched: a damaged cache must not crash a model."""
    config = entry.config
    sizes = (entry.m, entry.n, entry.k, *config)
    whole = all(type(size) is int and 0 < size <= 2**31 for size in sizes)
    name = entry.formulation if isinstance(entry.formulation, str) else ""
    if not whole or any(n & (n - 1) for n in config._replace(split_k=1, num_stages=1)):
        possible = False
    elif (columns := LANE_COLUMNS.get(name)) is not None:
        # A warp holds 16 bytes per lane of at least one row, and four words of each.
        possible = columns // 32 <= config.block_k <= columns <= config.block_n * config.block_k
        possible = possible and config.num_warps == 1 and config.block_m <= 16
    else:
        possible = name in FORMULATIONS and 8 <= config.block_m <= 256
        possible = possible and config.block_n >= 16
        possible = possible and config.block_k >= (128 if name == "gemm" else 32)
        possible = possible and config.num_warps in (4, 8)
    possible = possible and config.block_n <= 512 and config.block_k <= 4096
    possible = possible and config.split_k <= 1024 and config.num_stages <= 8
    if not possible or not (isinstance(entry.us, int | float) and 0 <= entry.us < math.inf):
        raise ValueError(f"not a kernel configuration: {entry}")


def shared_bytes(formulation: str, config: TileConfig) -> int:
    """Upper bound of the shared memory of a configuration, in bytes: the pipeline's tiles of
    weights and activations, with four tiles of activations per tile of packed weights. One warp
    needs next to none."""
    if formulation in LANE_COLUMNS:
        return 0
    planes = 4 if formulation == "gemm" else 1
    tile = (config.block_n + planes * config.block_m) * (config.block_k // planes)
    return config.num_stages * tile


def shared_limit(capability: int) -> int:
    """Bytes of shared memory that a block may have on a compute capability, such as 90."""
    return _SHARED_BYTES.get(capability, 101_376)


def table_to_json(table: Table) -> str:
    """The text of a table, one line per entry."""
    rows = [json.dumps(entry._asdict() | {"config": list(entry.config)}) for entry in table.entries]
    head = f'{{\n"source": {json.dumps(table.source)},\n"entries": [\n'
    return head + ",\n".join(rows) + "\n]\n}\n"


@cache
def shipped(capability: int) -> Table:
    """The package's table for a compute capability, such as 90: its own, else the table of the next
    lower one among those with no more shared memory."""
    fitting = [arch for arch in ARCHITECTURES if shared_limit(arch) <= shared_limit(capability)]
    lower = [arch for arch in fitting if arch <= capability]
    arch = max(lower) if lower else min(fitting)
    text = (files("bitnet_kernels") / "tables" / f"sm_{arch}.json").read_text("utf-8")
    return table_from_json(text)


def cache_file(device_name: str) -> Path:
    """The file that holds this user's measurements of the GPU of that name."""
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))  # its spec: ignore it unless absolute
    root = root if root.is_absolute() else Path.home() / ".cache"
    return root / "bitnet" / (re.sub(r"\W+", "_", device_name).strip("_") + ".json")


@cache
def fingerprint() -> str:
    """Hash of the kernels' sources and of Triton, 12 hex digits. Measurements with another hash are
    stale."""
    digest = hashlib.sha256()
    for path in sorted((Path(__file__).parent / "gpu").glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    with suppress(PackageNotFoundError):
        digest.update(version("triton").encode())
    return digest.hexdigest()[:12]


@cache
def tuned(device_name: str) -> Table:
    """The measurements of this GPU with these kernels; no entries if there are none, or if they
    cannot be read (tuning again writes the file anew)."""
    path = cache_file(device_name)
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST:  # a FIFO would be waited for
            return Table("", ())
        table = table_from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return Table("", ())
    return table if table.source.endswith(fingerprint()) else Table("", ())


def forget() -> None:
    """Read the tables again at the next call, after a tuning."""
    for function in (shipped, tuned, choose):
        function.cache_clear()


def allowed(kernel: str, planes: bool) -> tuple[str, ...]:
    """The formulations that ``kernel`` may mean; ``popcount`` needs bit planes of the weights."""
    if kernel in FORMULATIONS:
        return (kernel,)
    return tuple(
        name
        for name, family in FORMULATIONS.items()
        if kernel in (family, "auto") and (planes or name != "popcount")
    )


@lru_cache(maxsize=65536)
def choose(
    kernel: str, m: int, n: int, k: int, planes: bool, capability: int, device_name: str
) -> tuple[str, TileConfig]:
    """The fastest formulation that ``kernel`` allows for a shape, and its configuration.

    The user's own measurements decide if they have this N, K and M, else the nearest shape of the
    shipped table. Only configurations that fit the GPU's shared memory count.
    """
    names, m, limit = allowed(kernel, planes), bucket(m), shared_limit(capability)
    own = [entry for entry in tuned(device_name).entries if entry[:3] == (m, n, k)]
    for entries in (own, shipped(capability).entries):
        candidates = [
            entry
            for entry in entries
            if entry.formulation in names and shared_bytes(entry.formulation, entry.config) <= limit
        ]
        if candidates:
            # Of equals take dot, the multiplier units: there latency decides, and they have work
            # to spare.
            best = min(
                candidates,
                key=lambda entry: (
                    *_distance(entry, m, n, k),
                    entry.us,
                    FORMULATIONS[entry.formulation] == "addsub",
                ),
            )
            return best.formulation, best.config
    raise AssertionError(f"no table knows {kernel}: run python -m bitnet_kernels.tune")


def _distance(entry: Entry, m: int, n: int, k: int) -> tuple[float, float]:
    shape = abs(math.log2(entry.n / max(n, 1))) + abs(math.log2(entry.k / k))
    return abs(math.log2(entry.m / m)), shape


def key_of(device: Any) -> tuple[int, str]:
    """(capability, name) of a CUDA device, the last two arguments of :func:`choose`."""
    import torch

    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.name
