"""A whole window (draft, select, verify) with the Pallas TPU kernels, compiled for TPUs that are not there."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
import tpu_window

TOPOLOGIES = ["v5e:2x2", "v6e:2x2"]


@pytest.fixture(scope="module")
def programs():
    """What tpu_window.py prints, by topology."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, which compiles for TPUs, is not installed; it comes with the extra `test` on x86-64 Linux")
    command = [sys.executable, tpu_window.__file__, *TOPOLOGIES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_every_op_is_a_kernel(programs, topology):
    layers = tpu_window.TARGET.num_layers, tpu_window.DRAFT.num_layers
    assert programs[topology]["kernels"] == {
        "sparse_decode": layers[0],
        "dense_decode": layers[1],
        "top_p_threshold": 1,
    }


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_window_never_touches_the_host(programs, topology):
    program = programs[topology]
    assert program["callbacks"] == program["host_arrays"] == 0
    assert "while" in program["opcodes"]
    for opcode in program["opcodes"]:
        assert not opcode.startswith(("infeed", "outfeed", "send", "recv"))


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_caches_are_updated_where_they_lie(programs, topology):
    program = programs[topology]
    assert program["aliased_bytes"] >= program["cache_bytes"]
    assert program["cache_copies"] == 0
