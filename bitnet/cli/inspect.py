"""``bitnet inspect``: sizes and costs of a config or a model, and the GPU kernels' machine code."""

from typing import Any

from typer.core import TyperGroup

from bitnet.cli.lazy import group


class ConfigByDefault(TyperGroup):
    """``inspect CONFIG.toml`` means ``inspect config CONFIG.toml``."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        """Resolve as click does, but pass a first word that is no command to ``config``."""
        return super().resolve_command(ctx, args if args[0] in self.commands else ["config", *args])


inspect_group = group(
    {
        "config": "bitnet.cli.inspect_config:inspect_config",
        "model": "bitnet.cli.inspect_model:inspect_model",
        "kernels": "bitnet.cli.inspect_kernels:inspect_kernels",
    },
    "Show sizes and costs of a config, a model or the GPU kernels.\n\n"
    "bitnet inspect CONFIG.toml... [SECTION.KEY=VALUE...]: shapes, parameters, FLOPs, memory, "
    "energy. Try: bitnet inspect configs/15m.toml model.depth=8\n\n"
    "bitnet inspect model FOLDER: cost per token of a trained or packed model.\n\n"
    "bitnet inspect kernels: the kernels' machine code, counted without a GPU.",
    ConfigByDefault,
    subcommand_metavar="CONFIG.toml... | COMMAND [ARGS]...",
)
