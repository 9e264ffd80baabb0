"""``bitnet bench tune``: find the fastest kernels for shapes on this GPU."""

from typing import Annotated

import typer

from bitnet.cli.bench_common import (
    Models,
    Shapes,
    Tokens,
    bench_device,
    fail,
    given_shapes,
    say,
)
from bitnet.progress import Reports, plain_console
from bitnet.schema import UserError
from bitnet_kernels.available import triton_installed
from bitnet_kernels.bench.shapes import GOALS
from bitnet_kernels.dispatch import key_of


def tune_command(
    shape: Shapes = None,
    model: Models = None,
    m: Tokens = None,
    device: Annotated[str, typer.Option(help="cuda or cuda:N.")] = "cuda",
) -> None:
    """Find the fastest kernels for shapes on this GPU, and keep them.

    Every candidate is checked, then timed. The best are saved in the user's cache, which overrides
    the package's own table. Takes minutes per shape, since each candidate is compiled.

    Example: bitnet bench tune --model bitnet-2b4t --m 1 --m 16
    """
    shapes = tuple(given_shapes(shape, model)) or tuple(GOALS)
    target = bench_device(device)
    if target.type != "cuda":
        raise UserError("--device: tuning times kernels on a GPU; expected cuda or cuda:N")
    if not triton_installed():
        raise UserError("tuning needs Triton, which is not installed")
    from bitnet_kernels.tune import TOKENS as TABLE_TOKENS
    from bitnet_kernels.tune import Timer, tune

    tokens = tuple(dict.fromkeys(m or TABLE_TOKENS))
    console = plain_console()
    with Reports(console=console) as bar:
        task = bar.add_task("", total=len(shapes) * len(tokens))
        begun = -1

        def progress(text: str) -> None:
            nonlocal begun
            begun += 1
            bar.update(task, description=text, completed=begun)

        capability, name = key_of(target)
        try:
            path = tune(shapes, tokens, name, capability, Timer(target), progress)
        except RuntimeError as error:
            if "is not exact" not in str(error):
                raise
            bar.stop()
            fail(f"{error}; what went before is kept", error)
    say(console, f"tuned: {path}")
