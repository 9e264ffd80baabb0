"""Triton's interpreter, faster. Not a test module: the ``interpreted_*.py`` use it."""

from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def patch_once() -> None:
    """Keep Triton's language patched. The interpreter patches it again for every call of a function
    inside a kernel. That takes a millisecond each, which is half of its time."""
    original, patched = interpreter._patch_lang, set[object]()

    def patch(fn: Any) -> Any:
        languages = frozenset(id(value) for value in fn.__globals__.values() if value is tl)
        if languages not in patched:
            patched.add(languages)
            original(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch
