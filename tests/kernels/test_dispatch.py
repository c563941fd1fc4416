"""The choice that `implementation=None` makes, and what `specattn info` says of it."""

import re

import jax
import jax.numpy as jnp
import pytest
import specattn_kernels as kernels
from specattn_kernels import Call, Device, choose_implementation, current_device, dispatch
from specattn_kernels.dispatch import ATTENTION_OPS, BACKEND_OPS, SELECTION_OPS, SelectionCall

H100 = Device("gpu", (9, 0), (0, 11))
CALL = Call((8, 8, 32768, 128), 24, jnp.bfloat16)


@pytest.mark.parametrize(
    ("op", "device", "call", "name", "reason"),
    [
        ("decode_attention", Device("cpu", None, (0, 11)), CALL, "xla", "on a CPU"),
        ("sparse_decode_attention", Device("tpu", None, (0, 11)), CALL, "xla", "on a TPU"),
        ("decode_attention", H100, CALL, "pallas_triton", "token granular"),
        ("sparse_decode_attention", H100, CALL._replace(block_size=16), "pallas_triton", "16-slot block granular"),
        ("decode_attention", H100._replace(compute_capability=(7, 5)), CALL, "xla", "this GPU has 7.5"),
        ("decode_attention", H100._replace(compute_capability=None), CALL, "xla", "this is another"),
        ("decode_attention", H100._replace(jax_version=(0, 13)), CALL, "xla", "newer than"),
        ("decode_attention", H100, CALL._replace(query_rows=129), "xla", "129 query rows"),
        ("decode_attention", H100, CALL._replace(cache=(1, 1, 9, 24)), "xla", "head dim 24"),
        ("decode_attention", H100, CALL._replace(cache=(16, 8, 1 << 17, 128)), "xla", "2 .. 31"),
        ("decode_attention", H100, CALL._replace(dtype="float16"), "xla", "for float16 and head dim 128"),
        ("decode_attention", H100, CALL._replace(cache=(1, 1, 9, 32)), "xla", "head dim 32 yet"),
        ("select_blocks", H100, SelectionCall(1 << 20), "pallas_triton", "without sorting"),
        ("select_blocks", H100, SelectionCall(1 << 31), "xla", "expected fewer than 2 .. 31"),
        ("top_p_threshold", H100, SelectionCall(1 << 20, "linear"), "xla", "method 'linear'"),
    ],
)
def test_choice(op, device, call, name, reason):
    choice = choose_implementation(op, device, call)
    assert choice.name == name
    assert re.search(reason, choice.reason)


def test_every_choice_exists():
    for op in ATTENTION_OPS + SELECTION_OPS:
        assert op in BACKEND_OPS[choose_implementation(op, H100, CALL).name]
        assert callable(getattr(kernels, op))


def test_an_explicit_name_is_refused_where_it_cannot_run(monkeypatch):
    for device, said in (
        (Device("tpu", None, (0, 11)), "they need an NVIDIA GPU, this is a TPU"),
        (H100._replace(compute_capability=(7, 5)), "this GPU has 7.5"),
    ):
        monkeypatch.setattr(dispatch, "current_device", lambda device=device: device)
        with pytest.raises(NotImplementedError, match=f"pallas_triton: .*{said}; use implementation='xla', or None"):
            kernels.top_p_threshold(jnp.ones(4), 0.5, implementation="pallas_triton")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="says what a CPU is")
def test_current_device_follows_the_default():
    assert current_device() == Device("cpu", None, tuple(map(int, jax.__version__.split(".")[:2])))
    for default in ("cpu", jax.local_devices()[0]):
        with jax.default_device(default):
            assert current_device().platform == "cpu"
