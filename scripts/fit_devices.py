"""Fits the constants of configs/devices.toml to decode benchmarks: prints TOML lines, and what is left unexplained.

    python scripts/fit_devices.py scripts/results/decode-*

What it prints replaces the lines of the same names; then `python scripts/bench_decode.py --report DIR` shows what
`--mode auto` would choose with them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from specattn_jax.bench.decode_fit import FITTED, fit_profile, fit_terms
from specattn_jax.bench.runner import read_report
from specattn_jax.errors import UserError
from specattn_jax.planning.device import load_profile


def main() -> None:
    """Fits and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="with a decode.json")
    parser.add_argument("--device", choices=("gpu", "tpu"), default="gpu", help="which table of devices.toml")
    options = parser.parse_args()
    try:
        terms = fit_terms([read_report(folder, "decode") for folder in options.folders])
        before = load_profile(options.device, bandwidth=1.0)
    except UserError as error:
        parser.error(str(error))
    after = fit_profile(terms, before)
    print(f"[{options.device}]")
    for name in FITTED:
        value = getattr(after, name)
        print(f"{name} = {value:.3g}" if name.endswith("_share") else f"{name} = {value * 1e6:.3g}e-6")
    print(f"\n{'case':34} {'method':16} {'part':10} {'ms':>9}   predicted over measured, before and after")
    for term in terms:
        ratios = f"{term.ratio(before):.2f}  {term.ratio(after):.2f}"
        print(f"{term.case:34} {term.method:16} {term.part:10} {term.seconds * 1e3:9.3f}   {ratios}")


if __name__ == "__main__":
    main()
