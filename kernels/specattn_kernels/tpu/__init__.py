"""TPU kernels of Pallas, the backend `pallas_tpu`; on a CPU they run under `pltpu.force_tpu_interpret_mode` alone."""
