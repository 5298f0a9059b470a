"""Triton kernels for decoding on one GPU, and whole passes made of them.

Triton is imported by these modules only, so nothing else needs it. Where ``TRITON_INTERPRET=1`` is set before the first import,
everything here runs on the CPU in Triton's interpreter, slowly: that is how it is tested without a GPU.
"""
