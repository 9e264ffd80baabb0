"""Facts on how a model was trained, for the card or the metadata of an export.

The model folder of a run is inside the run's folder, which has the config and the metrics. A model
folder that was moved elsewhere is exported without them.

A card is made to be published, and paths name people, machines and projects. So only the last
component of every path in the config is kept.
"""

import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from bitnet.schema import read_file

_MAX_BYTES = 2**30
_TEXTS = ("sample_prompt", "text_field")
"""Keys whose value is a text that may contain a slash."""


@dataclass(frozen=True)
class Facts:
    """A run's facts on its model; empty if there is no run."""

    name: str
    """Name of the run, or of the model folder."""
    config: str = ""
    """The run's config.toml with shortened paths; "" if it cannot be read as TOML."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """The newest evaluation: ``step``, ``tokens``, ``val_loss`` (nats) and ``val_bpb``."""
    sources: tuple[str, ...] = ()
    """The training data, as in ``data.sources``, with shortened paths."""


def read_facts(folder: Path) -> Facts:
    """The facts of a model folder. Raises UserError for a config or metrics that cannot be read."""
    folder = folder.resolve()
    run = folder.parent
    config, metrics = run / "config.toml", run / "metrics.jsonl"
    if not (config.is_file() and metrics.is_file()):
        return Facts(folder.name)
    text = read_file(config, _MAX_BYTES).decode(errors="replace")
    try:
        settings = _without_paths(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, RecursionError):
        return Facts(run.name, metrics=_last_evaluation(metrics))
    shown = tomli_w.dumps(settings)
    return Facts(run.name, shown, _last_evaluation(metrics), _sources(settings))


def _without_paths(value: Any, key: str = "") -> Any:
    """A config value with each path replaced by its last component."""
    if isinstance(value, dict):
        return {key: _without_paths(one, key) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_paths(one, key) for one in value]
    if not isinstance(value, str) or key in _TEXTS or value.startswith("hf:"):
        return value
    return value.rstrip("/\\").replace("\\", "/").rpartition("/")[2]


def _last_evaluation(path: Path) -> dict[str, Any]:
    for line in reversed(read_file(path, _MAX_BYTES).splitlines()):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # the last line of a killed run
            continue
        if isinstance(row, dict) and "val_loss" in row:
            return row
    return {}


def _sources(settings: dict[str, Any]) -> tuple[str, ...]:
    """``data.sources`` of a run's config; in a mixture they are tables."""
    try:
        sources = settings["data"]["sources"]
    except (KeyError, TypeError):
        return ()
    names = [one.get("name", "") if isinstance(one, dict) else one for one in sources]
    return tuple(str(name) for name in names)
