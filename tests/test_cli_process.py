"""The command as a process of its own: which devices it asks for, and output that cannot be written."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from specattn_jax.cli.process import _hide_tpu_library

COMMAND = [sys.executable, "-m", "specattn_jax.cli"]


def specattn(*arguments, stdout=subprocess.PIPE, **environment):
    kept = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    command = [*COMMAND, *(str(argument) for argument in arguments)]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=kept | environment)


def one_sentence(done):
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    assert line.endswith(".")
    return line


@pytest.mark.parametrize(
    "platform", [*(pytest.param(other, marks=pytest.mark.slow) for other in ("cuda", "rocm", "abacus")), "abacus,cpu"]
)
def test_a_platform_that_is_not_there_is_one_sentence(tiny_folders, platform):
    done = specattn("info", tiny_folders.target, JAX_PLATFORMS=platform)
    assert f"JAX_PLATFORMS is '{platform}', but JAX finds no such device here (" in one_sentence(done)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["info", "MODEL", "--json"],
        *(
            pytest.param(arguments, marks=pytest.mark.slow)
            for arguments in (["generate", "--help"], ["generate", "PAIR", "--prompt", "a"])
        ),
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_a_full_disk_behind_stdout_is_one_sentence(tiny_folders, arguments):
    pair = ["--target", tiny_folders.target, "--draft", tiny_folders.draft, "--mode", "autoregressive"]
    given = {"MODEL": [tiny_folders.target], "PAIR": [*pair, "--max-new-tokens", 4]}
    with open("/dev/full", "w") as full:
        done = specattn(
            *[part for each in arguments for part in given.get(each, [each])], stdout=full, JAX_PLATFORMS="cpu"
        )
    assert "the output cannot be written (No space left on device)" in one_sentence(done)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, which is what makes the noise")
@pytest.mark.skipif(any(Path("/dev").glob("accel*")), reason="there may be a TPU")
def test_libtpu_is_silent_where_no_tpu_is(tiny_folders):
    done = specattn("info", tiny_folders.target, "--json")
    assert done.returncode == 0
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("devices", "hidden"),
    [
        ([], True),
        ([("0x8086", "0x7110"), ("0x10de", "0x2330")], True),
        ([("0x1ae0", "0x0042"), ("0x1ae0", "0x001f")], True),
        ([("0x8086", "0x7110"), ("0x1ae0", "0x0063")], False),
        ([("0x1ae0", "0x9999")], False),
    ],
)
def test_where_a_tpu_may_be_its_library_is_found(tmp_path, monkeypatch, devices, hidden):
    for name in ("JAX_PLATFORMS", "JAX_FORCE_TPU_INIT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TPU_LIBRARY_PATH", "/somewhere/libtpu.so")
    monkeypatch.setitem(sys.modules, "libtpu", "found")
    monkeypatch.delitem(sys.modules, "libtpu")
    for index, (vendor, kind) in enumerate(devices):
        (tmp_path / str(index)).mkdir()
        (tmp_path / str(index) / "vendor").write_text(f"{vendor}\n")
        (tmp_path / str(index) / "device").write_text(f"{kind}\n")
    _hide_tpu_library(tmp_path)
    assert ("libtpu" in sys.modules) == hidden == ("TPU_LIBRARY_PATH" not in os.environ)
    sys.modules.pop("libtpu", None)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    _hide_tpu_library(tmp_path)
    assert "libtpu" not in sys.modules
