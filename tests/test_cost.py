"""The cost model against counts by hand, and the table of the README against the cost model."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import pytest
from command import mistake, run

from specattn_jax.decoding.autoregressive import Autoregressive
from specattn_jax.decoding.itself import SelfSpeculative
from specattn_jax.decoding.protocol import Strategy
from specattn_jax.decoding.speculative import SpecAttn, Speculative
from specattn_jax.decoding.work import Scenario
from specattn_jax.errors import UserError
from specattn_jax.loading import draft_reference, resolve
from specattn_jax.models.sharding import MeshShape
from specattn_jax.models.transformer import abstract_model
from specattn_jax.planning.cost import WindowBytes, load_shape, shape_names, speedup, weights_read, window_bytes
from specattn_jax.planning.device import load_profile, window_seconds
from specattn_jax.planning.mesh import H100_COPY, predict_mesh, share
from specattn_jax.planning.mesh_choice import Wanted, choose_mesh, default_mesh
from specattn_jax.selection.policy import load_policy

LLAMA = Scenario(load_shape("llama-3.1-8b"), load_shape("llama-3.2-1b"), batch=8)
DRAFT_READS = load_policy("default").draft_reads
PAGE = Path(__file__).parents[1] / "docs" / "choosing_a_mode.md"
ALONE, DENSE, SPARSE = Autoregressive(), Speculative(), SpecAttn()
PAIRS = {
    "Llama-3.2-1B / 3.1-8B": ("llama-3.1-8b", "llama-3.2-1b"),
    "TinyLlama-1.1B / Llama-2-7B": ("llama-2-7b", "tinyllama-1.1b"),
    "SmolLM2-135M, our draft": ("smollm2-135m", "smollm2-draft"),
}


def moved(scenario: Scenario, strategy: Strategy) -> WindowBytes:
    return window_bytes(scenario, strategy.cost(scenario))


@pytest.mark.parametrize("name", shape_names())
def test_shapes_have_the_weights_that_the_model_has(name):
    config = load_shape(name)
    leaves = jax.tree.leaves(abstract_model(config, "bfloat16").params)
    assert sum(leaf.size for leaf in leaves) == config.parameter_count()
    wanted = {
        "llama-3.1-70b": 70.55,
        "llama-3.1-8b": 8.03,
        "llama-3.2-1b": 1.236,
        "llama-2-7b": 6.738,
        "tinyllama-1.1b": 1.1,
        "smollm2-135m": 0.1345,
    }
    if name in wanted:
        assert config.parameter_count() / 1e9 == pytest.approx(wanted[name], rel=2e-3)


@pytest.mark.smollm2
def test_the_shapes_of_the_embedded_pair_are_its_own():
    assert load_shape("smollm2-135m") == resolve("smollm2").config
    assert load_shape("smollm2-draft") == resolve(draft_reference("default", "smollm2")).config


def test_bytes_by_hand():
    dense = moved(LLAMA, DENSE)
    assert dense.target_cache == 2 * 32 * 8 * 8 * 32768 * 128 * 2
    assert dense.draft_cache == 5 * 2 * 16 * 8 * 8 * 32768 * 64 * 2
    assert dense.target_weights == 2 * (8030261248 - 128256 * 4096)
    assert dense.draft_weights == 5 * 2 * weights_read(LLAMA.draft)
    assert weights_read(LLAMA.draft) == LLAMA.draft.parameter_count()
    sparse = moved(LLAMA, SPARSE)
    assert sparse.target_cache == dense.target_cache / 4
    sources, rows = 16 * 8, 32 * 8
    keys = dense.draft_cache / 5 / 2
    # Groups of four query heads: of a quarter of the entries four logits are written and read, and one number noted.
    remembered = 6 * rows + rows * 2 * (2 * 4 + 1) / 4
    once = 6 * sources + 2 * (sources + rows) + 4 * rows + 8 * rows / 4 + remembered
    assert sparse.selection == keys + 8 * 32768 * once
    assert moved(LLAMA, ALONE)._replace(target_weights=0, target_cache=0).total == 0
    assert speedup(LLAMA, SPARSE, over=DENSE) == pytest.approx(dense.total / sparse.total)
    assert SPARSE.cost(LLAMA).tokens == 4.5
    often, seldom = (moved(LLAMA, SelfSpeculative(every=every)) for every in (1, 4))
    assert often.selection == 4 * seldom.selection > dense.target_cache / 2
    assert often._replace(selection=0) == seldom._replace(selection=0)


def test_a_draft_that_reads_sparsely():
    dense, sparse = (moved(LLAMA._replace(draft_reads=share), SPARSE) for share in (1.0, 0.25))
    assert dense.draft_cache == moved(LLAMA, DENSE).draft_cache
    assert sparse.draft_cache == dense.draft_cache / 4
    sources = 16 * 8
    own = 4 * sources + 4 * 6 * sources / 4
    assert sparse.selection - dense.selection == 8 * 32768 * own
    # A short cache is read whole.
    short = moved(LLAMA._replace(draft_reads=0.25, context=512), SPARSE).draft_cache
    assert short == 5 * LLAMA.draft.cache_bytes(8, 512, 2) / 2
    # Only what is sparse anyway.
    plain, other = (moved(LLAMA._replace(draft_reads=share), DENSE) for share in (1.0, 0.25))
    assert plain == other


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"draft_reads": 0.0}, "draft_reads is 0.0"),
        ({"batch": 0}, "batch is 0"),
        ({"accepted": 6.0}, "accepted is 6.0; expected 0 to the window's 5"),
        ({"kv_reduction": 1.5}, "kv_reduction is 1.5"),
    ],
)
def test_numbers_that_mean_nothing(change, said):
    with pytest.raises(UserError, match=said):
        moved(LLAMA._replace(**change), SPARSE)


def test_names_that_are_not_known():
    with pytest.raises(UserError, match=r"shape is 'gpt'; expected one of llama-3\.1-8b"):
        load_shape("gpt")


def test_the_table_of_the_documentation():
    """Each row: pair, batch, context, then specattn over dense speculative and over autoregressive decoding."""
    rows = re.findall(
        r"^\| ([^|]+) \| (\d+) \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE.read_text(), re.M
    )
    assert len(rows) >= 10
    for pair, batch, context, *ratios in rows:
        target, draft = (load_shape(name) for name in PAIRS[pair])
        scenario = Scenario(target, draft, int(batch), int(context.replace(",", "")), draft_reads=DRAFT_READS)
        want = [
            speedup(scenario, DENSE, over=ALONE),
            speedup(scenario, SPARSE, over=DENSE),
            speedup(scenario, SPARSE, over=ALONE),
        ]
        assert ratios == [f"{ratio:.2f}" for ratio in want]


def test_command():
    given = ("estimate", "--target", "llama-3.1-8b", "--draft", "llama-3.2-1b", "--batch", "8")
    report = json.loads(run(*given, "--context", "2048,32768", "--json").stdout)
    assert [row["context"] for row in report["rows"]] == [2048, 32768]
    assert report["draft_reads"] == DRAFT_READS
    shipped = LLAMA._replace(draft_reads=DRAFT_READS)
    assert report["rows"][1]["specattn_over_speculative"] == pytest.approx(speedup(shipped, SPARSE, over=DENSE))
    dense = json.loads(run(*given, "--context", "32768", "--draft-reads", "1", "--json").stdout)["rows"][0]
    assert dense["specattn_over_speculative"] == pytest.approx(speedup(LLAMA, SPARSE, over=DENSE))
    assert "whole numbers" in mistake(*given, "--context", "8k")
    assert "accepted is 9" in mistake(*given, "--accepted", "9")


@pytest.mark.parametrize(
    ("pair", "batch", "strategy"),
    [("smollm2", 1, ALONE), ("smollm2", 1, DENSE), ("qwen2.5-coder", 16, ALONE), ("qwen2.5-coder", 32, ALONE)],
)
def test_windows_that_nothing_was_fitted_to(pair, batch, strategy):
    """Real weights on an H100: the constants are those of other runs, and for the embedded pair of other models."""
    path = Path(__file__).parents[1] / "scripts" / "results" / "request-real-nvidia-h100" / "request.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    wanted = pair, batch, strategy.name
    (point,) = [
        one for one in report["points"] if (one["case"]["target"], one["case"]["batch"], one["method"]) == wanted
    ]
    shapes = {
        "smollm2": ("smollm2-135m", "smollm2-draft"),
        "qwen2.5-coder": ("qwen2.5-coder-1.5b", "qwen2.5-coder-0.5b"),
    }
    target, draft = map(load_shape, shapes[pair])
    scenario = Scenario(target, draft, batch, context=point["prompt_tokens"] + point["case"]["room"] // 2)
    profile = load_profile("gpu", bandwidth=report["copy_bytes_per_second"])
    predicted = window_seconds(scenario, strategy.cost(scenario), profile).total
    assert predicted == pytest.approx(point["window_seconds"], rel=0.1)


class TestMesh:
    SCENARIO = Scenario(load_shape("llama-3.1-70b"), load_shape("llama-3.1-8b"), batch=8, draft_reads=0.1)

    def test_one_device_waits_for_nobody(self):
        profile = load_profile("gpu", bandwidth=H100_COPY)
        assert share(self.SCENARIO, profile, MeshShape(), whole_draft=True) == (self.SCENARIO, profile)

    def test_sequences_share_caches_and_heads_share_all(self):
        profile = dataclasses.replace(load_profile("gpu", bandwidth=H100_COPY), link_latency_s=0.0, link_bandwidth=1e30)
        work = SpecAttn().cost(self.SCENARIO)
        whole = window_bytes(self.SCENARIO, work)
        data, heads = (
            share(self.SCENARIO, profile, shape, whole_draft=False).scenario
            for shape in (MeshShape(data=2), MeshShape(heads=2))
        )
        halves = window_bytes(data, work)
        assert halves.target_cache == whole.target_cache / 2
        assert halves.target_weights == whole.target_weights
        halves = window_bytes(heads, work)
        assert halves.target_cache == whole.target_cache / 2
        assert halves.draft_cache == whole.draft_cache / 2
        # Norms are whole everywhere.
        assert halves.target_weights == pytest.approx(whole.target_weights / 2, rel=1e-3)

    @pytest.mark.slow
    def test_devices_that_meet_slowly_gain_little(self):
        fast, slow = (
            dataclasses.replace(load_profile("gpu", bandwidth=H100_COPY), link_latency_s=seconds)
            for seconds in (1e-6, 1e-3)
        )
        times = [
            predict_mesh(self.SCENARIO, "heads=8", profile)["window_seconds"]["specattn"] for profile in (fast, slow)
        ]
        assert times[1] > times[0] + 2 * 80 * 0.9e-3

    @pytest.mark.slow
    def test_the_table_of_the_documentation(self):
        page = (Path(__file__).parents[1] / "docs" / "devices.md").read_text(encoding="utf-8")
        for mesh in ("heads=4", "data=2,heads=4", "heads=8"):
            found = predict_mesh(self.SCENARIO, mesh)
            held = [f"{found[name] / 2**30:.1f}" for name in ("weight_bytes", "cache_bytes")]
            times = [
                f"{found['window_seconds'][name] * 1e3:.1f}" for name in ("autoregressive", "speculative", "specattn")
            ]
            speeds = [f"{found['tokens_per_second'][name]:.0f}" for name in ("speculative", "specattn")]
            cells = [f"`{mesh}`", str(found["devices"]), *held, *times, *speeds]
            assert f"| {' | '.join(cells)} |" in page, cells


class TestChoiceOfMesh:
    """What is taken where nobody says which devices."""

    H100 = load_profile("gpu", bandwidth=2.46e12)
    LARGE, SMALL = load_shape("llama-3.1-8b"), load_shape("llama-3.2-1b")

    def choose(self, wanted, devices, *, target=LARGE, draft=SMALL, **more):
        return choose_mesh(target, draft, Wanted(*wanted), devices, self.H100, **more)

    def test_long_prompts_share_heads_and_many_sequences_too(self):
        assert self.choose((1, 32_000, 256), 2) == MeshShape(heads=2)
        assert self.choose((8, 32_000, 256), 4).devices == 4

    def test_a_small_model_stays_on_one_device(self):
        tiny = dataclasses.replace(self.SMALL, num_layers=30, embed_dim=576, mlp_dim=1536, num_heads=8, head_dim=64)
        assert self.choose((1, 100, 64), 8, target=tiny, draft=None) == MeshShape()

    def test_what_one_device_cannot_hold(self):
        giant = load_shape("llama-3.1-70b")
        assert self.choose((1, 8192, 64), 8, target=giant, draft=self.LARGE, room=75e9).heads >= 4
        # Even with all of them there is no room: loading says so, about the best that can be had.
        assert self.choose((1, 8192, 64), 2, target=giant, draft=self.LARGE, room=75e9) == MeshShape(heads=2)

    @pytest.mark.parametrize(("batch", "devices"), [(3, 8), (5, 7), (1, 3)])
    def test_it_divides_heads_and_sequences(self, batch, devices):
        shape = self.choose((batch, 8192, 128), devices)
        assert batch % shape.data == 0
        assert self.LARGE.num_kv_heads % shape.heads == 0
        assert shape.devices <= devices

    def test_nothing_is_asked_where_there_is_one_device_or_a_cpu(self):
        assert default_mesh("no such model", "default", "auto", Wanted(1, 100, 10)) is None
