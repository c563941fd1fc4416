"""Records what the program gives, so that a change of its structure can be held against it.

    python tests/recorded/record.py --out FILE [--only NAME ...]

Tokens of every mode, policy, sampling setting and ragged batch on the tiny and the embedded pair, and what `calibrate`
and `perplexity` write. `tests/test_recorded.py` runs the fast part of it against `tokens.json`.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import specattn_jax
from specattn_jax.calibration.passages import CalibrationSettings
from specattn_jax.examples import tiny_pair
from specattn_jax.selection.alignment import load_alignment
from specattn_jax.texts import find_text, read_text

PROMPTS = ("It is a truth universally acknowledged, that a single man", "Call me", "Once upon a time there were three")
MODES: dict[str, dict[str, Any]] = {
    "autoregressive": {"mode": "autoregressive"},
    "speculative": {"mode": "speculative"},
    "speculative, window 2": {"mode": "speculative", "window": 2},
    "specattn": {"mode": "specattn", "kv_reduction": 0.75},
    "specattn, p": {"mode": "specattn", "p": 0.8, "window": 3},
    "specattn, all": {"mode": "specattn", "p": 1.0},
    "specattn, paper": {"mode": "specattn", "policy": "paper", "p": 0.9},
    "specattn, paper exact": {"mode": "specattn", "policy": "paper_exact", "p": 0.9},
}
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 0.9, "seed": 3},
    "top": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "seed": 4},
}


def _tell(run: Any) -> list[dict[str, Any]]:
    """What of a result has to stay the same."""
    return [
        {
            "tokens": result.tokens,
            "windows": result.windows,
            "accepted": round(result.accepted_per_window, 6),
            "kv_reduction": round(result.kv_reduction, 4),
        }
        for result in run.results
    ]


def _continue(pair: Callable[[], Any], prompts: Sequence[str | int], options: dict[str, Any]) -> list[dict[str, Any]]:
    """Continues texts, or so many tokens of a book."""
    given = [_book(prompt) if isinstance(prompt, int) else prompt for prompt in prompts]
    return _tell(specattn_jax.generate(pair(), given, **options))


def tiny_tokens() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each mode with each way of sampling, on a ragged batch of the tiny pair."""
    for mode, how in MODES.items():
        for name, sampling in SAMPLING.items():
            options = {**how, **sampling, "max_new_tokens": 40}
            yield f"tiny/{mode}/{name}", functools.partial(_continue, tiny_pair, PROMPTS, options)


def tiny_single() -> Iterator[tuple[str, Callable[[], Any]]]:
    """One sequence alone, with what its windows read."""

    def watched() -> Any:
        run = specattn_jax.generate(
            tiny_pair(), [PROMPTS[0]], mode="specattn", p=0.8, max_new_tokens=24, keep_selection=True
        )
        record = run.results[0].selection
        assert record is not None
        return [*_tell(run), {"past": record.past.tolist(), "readers": record.readers.sum(axis=1).tolist()}]

    yield "tiny/kept selection", watched


def _book(tokens: int) -> list[int]:
    pair = _embedded()
    ids = pair.encode(read_text(find_text("pride_and_prejudice")))
    return list(ids[5000 : 5000 + tokens])


@functools.cache
def _embedded() -> Any:
    return specattn_jax.load_pair("smollm2", dtype="float32")


def embedded_tokens() -> Iterator[tuple[str, Callable[[], Any]]]:
    """The embedded pair, two prompts of different length."""
    for mode, how in MODES.items():
        for name in ("greedy", "temperature"):
            options = {**how, **SAMPLING[name], "max_new_tokens": 48}
            yield f"smollm2/{mode}/{name}", functools.partial(_continue, _embedded, (600, 350), options)


def _digest(array: Any) -> dict[str, Any]:
    """A few numbers of an array, and its shape."""
    flat = np.asarray(array, np.float64).ravel()
    return {"shape": list(np.shape(array)), "sum": float(flat.sum()), "norm": float(np.linalg.norm(flat))}


def calibration() -> Iterator[tuple[str, Callable[[], Any]]]:
    """What calibration fits."""
    for granularity in ("kv_head", "head", "layer"):

        def fitted(granularity: Any = granularity) -> Any:
            settings = CalibrationSettings(
                context=128, passages=2, windows=4, gradients=1, budgets="layer", granularity=granularity
            )
            with tempfile.TemporaryDirectory() as folder:
                pair = tiny_pair().calibrate(
                    [find_text("northanger_abbey")], settings=settings, out=Path(folder) / "alignment"
                )
                loaded = load_alignment(Path(folder) / "alignment")
            assert pair.alignment is not None
            names = ("weights", "savings", "left_out", "length_knots", "length_scale")
            digests = {name: _digest(getattr(loaded, name)) for name in names}
            run = specattn_jax.generate(pair, [PROMPTS[0]], mode="specattn", kv_reduction=0.6, max_new_tokens=24)
            return {**digests, "layer_map": list(loaded.layer_map), "run": _tell(run)}

        yield f"calibration/{granularity}", fitted


def perplexity() -> Iterator[tuple[str, Callable[[], Any]]]:
    """The rows of `specattn perplexity`."""

    def rows() -> Any:
        from typer.testing import CliRunner

        from specattn_jax.cli.app import app
        from specattn_jax.examples import save_tiny_pair
        from specattn_jax.selection.alignment import save_alignment

        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            target, draft = save_tiny_pair(root)
            (root / "alignment").mkdir()
            alignment = tiny_pair().alignment
            assert alignment is not None
            save_alignment(alignment, root / "alignment")
            arguments = ["perplexity", "--target", target, "--draft", draft, "--alignment", str(root / "alignment")]
            arguments += ["--context", "256", "--documents", "2", "--batch", "2", "--out", str(root / "out")]
            arguments += ["--methods", "full,streaming,quest,vegas,oracle,oracle_layer,specattn"]
            arguments += ["--policy", "default,paper", "--kv-reduction", "0.5"]
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, result.output
            table = json.loads((root / "out" / "table.json").read_text())
        keep = ("method", "policy", "p", "perplexity", "kv_reduction", "top1_fidelity", "kl", "captured_mass")
        table = table["rows"] if isinstance(table, dict) else table
        return [{name: row[name] for name in keep} for row in table]

    yield "perplexity/tiny", rows


ALL = (tiny_tokens, tiny_single, calibration, perplexity, embedded_tokens)


def main() -> None:
    """Writes what is asked for; what is in the file already is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[""], help="beginnings of names")
    options = parser.parse_args()
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    for group in ALL:
        for name, measure in group():
            if name in found or not any(name.startswith(start) for start in options.only):
                continue
            found[name] = measure()
            print(name, hashlib.sha256(json.dumps(found[name]).encode()).hexdigest()[:12], flush=True)
            options.out.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
