"""Tasks of our own, made of what is shipped: needles in the books, long answers, and Python's standard library.

They are not RULER's: the haystacks are novels, and the questions are worded in another way. Prompts end where a model
that was never taught to chat goes on with the answer.
"""

from __future__ import annotations

import dataclasses
import difflib
import random
import re
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from specattn_jax.errors import UserError
from specattn_jax.kinds import python_sources
from specattn_jax.loading.tokenizer import Tokenizer
from specattn_jax.texts import read_text, shipped_books

# Needles of the task that lists them, and steps of the one that traces them: answers of 200 tokens and more.
_LISTED, _STEPS = 20, 24
_COPIED_WORDS, _CODE_LINES = 160, 8
_TOWNS = (
    "Arden", "Belmont", "Corwen", "Dalkey", "Elstow", "Fairlie", "Glossop", "Hexham", "Ilkley", "Jarrow", "Keswick",
    "Ludlow", "Malvern", "Newlyn", "Oundle", "Penrith", "Quorn", "Rothbury", "Selkirk", "Tetbury", "Ulverston",
    "Ventnor", "Wetherby", "Yarm",
)  # fmt: skip
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


@dataclasses.dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        prompt: what the model reads.
        wanted: what its answer is compared with.
        limit: most new tokens.
        stop: texts that end the answer.
    """

    prompt: str
    wanted: tuple[str, ...]
    limit: int
    stop: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class OwnTask:
    """A task.

    Attributes:
        about: what is asked, for people.
        make: makes a sample: takes a source of chance, how much text there is room for as a function of what else the
            prompt says, and the tokenizer.
        score: from a sample and an answer to named scores from 0 to 1; the first is the task's.
        limit: most new tokens of an answer.
        long: whether answers are long, so that errors in the cache can add up.
    """

    about: str
    make: Callable[[random.Random, int, Tokenizer], Sample]
    score: Callable[[Sample, str], dict[str, float]]
    limit: int
    long: bool = False


def make_samples(name: str, length: int, count: int, tokenizer: Tokenizer) -> list[Sample]:
    """A task's samples, the same ones every time.

    Args:
        name: one of `OWN_TASKS`.
        length: most tokens of a prompt and its answer.
        count: how many.
        tokenizer: that measures them.

    Raises:
        UserError: the length has no room for the question.
    """
    task, samples = OWN_TASKS[name], []
    for index in range(count):
        chance = random.Random(f"{name} {length} {index}")
        room = length - task.limit
        # A tokenizer may join or split tokens where texts meet: what is too long is made again with less text.
        for _ in range(8):
            state = chance.getstate()
            sample = task.make(chance, room, tokenizer)
            over = len(tokenizer.encode(sample.prompt)) - (length - task.limit)
            if over <= 0:
                break
            room -= over + 8
            chance.setstate(state)
        else:
            raise UserError(f"length is {length}, which has no room for a question of {name}; give a larger one.")
        samples.append(sample)
    return samples


def _haystack(chance: random.Random, room: int, question: str, tokenizer: Tokenizer) -> list[str]:
    """Sentences of a shipped book, from a random place, that leave room for the question."""
    text = read_text(chance.choice(shipped_books("valid")))
    left = room - len(tokenizer.encode(question))
    # A token is rarely more than six characters; the rest is cut away.
    begin = chance.randrange(max(1, len(text) - 6 * max(left, 0)))
    tokens = tokenizer.encode(text[begin : begin + 6 * max(left, 1)], add_special=False)[: max(left, 1)]
    sentences = _SENTENCE.split(re.sub(r"\s+", " ", tokenizer.decode(tokens)).strip())
    return sentences[1:-1]


def _hide(chance: random.Random, sentences: Sequence[str], needles: Sequence[str], ordered: bool = False) -> str:
    """The sentences with the needles among them, at random places."""
    hidden, needles = list(sentences), list(needles)
    if not ordered:
        chance.shuffle(needles)
    places = sorted(chance.randrange(len(hidden) + 1) for _ in needles)
    for place, needle in reversed(list(zip(places, needles, strict=True))):
        hidden.insert(place, needle)
    return " ".join(hidden)


def _towns(chance: random.Random, count: int) -> dict[str, str]:
    """Towns with telephone numbers."""
    return {town: str(chance.randrange(100_000, 1_000_000)) for town in chance.sample(_TOWNS, count)}


def _fact(town: str, number: str) -> str:
    return f"The telephone number of the inn at {town} is {number}."


def _book_needle(chance: random.Random, room: int, tokenizer: Tokenizer) -> Sample:
    """One number among several."""
    towns = _towns(chance, 4)
    town = chance.choice(list(towns))
    head = "Somewhere in these pages of a novel stand the telephone numbers of some inns.\n\n"
    tail = f"\n\nQuestion: what is the telephone number of the inn at {town}?\nAnswer: The number is"
    needles = [_fact(*item) for item in towns.items()]
    sentences = _haystack(chance, room, head + tail + " ".join(needles), tokenizer)
    return Sample(head + _hide(chance, sentences, needles) + tail, (towns[town],), _LIMIT["book_needle"], ("\n",))


def _book_needles_all(chance: random.Random, room: int, tokenizer: Tokenizer) -> Sample:
    """All numbers, as a list."""
    towns = _towns(chance, _LISTED)
    head = "Somewhere in these pages of a novel stand the telephone numbers of some inns.\n\n"
    tail = (
        f"\n\nQuestion: list the {_LISTED} telephone numbers of inns in these pages, one a line, as 'town: number'."
        "\nAnswer:\n"
    )
    needles = [_fact(*item) for item in towns.items()]
    sentences = _haystack(chance, room, head + tail + " ".join(needles), tokenizer)
    wanted = tuple(f"{town}: {number}" for town, number in towns.items())
    return Sample(head + _hide(chance, sentences, needles) + tail, wanted, _LIMIT["book_needles_all"], ("\n\n",))


def _book_copy(chance: random.Random, room: int, tokenizer: Tokenizer) -> Sample:
    """A passage, word for word."""
    mark = f"[passage {chance.randrange(1000, 10_000)}]"
    head = f"These are pages of a novel. Remember the passage between the marks {mark}.\n\n"
    tail = f"\n\nThe passage between the marks, word for word:\n{mark}"
    sentences = _haystack(chance, room, head + tail + f" {mark} {mark}", tokenizer)
    lengths = [len(sentence.split()) for sentence in sentences]
    begin = chance.randrange(max(1, len(sentences) - _sentences_of(lengths[::-1]) + 1))
    end = begin + _sentences_of(lengths[begin:])
    passage = " ".join(sentences[begin:end])
    body = " ".join([*sentences[:begin], mark, passage, mark, *sentences[end:]])
    return Sample(head + body + tail, (passage,), _LIMIT["book_copy"], (mark,))


def _sentences_of(lengths: Sequence[int]) -> int:
    """How many sentences make up a passage."""
    words = 0
    for count, length in enumerate(lengths):
        if words >= _COPIED_WORDS:
            return count
        words += length
    return len(lengths)


def _variables_trace(chance: random.Random, room: int, tokenizer: Tokenizer) -> Sample:
    """A chain of sums, step by step."""
    value, lines, wanted = chance.randrange(10, 50), [], []
    for step in range(1, _STEPS + 1):
        if step == 1:
            lines.append(f"Step 1: x1 = {value}.")
        else:
            added = chance.randrange(1, 10)
            lines.append(f"Step {step}: x{step} = x{step - 1} + {added}.")
            value += added
        wanted.append(f"x{step} = {value}")
    head = f"Among these pages of a novel stand {_STEPS} steps of a calculation, in their order.\n\n"
    tail = f"\n\nThe values of x1 to x{_STEPS}, step by step, one a line, as 'x1 = value':\n"
    sentences = _haystack(chance, room, head + tail + " ".join(lines), tokenizer)
    prompt = head + _hide(chance, sentences, lines, ordered=True) + tail
    return Sample(prompt, tuple(wanted), _LIMIT["variables_trace"], ("\n\n",))


def _code_completion(chance: random.Random, room: int, tokenizer: Tokenizer) -> Sample:
    """The next lines of a module of the standard library, after as much of it as there is room for."""
    paths = _sources()
    while True:
        lines = chance.choice(paths).read_text(encoding="utf-8").splitlines(keepends=True)
        at = chance.randrange(len(lines) // 2, max(len(lines) // 2 + 1, len(lines) - 2 * _CODE_LINES))
        wanted = [line for line in lines[at:] if line.strip()][:_CODE_LINES]
        if len(wanted) == _CODE_LINES and lines[at].strip():
            break
    # Other modules before it, where it is shorter than the room.
    before = "".join(lines[:at])
    while len(before) < 6 * room:
        before = chance.choice(paths).read_text(encoding="utf-8") + "\n\n" + before
    kept = tokenizer.encode(before[-6 * room :], add_special=False)[-room:]
    return Sample(tokenizer.decode(kept), tuple(line.rstrip() for line in wanted), _LIMIT["code_completion"])


def _sources() -> list[Path]:
    """Modules of the standard library that are long enough, in the order of their names."""
    found = python_sources("valid")
    if not found:
        folder = sysconfig.get_path("stdlib")
        raise UserError(f"tasks names code_completion, but {folder} holds no sources of Python; leave it out.")
    return found


def _contains(sample: Sample, text: str) -> dict[str, float]:
    """Whether the number stands in the answer."""
    return {"found": float(sample.wanted[0] in text)}


def _share_of_lines(sample: Sample, text: str) -> dict[str, float]:
    """The share of the wanted lines that stand in the answer as they should, spaces aside."""
    given = {re.sub(r"\W+", " ", line).strip() for line in text.splitlines()}
    return {"lines": sum(re.sub(r"\W+", " ", one).strip() in given for one in sample.wanted) / len(sample.wanted)}


def _copied(sample: Sample, text: str) -> dict[str, float]:
    """How alike the words are, and how much was right up to the first error."""
    wanted, given = sample.wanted[0].split(), text.split()
    same = next(
        (i for i, (a, b) in enumerate(zip(wanted, given, strict=False)) if a != b), min(len(wanted), len(given))
    )
    alike = difflib.SequenceMatcher(None, wanted, given[: len(wanted)], autojunk=False).ratio()
    return {"similarity": alike, "right_from_the_start": same / len(wanted)}


def _completed(sample: Sample, text: str) -> dict[str, float]:
    """Edit similarity of the lines, and the share that is the same, place by place."""
    given = [line.rstrip() for line in text.splitlines() if line.strip()][:_CODE_LINES]
    exact = sum(a == b for a, b in zip(sample.wanted, given, strict=False)) / len(sample.wanted)
    alike = difflib.SequenceMatcher(None, "\n".join(sample.wanted), "\n".join(given), autojunk=False).ratio()
    return {"similarity": alike, "exact_lines": exact}


_LIMIT = {
    "book_needle": 24, "book_needles_all": 320, "book_copy": 320, "variables_trace": 320, "code_completion": 160,
}  # fmt: skip
OWN_TASKS: Mapping[str, OwnTask] = {
    "book_needle": OwnTask("one of four numbers in a novel", _book_needle, _contains, _LIMIT["book_needle"]),
    "book_needles_all": OwnTask(
        f"all of {_LISTED} numbers in a novel", _book_needles_all, _share_of_lines, _LIMIT["book_needles_all"], True
    ),
    "book_copy": OwnTask("a passage of a novel, word for word", _book_copy, _copied, _LIMIT["book_copy"], True),
    "variables_trace": OwnTask(
        f"{_STEPS} sums scattered in a novel", _variables_trace, _share_of_lines, _LIMIT["variables_trace"], True
    ),
    "code_completion": OwnTask(
        f"the next {_CODE_LINES} lines of Python's standard library", _code_completion, _completed,
        _LIMIT["code_completion"],
    ),
}  # fmt: skip
