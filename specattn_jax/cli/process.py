"""Settings of the whole process, which only a program may make, not a library. Imports nothing heavy."""

from __future__ import annotations

import _thread
import contextlib
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

from specattn_jax.errors import UserError
from specattn_jax.files import first_line

# How long the processes of several hosts wait for each other at the start, and for a sign of life later.
_SECONDS_TO_COME, _SECONDS_OF_SILENCE = 300, 30


def prepare_process() -> None:
    """Keeps compiled programs from run to run, and the libraries underneath quiet; call before JAX is imported."""
    cache = os.environ.get("SPECATTN_CACHE") or Path.home() / ".cache" / "specattn"
    defaults = {
        "JAX_COMPILATION_CACHE_DIR": str(Path(cache).expanduser() / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    _hide_tpu_library()
    # What libraries log as an error they raise too, and that becomes one sentence.
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    sys.unraisablehook = _interrupt_again
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def join_processes(coordinator: str | None, process_id: int | None, processes: int | None) -> bool:
    """Joins the processes of several hosts, whose devices are then one mesh; only process 0 prints.

    Args:
        coordinator: address of process 0; `auto` where JAX finds out by itself (a TPU pod, Slurm, Open MPI); None where
            there is one process.
        process_id: which of them this is.
        processes: how many there are.

    Returns:
        Whether this process prints.

    Raises:
        UserError: some of the three are missing, or the others do not come.
    """
    alone = coordinator is None and process_id is None and processes is None
    told = coordinator is not None and process_id is not None and processes is not None
    if alone:
        return True
    if not told and coordinator != "auto":
        raise UserError(
            f"--coordinator is {coordinator}, --process-id {process_id} and --processes {processes}; expected all "
            "three, or --coordinator auto."
        )
    with importing():
        import jax
    try:
        jax.distributed.initialize(
            None if coordinator == "auto" else coordinator,
            processes,
            process_id,
            initialization_timeout=_SECONDS_TO_COME,
            heartbeat_timeout_seconds=_SECONDS_OF_SILENCE,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"--coordinator is {coordinator}, but the processes cannot join ({first_line(error)})."
        ) from error
    return jax.process_index() == 0


def _hide_tpu_library(devices: Path = Path("/sys/bus/pci/devices")) -> None:
    """Lets JAX find no libtpu where no TPU is: it would print a dozen lines before it gives up.

    Nothing else about JAX's choice of a device changes, and a person who names platforms is not overruled.
    """
    named = {"JAX_PLATFORMS", "JAX_FORCE_TPU_INIT"} & os.environ.keys()
    if not named and not any(_is_tpu(device) for device in devices.glob("*")):
        sys.modules.setdefault("libtpu", None)  # type: ignore[arg-type]  # imports of it fail
        # libtpu sets it once it is imported, also for programs that are started from there, as from a notebook.
        os.environ.pop("TPU_LIBRARY_PATH", None)


def _is_tpu(device: Path) -> bool:
    """Whether a PCI device may be a TPU: made by Google, and neither its network card nor its disk."""
    try:
        vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "device"))
    except OSError:
        return False
    return vendor == "0x1ae0" and kind not in ("0x0042", "0x001f")


def _interrupt_again(dropped: sys.UnraisableHookArgs) -> None:
    """A Ctrl-C that arrives in a callback of the garbage collector would be printed and forgotten: it comes again."""
    if issubclass(dropped.exc_type, KeyboardInterrupt):
        threading.Timer(0.05, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(dropped)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Around imports: Ctrl-C ends the process at once.

    Extension modules that are interrupted while they are set up raise other errors or crash, and there is nothing to
    clean up yet.
    """

    def leave(*_: object) -> None:
        os.write(2, b"Interrupted.\n")
        os._exit(130)

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
