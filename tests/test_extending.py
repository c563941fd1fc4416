"""A strategy and a selection of one's own: one class each, nothing changed elsewhere, and they run everywhere."""

from __future__ import annotations

import dataclasses
import inspect
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Int32, Key
from specattn_kernels import select_blocks
from tiny import outputs, run, start

from specattn_jax.decoding.autoregressive import Autoregressive
from specattn_jax.decoding.protocol import DecodeSettings, Models, WindowRecord, newest, next_keys
from specattn_jax.decoding.sampling import Sampling, Verdict, verify
from specattn_jax.decoding.speculative import SpecAttn
from specattn_jax.decoding.state import DecodeState, commit
from specattn_jax.decoding.work import Drafter, Scenario, Work
from specattn_jax.evaluation.forced import read_documents
from specattn_jax.examples import tiny_pair
from specattn_jax.models.cache import KVCache
from specattn_jax.models.config import ModelConfig
from specattn_jax.models.forward import forward
from specattn_jax.runtime.generate import generate
from specattn_jax.runtime.request import Request
from specattn_jax.runtime.session import Session
from specattn_jax.selection.protocol import LayerChoice, Opened, Opening, Seen, Undrafted
from specattn_jax.selection.reads import attend_as_chosen, layer_shares, past_mask

PROMPTS = ["Call me Ishmael.", "Once upon a time there was a cache"]
NEW_TOKENS, MOST_LINES = 60, 40


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Lookup:
    """Drafts what followed the last two tokens when they were written before; the target verifies it densely."""

    settings: DecodeSettings = dataclasses.field(default_factory=DecodeSettings)
    window: int = 4
    name: ClassVar[str] = "lookup"
    needs_draft: ClassVar[bool] = False
    needs_text: ClassVar[bool] = False
    drafter: ClassVar[Drafter] = Drafter.TEXT
    lossless: ClassVar[bool] = True

    def start(self, models: Models, state: DecodeState) -> DecodeState:
        return dataclasses.replace(state, draft_cache=None, own=())

    def draft(self, state: DecodeState) -> Int32[Array, "B W"]:
        place, before = jnp.arange(1, state.output.shape[1]), state.output[:, :-1]
        same = (before == state.last[:, :1]) & (state.output[:, 1:] == state.last[:, 1:])
        found = jnp.max(jnp.where(same & (place < state.emitted[:, None] - 1), place, 0), axis=1)
        return jnp.take_along_axis(state.output, found[:, None] + 1 + jnp.arange(self.window), axis=1)

    def step(self, models: Models, state: DecodeState) -> tuple[DecodeState, WindowRecord]:
        for_verdict, later = next_keys(state, 2)
        past, drafted = state.target_cache.lengths, self.draft(state)
        tokens = jnp.concatenate([newest(state), drafted], axis=1)
        read = forward(models.target, tokens, state.target_cache, attend_as_chosen(None))
        logits = models.target.logits(read.hidden)
        verdict = verify(
            for_verdict, drafted, jax.nn.one_hot(drafted, logits.shape[-1]), logits, self.settings.sampling
        )
        seen = Seen(past, ~state.done, read.notes, read.cache.at(past))
        state, shares = dataclasses.replace(state, target_cache=seen.cache, keys=later), layer_shares(seen)
        state = commit(state, verdict, shares, drafted=self.window, stop_tokens=self.settings.stop_tokens)
        return state, WindowRecord(seen, shares, read.hidden, verdict)

    def cost(self, scenario: Scenario) -> Work:
        return Work(tokens=scenario.accepted + 1.0, verified=self.window + 1)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Scattered(Undrafted):
    """The target reads the newest entries, and of the others some by chance, different ones in every window."""

    target: ModelConfig
    share: float = 0.3
    recent: int = 4

    def init(self, opening: Opening) -> Opened:
        return opening.opened(jax.random.key(0))

    def plan(
        self, state: Key[Array, ""], draft_cache: KVCache | None, past: Int32[Array, " B"]
    ) -> tuple[tuple[LayerChoice, ...], Key[Array, ""]]:
        now, later = jax.random.split(state)
        layers, heads = self.target.num_layers, self.target.num_kv_heads
        chance = jax.random.uniform(now, (past.shape[0], layers, heads, draft_cache.num_slots))
        share = jnp.full((past.shape[0], 1, 1), self.share)
        plan = select_blocks(chance, share, past, num_recent=self.recent, measure="count")
        return tuple(plan.at_layer(layer) for layer in range(layers)), later

    def learn(self, state: Key[Array, ""], seen: Seen) -> Key[Array, ""]:
        return state


@pytest.mark.parametrize("kind", [Lookup, Scattered])
def test_either_is_one_short_class(kind):
    assert len(inspect.getsource(kind).splitlines()) <= MOST_LINES


@pytest.fixture(scope="module")
def alone():
    """What the target writes by itself."""
    found = generate(tiny_pair(), PROMPTS, mode="autoregressive", max_new_tokens=NEW_TOKENS)
    return [result.tokens for result in found.results]


class TestStrategy:
    def test_through_generate(self, alone):
        pieces = ["", ""]

        def write(index, text):
            pieces[index] += text

        strategy = Lookup(DecodeSettings(stop_tokens=tiny_pair().tokenizer.eos_ids))
        found = generate(tiny_pair(), PROMPTS, Request(max_new_tokens=NEW_TOKENS, mode=strategy), on_text=write)
        assert [result.tokens for result in found.results] == alone
        assert [result.text for result in found.results] == pieces
        assert {(result.mode, result.window, result.kv_reduction) for result in found.results} == {("lookup", 4, 0.0)}
        assert found.results[0].lossless

    def test_through_the_loop(self):
        pair, prompts = tiny_pair(), [[7, 8, 9], [1, 2, 3, 4]]
        by_itself = outputs(run(Autoregressive(), pair.target, None, prompts, NEW_TOKENS))
        state = run(Lookup(), pair.target, None, prompts, NEW_TOKENS)
        assert outputs(state) == by_itself
        # Texts of a model that learnt nothing go in circles sooner or later.
        assert state.statistics.accepted.sum() > 0

    def test_watched(self):
        @jax.tree_util.register_static
        @dataclasses.dataclass(frozen=True)
        class KeepVerdicts:
            def __call__(self, record: WindowRecord) -> Verdict:
                return record.verdict

        session, strategy = Session(Models(tiny_pair().target)), Lookup(DecodeSettings(Sampling(1.0)))
        state, kept = session.watch(strategy, start(strategy, session, [[7, 8, 9]], NEW_TOKENS), 5, KeepVerdicts())
        assert kept.tokens.shape == (5, 1, 5)
        told = [kept.tokens[window, 0, : int(count) + 1] for window, count in enumerate(kept.accepted[:, 0])]
        assert outputs(state)[0][1:] == np.concatenate(told).tolist()


class TestSelection:
    # Here and below, each share compiles programs of its own.
    @pytest.mark.parametrize("share", [pytest.param(0.3, marks=pytest.mark.slow), 1.0])
    def test_through_generate(self, alone, share):
        pair = tiny_pair()
        settings = DecodeSettings(stop_tokens=pair.tokenizer.eos_ids)
        strategy = SpecAttn(Scattered(pair.target.config, share), settings)
        found = generate(pair, PROMPTS, mode=strategy, max_new_tokens=NEW_TOKENS)
        if share == 1.0:
            assert [result.tokens for result in found.results] == alone
        for result in found.results:
            assert result.kv_reduction == pytest.approx(1.0 - share, abs=0.15)

    def test_through_the_loop(self):
        @jax.tree_util.register_static
        @dataclasses.dataclass(frozen=True)
        class KeepReads:
            def __call__(self, record: WindowRecord) -> tuple[Array, Array]:
                past, _, layers, cache = record.seen
                return past, jnp.stack([past_mask(seen.plan, past, cache) for seen in layers])

        pair = tiny_pair()
        session, strategy = Session(Models(pair.target, pair.draft)), SpecAttn(Scattered(pair.target.config), window=2)
        state = start(strategy, session, [list(range(40)), list(range(30))], 20)
        _, (past, masks) = session.watch(strategy, state, 3, KeepReads())
        for window in range(3):
            for sequence in range(2):
                length = int(past[window, sequence])
                reads = np.asarray(masks[window, :, sequence])
                assert reads[..., length - 4 : length].all()
                assert not reads[..., length:].any()
                # By chance, and so differently in every layer and head.
                assert len({row.tobytes() for row in reads.reshape(-1, reads.shape[-1])}) > 1

    @pytest.mark.parametrize("share", [0.3, pytest.param(1.0, marks=pytest.mark.slow)])
    def test_through_the_evaluation(self, share):
        pair = tiny_pair()
        documents = np.random.default_rng(0).integers(0, 256, (2, 80)).tolist()
        dense = read_documents(pair.target, pair.draft, None, documents, window=3)
        found = read_documents(
            pair.target,
            pair.draft,
            Scattered(pair.target.config, share),
            documents,
            reference=dense.hidden,
            window=3,
        )
        if share < 1.0:
            assert found.kv_reduction == pytest.approx(1.0 - share, abs=0.15)
            assert found.kl.min() > 0
        else:
            assert found.kv_reduction == pytest.approx(0.0, abs=1e-6)
            np.testing.assert_allclose(found.nll, dense.nll, rtol=1e-5)
