"""Tasks: the unmodified harness on a tiny pair, answers and likelihoods against independent ones, resuming."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest
from command import run as command
from tiny import random_alignment, tiny_model
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from specattn_jax import generate
from specattn_jax.errors import UserError
from specattn_jax.evaluation.methods import FULL, SPECATTN, Case, Variant, fit_case, make_selection
from specattn_jax.evaluation.store import SETTINGS
from specattn_jax.evaluation.tasks import answering as answering_module
from specattn_jax.evaluation.tasks import run
from specattn_jax.evaluation.tasks.answering import LOSSLESS_MODES, SPECULATIVE, Answering, Asked
from specattn_jax.evaluation.tasks.likelihood import Continuation, likelihoods
from specattn_jax.evaluation.tasks.own import OWN_TASKS, make_samples
from specattn_jax.evaluation.tasks.report import averages, join_results, write_results
from specattn_jax.evaluation.tasks.run import RULER, TaskRun, TaskSettings, list_task_cases, open_task_store
from specattn_jax.examples import byte_tokenizer
from specattn_jax.loading.pair import ModelPair
from specattn_jax.loading.tokenizer import Tokenizer, make_tokenizer
from specattn_jax.models.cache import KVCache
from specattn_jax.models.forward import forward
from specattn_jax.models.transformer import LanguageModel
from specattn_jax.selection.policy import SelectionPolicy, load_policy, read_policies
from specattn_jax.texts import read_text, shipped_books

VOCABULARY = 1024
# What RULER's samples repeat. With more tokens its example of a chain of variables, of 500 tokens, is never made.
RULERS_PHRASES = [
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n",
    "Memorize and track the chain(s) of variable assignment hidden in the following text. VAR = VAR Question: Find all "
    "variables that are assigned the value in the text above. Answer: According to the chain(s) of variable assignment "
    "in the text above, 5 variables are assgined the value, they are: ",
    "One of the special magic uuids for is: One of the special magic numbers for is: ",
]
CHAT = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}<assistant>"
SPARSE = [Case(SPECATTN, "default", p=0.7), Case("quest", saving=0.5)]
LOSSLESS_CASES = [Case(FULL), Case(SPECULATIVE)]


def words_tokenizer() -> Tokenizer:
    """A tokenizer that has words: RULER's shortest samples are too long for one of bytes."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator([read_text(shipped_books("valid")[0])[:100_000], *RULERS_PHRASES * 50], trainer)
    return make_tokenizer(backend, {"eos_token": "<|endoftext|>"}, (), CHAT)


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    shape = {"vocab_size": VOCABULARY, "max_context": 2048}
    # The baselines read the first two layers whole.
    target, draft = tiny_model(0, num_layers=3, **shape), tiny_model(1, **shape)
    alignment = random_alignment(target.config, draft.config)
    return ModelPair("tiny target", "tiny draft", target, draft, words_tokenizer(), alignment)


@pytest.fixture
def harness():
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed; pip install 'specattn-jax[eval]'")
    from specattn_jax.evaluation.tasks import harness

    return harness


def prompts(pair: ModelPair, count: int, length: int = 60) -> list[tuple[int, ...]]:
    tokens = pair.encode(read_text(shipped_books("valid")[0])[20_000:30_000])
    return [tuple(tokens[at * 100 : at * 100 + length + 3 * at]) for at in range(count)]


@pytest.mark.slow
def test_answers_are_those_of_one_prompt_at_a_time(pair):
    asked = [Asked(tokens, 8) for tokens in prompts(pair, 5)]
    together = Answering(pair, [Case(FULL)], batch=2)(Case(FULL), asked)
    for one, result in zip(asked, together.results, strict=True):
        alone = generate(pair, [one.tokens], mode="autoregressive", max_new_tokens=one.limit).results[0]
        assert (result.tokens, result.text) == (alone.tokens, alone.text)
    assert len(together.seconds) == 3
    assert together.requests_per_minute > 0


def test_sparse_methods_answer_and_save_reads(pair):
    asked = [Asked(tokens, 12) for tokens in prompts(pair, 2)]
    answering = Answering(pair, SPARSE, batch=2)
    for case in SPARSE:
        found = answering(case, asked)
        assert all(0 < one.kv_reduction < 1 and one.windows > 1 for one in found.results), case


@jax.jit
def whole_logits(target: LanguageModel, tokens: jax.Array, cache: KVCache) -> jax.Array:
    return target.logits(forward(target, tokens, cache).hidden)


def reference(pair: ModelPair, one: Continuation) -> tuple[float, bool]:
    """The whole text in one pass, in float64 from the logits on."""
    # One shape for all, so that it compiles once.
    tokens = np.zeros((1, 128), np.int32)
    tokens[0, : len(one.tokens)] = one.tokens
    cache = KVCache.empty(pair.target.config, 1, 128, pair.target.dtype)
    logits = np.asarray(whole_logits(pair.target, jax.numpy.asarray(tokens), cache), np.float64)
    log_probs = logits[0] - np.log(np.exp(logits[0] - logits[0].max(-1, keepdims=True)).sum(-1, keepdims=True))
    log_probs -= logits[0].max(-1, keepdims=True)
    places = np.arange(one.first, len(one.tokens))
    given = tokens[0, places]
    chosen = log_probs[places - 1]
    return float(chosen[np.arange(len(places)), given].sum()), bool((chosen.argmax(-1) == given).all())


def test_likelihoods_are_sums_of_log_probabilities(pair):
    asked = [Continuation(list(tokens), first) for tokens, first in zip(prompts(pair, 3), (1, 20, 58), strict=True)]
    for one, found in zip(asked, likelihoods(pair, Case(FULL), asked, batch=2), strict=True):
        wanted, greedy = reference(pair, one)
        assert found.log_prob == pytest.approx(wanted, abs=1e-3)
        assert found.greedy == greedy


@pytest.mark.slow
def test_a_sparse_method_that_reads_everything_is_as_likely(pair):
    asked = [Continuation(list(tokens), first) for tokens, first in zip(prompts(pair, 3), (1, 2, 50), strict=True)]
    everything = Case(SPECATTN, "default", p=1.0)
    for one, found in zip(asked, likelihoods(pair, everything, asked, batch=3), strict=True):
        assert found.log_prob == pytest.approx(reference(pair, one)[0], abs=1e-3)
    less = likelihoods(pair, Case("streaming", saving=0.8), asked, batch=3)
    assert abs(less[2].log_prob - reference(pair, asked[2])[0]) > 1e-3


@pytest.fixture
def few_words(monkeypatch):
    """RULER multiplies all nouns with all adjectives when it is imported, which takes half a minute."""
    wonderwords = pytest.importorskip("wonderwords")
    make = wonderwords.RandomWord.__init__

    def trimmed(self, *arguments, **options):
        make(self, *arguments, **options)
        self._categories = {name: list(words)[:300] for name, words in self._categories.items()}

    monkeypatch.setattr(wonderwords.RandomWord, "__init__", trimmed)


# The shortest of RULER's, with caches for so many tokens, whatever the prompt, so that all tasks share their programs.
LENGTH = 1024


@pytest.mark.parametrize("cases", [SPARSE[:1], pytest.param([*LOSSLESS_CASES, SPARSE[0]], marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")
def test_the_harness_runs_rulers_offline_tasks(harness, few_words, pair, cases):
    from specattn_jax.evaluation.tasks.ruler import load_task, run_task

    for name in RULER:
        task, found = load_task(name, LENGTH, pair.tokenizer, 1), {}
        assert len(task.dataset["test"]) == 1
        answering = Answering(pair, cases, slots=LENGTH)
        for case in cases:
            model = harness.SpecAttnLM(pair, case, answering=answering)
            scored = found[case.method] = run_task(model, name, task, LENGTH, 1)
            assert len(scored.scores) == 1
            assert all(0 <= score <= 1 for score in scored.scores)
            assert scored.texts == [one.text for one in model.answers.results]
            assert all((one.kv_reduction > 0) == (case in SPARSE) for one in model.answers.results)
        assert found.get(FULL) == found.get(SPECULATIVE)


def test_lossless_modes_answer_as_full_attention_does(pair):
    cases = [Case(FULL), *map(Case, LOSSLESS_MODES)]
    asked = [Asked(tuple(tokens), 20) for tokens in prompts(pair, 3)]
    answering = Answering(pair, cases, batch=2)
    full = [one.tokens for one in answering(Case(FULL), asked).results]
    for case in cases[1:]:
        found = answering(case, asked).results
        assert {one.mode for one in found} == {case.method}
        assert [one.tokens for one in found] == full


def test_what_the_harness_would_look_for_for_ever_is_refused(harness):
    from specattn_jax.evaluation.tasks.ruler import load_task

    with pytest.raises(UserError, match="lengths names 500; expected at least 1024"):
        load_task("ruler_vt", 500, words_tokenizer(), 1)
    with pytest.raises(UserError, match="cuts 750 letters into 750 tokens"):
        load_task("ruler_vt", 2000, byte_tokenizer(), 1)


@dataclasses.dataclass(frozen=True)
class Call:
    """A request as the harness hands it over."""

    args: tuple[object, ...]


def test_the_adapter_answers_as_the_harness_asks(harness, pair):
    model = harness.SpecAttnLM(pair, Case(FULL), batch_size=2)
    settings = {"until": ["e"], "max_gen_toks": 12, "do_sample": False}
    texts = [pair.tokenizer.decode(tokens) for tokens in prompts(pair, 2)]
    for text, given in zip(texts, model.generate_until([Call((text, settings)) for text in texts]), strict=True):
        whole = generate(pair, [text], mode="autoregressive", max_new_tokens=12).results[0].text
        assert given == whole.split("e")[0]
    long = model.ask("word " * 3000, {"max_gen_toks": 24})
    assert len(long.tokens) == model.max_length - 24
    assert model.ask("a", {"temperature": 0.5, "until": "x"}).sampling.temperature == 0.5
    assert model.ask("a", {"temperature": 0.5, "do_sample": False}).sampling.temperature == 0.0
    history = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "It was"}]
    assert model.apply_chat_template(history[:1]) == "<user>Who?<assistant>"
    assert model.apply_chat_template(history, add_generation_prompt=False) == "<user>Who?<assistant>It was"


def test_the_adapter_scores_as_the_harness_asks(harness, pair):
    model = harness.SpecAttnLM(pair, Case(FULL), batch_size=2)
    text = pair.tokenizer.decode(prompts(pair, 1)[0])
    (scored,) = model.loglikelihood([Call((text, " and then"))])
    tokens = model.tok_encode(text + " and then")
    first = len(model.tok_encode(text))
    assert scored[0] == pytest.approx(reference(pair, Continuation(tokens, first))[0], abs=1e-3)
    (rolling,) = model.loglikelihood_rolling([Call((text,))])
    whole = Continuation([model.prefix_token_id, *model.tok_encode(text)], 1)
    assert rolling == pytest.approx(reference(pair, whole)[0], abs=1e-3)


def test_the_adapter_is_made_from_arguments(harness, tiny_folders):
    arguments = f"target={tiny_folders.target},draft={tiny_folders.draft},alignment={tiny_folders.alignment}"
    model = harness.SpecAttnLM.create_from_arg_string(f"{arguments},mode=specattn,kv_reduction=0.5", {"batch_size": 4})
    assert (model.case, model.batch_size) == (Case(SPECATTN, "default", saving=0.5), 4)
    assert harness.SpecAttnLM.create_from_arg_string(f"{arguments},mode=autoregressive").case == Case(FULL)
    for wrong, message in {"mode=fast": "mode is 'fast'", "speed=1": "model_args names speed"}.items():
        with pytest.raises(UserError, match=message):
            harness.SpecAttnLM.create_from_arg_string(f"{arguments},{wrong}")


@pytest.mark.parametrize("name", OWN_TASKS)
def test_own_samples_fit_and_know_their_answer(name):
    tokenizer, task = words_tokenizer(), OWN_TASKS[name]
    for sample in make_samples(name, 1000, 3, tokenizer):
        assert len(tokenizer.encode(sample.prompt)) + sample.limit <= 1000
        assert set(task.score(sample, "\n".join(sample.wanted)).values()) == {1.0}
        assert set(task.score(sample, "nothing of it").values()) != {1.0}
        for wanted in sample.wanted if "needle" in name else ():
            assert wanted.split(": ")[-1] in sample.prompt
    assert make_samples(name, 1000, 3, tokenizer) == make_samples(name, 1000, 3, tokenizer)


def test_a_length_without_room_is_refused():
    with pytest.raises(UserError, match="length is 340, which has no room"):
        make_samples("book_needles_all", 340, 1, words_tokenizer())


# Each method compiles its programs for a while.
@pytest.mark.parametrize(
    "methods", [("full", "specattn"), pytest.param(("full", "speculative", "specattn"), marks=pytest.mark.slow)]
)
def test_tasks_go_on_where_they_stopped(pair, tmp_path, monkeypatch, methods):
    settings = TaskSettings(samples=2, batch=2)
    cases = list_task_cases(methods, ["default"], masses=[0.7])
    store = open_task_store(tmp_path / "run", pair, settings)
    first = TaskRun(pair, settings, store).run(["book_needle"], [500], cases)
    told = []
    again = TaskRun(pair, settings, store, lambda done, total, cell, result: told.append((done, total, result)))
    # Nothing is answered a second time.
    monkeypatch.setattr(Answering, "__call__", None)
    assert again.run(["book_needle"], [500], cases) == first
    assert told[-1] == (len(methods), len(methods), "")
    full, *speculative, sparse = first
    fitted = [fit_case(pair, case, context=500, batch=2) for case in cases]
    assert [row["draft_reads"] for row in first] == [case.draft_reads for case in fitted]
    kept = [store.load(f"book_needle-500-{case.key}", case.describe()) for case in fitted]
    for other, row in zip(kept[1:-1], speculative, strict=True):
        assert other["texts"] == kept[0]["texts"]
        assert row["score"] == full["score"]
    assert full["prompts"] == sparse["prompts"]
    assert sparse["kv_reduction"] > 0 == full["kv_reduction"]
    write_results(tmp_path / "run", first, "Tiny models.", {"samples": 2})
    assert json.loads((tmp_path / "run" / "table.json").read_text()) == first
    assert "| book_needle | 500 | full | 0.0% |" in (tmp_path / "run" / "table.md").read_text()


def test_an_experiment_is_a_row_of_its_own(pair, tmp_path):
    file = tmp_path / "variants.toml"
    file.write_text('[whole]\nprediction = "mixture"\nnum_sink = 2\n')
    policies, other = read_policies(file), random_alignment(pair.target.config, pair.draft.config, seed=1)
    assert policies == {"whole": SelectionPolicy("mixture", num_sink=2)}
    usual = Case(SPECATTN, "default", saving=0.75)
    cases = [
        dataclasses.replace(usual, policy="whole", variant=Variant(policies["whole"])),
        dataclasses.replace(usual, alignment="other", variant=Variant(alignment=other)),
    ]
    assert [case.line for case in cases] == ["specattn whole", "specattn default other"]
    assert len({case.key for case in [usual, *cases]}) == 3
    assert cases[0].describe() == {**usual.describe(), "policy": dataclasses.asdict(policies["whole"])}
    # The pair's own alignment is named by the folder, the others by each of their files.
    assert cases[1].describe().keys() - usual.describe().keys() == {"alignment"}
    selections = [make_selection(pair, case) for case in [usual, *cases]]
    expected = [("default", pair.alignment), ("whole", pair.alignment), ("default", other)]
    for selection, (policy, alignment) in zip(selections, expected, strict=True):
        assert selection.policy == (policies.get(policy) or load_policy(policy))
        assert selection.alignment is alignment
    file.write_text('[whole]\nprediction = "mixture"\nspeed = 2\n')
    with pytest.raises(UserError, match=r"variants\.toml: is damaged .*speed"):
        read_policies(file)


def test_the_reach_of_the_draft_belongs_to_the_results(pair, tmp_path, monkeypatch):
    stores = {}
    for reach in (4096, None):
        settings = TaskSettings(samples=1, draft_reach=reach)
        stores[reach] = open_task_store(tmp_path / str(reach), pair, settings)
        stores[reach].save("part", {}, {})
    # Folders from before there was a choice have no such entry.
    assert "draft_reach" not in json.loads((tmp_path / "4096" / SETTINGS).read_text())
    with pytest.raises(UserError, match="draft_reach differ"):
        open_task_store(tmp_path / "None", pair, TaskSettings(samples=1))

    def ask(pair, prompts, request, memory):
        raise UserError(f"the draft sees {request.draft_reach}")

    monkeypatch.setattr(answering_module, "generate", ask)
    settings = TaskSettings(samples=1, draft_reach=None)
    with pytest.raises(UserError, match="the draft sees None"):
        TaskRun(pair, settings, stores[None]).run(["book_needle"], [500], [Case(FULL)])


def row(task, line, **changes):
    numbers = dict.fromkeys(("p", "wanted_kv_reduction", "score_se", "requests_per_minute"))
    means = dict.fromkeys(("kv_reduction", "score", "new_tokens", "windows", "accepted_per_window"), 0.5)
    return {"task": task, "length": 500, "line": line, "prompts": task, **numbers, **means, **changes}


def test_results_of_several_processes_make_one_table(tmp_path):
    first = [row("book_needle", "full"), row("book_copy", "full")]
    second = [row("book_copy", "full", score=0.25), row("book_copy", "quest"), row("book_needle", "full", length=400)]
    for name, rows in {"first": first, "second": second}.items():
        write_results(tmp_path / name, rows, "Tiny models.", {"name": name})
    joined = join_results([tmp_path / "first", tmp_path / "second"], tmp_path / "all")
    assert joined == [second[2], *first, second[1]]
    assert json.loads((tmp_path / "all" / "table.json").read_text()) == joined
    assert (tmp_path / "all" / "table.md").read_text().startswith("Tiny models.\n")
    runs = json.loads((tmp_path / "all" / "run.json").read_text())["joined"]
    assert [run["command"]["name"] for run in runs] == ["first", "second"]
    write_results(tmp_path / "other", [row("book_copy", "streaming", prompts="others")], "Tiny models.", {})
    with pytest.raises(UserError, match="book_copy at 500 tokens has different questions"):
        join_results([tmp_path / "first", tmp_path / "other"], tmp_path / "all")
    with pytest.raises(UserError, match="name folders with finished results"):
        join_results([tmp_path / "nothing"], tmp_path / "all")


def test_means_are_over_tasks_that_all_methods_of_a_length_answered():
    rows = [
        row("book_needle", "full", score=1.0),
        row("book_copy", "full", score=0.0),
        row("book_needle", "quest", score=0.5),
        row("book_copy", "full", length=400, score=0.25),
    ]
    assert [(label, length, score) for label, length, score, _ in averages(rows)] == [
        ("full", 500, 1.0),
        ("quest", 500, 0.5),
        ("full", 400, 0.25),
    ]


def test_missing_packages_are_named_with_what_installs_them(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "nltk" else object())
    with pytest.raises(UserError, match=r"nltk is not installed; run `pip install 'specattn-jax\[eval\]'`"):
        run.check_tasks(["ruler_vt"])
    run.check_tasks(["book_copy"])
    with pytest.raises(UserError, match="tasks names 'chess'"):
        run.check_tasks(["chess"])


def test_the_command_says_what_is_wrong(tiny_folders, tmp_path):
    models = ["--target", str(tiny_folders.target), "--draft", str(tiny_folders.draft)]
    wrong = {
        "tasks names 'chess'": ["--tasks", "chess"],
        "methods names 'magic'": ["--tasks", "own", "--methods", "magic"],
        "--lengths names 0.5": ["--tasks", "own", "--lengths", "0.5"],
        "--lengths is ''; expected numbers": ["--tasks", "own", "--lengths", ""],
        "--kv-reduction is ' ,'; expected numbers": ["--tasks", "own", "--kv-reduction", " ,"],
        "--p is ''; expected numbers": ["--tasks", "own", "--p", ""],
        "lengths names 4096": ["--tasks", "own", "--methods", "full"],
        "length is 256, which has no room": ["--tasks", "own", "--methods", "full", "--lengths", "256"],
    }
    for message, arguments in wrong.items():
        result = command(*["tasks", "--out", str(tmp_path / "out"), *models, *arguments])
        assert (result.exit_code, message in result.stderr) == (1, True), result.stderr
    assert not (tmp_path / "out").exists()
