"""Fits the constants of configs/devices.toml to benchmarks: prints TOML lines, and what is left unexplained.

    python scripts/fit_devices.py scripts/results/decode-nvidia-h100 scripts/results/request-lossless-nvidia-h100 \
        scripts/results/window-nvidia-h100

A folder holds decode.json, request.json of random weights, or window.json.

What it prints replaces the lines of the same names; then `python scripts/bench_decode.py --report DIR` shows what
`--mode auto` would choose with them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from specattn_jax.bench.decode_fit import FITTED, fit_profile, fit_terms
from specattn_jax.bench.runner import Report, read_report
from specattn_jax.errors import UserError
from specattn_jax.planning.device import load_profile

FILES = ("decode", "request", "window")


def read(folder: Path) -> Report:
    """What was measured in a folder.

    Raises:
        UserError: nothing.
    """
    return read_report(folder, next((name for name in FILES if (folder / f"{name}.json").is_file()), FILES[0]))


def main() -> None:
    """Fits and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="with measured windows")
    parser.add_argument("--device", choices=("gpu", "tpu"), default="gpu", help="which table of devices.toml")
    options = parser.parse_args()
    try:
        terms = fit_terms([read(folder) for folder in options.folders])
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
