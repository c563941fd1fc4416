"""Whatever is written behind a command, it succeeds or says one sentence; never a traceback."""

from __future__ import annotations

import shutil
import uuid

import pytest
from command import run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SIZES = [
    "-1",
    "0",
    "1",
    "2",
    "0.5",
    "1.5",
    "-0.5",
    "1e308",
    "-1e308",
    "nan",
    "inf",
    "-inf",
    "1e-320",
    "9" * 19,
    "9" * 40,
]
HUGE = [str(2**31), str(2**32), str(2**63), "-9223372036854775809"]
NUMBERS = st.sampled_from([*SIZES, *HUGE, "0x10", "1_000", "seven", "", " ", "1,2", ","])
TEXTS = st.sampled_from(["", " ", "a", "naïve", "🙂", "nul\0", "\ud800", "../..", "-", "--", "%s{}", "a" * 300])
WORDS = TEXTS | st.text(st.characters(exclude_characters="/"), max_size=8)
NAMES = [
    "float32",
    "bfloat16",
    "float99",
    "default",
    "paper",
    "paper_exact",
    "auto",
    "speculative",
    "specattn",
    "layer",
]
NAMED = st.sampled_from([*NAMES, "autoregressive", "head", "kv_head", "oracle", "orbax", "hf", "pg19", "tiny"])
FLAGS = st.none()
MESHES = st.sampled_from(
    ["data=1", "heads=1,data=1", "data=2", "heads=3", "heads=0", "data=", "data=1,data=1", "x=1", "data=1,", "1x1"]
)
# The names of files that `places` makes.
FILES = [
    "target",
    "missing",
    "folder",
    "empty",
    "binary",
    "cut",
    "config",
    "words",
    "text",
    "lines",
    "pairing",
    "below",
]
PATHS = st.sampled_from([f"FILE:{name}" for name in FILES])
PLACES = PATHS | WORDS
MODELS = PATHS | WORDS
# Longer than the models' context, or no length: what is possible would be measured for minutes.
LENGTHS = NUMBERS.filter(lambda text: text not in ("2", "1,2"))
OPTIONS = {
    "generate": {
        "--max-new-tokens": NUMBERS, "--mode": NAMED | WORDS, "--lossless": FLAGS, "--p": NUMBERS, "--chat": FLAGS,
        "--kv-reduction": NUMBERS, "--window": NUMBERS | NAMED, "--policy": NAMED | WORDS, "--temperature": NUMBERS,
        "--top-p": NUMBERS, "--top-k": NUMBERS, "--min-p": NUMBERS, "--repetition-penalty": NUMBERS, "--seed": NUMBERS,
        "--dtype": NAMED | WORDS, "--alignment": PLACES, "--stop": WORDS, "--draft-reads": NUMBERS | NAMED,
        "--draft-reach": NUMBERS | NAMED, "--mesh": MESHES | WORDS, "--prompt": WORDS, "--prompt-file": PLACES,
        "--prompts": PLACES, "--batch": NUMBERS, "--out": PLACES,
    },
    "chat": {
        "--max-new-tokens": NUMBERS, "--mode": NAMED | WORDS, "--kv-reduction": NUMBERS, "--temperature": NUMBERS,
        "--top-p": NUMBERS, "--seed": NUMBERS, "--dtype": NAMED | WORDS, "--mesh": MESHES | WORDS,
        "--alignment": PLACES,
    },
    "tasks": {
        "--tasks": NAMED | WORDS, "--lengths": LENGTHS, "--samples": NUMBERS, "--batch": NUMBERS, "--methods": NAMED,
        "--kv-reduction": NUMBERS, "--p": NUMBERS, "--policy": NAMED | WORDS, "--window": NUMBERS,
        "--dtype": NAMED | WORDS, "--alignment": PLACES, "--chat": FLAGS,
    },
    "train-draft": {
        "--num-layers": NUMBERS, "--steps": NUMBERS, "--rows": NUMBERS, "--length": NUMBERS, "--accumulate": NUMBERS,
        "--peak-rate": NUMBERS, "--attention-weight": NUMBERS, "--own-share": NUMBERS, "--continuations": NUMBERS,
        "--prompt": NUMBERS, "--written": NUMBERS, "--batch": NUMBERS, "--storage": NAMED | WORDS,
        "--checkpoint-every": NUMBERS, "--seed": NUMBERS, "--dtype": NAMED | WORDS,
    },
    "bench kernels": {"--grid": NAMED | WORDS, "--minutes": NUMBERS, "--only": WORDS},
    "bench decode": {"--grid": NAMED | WORDS, "--minutes": NUMBERS, "--only": WORDS, "--mesh": MESHES | WORDS},
    "bench request": {"--grid": NAMED | WORDS, "--minutes": NUMBERS, "--only": WORDS, "--mesh": MESHES | WORDS},
    "info": {"--mesh": MESHES | WORDS, "--context": NUMBERS, "--dtype": NAMED | WORDS},
    "estimate": {
        "--context": NUMBERS, "--batch": NUMBERS, "--kv-reduction": NUMBERS, "--accepted": NUMBERS,
        "--draft-reads": NUMBERS, "--window": NUMBERS, "--mesh": MESHES | WORDS,
    },
    "convert": {"--to": NAMED | WORDS, "--dtype": NAMED | WORDS, "--out": PLACES},
    "perplexity": {
        "--context": NUMBERS, "--prefill": NUMBERS, "--documents": NUMBERS, "--batch": NUMBERS, "--methods": NAMED,
        "--kv-reduction": NUMBERS, "--p": NUMBERS, "--policy": NAMED | WORDS, "--window": NUMBERS,
        "--drift-tokens": NUMBERS, "--seed": NUMBERS, "--dtype": NAMED | WORDS, "--alignment": PLACES,
        "--mesh": MESHES | WORDS,
    },
    "calibrate": {
        "--context": NUMBERS, "--passages": NUMBERS, "--granularity": NAMED | WORDS, "--window": NUMBERS,
        "--seed": NUMBERS, "--dtype": NAMED | WORDS,
    },
}  # fmt: skip
# Some commands make their folder before they see that nothing can be done.
OUTS = st.sampled_from([f"FILE:{name}" for name in ("new", "folder", "empty", "binary", "below")])
# The texts of what would measure for minutes.
LINES = st.lists(
    st.sampled_from(
        [b"/saved\n", b"/mode self\n", b"/mode\n", b"/x y\n", b"\xff\xfe\n", b"\r\n", b"\xef\xbb\xbf/reset\r\n"]
    ),
    max_size=3,
).map(b"".join)
UNREADABLE = st.sampled_from([f"FILE:{name}" for name in ("missing", "folder", "empty", "binary", "below")])


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    command = draw(st.sampled_from(list(OPTIONS)))
    line = command.split()
    models = st.just("FILE:target") | MODELS
    if command in ("info", "convert"):
        line.append(draw(models))
    elif command == "train-draft":
        line += ["--target", draw(models)]
    elif not command.startswith("bench"):
        line += ["--target", draw(models), "--draft", draw(models)]
    if command in ("perplexity", "calibrate", "train-draft"):
        line += ["--out", draw(PLACES), "--text", draw(UNREADABLE)]
    elif command == "tasks":
        line += ["--out", draw(OUTS)]
    elif command.startswith("bench"):
        line += ["--out", draw(OUTS), "--cases", "no such case"]
    elif command == "convert":
        line += ["--out", "FILE:new"]
    elif command == "generate" and draw(st.booleans()):
        line += ["--prompt", "a", "--max-new-tokens", "1"]
    chosen = draw(st.lists(st.sampled_from(sorted(OPTIONS[command])), min_size=1, max_size=3, unique=True))
    for name in chosen:
        value = draw(OPTIONS[command][name])
        line += [name] if value is None else [name, value]
    return [*line, *draw(st.sampled_from([[], [], ["--json"], ["--no-such-option"], ["one", "too", "many"]]))]


@pytest.fixture(scope="module")
def places(tiny_folders, tmp_path_factory):
    root = tmp_path_factory.mktemp("places")
    shutil.copytree(tiny_folders.target, root / "cut")
    weights = root / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    shutil.copytree(tiny_folders.target, root / "config")
    (root / "config" / "config.json").write_text('{"model_type": "llama", "hidden_size": -1')
    (root / "folder").mkdir()
    (root / "folder" / "something").write_text("")
    (root / "empty").write_text("")
    (root / "binary").write_bytes(bytes(range(256)))
    (root / "text").write_text("It is a truth.\n")
    (root / "lines").write_text('{"prompt": "a", "id": "\\ud800"}\n\n{"prompt": "b", "seed": 1}\n')
    shutil.copytree(tiny_folders.target, root / "words")
    (root / "words" / "tokenizer.json").write_text('{"model": {"type": "BPE"')
    shutil.copytree(tiny_folders.alignment, root / "pairing")
    (root / "pairing" / "alignment.json").write_text('{"format": 1, "layer_map": 7}')
    return root, {"target": tiny_folders.target, "below": root / "text" / "below"}


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(command_lines(), LINES)
def test_any_command_line_succeeds_or_says_one_sentence(places, monkeypatch, line, said):
    root, known = places
    monkeypatch.chdir(root)
    known = {**known, "new": root / f"new-{uuid.uuid4().hex}"}
    names = [part.removeprefix("FILE:") for part in line]
    arguments = [
        str(known.get(name, root / name)) if part.startswith("FILE:") else part
        for name, part in zip(names, line, strict=True)
    ]
    kept = (root / "text").read_bytes(), (root / "binary").read_bytes()
    result = run(*arguments, stdin=said)
    assert "Traceback" not in result.output
    if result.exit_code == 1:
        errors = [part for part in result.stderr.splitlines() if part.startswith("Error: ")]
        assert len(errors) == 1
        assert result.stderr.splitlines()[-1] == errors[0]
        assert errors[0].endswith(".")
        assert result.stdout == ""
    else:
        assert result.exit_code in (0, 2)
    assert kept == ((root / "text").read_bytes(), (root / "binary").read_bytes())
