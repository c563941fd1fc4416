"""How TPU kernels run without a TPU."""

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu
from specattn_kernels.tpu import attention


@pytest.fixture
def tpu_interpreter(monkeypatch):
    """Interprets TPU kernels, compiled without optimising, which halves their time, in as many steps as can be."""
    jax.config.update("jax_disable_most_optimizations", True)
    monkeypatch.setattr(attention, "STEP_BYTES", 0)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        yield


@pytest.fixture(autouse=True)
def interpreter_of_implementation(request):
    """The interpreter that a test of several implementations needs."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and callspec.params.get("implementation") == "pallas_tpu":
        request.getfixturevalue("tpu_interpreter")
