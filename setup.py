"""Builds the native CPU kernels, and puts train.py and the configs into the wheel; everything else
about the package stands in pyproject.toml.

The kernels are plain C that needs neither Python's headers nor torch's, so one build serves every
Python (``abi3``) and every torch. ``optional``: where they cannot be compiled, the installation
succeeds without them.
"""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

# Relative to this file's folder, as setuptools asks.
NATIVE = Path("kernels/bitnet_kernels/cpu/native")
CARRIED = [Path("train.py"), *sorted(Path("configs").rglob("*.toml"))]


class BuildPy(build_py):
    """Copies train.py and configs/ to bitnet/checkout/ (bitnet/presets.py), too."""

    def run(self) -> None:
        """Copy the modules and those files; an editable installation finds them in the checkout."""
        super().run()
        if not self.editable_mode:
            for path in CARRIED:
                target = Path(self.build_lib, "bitnet/checkout", path)
                self.mkpath(str(target.parent))
                self.copy_file(str(path), str(target))


setup(
    cmdclass={"build_py": BuildPy},
    ext_modules=[
        Extension(
            "bitnet_kernels.cpu._native",
            sources=[str(path) for path in sorted(NATIVE.glob("*.c"))],
            depends=[str(path) for path in sorted(NATIVE.glob("*.h"))],
            # Contracting a product and a sum into one operation would round once instead of twice.
            # Nobody reads the flags of floating-point exceptions; to keep them, gcc would compute
            # every "a ? b : c" one by one where there are no masks (AVX2, NEON).
            extra_compile_args=[
                *("-std=c11", "-O3", "-fvisibility=hidden"),
                *("-ffp-contract=off", "-fno-trapping-math"),
            ],
            py_limited_api=True,
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
