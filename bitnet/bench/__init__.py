"""What ``bitnet bench train`` and ``bitnet bench decode`` measure, and how.

The contenders run in separate processes (:mod:`bitnet.bench.worker`) and take turns.
:mod:`bitnet_kernels.bench` times the kernels alone.
"""
