"""Our models for lm-evaluation-harness; it finds them as `specattn` once this module is imported.

`python -m specattn_jax.evaluation.tasks` is the harness' own command with this module imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string

from specattn_jax.decoding.sampling import Sampling
from specattn_jax.errors import UserError
from specattn_jax.evaluation.methods import FULL, METHODS, SPECATTN, Case, list_cases
from specattn_jax.evaluation.tasks.answering import LOSSLESS, LOSSLESS_MODES, Answering, Answers, Asked, needs_draft
from specattn_jax.evaluation.tasks.likelihood import Continuation, likelihoods
from specattn_jax.loading.pair import ModelPair, load_pair
from specattn_jax.runtime.request import DEFAULT_KV_REDUCTION, DEFAULT_WINDOW

# Where a task does not say; the harness' own models have the same.
_MOST_NEW_TOKENS = 256
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_MODES = {"autoregressive": FULL, **{method: method for method in (*LOSSLESS_MODES, *METHODS)}}


@register_model("specattn")
class SpecAttnLM(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """A pair and one method, as the harness wants it: text generation in real batches, and log-likelihoods."""

    def __init__(
        self,
        pair: ModelPair,
        case: Case,
        *,
        window: int = DEFAULT_WINDOW,
        batch_size: int = 1,
        max_length: int | None = None,
        seed: int = 0,
        answering: Answering | None = None,
    ) -> None:
        """Wraps what is loaded already; the harness itself calls `create_from_arg_string`.

        Args:
            pair: the models.
            case: the method with its setting.
            window: W, of all methods that draft.
            batch_size: prompts at a time.
            max_length: most tokens of a prompt and its answer; the shorter context of the two models without it.
            seed: of draws with a temperature.
            answering: answers in its place, where several methods are asked the same.
        """
        super().__init__()
        self.pair, self.case, self.window, self.batch_size = pair, case, window, batch_size
        self._answering = answering or Answering(pair, [case], window=window, batch=batch_size, seed=seed)
        models = (pair.target, pair.need_draft()) if needs_draft(case) else (pair.target,)
        context = min(model.config.max_context for model in models)
        self.max_length = context if max_length is None else min(max_length, context)
        # What the last call of `generate_until` cost.
        self.answers: Answers | None = None

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> SpecAttnLM:
        """From `target=...,draft=...,mode=...,kv_reduction=...`; see `create_from_arg_obj`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> SpecAttnLM:
        """From the arguments of `_load`, by name.

        Raises:
            UserError: an argument is unknown or out of range, or the models cannot be loaded.
        """
        given = {name: value for name, value in {**arg_dict, **(additional_config or {})}.items() if value is not None}
        # RULER reads it from the same arguments; the pair has its own. Devices are JAX's to choose.
        for name in ("tokenizer", "device", "max_batch_size"):
            given.pop(name, None)
        unknown = sorted(given.keys() - _ARGUMENTS)
        if unknown:
            raise UserError(f"model_args names {unknown[0]}; expected some of {', '.join(sorted(_ARGUMENTS))}.")
        return _load(**given)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.pair.tokenizer.eos_ids[0])

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text of which everything is scored."""
        begin = self.pair.tokenizer.bos_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """Names the cache of requests."""
        return self.pair.target_name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the chat format; None where it is not wanted.

        Raises:
            UserError: it is wanted, and the model has none.
        """
        if not chat_template:
            return None
        if self.pair.tokenizer.chat_template is None:
            raise UserError(
                f"apply_chat_template is set, but {self.pair.target_name} has no chat template; leave it out."
            )
        return self.pair.tokenizer.chat_template

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt for the next message; without `add_generation_prompt`, one that goes on with the last message."""
        if add_generation_prompt:
            return self.pair.tokenizer.apply_chat(chat_history)
        return self.pair.tokenizer.apply_chat(chat_history[:-1]) + chat_history[-1]["content"]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, by default with the begin token that the model was trained with."""
        return self.pair.tokenizer.encode(string, add_special=add_special_tokens is not False)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, each up to its first stop text or the end token."""
        asked = [self.ask(*request.args) for request in requests]
        self.answers = self._answering(self.case, asked)
        texts = [result.text for result in self.answers.results]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def ask(self, text: str, settings: Mapping[str, Any]) -> Asked:
        """A prompt with the harness' settings; what is too long loses its beginning.

        Raises:
            UserError: the answer alone would fill the context.
        """
        limit = next((int(settings[name]) for name in _LIMITS if settings.get(name) is not None), _MOST_NEW_TOKENS)
        room = self.max_length - limit
        if not 0 < limit < self.max_length:
            raise UserError(f"max_gen_toks is {limit}; expected 1 to {self.max_length - 1}, so that a prompt has room.")
        until = settings.get("until") or ()
        drawn = settings.get("do_sample", True)
        sampling = Sampling(
            float(settings.get("temperature") or 0.0) if drawn else 0.0,
            int(settings.get("top_k") or 0) if drawn else 0,
            float(settings.get("top_p") or 1.0) if drawn else 1.0,
        )
        stop = (until,) if isinstance(until, str) else tuple(one for one in until if one)
        return Asked(tuple(self.tok_encode(text)[-room:]), limit, stop, sampling)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **ignored: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations; contexts that are too long lose their beginning."""
        asked = []
        for _, context, continuation in requests:
            whole = (context + continuation)[-(self.max_length + 1) :]
            asked.append(Continuation(whole, max(1, len(whole) - len(continuation))))
        scores = likelihoods(self.pair, self.case, asked, window=self.window, batch=self.batch_size)
        for (key, _, _), score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", key, tuple(score))
        return [(score.log_prob, score.greedy) for score in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows as long as the context that do not overlap."""
        totals = []
        for request in requests:
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            parts = [(("", request.args[0]), *make_disjoint_window(window)) for window in windows]
            totals.append(sum(score for score, _ in self._loglikelihood_tokens(parts)))
        return totals


_ARGUMENTS = {
    "target", "draft", "mode", "kv_reduction", "p", "policy", "window", "alignment", "dtype", "batch_size",
    "max_length", "seed",
}  # fmt: skip


def _load(
    target: str = "smollm2",
    draft: str = "default",
    mode: str = SPECATTN,
    kv_reduction: float | None = None,
    p: float | None = None,
    policy: str = "default",
    window: int = DEFAULT_WINDOW,
    alignment: str = "default",
    dtype: str = "auto",
    batch_size: int | str = 1,
    max_length: int | None = None,
    seed: int = 0,
) -> SpecAttnLM:
    """Loads a pair for the harness.

    Args:
        target: as in `load_pair`.
        draft: likewise.
        mode: autoregressive, speculative, lookup, self, hierarchical, specattn, or a method of `specattn perplexity`.
        kv_reduction: wanted share of reads saved; 0.75 where neither it nor p is given.
        p: or the attention mass that is read.
        policy: of mode specattn.
        window: W.
        alignment: as in `load_pair`.
        dtype: likewise.
        batch_size: prompts at a time.
        max_length: as in `SpecAttnLM`.
        seed: likewise.

    Raises:
        UserError: a value is out of range, or the models cannot be loaded.
    """
    if mode not in _MODES:
        raise UserError(f"mode is {mode!r}; expected one of {', '.join(_MODES)}.")
    if not str(batch_size).isdecimal():
        raise UserError(f"batch_size is {batch_size!r}; expected a number of prompts.")
    case = Case(_MODES[mode])
    if case.method not in LOSSLESS:
        if kv_reduction is None and p is None:
            kv_reduction = DEFAULT_KV_REDUCTION
        savings, masses = ([] if value is None else [float(value)] for value in (kv_reduction, p))
        case = list_cases([case.method], [policy], savings=savings, masses=masses)[0]
    pair = load_pair(str(target), str(draft), alignment=alignment, dtype=dtype)
    return SpecAttnLM(pair, case, window=int(window), batch_size=int(batch_size), max_length=max_length, seed=int(seed))
