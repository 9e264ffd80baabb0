"""Builds the native CPU kernels; everything else about the package stands in pyproject.toml.

They are plain C that needs neither Python's headers nor torch's, so one build serves every Python
(``abi3``) and every torch. ``optional``: where they cannot be compiled, the installation succeeds
without them.
"""

from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path(
    "kernels/bitnet_kernels/cpu/native"
)  # relative to this file's folder, as setuptools asks

setup(
    ext_modules=[
        Extension(
            "bitnet_kernels.cpu._native",
            sources=[str(path) for path in sorted(NATIVE.glob("*.c"))],
            depends=[str(path) for path in sorted(NATIVE.glob("*.h"))],
            # Contracting a product and a sum into one operation would round once instead of twice.
            extra_compile_args=["-std=c11", "-O3", "-ffp-contract=off", "-fvisibility=hidden"],
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
