"""The native CPU library: found, loaded and told about threads.

It is plain C (``native/``), built when the package is installed, and never required: without it
:func:`library` is None and torch operators do the work. Python calls it through ctypes, so it needs
neither Python's headers nor torch's, and one build serves every Python and every torch.

One build holds code for several instruction sets. The best one that the CPU runs is chosen when the
library is first used. ``BITNET_CPU=avx2`` (or another name) forces one, and so does :func:`use`.

The library runs on torch's own threads: see ``native/threads.c``. A forked child has none of them,
so it runs on one thread. So does a process whose torch has an OpenMP runtime without GNU's entry
points (LLVM's runtime has them, also on macOS).
"""

import ctypes
import os
import struct
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

ABI = 10
"""BN_ABI of ``native/bitnet_cpu.h``."""
_I32, _I64, _F32, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_NORM = (_POINTER, _POINTER, _F32, _I64, _I64)
"""The inputs of a norm: x, weight, eps, M, K."""
_U64 = ctypes.c_uint64
_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "bn_abi": (_I32, ()),
    "bn_isa_name": (ctypes.c_char_p, (_I32,)),
    "bn_isa_use": (_I32, (ctypes.c_char_p,)),
    "bn_isa_used": (ctypes.c_char_p, ()),
    "bn_families_share_layout": (_I32, ()),
    "bn_use_openmp": (None, (_POINTER, _POINTER, _POINTER)),
    "bn_read": (_U64, (_POINTER, _I64, _I32)),
    "bn_workspace": (_I64, (_POINTER,)),
    "bn_step": (_I64, (_POINTER, _I64, _I32)),
    "bn_prefill": (_I64, (_POINTER, _POINTER, _POINTER, _I64, _I32)),
    "bn_ternary_workspace": (_I64, (_I32, _I64, _I64)),
    "bn_ternary_matmul": (None, (_I32, _I32, *3 * (_I64,), *5 * (_POINTER,))),
    "bn_quantized_linear": (
        None,
        (_I32, _I32, *3 * (_I64,), *5 * (_POINTER,), _I64, *3 * (_POINTER,)),
    ),
    "bn_ternary_linear": (
        None,
        (_I32, _I32, *3 * (_I64,), *4 * (_POINTER,), _I64, *3 * (_POINTER,)),
    ),
    "bn_pack": (None, (_I32, _POINTER, _I64, _I64, _POINTER)),
    "bn_bit_planes": (None, (_I32, _POINTER, _I64, _I64, _POINTER)),
    "bn_quant": (None, (_POINTER, _I64, _I64, _POINTER, _POINTER, _POINTER, _I32)),
    "bn_rmsnorm": (None, (_POINTER, _POINTER, _F32, _I64, _I64, _POINTER, _I32)),
    "bn_rmsnorm_quant": (None, (*_NORM, _POINTER, _POINTER, _POINTER, _I32)),
    "bn_add_rmsnorm_quant": (
        None,
        (_POINTER, *_NORM, _POINTER, _POINTER, _POINTER, _POINTER, _I32),
    ),
    "bn_relu2_mul_rmsnorm_quant": (
        None,
        (_POINTER, *_NORM, _POINTER, _POINTER, _POINTER, _I32),
    ),
    "bn_gate_mul": (None, (_POINTER, _POINTER, _I32, _I64, _POINTER, _I32)),
    "bn_dense_linear": (None, (_POINTER, _I64, _I64, _POINTER, _I64, _I64, _POINTER, _I32)),
    "bn_int8_linear": (
        None,
        (*(_POINTER,) * 3, _I64, _I64, _POINTER, _POINTER, _I64, _POINTER, _I32),
    ),
    "bn_rope_append": (None, (*(_POINTER,) * 6, _I64, _I64, _I64, _POINTER, _I32)),
    "bn_decode_attention": (
        None,
        (*(_POINTER,) * 3, _I64, _I64, _I64, _POINTER, _POINTER, _I32),
    ),
    "bn_decode_attention_scratch": (_I64, (_I64,)),
    "bn_train_norm_backward": (
        None,
        (_POINTER, _POINTER, _POINTER, _POINTER, _I64, _I64, _POINTER, _POINTER, _POINTER, _I32),
    ),
    "bn_train_gate_backward": (
        None,
        (_POINTER, _POINTER, _POINTER, _I64, _POINTER, _POINTER, _I32),
    ),
    "bn_train_rescale": (None, (_POINTER, _POINTER, _POINTER, _I64, _POINTER, _I64, _I64, _I32)),
    "bn_absmean": (None, (_POINTER, _I64, _F32, _POINTER, _POINTER, _I32)),
    "bn_stochastic": (None, (_POINTER, _I64, _I64, _U64, _POINTER, _POINTER, _I32)),
    "bn_stochastic_columns": (
        None,
        (_POINTER, _POINTER, _I64, _I64, _U64, _POINTER, _POINTER, _I32),
    ),
    "bn_digits_columns": (None, (_POINTER, _POINTER, _I64, _I64, _POINTER, _POINTER, _I32)),
    "bn_sum_of_digits": (None, (_POINTER, _POINTER, _I64, _I64, _POINTER, _I32)),
    "bn_has_tiles": (_I32, ()),
    "bn_cross_entropy": (None, (_POINTER, _POINTER, _I64, _I64, _POINTER, _I32)),
    "bn_tiles_scratch": (_I64, (_I32,)),
    "bn_input_gradient": (
        None,
        (_POINTER, _POINTER, _POINTER, _I64, _I64, _I64, _I64, _POINTER, _POINTER, _I32),
    ),
    "bn_has_lookup": (_I32, ()),
    "bn_lookup_scratch": (_I64, (_I64, _I64, _I32)),
    "bn_lookup_gradient": (
        None,
        (_POINTER, _POINTER, _POINTER, _I64, _I64, _I64, _I64, _POINTER, _POINTER, _I32),
    ),
    "bn_weight_gradient": (
        None,
        (_POINTER, _POINTER, _POINTER, _I64, _I64, _I64, _POINTER, _POINTER, _I32),
    ),
}
"""Name -> result and arguments, as in ``native/bitnet_cpu.h``."""
_OPENMP = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
_PROCESS = os.getpid()


class LayerCache(ctypes.Structure):
    """bn_layer_cache."""

    _fields_ = (
        ("kind", _I64),
        ("g", _I64),
        ("columns", _I64),
        ("e", _I64),
        ("k", _POINTER),
        ("v", _POINTER),
        ("k_scale", _POINTER),
        ("v_scale", _POINTER),
    )


KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
"""BN_MATRIX_... of a dtype."""


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library, or None if there is none; :func:`missing` says why.

    Raises:
        ValueError: ``BITNET_CPU`` names an instruction set that this CPU does not run.
    """
    path = _path()
    if path is None or not _whole(path):
        return None
    try:
        lib = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError):  # built for another machine, or from an older source
        return None
    if lib.bn_abi() != ABI:
        return None
    if os.getpid() == _PROCESS and (pointers := _openmp()) is not None:
        lib.bn_use_openmp(*pointers)
    if forced := os.environ.get("BITNET_CPU"):
        _use(lib, forced, "BITNET_CPU")
    return lib


def missing() -> str:
    """Why there is no library, in a clause; empty if there is one."""
    if library() is not None:
        return ""
    if _path() is None:
        return "the native CPU library was not built at installation (no C compiler?)"
    return (
        "the native CPU library is damaged, or of another machine or version; reinstall the package"
    )


def available() -> tuple[str, ...]:
    """The library's instruction sets that this CPU runs, best first; none without the library."""
    lib = library()
    return () if lib is None else _names(lib)


def used() -> str:
    """The instruction set in use; empty without the library."""
    lib = library()
    return "" if lib is None else lib.bn_isa_used().decode()


def use(name: str) -> None:
    """Use an instruction set from now on, in the whole process. For tests and measurements.

    Raises:
        ValueError: there is no library, or this CPU does not run the instruction set.
    """
    lib = library()
    if lib is None:
        raise ValueError(f"name: {missing()}")
    _use(lib, name, "name")


def families_share_layout() -> bool:
    """Whether addsub reads packed weights on the instruction set in use. If so, there is no second
    layout in bit planes."""
    lib = library()
    return lib is not None and bool(lib.bn_families_share_layout())


def runs_now(*tensors: Tensor) -> bool:
    """Whether these are plain tensors, whose memory a call may use now. Compiled code, traces and
    torch.func's transforms get torch operators instead, which they can analyze."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return not tracing and all(type(one) in (Tensor, torch.nn.Parameter) for one in tensors)


def threads() -> int:
    """The number of threads of a call, which is torch's."""
    return torch.get_num_threads()


def _names(lib: ctypes.CDLL) -> tuple[str, ...]:
    names: list[str] = []
    while (name := lib.bn_isa_name(len(names))) is not None:
        names.append(name.decode())
    return tuple(names)


def _use(lib: ctypes.CDLL, name: str, argument: str) -> None:
    if not lib.bn_isa_use(name.encode()):
        raise ValueError(f"{argument}: expected one of {', '.join(_names(lib))}, got {name!r}")


def _path() -> Path | None:
    """The library's file, beside this one."""
    folder = Path(__file__).parent
    candidates = (folder / f"_native{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def _whole(path: Path) -> bool:
    """Whether a file of Linux's format (ELF, 64 bits) reaches to the end of its last table. An
    interrupted copy leaves half a file, and loading that would end the process."""
    with path.open("rb") as file:
        head = file.read(64)
    if head[:4] != b"\x7fELF":
        return True
    if len(head) < 64:
        return False
    (table,) = struct.unpack_from("<Q", head, 40)
    size, count = struct.unpack_from("<HH", head, 58)
    return path.stat().st_size >= table + size * count


def _openmp() -> tuple[int, ...] | None:
    """The addresses of three functions in the OpenMP runtime that torch runs on.

    torch's library is linked to that runtime, whatever its file is called (wheels with CUDA rename
    it), so a look-up that starts at torch's library finds this runtime and no other.
    """
    macos = Path(torch.__file__).parent / "lib" / "libtorch_cpu.dylib"
    for name in ("libtorch_cpu.so", str(macos)):  # Linux finds a loaded library by its bare name
        try:
            runtime = ctypes.CDLL(name)
            functions = [getattr(runtime, function) for function in _OPENMP]
        except (OSError, AttributeError):
            continue
        return tuple(ctypes.cast(function, _POINTER).value or 0 for function in functions)
    return None
