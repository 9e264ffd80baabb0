"""A fake wandb that keeps what it is given, and fails on request. Not a test module."""

import types
from typing import Any


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, Any], int]] = []
        self.exit_code: int | None = None

    def log(self, row: dict[str, Any], step: int) -> None:
        if row.get("train/bad"):
            raise RuntimeError("server says no\nand much more")
        self.logged.append((row, step))

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


class FakeWandb(types.ModuleType):
    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[dict[str, Any]] = []
        self.run = FakeRun()
        self.error: Exception | None = None

    def init(self, **arguments: Any) -> FakeRun:
        self.calls.append(arguments)
        if self.error is not None:
            raise self.error
        return self.run

    def Html(self, text: str, inject: bool) -> str:
        assert not inject
        return text

    Settings = dict
