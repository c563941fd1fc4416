"""Many devices give what one gives: meshes of eight virtual CPU devices, which meshes are refused, and what moves."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import time

import mesh_processes
import mesh_runs
import numpy as np
import pytest
from command import mistake
from tiny import tiny_config

from specattn_jax.errors import UserError
from specattn_jax.models.sharding import (
    MeshShape,
    abstract_mesh,
    device_cache_bytes,
    device_weight_bytes,
    make_mesh,
    split_draft,
    split_target,
)
from specattn_jax.planning.cost import load_shape


def start(file, *arguments, devices=8):
    """A process with so many virtual devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, file, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def result_of(process):
    """What it printed last."""
    out, err = process.communicate(timeout=3000)
    assert process.returncode == 0, err[-4000:]
    return out.splitlines()[-1]


def run_in_a_process(which):
    return json.loads(result_of(start(mesh_runs.__file__, which)))


def check(found):
    for run in found["runs"]:
        case, window = run["case"], run["window"]
        assert len({token for row in run["want"] for token in row}) > 4, case
        assert run["got"] == run["want"], case
        assert window["host"] == 0, case
        # The scores of all the draft's heads are gathered, but never a cache.
        assert window["largest_moved"] < window["cache_part"], case


def test_a_mesh_gives_the_same_tokens():
    found = run_in_a_process("few")
    check(found)
    window = found["runs"][0]["window"]
    assert window["cache_spec"] == "P('data', 'heads')"
    assert window["moved"] > 0
    met = found["meeting"]
    assert met["latency_s"] > 0
    assert 0 < met["bandwidth"] < math.inf
    # Devices that only share sequences never meet.
    assert met["alone"] is None
    assert met["believed"] == [met["latency_s"], met["bandwidth"]]
    assert met["waits"] > 2 * met["latency_s"]
    chosen = found["chosen"]
    assert chosen["cpu"] is None
    # Which is the fastest depends on what was measured; that all of them hold least does not.
    assert chosen["all"] is None or MeshShape.parse(chosen["all"]).devices <= 8
    assert MeshShape.parse(chosen["no room"]).devices == 8


@pytest.mark.slow
def test_a_mesh_calibrates_as_one_device_does():
    want, got = run_in_a_process("calibration")["fits"]
    assert got["layer_map"] == want["layer_map"]
    # Not all of the draft's layers say the same.
    assert len(set(want["layer_map"])) > 1
    for name, array in want["arrays"].items():
        np.testing.assert_allclose(got["arrays"][name], array, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("command", ["generate", "perplexity", "calibrate", "tasks"])
def test_commands_that_run_a_model_take_a_mesh(tiny_folders, tmp_path, command):
    options = ["--prompt", "a"] if command == "generate" else ["--out", tmp_path / "out"]
    pair = ["--target", tiny_folders.target, "--draft", tiny_folders.draft]
    assert "mesh is data=1,heads=64, which takes" in mistake(command, *pair, *options, "--mesh", "heads=64")


@pytest.mark.slow
def test_every_strategy_gives_the_same_tokens_on_every_mesh():
    found = run_in_a_process("all")
    # Eight strategies, four with a draft of which every device may have all.
    assert len(found["runs"]) == 2 * (8 * len(mesh_runs.MESHES) + 4)
    check(found)
    np.testing.assert_allclose(found["perplexity"], found["perplexity"][0], rtol=1e-4)


def test_what_people_write_is_read():
    assert MeshShape.parse("data=2,heads=4") == (2, 4)
    assert MeshShape.parse("heads=8") == (1, 8)
    assert str(MeshShape(2, 4)) == "data=2,heads=4"


@pytest.mark.parametrize("text", ["", "8", "heads", "heads=0", "model=2", "data=2;heads=2", "data=2,heads=x"])
def test_what_cannot_be_read_is_refused(text):
    with pytest.raises(UserError, match=r"^mesh is .*; expected .* data=2,heads=4\.$"):
        MeshShape.parse(text)


def test_too_few_devices_are_refused():
    with pytest.raises(UserError, match=r"^mesh is data=1,heads=64, which takes 64 devices, but \d+ are here; "):
        make_mesh("heads=64")


def test_heads_that_cannot_be_shared_are_refused():
    mesh = abstract_mesh(MeshShape(1, 4))
    with pytest.raises(UserError, match=r"heads is 4, but the target has 6 kv heads.* expected heads to be 1 or 2 or"):
        split_target(mesh, tiny_config(num_heads=6, num_kv_heads=6))


def test_bytes_of_a_device():
    config = tiny_config(num_kv_heads=4, num_layers=2)
    split = split_target(abstract_mesh(MeshShape(2, 4)), config)
    whole = device_weight_bytes(config, np.float32, None)
    assert whole == config.parameter_count() * 4
    # Norms are whole everywhere.
    norms = (2 * config.num_layers + 1) * config.embed_dim * 4
    assert device_weight_bytes(config, np.float32, split) == (whole - norms) // 4 + norms
    assert device_cache_bytes(config, 2, 128, 4, split) == config.cache_bytes(2, 128, 4) // 8
    # A batch that cannot be shared is everywhere.
    assert device_cache_bytes(config, 3, 128, 4, split) == config.cache_bytes(3, 128, 4) // 4


def test_a_small_draft_is_whole_and_a_large_one_split():
    mesh = abstract_mesh(MeshShape(heads=2))
    assert split_draft(mesh, load_shape("smollm2-draft"), 2).heads is None
    assert split_draft(mesh, load_shape("llama-3.2-1b"), 2).heads == "heads"
    # Its heads cannot be shared, whatever it pays.
    assert split_draft(abstract_mesh(MeshShape(heads=3)), load_shape("llama-3.1-8b"), 2).heads is None


@pytest.mark.parametrize("options", [["--processes", 2], ["--coordinator", "host:1", "--process-id", 0]])
def test_processes_say_all_or_nothing(options):
    assert "expected all three, or --coordinator auto" in mistake(*options, "info", "smollm2")


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def start_together(count, new_tokens):
    """So many processes with eight devices in all."""
    port = free_port()
    return [
        start(mesh_processes.__file__, port, count, index, new_tokens, devices=8 // count) for index in range(count)
    ]


@pytest.mark.slow
def test_two_processes_give_the_tokens_of_one():
    one, two = start_together(1, 12), start_together(2, 12)
    want, *others = [result_of(process) for process in (*one, *two)]
    assert want.startswith("tokens [[")
    assert others == [want, want]


@pytest.mark.slow
def test_a_process_whose_partner_is_gone_ends():
    first, second = start_together(2, 900)
    # Long enough to be at work, as the first says when it meets the others.
    time.sleep(60)
    second.kill()
    second.communicate()
    _, err = first.communicate(timeout=60)
    assert first.returncode != 0
    assert err
