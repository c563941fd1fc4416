"""Which backend serves a call: the choice that `implementation=None` makes, and what each of them refuses."""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import specattn_kernels as kernels
from specattn_kernels import (
    ATTENTION_OPS,
    BACKENDS,
    PREFILL_OPS,
    SCORE_OPS,
    SELECTION_OPS,
    AttentionCall,
    Device,
    SelectionCall,
    backends,
    choose_implementation,
    compiled_implementations,
    current_device,
)

H100 = Device("gpu", (9, 0), (0, 11))
TPU = Device("tpu", None, (0, 11))
CPU = Device("cpu", None, (0, 11))
DENSE = AttentionCall("decode_attention", (8, 8, 32768, 128), 6, 4, jnp.bfloat16)
SPARSE = DENSE._replace(op="sparse_decode_attention", block_size=16)
SELECT = SelectionCall("select_blocks", 8, 1 << 17)


@pytest.mark.parametrize(
    ("device", "call", "name", "reason"),
    [
        (CPU, DENSE, "xla", "on a CPU"),
        (TPU, SPARSE, "xla", "on a TPU"),
        (H100, DENSE, "pallas_triton", "token granular"),
        (H100, SPARSE, "pallas_triton", "16-slot block granular"),
        (H100._replace(compute_capability=(7, 5)), DENSE, "xla", "this GPU has 7.5"),
        (H100._replace(compute_capability=None), DENSE, "xla", "this is another"),
        (H100._replace(jax_version=(0, 13)), DENSE, "xla", "newer than"),
        (H100, DENSE._replace(tokens=43, group=3), "xla", "129 query rows"),
        (H100, DENSE._replace(op="score_cache", tokens=17), "pallas_triton", "once"),
        (H100, DENSE._replace(op="score_cache", tokens=17, group=5), "xla", "17 tokens and 5 query heads"),
        (H100, DENSE._replace(cache=(1, 1, 9, 24)), "xla", "head dim 24"),
        (H100, DENSE._replace(cache=(16, 8, 1 << 17, 128)), "xla", "2 .. 31"),
        (H100, DENSE._replace(dtype="float16"), "xla", "for float16 and head dim 128"),
        (H100, DENSE._replace(cache=(1, 1, 9, 32)), "xla", "head dim 32 yet"),
        (H100, SELECT, "pallas_triton", "without sorting"),
        (H100, SELECT._replace(rows=1 << 14), "xla", "expected fewer than 2 .. 31"),
        (H100, SELECT._replace(op="top_p_threshold", method="linear"), "xla", "method 'linear'"),
    ],
)
def test_choice(device, call, name, reason):
    choice = choose_implementation(call, device)
    assert choice.name == name
    assert re.search(reason, choice.reason)


def test_every_backend_has_the_ops_that_it_names():
    assert tuple(BACKENDS) == kernels.IMPLEMENTATIONS
    for backend in BACKENDS.values():
        assert set(backend.modules) <= {*ATTENTION_OPS, *PREFILL_OPS, *SCORE_OPS, *SELECTION_OPS}
        for op in backend.modules:
            assert callable(backend.load(op))
            assert callable(getattr(kernels, op))


@pytest.mark.parametrize(
    ("name", "device", "call", "said"),
    [
        ("pallas_tpu", H100, SELECT, "its kernels run on a TPU, this is a GPU"),
        ("pallas_tpu", TPU, SELECT._replace(slots=1 << 20), "rows of 1048576 scores"),
        ("pallas_tpu", TPU, SELECT._replace(slots=1 << 20, block_size=2), None),
        ("pallas_triton", TPU, SELECT, "its kernels run on a GPU, this is a TPU"),
        ("pallas_mosaic_gpu", TPU, SPARSE, "its kernels run on a GPU, this is a TPU"),
        ("pallas_mosaic_gpu", H100, SELECT, "it does not have this op; expected one of decode_attention, sparse"),
        ("pallas_mosaic_gpu", H100, DENSE._replace(scores=True), "it returns no scores"),
        # Mosaic does not stand on Triton, which newer versions of JAX are without.
        ("pallas_mosaic_gpu", H100._replace(jax_version=(0, 13)), SPARSE, None),
        ("pallas_triton", H100._replace(jax_version=(0, 13)), SPARSE, "newer than"),
        ("pallas_tpu", CPU, SPARSE, None),
        ("xla", TPU, SPARSE, None),
    ],
)
def test_refusal(name, device, call, said):
    refused = BACKENDS[name].refusal(call, device)
    assert refused is None if said is None else said in refused


def test_compiled_implementations():
    assert compiled_implementations(SPARSE, H100) == ("xla", "pallas_triton", "pallas_mosaic_gpu")
    assert compiled_implementations(SELECT, TPU) == ("xla", "pallas_tpu")
    assert compiled_implementations(DENSE, CPU) == ("xla",)


def test_an_explicit_name_is_refused_where_it_cannot_run(monkeypatch):
    for device, said in ((TPU, "this is a TPU"), (H100._replace(compute_capability=(7, 5)), "this GPU has 7.5")):
        monkeypatch.setattr(backends, "current_device", lambda device=device: device)
        with pytest.raises(NotImplementedError, match=f"pallas_triton: .*{said}; use implementation='xla', or None"):
            kernels.top_p_threshold(jnp.ones(4), 0.5, implementation="pallas_triton")


def test_several_names_are_tried_in_order():
    scores = jnp.asarray([3.0, 2.0, 1.0])
    names = ("pallas_mosaic_gpu", "pallas_triton")
    with pytest.raises(
        NotImplementedError, match=r"threshold: pallas_mosaic_gpu: .*this op.*; pallas_triton: method 'linear'.*; use"
    ):
        kernels.top_p_threshold(scores, 0.5, method="linear", implementation=names)
    assert kernels.top_p_threshold(scores, 0.5, method="linear", implementation=(*names, "xla")).shape == ()
    with pytest.raises(ValueError, match=r"`implementation` is \(\), but must be None or one of 'xla', .* in order of"):
        kernels.top_p_threshold(scores, 0.5, implementation=())


def test_importing_the_package_loads_no_kernels():
    code = "import sys, specattn_kernels; print([name for name in sys.modules if 'pallas' in name])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="says what a CPU is")
def test_current_device_follows_the_default():
    assert current_device() == Device("cpu", None, tuple(map(int, jax.__version__.split(".")[:2])))
    for default in ("cpu", jax.local_devices()[0]):
        with jax.default_device(default):
            assert current_device().platform == "cpu"
