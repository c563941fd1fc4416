"""Models that compute no numbers: every mode says so, and whose fault it is."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import mistake

from specattn_jax.calibration.passages import CalibrationSettings
from specattn_jax.decoding.sampling import is_sound
from specattn_jax.errors import UserError
from specattn_jax.evaluation.forced import read_documents
from specattn_jax.evaluation.methods import FULL, Case
from specattn_jax.evaluation.tasks.likelihood import Continuation, likelihoods
from specattn_jax.loading import save_hf
from specattn_jax.loading.pair import load_pair
from specattn_jax.models.transformer import LanguageModel
from specattn_jax.runtime.generate import generate

# As many as tests of other modules ask for, which compile the same programs.
NEW_TOKENS = 24
MODES = ["autoregressive", "speculative", "specattn", "auto"]


def with_weight(model, name, value, layer=1):
    """The model with one number of a weight set, or a whole weight scaled by a function."""

    def change(path, leaf):
        text = jax.tree_util.keystr(path)
        if name not in text or (f"[{layer}]" not in text and f"'{layer}'" not in text):
            return leaf
        return value(leaf) if callable(value) else leaf.at[(0,) * leaf.ndim].set(value)

    params = jax.tree_util.tree_map_with_path(change, model.params)
    assert not all(a is b for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(model.params), strict=True))
    return LanguageModel(params, model.graphdef, model.config)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_damaged_target_is_named_in_every_mode(tiny_pair, mode, value):
    pair = dataclasses.replace(tiny_pair, target=with_weight(tiny_pair.target, "down", value))
    with pytest.raises(UserError, match=r"^target: .* its weight .*layers.*1.*down.* float32; ") as error:
        generate(pair, ["Call me Ishmael."], mode=mode, max_new_tokens=NEW_TOKENS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("mode", "temperature"),
    [
        ("speculative", 0.0),
        ("specattn", 1.0),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in (("speculative", 1.0), ("specattn", 0.0))),
    ],
)
def test_a_damaged_draft_is_named(tiny_pair, mode, temperature):
    pair = dataclasses.replace(tiny_pair, draft=with_weight(tiny_pair.draft, "down", jnp.nan))
    with pytest.raises(UserError, match=r"^draft: .* its weight "):
        generate(pair, ["Call me Ishmael."], mode=mode, max_new_tokens=NEW_TOKENS, temperature=temperature)
    # Nobody asks it here.
    assert (
        len(generate(pair, ["Call me Ishmael."], mode="autoregressive", max_new_tokens=NEW_TOKENS).results[0].tokens)
        == NEW_TOKENS
    )


def test_an_overflow_names_its_layer(tiny_pair):
    target = tiny_pair.target
    for name in ("up", "down"):
        target = with_weight(target, name, lambda leaf: jnp.full_like(leaf, 3e38))
    pair = dataclasses.replace(tiny_pair, target=target)
    with pytest.raises(UserError, match="from layer 2 of 3 on"):
        generate(pair, ["Call me Ishmael."], mode="autoregressive", max_new_tokens=NEW_TOKENS)


def test_one_bad_prompt_of_several_is_named(tiny_pair):
    broken = tiny_pair.target.params
    token = tiny_pair.tokenizer.encode("Z", add_special=False)[0]

    def change(path, leaf):
        return leaf.at[token].set(jnp.nan) if "embedding" in jax.tree_util.keystr(path) else leaf

    params = jax.tree_util.tree_map_with_path(change, broken)
    target = LanguageModel(params, tiny_pair.target.graphdef, tiny_pair.target.config)
    pair = dataclasses.replace(tiny_pair, target=target)
    if target.config.tie_embeddings:
        pytest.skip("a row of a tied embedding is a logit of every prompt")
    with pytest.raises(UserError, match="after prompt 2, "):
        generate(pair, ["Call me", "Zebra", "me"], mode="speculative", max_new_tokens=NEW_TOKENS)


@pytest.mark.slow
def test_perplexity_is_no_nan(tiny_pair):
    target = with_weight(tiny_pair.target, "down", jnp.nan)
    with pytest.raises(UserError, match=r"^target: .* in document 1, as its weight "):
        read_documents(target, tiny_pair.draft, None, np.arange(120).reshape(2, 60))


@pytest.mark.parametrize("role", ["target", "draft"])
def test_calibration_fits_nothing_to_nan(tiny_pair, role, tmp_path):
    pair = dataclasses.replace(tiny_pair, **{role: with_weight(getattr(tiny_pair, role), "down", jnp.nan, layer=0)})
    few = CalibrationSettings(context=64, passages=2, windows=2, window=2, iterations=2)
    with pytest.raises(UserError, match=f"^{role}: what it computes of the texts is NaN or infinite, in float32; "):
        pair.calibrate([list(range(128))], settings=few, out=tmp_path / "alignment")
    assert not (tmp_path / "alignment").exists()


def test_a_likelihood_is_no_nan(tiny_pair):
    pair = dataclasses.replace(tiny_pair, target=with_weight(tiny_pair.target, "down", jnp.nan))
    with pytest.raises(UserError, match=r"^target: .* in a text that is scored, as its weight "):
        likelihoods(pair, Case(FULL), [Continuation(list(range(20)), 4)])


def test_the_command_says_it_and_fails(tiny_folders, tmp_path):
    pair = load_pair(str(tiny_folders.target), "self", alignment=None)
    target = pair.target
    # Finite, as the loader refuses what is not.
    for name in ("up", "down"):
        target = with_weight(target, name, lambda leaf: jnp.full_like(leaf, 3e38))
    save_hf(target, pair.tokenizer, tmp_path / "broken")
    told = mistake("generate", "--target", tmp_path / "broken", "--mode", "autoregressive", "--prompt", "Call me")
    assert told.startswith("target: its logits are NaN or infinite after prompt 1, from layer 2 of 3 on, ")


def test_tokens_that_are_ruled_out_are_no_fault():
    logits = jnp.array([[0.0, -jnp.inf], [-jnp.inf, -jnp.inf], [jnp.inf, 0.0], [jnp.nan, 0.0]])
    assert is_sound(logits).tolist() == [True, False, False, False]
