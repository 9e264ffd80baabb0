"""What ``bitnet bench train`` and ``bitnet bench decode`` measure, and how.

Those measured live in processes of their own (:mod:`bitnet.bench.worker`) and take turns; the
kernels alone are timed by :mod:`bitnet_kernels.bench`.
"""
