"""Triton kernels, one per file; importing any of them imports Triton.

Every file holds the jitted kernel and a launch function that takes checked torch tensors;
:mod:`bitnet_kernels.gpu.common` holds the code that the matmuls share.
"""
