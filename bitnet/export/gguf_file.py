"""A GGUF file as data: its metadata and its tensors, checked as they are read.

The `gguf` package reads the file and trusts it. Here every count is compared with the file's real
contents before memory of that size is allocated, and every metadata value is checked for the
expected type.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from bitnet.export.gguf_types import I2_S, i2_s_bytes
from bitnet.schema import UserError, check_file, user_input

_MAX_READS = 2**22
"""Most numbers and strings in the metadata; Llama 4's vocabulary and merges are 1.5 million."""
_I2_S: Any = SimpleNamespace(name="I2_S", value=I2_S)


def open_gguf(source: Path) -> Any:
    """gguf's reader of a file. Its tensors are checked to be within the file and not to overlap.

    A tensor of bitnet.cpp's type i2_s, which the package does not know, has the type's name "I2_S"
    and its bytes as data.

    Raises:
        UserError: not a GGUF file, a damaged one, or the package is missing.
    """
    check_file(source)
    try:
        from gguf import GGUFReader, ReaderTensor
    except ImportError as error:
        raise UserError(
            f'{source}: reading GGUF needs the gguf extra: pip install "bitnet-train[gguf]"'
        ) from error

    class Checked(GGUFReader):
        reads = 0

        def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            found = super()._get(offset, dtype, count, override_order)
            self.reads += 1
            if len(found) != int(count):
                raise ValueError("the file ends before what its header promises")
            if self.reads > _MAX_READS:
                raise ValueError("its metadata has too many items")
            return found

        def _build_tensors(self, start_offs: int, fields: Any) -> None:
            packed = [field for field in fields if int(field.parts[4][0]) == I2_S]
            super()._build_tensors(start_offs, [f for f in fields if int(f.parts[4][0]) != I2_S])
            names = {tensor.name for tensor in self.tensors}
            for field in packed:
                dims, offset = field.parts[3], start_offs + int(field.parts[5][0])
                if field.name in names:
                    raise ValueError(f"has tensor {field.name} twice")
                names.add(field.name)
                size = i2_s_bytes(math.prod(map(int, dims)))
                data = self._get(offset, np.uint8, size)
                elements = math.prod(map(int, dims))
                self.tensors.append(
                    ReaderTensor(field.name, _I2_S, dims, elements, size, offset, data, field)
                )

    with user_input(f"{source}: not a GGUF file, or a damaged one"):
        reader = Checked(source)
        if reader.byte_order != "I":
            raise ValueError("its numbers are of the other byte order")
        end = 0
        for tensor in sorted(reader.tensors, key=lambda tensor: int(tensor.field.parts[-1][0])):
            begin = int(tensor.field.parts[-1][0])
            if begin < end or begin % int(reader.alignment):
                raise ValueError(f"tensor {tensor.name} begins inside of another")
            if math.prod(map(int, tensor.shape)) != tensor.n_elements:
                raise ValueError(f"tensor {tensor.name} has an impossible shape")
            end = begin + tensor.n_bytes
    return reader


class Keys:
    """The file's metadata as Python values; a wrong type is an error that names the key."""

    def __init__(self, source: Path, reader: Any) -> None:
        self.source = source
        self._fields = reader.fields

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of a key, which must be of type ``kind`` (list: an array)."""
        if key not in self._fields:
            return default
        with user_input(f"{self.source}: {key}: cannot be read"):
            value = self._fields[key].contents()
        fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
        if not fits or (isinstance(value, bool) and kind in (int, float)):
            raise UserError(f"{self.source}: {key}: cannot be read: expected {kind.__name__}")
        return value

    def need(self, key: str, kind: type) -> Any:
        """As :meth:`get`. Raises UserError if the key is missing."""
        if key not in self._fields:
            raise UserError(f"{self.source}: has no {key}")
        return self.get(key, kind)

    def size(self, key: str, default: Any = None) -> Any:
        """A positive integer."""
        value = self.get(key, int, default) if default is not None else self.need(key, int)
        if not 0 < value < 2**40:
            raise UserError(f"{self.source}: {key}: cannot be read: is {value}, expected 1 or more")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A positive, finite number. An fp32 value becomes the shortest decimal that rounds to it:
        1e-5, not 9.99999975e-6."""
        value = self.need(key, float) if default is None else self.get(key, float, default)
        if not 0 < value < math.inf:
            raise UserError(f"{self.source}: {key}: cannot be read: is {value}, expected above 0")
        return float(str(np.float32(value))) if value == np.float32(value) else float(value)
