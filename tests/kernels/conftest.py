"""How TPU kernels run without a TPU."""

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu
from specattn_kernels.tpu import attention


@pytest.fixture(autouse=True, scope="module")
def own_programs_of_kernels(own_programs):
    """Interpreters and sizes are set here, in ways that compiled functions do not know of."""


def do_not_optimise():
    """What an interpreter runs is compiled in half the time; nobody uses it beyond tests."""
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def tpu_interpreter(monkeypatch):
    """Interprets TPU kernels, in as many steps as can be."""
    do_not_optimise()
    monkeypatch.setattr(attention, "STEP_BYTES", 0)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        yield


@pytest.fixture(autouse=True)
def interpreter_of_implementation(request):
    """The interpreter that a test of several implementations needs."""
    callspec = getattr(request.node, "callspec", None)
    implementation = "" if callspec is None else callspec.params.get("implementation", "")
    if implementation.startswith("pallas"):
        do_not_optimise()
    if implementation == "pallas_tpu":
        request.getfixturevalue("tpu_interpreter")
