"""NVIDIA Hopper kernels through Pallas's Mosaic GPU lowering, the backend `pallas_mosaic_gpu`."""
