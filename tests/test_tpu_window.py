"""Whole prompts and a whole window (draft, select, verify) with the Pallas TPU kernels, for TPUs that are not there."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import tpu_window
from jax.experimental.pallas import tpu as pltpu
from tiny import outputs, run, selection_for, tiny_model

from specattn_jax.decoding.protocol import DecodeSettings
from specattn_jax.decoding.sampling import Sampling
from specattn_jax.decoding.speculative import SpecAttn

TOPOLOGIES = ["v5e:2x2", "v6e:2x2"]
MESHES = ["v5e:2x4/data=2,heads=4", "v6e:2x2/heads=4"]


@pytest.fixture(scope="module")
def programs():
    """What tpu_window.py prints, by topology and program."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, which compiles for TPUs, is not installed; it comes with the extra `test` on x86-64 Linux")
    return compile_for(*TOPOLOGIES)


def compile_for(*topologies):
    command = [sys.executable, tpu_window.__file__, *topologies]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_every_op_is_a_kernel(programs, topology):
    target, draft = tpu_window.TARGET.num_layers, tpu_window.DRAFT.num_layers
    # Before the first window the last tokens read everything: the draft's, to plan what it reads in that window, and
    # the target's, whose look at the past is its opening.
    assert programs[topology]["decode"]["kernels"] == {
        "sparse_decode": target + draft,
        "dense_decode": draft + target,
        "score_cache": 2 * draft + target,
        "top_p_threshold": 3,
    }
    assert programs[topology]["target"]["kernels"] == {"prefill": target}
    assert programs[topology]["draft"]["kernels"] == {"prefill": draft}


@pytest.mark.parametrize("name", ["decode", "target", "draft"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.slow
def test_no_program_touches_the_host(programs, topology, name):
    program = programs[topology][name]
    assert program["callbacks"] == program["host_arrays"] == 0
    assert "while" in program["opcodes"]
    for opcode in program["opcodes"]:
        assert not opcode.startswith(("infeed", "outfeed", "send", "recv"))


# Not the draft's prefill: there XLA lays slots innermost, as heads of 64 fill half a row of lanes, and the kernel's
# operands are turned copies.
@pytest.mark.parametrize("name", ["decode", "target"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.slow
def test_caches_are_updated_where_they_lie(programs, topology, name):
    program = programs[topology][name]
    assert program["aliased_bytes"] >= program["cache_bytes"]
    assert program["cache_copies"] == 0


@pytest.mark.slow
def test_a_mesh_of_chips_runs_the_same_kernels(programs):
    opening = 2 * tpu_window.BATCH * tpu_window.TARGET.num_layers * tpu_window.TARGET.num_kv_heads * tpu_window.SLOTS
    for name, found in compile_for(*MESHES).items():
        chips = 8 if name.startswith("v5e") else 4
        assert found["kernels"] == programs["v5e:2x2"]["decode"]["kernels"], name
        assert found["callbacks"] == found["host_arrays"] == 0, name
        # Each chip has its part of weights and caches, whose place is that of the new ones, and norms besides.
        held = found["cache_bytes"] / chips + found["weight_bytes"] / 4
        assert held <= found["argument_bytes"] < 1.1 * held, name
        assert found["aliased_bytes"] >= found["cache_bytes"] / chips, name
        # Besides the scores of the opening, of which a chip's few heads fill tiles of 16 rows.
        assert found["temporary_bytes"] < 0.2 * held + opening, name
        # The draft's scores are gathered; a layer's keys would be more.
        assert found["largest_moved"] < tpu_window.SLOTS * tpu_window.TARGET.head_dim, name


def decode_with(implementation):
    """A few windows of a ragged batch, everything by one backend."""
    target, draft = (tiny_model(seed, scale=2.0, num_layers=1, num_kv_heads=1, head_dim=64) for seed in (0, 1))
    policy = {"block_size": 16, "num_recent": 1}
    selection = selection_for(target, draft, "default", 0.6, implementation=implementation, **policy)
    strategy = SpecAttn(selection, DecodeSettings(Sampling(temperature=1.0)), window=2)
    # With room for the new tokens, the longer one fills 128 slots.
    prompts = [np.random.default_rng(0).integers(0, 8, size).tolist() for size in (120, 40)]
    keys = jax.random.split(jax.random.key(0), len(prompts))
    interpreted = pltpu.force_tpu_interpret_mode() if implementation == "pallas_tpu" else contextlib.nullcontext()
    with interpreted:
        state = run(strategy, target, draft, prompts, 5, keys, implementation)
        return outputs(state), np.asarray(state.statistics.read), np.asarray(state.statistics.windows)


@pytest.mark.slow
def test_interpreted_window_equals_xla():
    (tokens, read, windows), (want_tokens, want_read, want_windows) = map(decode_with, ("pallas_tpu", "xla"))
    assert len({token for row in tokens for token in row}) > 2
    assert tokens == want_tokens
    np.testing.assert_array_equal(windows, want_windows)
    np.testing.assert_allclose(read, want_read, rtol=1e-6)
    assert (read[:, 0] < windows).any()
