"""Many prompts for one command: read from files, decoded in batches, written line by line so that a run can go on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specattn_jax.cli.terminal import StageBar, read_stdin, say_notes
from specattn_jax.errors import UserError
from specattn_jax.files import exists, first_line
from specattn_jax.texts import read_text, without_final_newline

if TYPE_CHECKING:
    from specattn_jax.loading.pair import ModelPair
    from specattn_jax.runtime.request import Request
    from specattn_jax.runtime.results import Generation

DEFAULT_BATCH = 8
_KEYS = ("prompt", "messages", "id", "seed")


@dataclasses.dataclass(frozen=True)
class Job:
    """One prompt of many.

    Attributes:
        origin: where it stands, for messages.
        id: what the person calls it; its number from 1 where they do not.
        text: the text to continue; None where messages are given.
        messages: a conversation, for the model's chat format.
        seed: of its random draws; None where the person gives none.
    """

    origin: str
    id: str | int
    text: str | None = None
    messages: tuple[Mapping[str, str], ...] = ()
    seed: int | None = None

    def encode(self, pair: ModelPair, chat: bool) -> list[int]:
        """Token ids.

        Args:
            pair: with the tokenizer.
            chat: whether a text is put into the chat format too.

        Raises:
            UserError: the model has no chat format, or it refuses the messages.
        """
        messages = self.messages
        if self.text is not None:
            if not chat:
                return pair.tokenizer.encode(self.text)
            messages = ({"role": "user", "content": self.text},)
        return pair.tokenizer.encode_chat(messages)


def read_prompt_files(names: Sequence[str]) -> list[Job]:
    """One prompt per text file; `-` is stdin. Their ids are the names.

    Raises:
        UserError: a file cannot be read, is empty, or stdin is named twice.
    """
    if names.count("-") > 1:
        raise UserError("--prompt-file is '-' (stdin) more than once; expected it at most once.")
    jobs = []
    for name in names:
        jobs.append(Job(f"--prompt-file {name}", name, read_prompt_file(name)))
    return jobs


def read_prompt_file(name: str) -> str:
    """The text of a file, or of stdin where that is named `-`, without a final newline.

    Raises:
        UserError: it cannot be read, or is empty.
    """
    text = without_final_newline(read_stdin() if name == "-" else read_text(Path(name)))
    if not text.strip():
        raise UserError("the prompt is empty; expected some text.")
    return text


def read_jobs(path: Path) -> list[Job]:
    """The prompts of a JSON-lines file: objects with `prompt` or `messages`, and `id` or `seed` if wanted.

    Raises:
        UserError: it cannot be read, or a line is wrong (says which).
    """
    jobs: list[Job] = []
    # Not splitlines: JSON may hold the separators of Unicode inside a string.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            jobs.append(_parse(line, f"--prompts: {path}, line {number}", len(jobs) + 1))
    seen: dict[str | int, str] = {}
    for job in jobs:
        if job.id in seen:
            raise UserError(f"{job.origin}: id is {job.id!r}, as before it; expected every id once.")
        seen[job.id] = job.origin
    return jobs


def _parse(line: str, origin: str, number: int) -> Job:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{origin}: is not JSON ({first_line(error)}); expected one object per line.") from error
    if not isinstance(found, dict):
        raise UserError(f'{origin}: is {_short(found)}; expected an object such as {{"prompt": "a text"}}.')
    if unknown := [key for key in found if key not in _KEYS]:
        raise UserError(f"{origin}: has {_short(unknown[0])}; expected only {', '.join(_KEYS)}.")
    if ("prompt" in found) == ("messages" in found):
        raise UserError(f"{origin}: expected either prompt or messages.")
    name = found.get("id", number)
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise UserError(f"{origin}: id is {_short(name)}; expected a text or a whole number.")
    seed = found.get("seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32):
        raise UserError(f"{origin}: seed is {_short(seed)}; expected a whole number from 0 to {2**32 - 1}.")
    if "prompt" in found:
        text = found["prompt"]
        if not _is_text(text) or not text.strip():
            raise UserError(f"{origin}: prompt is {_short(text)}; expected some text.")
        return Job(origin, name, text, seed=seed)
    messages = found["messages"]
    if not isinstance(messages, list) or not messages or not all(_is_message(one) for one in messages):
        raise UserError(
            f"{origin}: messages is {_short(messages)}; expected a list of objects with the texts role and content."
        )
    return Job(origin, name, messages=tuple(messages), seed=seed)


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and set(value) == {"role", "content"} and all(map(_is_text, value.values()))


def _is_text(value: object) -> bool:
    """Whether it is a text that UTF-8 can hold: JSON can escape half a character."""
    return isinstance(value, str) and value.encode("utf-8", "replace").decode() == value


def _short(value: object) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= 40 else f"{shown[:40]}…"


class Results:
    """The file of results, a line per prompt, in order; a run that was interrupted goes on behind what is there.

    A half-written line is cut off, and so is an incomplete batch: the prompts of a batch are always decoded together.
    """

    def __init__(self, path: Path, jobs: Sequence[Job], settings: Mapping[str, Any], batch: int) -> None:
        """Looks at the file, and changes nothing yet.

        Raises:
            UserError: it is no file, or holds something else than results of these prompts with these settings.
        """
        self._path = path
        self._keys = [_key(job, {**settings, "batch": batch}) for job in jobs]
        if exists(path) and not path.is_file():
            raise UserError(f"--out: {path} is no file; expected a file to write, such as answers.jsonl.")
        try:
            data = path.read_bytes() if exists(path) else b""
        except OSError as error:
            raise UserError(f"--out: {path} cannot be read ({error.strerror}); choose another file.") from error
        lines = data.split(b"\n")[:-1]
        if data and not lines and not b'{"id": '.startswith(data[:7]):
            raise self._foreign(1)
        for number, line in enumerate(lines, 1):
            if number > len(jobs) or _found_key(line) != self._keys[number - 1]:
                raise self._foreign(number)
        self.done = len(lines) if len(lines) == len(jobs) else len(lines) // batch * batch
        self._kept = sum(len(line) + 1 for line in lines[: self.done])

    def _foreign(self, number: int) -> UserError:
        return UserError(
            f"--out: {self._path}, line {number} is no result of these prompts with these options; choose another "
            "file, or give the command that wrote it."
        )

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes the results of the next prompts.

        Raises:
            UserError: the file cannot be written.
        """
        text = "".join(
            json.dumps({**row, "key": self._keys[self.done + index]}, ensure_ascii=False, allow_nan=False) + "\n"
            for index, row in enumerate(rows)
        ).encode("utf-8", "replace")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                file.truncate(self._kept)
                file.write(text)
        except OSError as error:
            raise UserError(
                f"--out: {self._path} cannot be written ({error.strerror}); free some space or choose another file."
            ) from error
        self.done += len(rows)
        self._kept += len(text)


def _key(job: Job, settings: Mapping[str, Any]) -> str:
    """What a result depends on, in short."""
    described = json.dumps([job.id, job.text, job.messages, job.seed, settings], sort_keys=True, default=str)
    return hashlib.sha256(described.encode("utf-8", "replace")).hexdigest()[:16]


def _found_key(line: bytes) -> object:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found.get("key") if isinstance(found, dict) else None


def answer(
    pair: ModelPair,
    jobs: Sequence[Job],
    request: Request,
    results: Results,
    *,
    batch: int,
    chat: bool,
    bar: StageBar,
    **hooks: Callable[..., None],
) -> dict[str, Any]:
    """Answers what has no answer yet, batch by batch; what makes results doubtful is said once.

    Where a prompt has no seed it gets that of the request plus the number of prompts before it, so that no two draw
    alike; each then draws as it would alone.

    Args:
        pair: the models.
        jobs: all prompts.
        request: what is wanted of each.
        results: told the answers.
        batch: prompts decoded at a time.
        chat: whether texts are put into the chat format.
        bar: shows how far it is.
        hooks: callbacks of `generate`.

    Returns:
        What was done, in numbers.

    Raises:
        UserError: a prompt is too long (says which, before any is decoded), or as for `generate`.
    """
    from specattn_jax.runtime.generate import generate
    from specattn_jax.runtime.request import check_draft, check_lengths, encode_prompt, find_candidates

    encoded, strategies = [], find_candidates(pair, request).strategies
    for job in jobs:
        try:
            encoded.append(encode_prompt(pair, job.encode(pair, chat), 0))
            check_lengths(pair, encoded[-1:], request.max_new_tokens)
            check_draft(pair, strategies, encoded[-1:], request.max_new_tokens)
        except UserError as error:
            raise UserError(f"{job.origin}: {error}") from error
    assert isinstance(request.seed, int)
    first, before, tokens, seconds, noted = request.seed, results.done, 0, 0.0, False
    bar.steps("answering", before, len(jobs))
    for start in range(before, len(jobs), batch):
        now = jobs[start : start + batch]
        seeds = [(first + start + index) % 2**32 if job.seed is None else job.seed for index, job in enumerate(now)]
        run = generate(pair, encoded[start : start + batch], request.change(seed=seeds), **hooks)  # type: ignore[arg-type]
        results.append([{"id": job.id, **describe(one)} for job, one in zip(now, run.results, strict=True)])
        if run.notes and not noted:
            # Those of later batches would say the same of other lengths.
            bar.hide()
            say_notes(run.notes)
            noted = True
        tokens += sum(len(one.tokens) for one in run.results)
        seconds += run.timing.prefill_s + run.timing.decode_s
        bar.steps("answering", results.done, len(jobs), f"{tokens / seconds:.1f} tokens/s" if seconds else "")
    return {
        "prompts": len(jobs),
        "answered_before": before,
        "new_tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds if seconds else 0.0,
    }


def describe(result: Generation) -> dict[str, Any]:
    """What one prompt gave, for programs."""
    return {
        "text": result.text,
        "new_tokens": len(result.tokens),
        "prompt_tokens": result.prompt_tokens,
        "finish_reason": result.finish_reason,
        "mode": result.mode,
        "window": result.window,
        "windows": result.windows,
        "accepted_per_window": result.accepted_per_window,
        "kv_reduction": result.kv_reduction,
        "draft_reads": result.draft_reads,
    }
