"""Make the tables of :mod:`bitnet_kernels.dispatch`: by timing on a GPU, or by a static model.

:func:`tune` times every candidate on the GPU at hand and writes the user's cache. Without a GPU
:func:`static_table` ranks the same candidates by their machine code. It made the shipped tables,
for GPUs that nobody has measured yet; their ``source`` says so.
"""

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bitnet_kernels import reference
from bitnet_kernels.bench.timing import (
    CudaBackend,
    copies_needed,
    interleave,
    quantile,
    record,
)
from bitnet_kernels.dispatch import (
    ARCHITECTURES,
    FORMULATIONS,
    LANE_COLUMNS,
    Entry,
    Table,
    TileConfig,
    bucket,
    cache_file,
    fingerprint,
    forget,
    shared_bytes,
    shared_limit,
    table_to_json,
    tuned,
)
from bitnet_kernels.files import write_whole
from bitnet_kernels.packing import bit_planes, pack_ternary

SHAPES = ((1024, 1024), (2560, 2560), (4096, 4096), (2560, 6912), (4096, 14336), (8192, 28672))
"""N x K of the shipped tables."""
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
Cost = Callable[[str, list[TileConfig], int, int, int], list[float]]
"""(formulation, configurations, M, N, K) -> microseconds of each."""


def candidates(formulation: str, m: int, n: int, k: int, limit: int) -> list[TileConfig]:
    """The configurations worth trying for a shape, with at most ``limit`` bytes of shared memory;
    none if the formulation cannot win."""
    tokens = bucket(m)
    found: Iterator[TileConfig]
    if formulation in ("gemm", "unpacked"):
        if formulation == "unpacked" and m < 256:
            return []
        block_m = min(max(tokens, 8), 128)
        blocks = (
            ((128, 256), (64, 256), (128, 512))
            if formulation == "gemm"
            else ((128, 64), (128, 128))
        )
        splits = (1, 2, 4, 8) if m <= 64 else (1,)
        warps = 8 if block_m >= 64 else 4
        found = (
            TileConfig(block_m, block_n, block_k, split, warps, stages)
            for (block_n, block_k), split, stages in itertools.product(blocks, splits, (3, 4))
        )
    else:
        if m > 16:
            return []
        longest, sums = LANE_COLUMNS[formulation], 4 if formulation == "popcount" else 8
        block_m = min(tokens, 4)
        found = (
            TileConfig(block_m, rows * groups, longest // groups, split)
            for rows, groups, split in itertools.product((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8))
            if rows * block_m <= sums
        )
    # Slices of K shorter than a block would leave programs that only wait for the others.
    useful = [one for one in found if one.split_k == 1 or one.split_k * one.block_k <= k]
    return [one for one in useful if shared_bytes(formulation, one) <= limit]


def best_entries(
    cost: Cost,
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    limit: int,
    progress: Callable[[str], None],
) -> Iterator[Entry]:
    """The cheapest configuration of every formulation, shape and M."""
    for (n, k), m in itertools.product(shapes, tokens):
        progress(f"N x K = {n} x {k}, M = {m}")
        for formulation in FORMULATIONS:
            if tried := candidates(formulation, m, n, k, limit):
                times = [round(us, 3) for us in cost(formulation, tried, m, n, k)]
                # Of equals take the largest block: it reads the activations least often.
                best = min(
                    zip(times, tried, strict=True), key=lambda one: (one[0], -one[1].block_n)
                )
                if best[0] < math.inf:
                    yield Entry(m, n, k, formulation, best[1], best[0])


def static_table(
    sm: int,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    tokens: Sequence[int] = TOKENS,
    progress: Callable[[str], None] = lambda text: None,
) -> Table:
    """The table of a GPU architecture from the static model; needs Triton, but no GPU."""

    from bitnet_kernels.sass import estimate_us

    def cost(formulation: str, tried: list[TileConfig], m: int, n: int, k: int) -> list[float]:
        return [estimate_us(formulation, config, sm, m, n, k) for config in tried]

    entries = tuple(best_entries(cost, shapes, tokens, shared_limit(sm), progress))
    return Table("static model of the compiled code, not measured", entries)


class Timer:
    """Times candidates on a GPU, in CUDA graphs, with cold weights. The candidates of a formulation
    take turns. Each is first compared with the reference."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self.shape: tuple[int, int] = (0, 0)
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.codes = torch.empty(0, dtype=torch.float32, device="cpu")

    def __call__(
        self, formulation: str, tried: list[TileConfig], m: int, n: int, k: int
    ) -> list[float]:
        """Median microseconds of each; RuntimeError if one is not exact."""
        generator = torch.Generator(self.device).manual_seed(0)

        def integers(low: int, high: int, rows: int) -> Tensor:
            wide = torch.randint(low, high, (rows, k), generator=generator, device=self.device)
            return wide.to(torch.int8)

        if self.shape != (n, k):
            self.shape, self.codes = (n, k), integers(-1, 2, n)
            packed = pack_ternary(self.codes)
            n_copies = copies_needed(packed.numel(), self.cache_bytes, "cold")
            pairs = [(packed.clone(), bit_planes(packed)) for _ in range(n_copies)]
            self.copies = pairs
        x = integers(-127, 128, m)
        row_sum, want = x.sum(1, dtype=torch.int32), reference.int8_matmul(x, self.codes)
        from triton.runtime.errors import OutOfResources

        backend = CudaBackend()
        replays = {}
        for config in tried:

            def call(i: int, config: TileConfig = config) -> Tensor:
                from bitnet_kernels.gpu.matmul import matmul

                packed, planes = self.copies[i]
                return matmul(formulation, config, x, packed, planes, row_sum, full_range=False)

            try:
                got = call(0)
            except OutOfResources:  # not a configuration for this GPU
                continue
            if not torch.equal(got, want):
                raise RuntimeError(f"{formulation} {config} is not exact at M, N, K = {m, n, k}")
            replays[str(config)] = record(call, len(self.copies), backend)
        seconds = interleave(replays, backend, rounds=9, cache="cold")
        return [1e6 * quantile(seconds.get(str(config), [math.inf]), 0.5) for config in tried]


def tune(
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    device_name: str,
    capability: int,
    cost: Cost,
    progress: Callable[[str], None] = lambda text: None,
) -> Path:
    """Measure the candidates for the shapes N x K and keep the best in the user's cache, where
    :func:`bitnet_kernels.dispatch.choose` finds them from then on.

    Arguments:
        device_name, capability: of the GPU, from ``dispatch.key_of``.
        cost: gives the microseconds of candidates: a :class:`Timer`.
    Returns:
        The path of the cache file, which is written after each shape. Entries for other shapes and
        M are kept; entries of a damaged file or of other kernels are dropped.
    Raises:
        RuntimeError: a candidate is not exact; nothing is written for its shape.
    """
    path = cache_file(device_name)
    source = f"measured on {device_name}, kernels {fingerprint()}"
    buckets = sorted({bucket(m) for m in tokens})
    for shape in shapes:
        new = tuple(best_entries(cost, [shape], buckets, shared_limit(capability), progress))
        forget()
        measured = {entry[:3] for entry in new}
        kept = tuple(e for e in tuned(device_name).entries if e[:3] not in measured)
        write_whole(path, table_to_json(Table(source, kept + new)))
    forget()
    return path


def main() -> None:
    """Rewrite the shipped tables: ``python -m bitnet_kernels.tune`` in a checkout, minutes."""
    for sm in ARCHITECTURES:

        def progress(text: str, sm: int = sm) -> None:
            print(f"sm_{sm}: {text}", file=sys.stderr)

        path = Path(__file__).parent / "tables" / f"sm_{sm}.json"
        write_whole(path, table_to_json(static_table(sm, progress=progress)))


if __name__ == "__main__":
    main()
