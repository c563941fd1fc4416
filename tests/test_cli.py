"""The command line as a person and as a program meet it: streams, exit statuses, one sentence per mistake."""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import json
import lzma
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from command import mistake, run

import specattn_jax
from specattn_jax.loading import get_preset, is_cached
from specattn_jax.reporting import plots
from specattn_jax.texts import shipped_books

JSON_KEYS = {
    "text", "new_tokens", "prompt_tokens", "finish_reason", "mode", "windows", "accepted_per_window", "kv_reduction",
    "prefill_s", "decode_s", "tokens_per_s", "compile_s", "target", "draft", "policy", "seed", "requested_mode",
    "window", "draft_reads",
}  # fmt: skip
PROMPT = "Once upon a time there was a cache. "


@pytest.fixture
def generate(tiny_folders):
    """`specattn generate` on the tiny pair."""
    pair = ["--target", tiny_folders.target, "--draft", tiny_folders.draft]
    return lambda *more: ["generate", *pair, "--max-new-tokens", 24, *more]


@pytest.fixture
def specattn(generate, tiny_folders):
    return lambda *more: generate("--alignment", tiny_folders.alignment, *more)


class TestHelp:
    def test_lists_every_command(self):
        result = run("--help")
        assert result.exit_code == 0
        for command in ("generate", "calibrate", "train-draft", "fetch", "convert", "info", "bench"):
            assert command in result.stdout

    @pytest.mark.parametrize("command", ["generate", "chat"])
    def test_auto_and_seeds(self, command):
        said = re.sub(r"[│\s]+|\[0<=x<=\d+\]", " ", run(command, "--help").stdout)
        assert "With auto it does not fix a sampled text alone: give --mode too." in " ".join(said.split())

    def test_imports_nothing_heavy(self):
        code = (
            "import sys, specattn_jax.cli.app; sys.exit(bool({'jax', 'transformers', 'matplotlib'} & set(sys.modules)))"
        )
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_version(self):
        assert run("--version").stdout == f"specattn {specattn_jax.__version__}\n"

    def test_a_wrong_option_is_a_usage_error(self):
        assert run("generate", "--no-such-option").exit_code == 2


class TestGenerate:
    @pytest.mark.parametrize(
        "mode",
        ["specattn", *(pytest.param(other, marks=pytest.mark.slow) for other in ("autoregressive", "speculative"))],
    )
    def test_json_is_one_object_with_all_keys(self, generate, specattn, tiny_folders, mode):
        command = specattn if mode == "specattn" else generate
        result = run(*command("--prompt", PROMPT, "--mode", mode, "--json", "--seed", 3))
        assert result.exit_code == 0
        report = json.loads(result.stdout)
        assert set(report) == JSON_KEYS
        assert report["mode"] == report["requested_mode"] == mode
        assert report["window"] == (None if mode == "autoregressive" else 5)
        assert report["prompt_tokens"] == len(PROMPT)
        assert 1 <= report["new_tokens"] <= 24
        assert 0 <= report["accepted_per_window"] <= 5
        assert report["draft"] == (None if mode == "autoregressive" else str(tiny_folders.draft))
        assert report["policy"] == ("default" if mode == "specattn" else None)
        assert (report["target"], report["seed"]) == (str(tiny_folders.target), 3)
        assert 0 < report["kv_reduction"] < 1 if mode == "specattn" else report["kv_reduction"] == 0

    def test_text_goes_to_stdout_and_numbers_to_stderr(self, generate):
        arguments = generate("--prompt", PROMPT, "--mode", "speculative")
        text = json.loads(run(*arguments, "--json").stdout)["text"]
        result = run(*arguments)
        assert result.stdout == text + "\n"
        assert "tokens/s" in result.stderr
        assert "drafts accepted" in result.stderr

    @pytest.mark.slow
    def test_no_bar_is_drawn_into_a_pipe(self, generate):
        # As notebooks do to programs that a cell runs.
        environment = {**os.environ, "FORCE_COLOR": "1", "CLICOLOR_FORCE": "1", "TERM": "xterm-color"}
        arguments = generate("--prompt", PROMPT, "--mode", "autoregressive")
        command = [sys.executable, "-m", "specattn_jax.cli", *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert "compiling" not in done.stderr
        assert "tokens/s" in done.stderr

    def test_json_streams_the_text_to_stderr(self, generate):
        result = run(*generate("--prompt", PROMPT, "--mode", "speculative", "--json"))
        assert json.loads(result.stdout)["text"] in result.stderr

    def test_everything_is_read_with_p_1(self, generate, specattn):
        sparse = json.loads(run(*specattn("--prompt", PROMPT, "--mode", "specattn", "--p", 1, "--json")).stdout)
        alone = json.loads(run(*generate("--prompt", PROMPT, "--mode", "autoregressive", "--json")).stdout)
        assert sparse["kv_reduction"] == pytest.approx(0, abs=1e-6)
        assert sparse["text"] == alone["text"]

    def test_the_published_policy(self, specattn):
        arguments = specattn("--prompt", PROMPT, "--mode", "specattn", "--policy", "paper", "--p", 0.8, "--json")
        report = json.loads(run(*arguments).stdout)
        assert report["policy"] == "paper"
        assert 0 <= report["kv_reduction"] < 1

    def test_sampling_depends_on_the_seed_alone(self, generate):
        def text(seed):
            arguments = generate("--prompt", PROMPT, "--mode", "autoregressive", "--temperature", 1, "--seed", seed)
            return run(*arguments).stdout

        assert text(1) == text(1) != text(2)

    def test_prompts_from_file_and_stdin_are_the_same(self, generate, tmp_path):
        (tmp_path / "prompt.txt").write_text(PROMPT + "\n", encoding="utf-8")
        common = ["--mode", "autoregressive", "--json"]
        given = run(*generate("--prompt", PROMPT, *common))
        from_file = run(*generate("--prompt-file", tmp_path / "prompt.txt", *common))
        piped = run(*generate("--prompt-file", "-", *common), stdin=PROMPT.encode() + b"\n")
        texts = {json.loads(result.stdout)["text"] for result in (given, from_file, piped)}
        assert len(texts) == 1
        assert json.loads(piped.stdout)["prompt_tokens"] == len(PROMPT)

    def test_auto_says_what_it_did_and_why(self, specattn):
        result = run(*specattn("--prompt", PROMPT, "--verbose", "--json"))
        report = json.loads(result.stdout)
        assert report["requested_mode"] == "auto"
        assert report["mode"] in ("autoregressive", "speculative", "specattn")
        stderr = result.stderr + run(*specattn("--prompt", PROMPT)).stderr
        for said in (
            "GB/s",
            "of drafted tokens accepted",
            "ms per token, ",
            " s until the end predicted",
            "predicted to be",
            "chosen by auto",
        ):
            assert said in stderr
        for mode in ("autoregressive", "speculative", "specattn"):
            assert f"{mode}" in result.stderr

    def test_auto_keeps_to_a_window_and_to_lossless_modes(self, specattn):
        stderr = run(
            *specattn("--prompt", PROMPT, "--verbose", "--window", 3, "--lossless", "--max-new-tokens", 4)
        ).stderr
        assert "speculative (window 3): " in stderr
        assert "(window 5)" not in stderr
        assert "specattn" not in stderr

    def test_the_window_of_a_named_mode_is_chosen(self, generate):
        options = "--mode", "speculative", "--window", "auto", "--verbose", "--max-new-tokens", 4
        stderr = run(*generate("--prompt", PROMPT, *options)).stderr
        assert "speculative (window " in stderr
        assert "autoregressive" not in stderr

    def test_chat_wraps_the_prompt(self, generate):
        arguments = generate("--prompt", "Hello", "--chat", "--mode", "autoregressive", "--json")
        assert json.loads(run(*arguments).stdout)["prompt_tokens"] == len("user: Hello\nassistant: ")

    def test_one_token_is_enough(self, generate):
        arguments = generate("--prompt", "a", "--mode", "autoregressive", "--json", "--max-new-tokens", 1)
        report = json.loads(run(*arguments).stdout)
        assert (report["new_tokens"], report["windows"], report["tokens_per_s"]) == (1, 0, 0)


class TestMistakes:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--prompt", ""], "the prompt is empty"),
            (["--prompt", " \n"], "the prompt is empty"),
            ([], "either --prompt TEXT or --prompt-file"),
            (["--prompt", "a", "--prompt-file", "b"], "either --prompt TEXT or --prompt-file"),
            (["--prompt-file", "missing.txt"], "missing.txt does not exist"),
            (["--prompt", "a" * 300], "300 tokens, but the context"),
            (["--prompt", "a", "--max-new-tokens", 0], "--max-new-tokens is 0; expected at least 1"),
            (["--prompt", "a" * 200, "--max-new-tokens", 100], "leaves room for 56"),
            (["--prompt", "a", "--p", 0], "--p is 0.0; expected a number in (0, 1]"),
            (["--prompt", "a", "--p", 1.01], "--p is 1.01"),
            (["--prompt", "a", "--p", "nan"], "--p is nan"),
            (["--prompt", "a", "--kv-reduction", 0.99], "kv_reduction is 0.99"),
            (["--prompt", "a", "--kv-reduction", 0.6, "--p", 0.5], "give one of them"),
            (["--prompt", "a", "--kv-reduction", 0.6, "--policy", "paper"], "policy paper has no budgets"),
            (["--prompt", "a", "--policy", "best"], "policy is 'best'; expected one of default, paper"),
            (["--prompt", "a", "--window", 0], "window is 0; expected 1 to 64"),
            (["--prompt", "a", "--window", 100000], "window is 100000"),
            (["--prompt", "a", "--window", "five"], "--window is 'five'; expected a number of drafted tokens, or auto"),
            (
                ["--prompt", "a", "--mode", "fast"],
                "mode is 'fast'; expected one of auto, autoregressive, lookup, self, speculative, "
                "hierarchical, specattn",
            ),
            (["--prompt", "a", "--temperature", -1], "temperature is -1.0"),
            (["--prompt", "a", "--top-p", 2], "top_p is 2.0"),
            (["--prompt", "a", "--top-k", -1], "top_k is -1"),
            (["--prompt", "a", "--dtype", "int4"], "dtype is 'int4'"),
            (["--prompt", "a", "--alignment", "nowhere"], "nowhere/alignment.json does not exist"),
        ],
    )
    def test_generate(self, specattn, options, said):
        assert said in mistake(*specattn(*options))

    def test_options_of_another_mode(self, generate):
        said = "--p says what mode specattn reads, but --mode is speculative"
        assert said in mistake(*generate("--prompt", "a", "--mode", "speculative", "--p", 0.9))

    def test_no_alignment(self, generate):
        assert "specattn calibrate" in mistake(*generate("--prompt", "a", "--mode", "specattn"))
        assert "specattn calibrate" in mistake(*generate("--prompt", "a", "--kv-reduction", 0.5))

    def test_lossless_is_for_auto(self, generate):
        said = "--lossless is for --mode auto, but --mode is specattn"
        assert said in mistake(*generate("--prompt", "a", "--mode", "specattn", "--lossless"))

    def test_invalid_utf8_says_where(self, generate, tmp_path):
        path = tmp_path / "latin1.txt"
        path.write_bytes("one\ntwo caf\xe9".encode("latin-1"))
        where = "byte 0xe9 at offset 11 (line 2)"
        assert where in mistake(*generate("--prompt-file", path))
        assert where in mistake(*generate("--prompt-file", "-"), stdin=path.read_bytes())

    @pytest.mark.parametrize("kind", ["gz", "xz", "bz2"])
    def test_a_damaged_archive(self, generate, tmp_path, kind):
        packed = bytearray({"gz": gzip, "xz": lzma, "bz2": bz2}[kind].compress(b"some words, many times over " * 9))
        for at in range(12, len(packed) - 12, 5):
            packed[at] ^= 0xFF
        path = tmp_path / f"prompt.txt.{kind}"
        path.write_bytes(packed)
        assert "cannot be read" in mistake(*generate("--prompt-file", path))

    def test_a_prompt_of_undecodable_bytes(self, generate):
        assert "not valid UTF-8 at character 2" in mistake(*generate("--prompt", "a\udcff"))

    def test_other_tokenizers(self, tiny_folders):
        arguments = ["--target", tiny_folders.target, "--draft", tiny_folders.stranger, "--prompt", "a"]
        assert "expected the same tokenizer" in mistake("generate", *arguments)

    def test_no_default_draft(self, tiny_folders):
        assert "draft" in mistake("generate", "--target", tiny_folders.target, "--prompt", "a")

    def test_no_such_model(self):
        assert "found nothing of that name" in mistake("generate", "--target", "no-such-model", "--prompt", "a")

    def test_a_name_of_several_lines_stays_in_one(self):
        assert r"model 'a\nb': found" in mistake("info", "a\nb")
        assert r"folder /a\nb, and" in mistake("info", "/a\nb")

    @pytest.mark.parametrize("name", ["x" * 300, "~nobody-of-that-name/model"])
    def test_impossible_names(self, tiny_folders, name):
        assert "found nothing of that name" in mistake("info", name)
        assert "neither a file nor a shipped book" in mistake("calibrate", "--text", name, "--out", "out")
        if not name.startswith("~"):
            assert "cannot be written" in mistake("convert", tiny_folders.target, "--out", name)

    @pytest.mark.parametrize("kind", ["hf", "orbax"])
    def test_a_full_disk(self, tiny_folders, tmp_path, monkeypatch, kind):
        monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
        said = mistake("convert", tiny_folders.target, "--to", kind, "--out", tmp_path / "out")
        assert "but the disk has 0.0 MiB left" in said
        assert list(tmp_path.iterdir()) == []

    def test_not_enough_memory(self, generate, monkeypatch):
        monkeypatch.setattr("specattn_jax.loading.memory.available_bytes", lambda device=None: 1000)
        assert "available" in mistake(*generate("--prompt", "a", "--mode", "speculative"))

    def test_the_device_runs_out_of_memory(self, tiny_folders, monkeypatch):
        def fail(*_, **__):
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte")

        monkeypatch.setattr("specattn_jax.loading.pair.load_pair", fail)
        assert "ran out of memory" in mistake("generate", "--prompt", "a")

    def test_a_bug_keeps_its_traceback(self, monkeypatch):
        def fail(*_, **__):
            raise RuntimeError("a bug")

        monkeypatch.setattr("specattn_jax.loading.pair.load_pair", fail)
        with pytest.raises(RuntimeError, match="a bug"):
            run("generate", "--prompt", "a")

    @pytest.mark.parametrize("command", ["calibrate", "convert"])
    def test_out_that_is_taken(self, tiny_folders, tmp_path, command):
        (tmp_path / "mine.txt").write_text("keep me", encoding="utf-8")
        model = [tiny_folders.target] if command == "convert" else ["--target", tiny_folders.target, "--draft", "self"]
        assert "exists already" in mistake(command, *model, "--out", tmp_path)
        assert "exists already" in mistake(command, *model, "--out", tmp_path / "mine.txt")
        assert (tmp_path / "mine.txt").read_text(encoding="utf-8") == "keep me"

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--text", "no_such_book"], "the books are"),
            (["--granularity", "token"], "--granularity is 'token'"),
            (["--window", 0], "--window is 0"),
            (["--passages", 1], "passages is 1"),
            (["--passages", 2.5], "--passages names 2.5; expected whole numbers"),
            (["--passages", "2,4"], "--passages holds 2 numbers; expected one"),
            (["--quotes", "0,0.1,0.2", "--context", "64,128"], "expected one, or one for each of 2 lengths"),
            (["--quotes", "some"], "--quotes names 'some'; expected numbers"),
            (["--context", 10], "context is 10"),
            (["--context", 300], "expected at most the models' 256"),
        ],
    )
    def test_calibrate(self, tiny_folders, tmp_path, options, said):
        pair = ["--target", tiny_folders.target, "--draft", tiny_folders.draft]
        if options[0] != "--text":
            options = [*options, "--text", "milton"]
        assert said in mistake("calibrate", *pair, "--out", tmp_path / "out", *options)
        assert not (tmp_path / "out").exists()

    def test_convert(self, tiny_folders, tmp_path):
        assert "--to is 'gguf'" in mistake("convert", tiny_folders.target, "--to", "gguf", "--out", tmp_path / "out")
        assert "found nothing" in mistake("convert", "nothing", "--out", tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    def test_fetch_and_info(self, tiny_folders):
        assert "expected one of" in mistake("fetch", "no-such-preset")
        assert "found nothing of that name" in mistake("info", "no-such-model")
        assert "--context is 0" in mistake("info", tiny_folders.target, "--context", 0)


def interrupt(*_, **__):
    raise KeyboardInterrupt


class TestInterrupt:
    def test_generate(self, generate, monkeypatch):
        monkeypatch.setattr("specattn_jax.decoding.loop.decode", interrupt)
        result = run(*generate("--prompt", PROMPT, "--mode", "speculative"))
        assert (result.exit_code, result.stdout, result.stderr) == (130, "", "Interrupted.\n")

    @pytest.mark.parametrize("where", ["calibration.calibrate.target_rows", "calibration.calibrate.save_alignment"])
    def test_calibrate_leaves_nothing(self, tiny_folders, tiny_pair, tmp_path, monkeypatch, where):
        if where != "calibration.calibrate.target_rows":
            fitted = dataclasses.replace(tiny_pair.alignment, provenance='{"mixture_kl": 0, "layer_map_kl": 0}')
            found = fitted, np.zeros((2, 3))
            monkeypatch.setattr("specattn_jax.loading.pair.calibrate", lambda *_, **__: found)
        monkeypatch.setattr(f"specattn_jax.{where}", interrupt)
        arguments = ["--target", tiny_folders.target, "--draft", tiny_folders.draft, "--text", "milton"]
        result = run("calibrate", *arguments, "--context", 64, "--passages", 2, "--out", tmp_path / "out")
        assert result.exit_code == 130
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("kind", ["hf", "orbax"])
    def test_convert_leaves_nothing_and_works_again(self, tiny_folders, tmp_path, monkeypatch, kind):
        arguments = ["convert", tiny_folders.target, "--to", kind, "--out", tmp_path / "out"]
        with monkeypatch.context() as patch:
            patch.setattr("specattn_jax.loading.tokenizer.Tokenizer.save", interrupt)
            assert run(*arguments).exit_code == 130
        assert list(tmp_path.iterdir()) == []
        assert run(*arguments).exit_code == 0

    @pytest.mark.slow
    @pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
    def test_a_real_signal_ends_the_program(self, tiny_folders, tmp_path):
        code = (
            "import os, signal, specattn_jax.cli as cli, specattn_jax.calibration.calibrate as calibration\n"
            # A shell that runs the tests in the background has it ignored.
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "calibration.target_rows = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
            "cli.main()"
        )
        pair = ["--target", tiny_folders.target, "--draft", tiny_folders.draft, "--text", "milton"]
        arguments = ["calibrate", *pair, "--context", "64", "--passages", "2", "--out", tmp_path / "out"]
        environment = {**os.environ, "SPECATTN_CACHE": str(tmp_path / "cache")}
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "Interrupted.\n")
        assert not (tmp_path / "out").exists()


class TestCalibrate:
    def test_what_it_writes_serves_generate(self, tiny_folders, generate, tmp_path):
        out, text = tmp_path / "new" / "alignment", tmp_path / "text.txt"
        text.write_text("To be, or not to be, that is the question. " * 20, encoding="utf-8")
        pair = ["--target", tiny_folders.target, "--draft", tiny_folders.draft]
        result = run(
            "calibrate", *pair, "--text", text, "milton", "--context", 96, "--passages", 2, "--out", out, "--json"
        )
        assert result.exit_code == 0
        report = json.loads(result.stdout)
        assert report["texts"] == ["text.txt", "milton.txt.xz"]
        assert len(report["layer_map"]) == 3
        assert {path.name for path in out.iterdir()} == {"alignment.json", "alignment.npz", "heatmap.png"}
        provenance = json.loads((out / "alignment.json").read_text(encoding="utf-8"))["provenance"]
        assert provenance["target"] == str(tiny_folders.target)
        assert (out / "heatmap.png").read_bytes().startswith(b"\x89PNG")
        report = json.loads(
            run(*generate("--prompt", PROMPT, "--mode", "specattn", "--alignment", out, "--json")).stdout
        )
        assert 0 < report["kv_reduction"] < 1

    def test_the_mixture_in_the_picture_sums_to_one(self, tiny_pair):
        mixture = plots.mixture_by_layer(tiny_pair.alignment, tiny_pair.draft.config.num_layers)
        assert mixture.shape == (2, 3)
        np.testing.assert_allclose(mixture.sum(axis=0), 1, rtol=1e-5)


class TestModels:
    @pytest.mark.parametrize("kind", ["hf", "orbax"])
    def test_a_converted_model_is_the_same_model(self, tiny_folders, tmp_path, kind):
        result = run("convert", tiny_folders.target, "--to", kind, "--out", tmp_path / kind, "--json")
        assert result.exit_code == 0
        report = json.loads(result.stdout)
        assert (report["format"], report["dtype"]) == (kind, "float32")
        assert report["bytes"] > 0
        arguments = ["--draft", "self", "--prompt", PROMPT, "--mode", "autoregressive", "--max-new-tokens", 24]
        same, original = (
            run("generate", "--target", model, *arguments) for model in (tmp_path / kind, tiny_folders.target)
        )
        assert same.stdout == original.stdout

    def test_info_of_a_mesh(self, tiny_folders):
        report = json.loads(
            run("info", tiny_folders.target, "--context", 128, "--mesh", "data=3,heads=2", "--json").stdout
        )
        mesh = report["mesh"]
        assert mesh["devices"] == 6
        assert report["weight_bytes"] / 2 < mesh["weight_bytes"] < 0.8 * report["weight_bytes"]
        # A sequence for each of data. The vocabulary of 257 is whole on every device.
        assert mesh["cache_bytes"] == report["cache_bytes"] / 2
        assert "on 6 devices" in run("info", tiny_folders.target, "--mesh", "data=3,heads=2").stderr
        assert "heads is 4, but" in mistake("info", tiny_folders.target, "--mesh", "heads=4")

    def test_info(self, tiny_folders):
        report = json.loads(run("info", tiny_folders.target, "--context", 100, "--dtype", "bfloat16", "--json").stdout)
        assert report["format"] == "hf"
        assert report["config"]["num_layers"] == 3
        assert report["weight_bytes"] == 2 * report["parameters"]
        assert report["cache_bytes"] == 2 * 3 * 2 * 100 * 8 * 2
        assert report["tokenizer"]["tokens"] == 257
        assert report["devices"]
        assert report["kernels"]["select_blocks"]["name"] == "xla"
        assert "on a CPU" in report["kernels"]["decode_attention"]["reason"]
        shown = run("info", tiny_folders.target).stderr
        assert "xla for decode_attention, sparse_decode_attention, score_cache" in shown
        assert "3 layers" in shown
        assert "256 tokens" in shown

    @pytest.mark.smollm2
    def test_the_embedded_preset(self):
        if not is_cached(get_preset("smollm2").target):
            pytest.skip("the embedded model is not here; run `specattn fetch smollm2`")
        places = json.loads(run("fetch", "smollm2", "--json").stdout)
        assert places["target"].endswith(".gguf")
        report = json.loads(run("info", "smollm2", "--json").stdout)
        assert report["config"]["num_layers"] == 30
        assert report["tokenizer"]["chat_template"]


class TestProgram:
    """The installed command in a process of its own."""

    def test_nothing_but_ours_on_either_stream(self, tiny_folders, tmp_path):
        code = "from specattn_jax.cli import main; main()"
        pair = ["--target", tiny_folders.target, "--draft", tiny_folders.draft, "--mode", "autoregressive"]
        arguments = ["generate", *pair, "--prompt", PROMPT, "--max-new-tokens", "8"]
        environment = {**os.environ, "SPECATTN_CACHE": str(tmp_path), "PYTHONWARNINGS": "default"}
        # Who runs the tests may have a cache of their own.
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, env=environment)
        assert done.returncode == 0
        names = [line.split("  ")[0] for line in done.stderr.decode().splitlines()]
        assert names == ["mode", "tokens", "speed", "time"]
        assert (tmp_path / "xla").is_dir()


def test_books_for_calibration_are_shipped():
    assert len(shipped_books("train")) >= 3
