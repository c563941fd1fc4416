"""Fits the prefill constants of configs/devices.toml to a request benchmark: prints TOML lines and what is left.

python scripts/fit_prefill.py scripts/results/request-nvidia-h100
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from specattn_jax.bench.decode_cases import case_of, shape
from specattn_jax.bench.decode_methods import AUTOREGRESSIVE
from specattn_jax.bench.runner import read_report
from specattn_jax.errors import UserError
from specattn_jax.planning.cost import prefill_arithmetic
from specattn_jax.planning.device import load_profile


def main() -> None:
    """Least squares of relative errors over the prefills of the target alone, with shares and times not below 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="with a request.json")
    parser.add_argument("--device", choices=("gpu", "tpu"), default="gpu", help="which table of devices.toml")
    options = parser.parse_args()
    try:
        report, flops = read_report(options.folder, "request"), load_profile(options.device, bandwidth=1.0).flops
    except UserError as error:
        parser.error(str(error))
    rows, seconds = [], []
    for point in report["points"]:
        case = case_of(point)
        if point["failure"] is None and point["method"] == AUTOREGRESSIVE and not case.real:
            config = shape(case.target)
            rows.append((*prefill_arithmetic(config, case.batch, case.context), config.num_layers))
            seconds.append(point["prefill_seconds"])
    table, took = np.array(rows), np.array(seconds)
    scale = np.array([flops, flops, 1.0])
    found, _ = nnls(table / scale / took[:, None], np.ones(len(took)))
    print(f"[{options.device}]\nprefill_share = {1 / found[0]:.3g}\nprefill_attention_share = {1 / found[1]:.3g}")
    print(f"prefill_layer_s = {found[2] * 1e6:.3g}e-6\n")
    for row, measured in zip(table, took, strict=True):
        print(f"{measured:8.3f} s measured, {(row / scale) @ found / measured:.2f} of it predicted")


if __name__ == "__main__":
    main()
