"""Views of a run in other programs: wandb and TensorBoard.

Both get the same panels, from :func:`panels`. Neither ends a run or stops it for long: the first
failure of any call prints one warning and switches the tracker off; metrics.jsonl continues. The
packages are imported when a tracker starts, so that a run without one does not pay for the import.
"""

import json
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from html import escape
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from bitnet.durable import write_atomic
from bitnet.schema import UserError, read_file

_SECTIONS = {
    "lr": "optim",
    "wd": "optim",
    "grad_norm": "optim",
    "tokens_per_second": "speed",
    "data_wait": "speed",
    "mfu": "speed",
    "peak_memory_bytes": "speed",
}
"""The section of each number in a line; all other numbers are in "train"."""


def panels(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics by panel, ``section/name``.

    ``train/loss``, ``val/loss``, ``val/bpb``, ``optim/lr``, ``speed/mfu``, ``ternary/zeros`` (of
    the model) and, one panel per layer, ``zeros/layers.0.mlp.up_proj``, ``flip_rate/...``.
    """
    found = dict[str, float]()
    for key, value in row.items():
        if key == "ternary/layers":
            for layer, numbers in value.items():
                found |= {f"{name}/{layer}": number for name, number in numbers.items()}
        elif key.startswith("val_"):
            found[f"val/{key.removeprefix('val_')}"] = value
        elif "/" in key:
            found[key] = value
        elif key not in ("step", "sample"):
            found[f"{_SECTIONS.get(key, 'train')}/{key}"] = value
    return found


class Tracker(ABC):
    """The common base of wandb and TensorBoard.

    Arguments:
        warn: prints one warning line.
    """

    name: str

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn, self._open = warn, False
        with self._guard("start"):
            self._start()
            self._open = True

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Show a line of metrics. The step must not decrease."""
        if self._open:
            with self._guard("log"):
                self._log(panels(row), row.get("sample", ""), step)

    def finish(self, exit_code: int = 0) -> None:
        """Close the tracker. Safe to call twice."""
        was_open, self._open = self._open, False
        if was_open:
            with self._guard("finish"):
                self._finish(exit_code)

    @abstractmethod
    def _start(self) -> None: ...

    @abstractmethod
    def _log(self, numbers: dict[str, float], sample: str, step: int) -> None: ...

    @abstractmethod
    def _finish(self, exit_code: int) -> None: ...

    @contextmanager
    def _guard(self, action: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._open = False
            reason = (str(error) or type(error).__name__).splitlines()[0]
            self._warn(f"{self.name}: {action} failed ({reason}); it is off, metrics.jsonl goes on")


class Wandb(Tracker):
    """wandb, without prompts. Online mode needs an API key; without one, wandb would stop at a
    prompt, so the run is logged offline. The run's id is kept in ``<folder>/wandb/id``, so a
    resumed run continues its curves: online in place, offline when `wandb sync` uploads the parts
    (wandb ignores steps that it has already seen).

    Arguments:
        mode: as ``log.wandb``. project: as ``log.wandb_project``.
        folder: the run's folder; name: the run's name; settings: the resolved config, to store.
    """

    name = "wandb"

    def __init__(
        self,
        mode: Literal["offline", "online"],
        project: str,
        folder: Path,
        name: str,
        settings: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        self._mode: Literal["offline", "online"] = mode
        if mode == "online" and not _has_wandb_key():
            warn("wandb: no API key (run `wandb login`, or set WANDB_API_KEY): logging offline")
            self._mode = "offline"
        self._project, self._folder, self._name = project, folder, name
        self._settings = dict(settings)
        super().__init__(warn)

    def _start(self) -> None:
        import wandb

        self._run = wandb.init(
            project=self._project,
            name=self._name,
            id=_wandb_id(self._folder / "wandb" / "id"),
            dir=str(self._folder),
            config=self._settings,
            resume="allow" if self._mode == "online" else None,  # offline has no server to ask
            settings=wandb.Settings(
                mode=self._mode, console="off", silent=True, init_timeout=30, finish_timeout=30
            ),
        )

    def _log(self, numbers: dict[str, float], sample: str, step: int) -> None:
        import wandb

        shown: dict[str, Any] = dict(numbers)
        if sample:
            shown["sample"] = wandb.Html(f"<pre>{escape(sample)}</pre>", inject=False)
        self._run.log(shown, step=step)

    def _finish(self, exit_code: int) -> None:
        """Close wandb; online it waits at most 30 s for the upload."""
        self._run.finish(exit_code=exit_code)


class TensorBoard(Tracker):
    """TensorBoard: `tensorboard --logdir runs` shows all runs.

    Arguments:
        folder: of the event files. settings: the resolved config, shown as text.
        first_step: events of a killed process from this step on are dropped.
    Raises:
        UserError: the package is missing.
    """

    name = "tensorboard"

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        first_step: int,
        warn: Callable[[str], None],
    ) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "log.tensorboard = true needs a package: pip install 'bitnet-train[tensorboard]'"
            ) from error
        self._make = partial(SummaryWriter, str(folder), purge_step=first_step)
        self._settings, self._first_step = settings, first_step
        super().__init__(warn)

    def _start(self) -> None:
        self._writer: Any = self._make()
        settings = json.dumps(self._settings, indent=2, default=str)
        self._writer.add_text("config", _markdown(settings), self._first_step)

    def _log(self, numbers: dict[str, float], sample: str, step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        if sample:
            self._writer.add_text("sample", _markdown(sample), step)

    def _finish(self, exit_code: int) -> None:
        self._writer.close()


def _markdown(text: str) -> str:
    """Text as a code block, which Markdown shows unchanged."""
    return "\n".join(f"    {line}" for line in text.split("\n"))


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, NetrcParseError):
        return False


def _wandb_id(path: Path) -> str:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, secrets.token_hex(4).encode())  # not `random`, whose state is the run's
    return read_file(path, 1000).decode().strip()
