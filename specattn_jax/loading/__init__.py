"""Models from files: Hugging Face folders, GGUF, Orbax, drafts, presets and hub ids, behind one resolver."""

from specattn_jax.loading.checkpoint import load_checkpoint, save_checkpoint
from specattn_jax.loading.draft import limit_vocabulary, save_draft, share_embedding
from specattn_jax.loading.fetch import cache_dir, is_cached
from specattn_jax.loading.hf import save_hf
from specattn_jax.loading.memory import available_bytes, check_memory
from specattn_jax.loading.presets import Preset, get_preset, preset_names
from specattn_jax.loading.resolve import ModelFiles, draft_reference, fetch_preset, load_model, resolve
from specattn_jax.loading.tensors import Progress
from specattn_jax.loading.tokenizer import TextStream, Tokenizer, check_compatible

__all__ = [
    "ModelFiles",
    "Preset",
    "Progress",
    "TextStream",
    "Tokenizer",
    "available_bytes",
    "cache_dir",
    "check_compatible",
    "check_memory",
    "draft_reference",
    "fetch_preset",
    "get_preset",
    "is_cached",
    "limit_vocabulary",
    "load_checkpoint",
    "load_model",
    "preset_names",
    "resolve",
    "save_checkpoint",
    "save_draft",
    "save_hf",
    "share_embedding",
]
