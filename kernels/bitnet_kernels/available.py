"""Whether the Triton kernels and the kernels of the native CPU library can run. This module alone
decides it, for every operator and tool.

Triton is imported only when one of its kernels runs. Without Triton everything works on any device,
except a Triton kernel that is asked for by name.
"""

from importlib.util import find_spec

import torch

from bitnet_kernels.cpu import native


def triton_installed() -> bool:
    """Whether Triton is installed, which ahead-of-time compilation needs. Does not import it."""
    return find_spec("triton") is not None


def why_not_triton(device: torch.device) -> str:
    """The reason why Triton kernels cannot run on tensors of a device; empty if they can. They can
    on CUDA from compute capability 8.0 on, elsewhere in Triton's interpreter."""
    if not triton_installed():
        return "needs Triton, which is not installed; use 'auto'"
    if device.type == "cuda":
        recent = torch.cuda.get_device_capability(device) >= (8, 0)
        return "" if recent else "needs compute capability 8.0 or later; use 'auto'"
    from bitnet_kernels.gpu.common import INTERPRETED

    if INTERPRETED:
        return ""
    return (
        f"runs on CUDA tensors; for {device.type} tensors use 'auto', or set TRITON_INTERPRET=1 "
        "before Triton is imported"
    )


def triton_by_default(device: torch.device) -> bool:
    """Whether ``kernel="auto"`` takes Triton's kernels. The interpreter runs only kernels asked for
    by name."""
    return device.type == "cuda" and not why_not_triton(device)


def takes_native(kernel: str, device: torch.device) -> bool:
    """Whether ``kernel`` runs in the native library: on a CPU that has one, a family or ``auto``.
    Formulations are Triton's."""
    named = kernel in ("auto", "addsub", "dot")
    return named and device.type == "cpu" and native.library() is not None


def takes_triton(kernel: str, device: torch.device) -> bool:
    """Whether ``kernel``, one of :data:`bitnet_kernels.KERNELS`, is a Triton kernel on a device.

    Raises ValueError if a kernel that is asked for by name cannot run.
    """
    if kernel == "auto":
        return triton_by_default(device)
    if kernel == "reference" or takes_native(kernel, device):
        return False
    if reason := why_not_triton(device):
        raise ValueError(f"kernel: {kernel!r} {reason}")
    return True
