"""`specattn chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from specattn_jax.cli import options
from specattn_jax.cli.process import importing
from specattn_jax.cli.terminal import open_stdin, say, say_error, say_notes, stage_bar
from specattn_jax.errors import UserError
from specattn_jax.texts import decode_text

if TYPE_CHECKING:
    from specattn_jax.loading.pair import ModelPair
    from specattn_jax.runtime.request import Request
    from specattn_jax.runtime.results import Generations

# Tokens of a message that are read at a time, and what a window may write behind the newest token.
_CHUNK, _MOST_WRITTEN = 128, 64
# Caches begin with so much room, and grow to the next power of two and then by steps.
_LEAST_ROOM, _STEP = 1024, 4096
_HELP = "/mode MODE, /saved, /reset, /quit; Ctrl-C stops an answer"


def chat_command(
    target: options.Target = "smollm2",
    draft: options.Draft = "default",
    max_new_tokens: Annotated[int, typer.Option(help="Most new tokens per answer.")] = 512,
    mode: Annotated[
        str, typer.Option(help="How to decode, as for `generate`; /mode changes it.", metavar="MODE")
    ] = "auto",
    kv_reduction: Annotated[
        float | None, typer.Option(help="specattn, should it run: share of the cache reads to save.")
    ] = None,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    seed: options.TextSeed = 0,
    dtype: options.Dtype = "auto",
    mesh: options.Mesh = None,
    alignment: options.AlignmentFolder = None,
) -> None:
    """Talk to a chat model; what was said stays in its cache. Lines come from stdin, answers go to stdout."""
    with importing():
        from specattn_jax.loading.pair import load_pair
        from specattn_jax.planning.mesh_choice import Wanted, default_mesh
        from specattn_jax.runtime.request import Request

    request = Request(
        max_new_tokens=max_new_tokens,
        mode=mode,
        kv_reduction=kv_reduction,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {max_new_tokens}; expected at least 1.")
    request.check_drafted(draft)
    with stage_bar() as bar:
        # Nobody knows how long a conversation becomes.
        mesh = mesh or default_mesh(target, draft, dtype, Wanted(1, 4096, max_new_tokens))
        pair = load_pair(target, draft, alignment=alignment or "default", dtype=dtype, mesh=mesh, progress=bar.bytes)
    conversation = _Conversation(pair, request)
    say(_HELP, style="dim")
    for line in _lines():
        try:
            if not conversation.hear(decode_text(line, "what you said").strip()):
                break
        except UserError as error:
            # A conversation goes on after a mistake.
            say_error(str(error))
        except KeyboardInterrupt:
            say("")


def _lines() -> Iterator[bytes]:
    """What the person says, line by line; as bytes, because one that is no UTF-8 must not end the conversation."""
    stdin = open_stdin()
    while True:
        if stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = stdin.readline()
        except KeyboardInterrupt:
            say("")
            continue
        if not line:
            return
        if line.strip():
            yield line


def _room_for(tokens: int) -> int:
    """Entries of caches for a prompt and its answer. Sizes are few, as each of them compiles all programs anew."""
    from specattn_jax.models.cache import round_up

    needed = tokens + _CHUNK + _MOST_WRITTEN
    return max(_LEAST_ROOM, 1 << (needed - 1).bit_length()) if needed <= _STEP else round_up(needed, _STEP)


class _Conversation:
    """Messages so far, how to answer, and what the caches hold."""

    def __init__(self, pair: ModelPair, request: Request) -> None:
        """Begins one.

        Raises:
            UserError: the target is no chat model, or the pair cannot answer in this mode.
        """
        if pair.tokenizer.chat_template is None:
            raise UserError(f"target: {pair.target_name} has no chat template; name a chat model, or use `generate`.")
        self._pair = pair
        self._answer_by(request)
        self._forget()

    def _answer_by(self, request: Request) -> None:
        """Takes a request for all that follows.

        Raises:
            UserError: the pair cannot answer it.
        """
        from specattn_jax.runtime.request import find_candidates

        find_candidates(self._pair, request)
        self._request = request

    def _forget(self) -> None:
        """Begins anew."""
        from specattn_jax.runtime.session import Memory

        self._messages: list[dict[str, str]] = []
        self._memory = Memory(chunk=_CHUNK)
        self._last: Generations | None = None
        self._noted = False

    def hear(self, line: str) -> bool:
        """Obeys a command or answers; False where the person leaves."""
        command, _, argument = line.partition(" ")
        if command == "/quit":
            return False
        if command == "/mode":
            self._answer_by(self._request.change(mode=argument.strip()))
            say(f"mode {self._request.mode}", style="dim")
        elif command == "/saved":
            say(self._saved(), style="dim")
        elif command == "/reset":
            self._forget()
        elif line.startswith("/"):
            raise UserError(f"{command} is no command; expected one of {_HELP}.")
        else:
            self._answer(line)
        return True

    def _answer(self, line: str) -> None:
        """Streams the answer to a message; one that is stopped stays as far as it came."""
        from specattn_jax.runtime.generate import generate

        messages = [*self._messages, {"role": "user", "content": line}]
        said = list[str]()
        prompt = self._pair.tokenizer.encode_chat(messages)
        context = self._pair.target.config.max_context
        room = context - len(prompt)
        if room < 1:
            raise UserError(
                f"the conversation has {len(prompt)} tokens, but the context of {self._pair.target_name} is {context}; "
                "say less, or begin anew with /reset."
            )
        wanted = self._request.max_new_tokens
        self._memory.slots = _room_for(len(prompt) + wanted)
        request = self._request.change(max_new_tokens=min(wanted, room))
        self._last = None

        def on_text(_: int, text: str) -> None:
            said.append(text)
            print(text, end="", flush=True)

        try:
            self._last = generate(self._pair, [prompt], request, on_text=on_text, memory=self._memory)
        except KeyboardInterrupt:
            say(" (stopped)", style="dim")
        print(flush=True)
        if self._last is not None and self._last.results[0].finish_reason == "length" and room < wanted:
            say(f"(the context of {context} tokens is full; /reset begins anew)", style="dim")
        if self._last is not None and self._last.notes and not self._noted:
            # Later answers would say the same of a longer text.
            say_notes(self._last.notes)
            self._noted = True
        self._messages = [*messages, {"role": "assistant", "content": "".join(said)}]

    def _saved(self) -> str:
        """Of the last answer: the share of cache reads saved, drafts accepted, and speed."""
        if self._last is None:
            return "nothing was answered yet"
        result = self._last.results[0]
        read = self._memory.prefilled.get("target", result.prompt_tokens)
        return (
            f"{result.mode}: {result.kv_reduction:.1%} of cache reads saved, {result.accepted_per_window:.2f} drafted "
            f"tokens accepted per window, {self._last.tokens_per_s:.1f} tokens/s; {read} of {result.prompt_tokens} "
            "tokens of the conversation had to be read"
        )
