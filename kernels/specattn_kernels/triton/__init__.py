"""NVIDIA GPU kernels through Pallas's Triton lowering, the backend `pallas_triton`.

On a CPU they run in Pallas's interpreter: slow, and for tests only.
"""
