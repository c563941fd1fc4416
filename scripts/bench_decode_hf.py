"""Times Hugging Face transformers on the shapes of the decode benchmark, in a process of its own.

    python scripts/bench_decode_hf.py --out FOLDER_OF_DECODE_JSON

One forward of one token (decoding) and of six (verifying a window of five) over a full DynamicCache: sdpa, bfloat16,
random weights. Writes hf.json, which `specattn bench decode` puts into its table. Needs torch and a GPU; neither the
package nor JAX is imported, so that the card belongs to torch alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tomllib
from pathlib import Path
from typing import Any

import torch
import transformers

SHAPES = Path(__file__).parent.parent / "configs" / "shapes.toml"
# The cases of the grid `small`: target, sequences, slots, of which 256 are empty.
CASES = (
    ("llama-3.1-8b", 8, 32768),
    ("llama-3.1-8b", 1, 131072),
    ("llama-3.1-8b", 1, 2048),
    ("llama-3.1-8b", 1, 8192),
    ("llama-3.1-8b", 8, 8192),
    ("llama-2-7b", 1, 32768),
)
TINY = (("smollm2-draft", 1, 512),)
ROOM, WARM_UP, REPEATS = 256, 2, 7


def make_model(name: str, device: str) -> Any:
    """Random weights of a shape, in bfloat16 from the start."""
    shape = tomllib.loads(SHAPES.read_text(encoding="utf-8"))[name]
    config = transformers.LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["embed_dim"],
        intermediate_size=shape["mlp_dim"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"],
        head_dim=shape["head_dim"],
        max_position_embeddings=1 << 18,
        tie_word_embeddings=shape.get("tie_embeddings", False),
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def fill_cache(config: Any, batch: int, context: int, device: str) -> Any:
    """A cache that looks full of tokens."""
    cache = transformers.DynamicCache()
    size = (batch, config.num_key_value_heads, context, config.head_dim)
    for layer in range(config.num_hidden_layers):
        k, v = (torch.randn(size, dtype=torch.bfloat16, device=device) for _ in range(2))
        cache.update(k, v, layer)
    return cache


@torch.inference_mode()
def time_forward(model: Any, cache: Any, batch: int, tokens: int, device: str) -> float:
    """Median seconds of one forward; the cache is cut back after each."""
    ids = torch.randint(model.config.vocab_size, (batch, tokens), device=device)
    seconds = []
    for _ in range(WARM_UP + REPEATS):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        began.record()
        model(ids, past_key_values=cache, use_cache=True)
        ended.record()
        torch.cuda.synchronize()
        seconds.append(began.elapsed_time(ended) / 1e3)
        cache.crop(-tokens)
    return statistics.median(seconds[WARM_UP:])


def measure(model: Any, name: str, batch: int, slots: int, device: str) -> list[dict[str, Any]]:
    """Both forwards of one case; what fails says why."""
    context, points = slots - ROOM, []
    cache: Any = None
    for tokens in (1, 6):
        point: dict[str, Any] = {"pair": name, "batch": batch, "context": context, "tokens": tokens, "failure": None}
        try:
            cache = fill_cache(model.config, batch, context, device) if cache is None else cache
            point["seconds"] = time_forward(model, cache, batch, tokens, device)
            point["peak_bytes"] = torch.cuda.max_memory_allocated()
        except Exception as failure:  # such as too little memory, which the other cases may not need
            point["failure"] = f"{type(failure).__name__}: {str(failure).splitlines()[0][:300]}"
        print(point, flush=True)
        points.append(point)
    return points


def main() -> None:
    """Measures all cases; those of one target share its weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder of decode.json")
    parser.add_argument("--tiny", action="store_true", help="only show that it runs")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_decode_hf: torch sees no GPU; run it on a machine that has one.")
    points, model, loaded = [], None, ""
    for name, batch, slots in TINY if options.tiny else CASES:
        if name != loaded:
            model = None
            gc.collect()
            torch.cuda.empty_cache()
            model, loaded = make_model(name, "cuda"), name
        points += measure(model, name, batch, slots, "cuda")
        gc.collect()
        torch.cuda.empty_cache()
    report = {
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "points": points,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "hf.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
