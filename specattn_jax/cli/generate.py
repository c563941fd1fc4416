"""`specattn generate`: continues a prompt."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from specattn_jax.cli import options
from specattn_jax.cli.process import importing
from specattn_jax.cli.prompts import (
    DEFAULT_BATCH,
    Job,
    Results,
    answer,
    describe,
    read_jobs,
    read_prompt_file,
    read_prompt_files,
)
from specattn_jax.cli.terminal import print_json, print_table, say, say_notes, stage_bar
from specattn_jax.errors import UserError

if TYPE_CHECKING:
    from specattn_jax.planning.gate import Decision
    from specattn_jax.runtime.results import Generations


def generate_command(
    target: options.Target = "smollm2",
    draft: options.Draft = "default",
    prompt: Annotated[str | None, typer.Option(help="The text to continue.", metavar="TEXT")] = None,
    prompt_file: Annotated[
        list[str] | None,
        typer.Option(
            help="UTF-8 file with the text (.xz, .gz, .bz2 too), '-' for stdin; a final newline is left out. With "
            "--out it may be repeated.",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="JSON lines, each with prompt or messages, and id if wanted; needs --out.", metavar="FILE"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="File for one JSON line per prompt; the same command goes on where it stopped."),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(help="With --out: prompts decoded at a time.", show_default=str(DEFAULT_BATCH)),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat format.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Most new tokens.")] = 128,
    mode: Annotated[
        str,
        typer.Option(
            help="autoregressive (target alone), lookup (proposes what the text says), self (the target drafts over a "
            "small share of its cache), speculative (draft, dense verification), hierarchical (draft, or with --draft "
            "none the text, then the target over few entries, then dense verification), specattn (draft, verification "
            "reads what the draft attended to: approximate), or auto, the one predicted to be the fastest here.",
            metavar="MODE",
        ),
    ] = "auto",
    lossless: Annotated[
        bool, typer.Option("--lossless", help="auto: only modes that leave the target's own output as it is.")
    ] = False,
    p: Annotated[
        float | None,
        typer.Option(
            "--p", help="specattn: attention mass to read, in (0, 1]; 1 reads everything.", show_default=False
        ),
    ] = None,
    kv_reduction: Annotated[
        float | None,
        typer.Option(
            help="specattn, should it run: share of the cache reads to save.",
            show_default="0.75, or p = 0.95 with policy paper",
        ),
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(
            help="Drafted tokens per window, or auto.",
            metavar="TOKENS|auto",
            show_default="mode auto chooses; otherwise 5",
        ),
    ] = None,
    draft_reads: Annotated[
        str | None,
        typer.Option(
            help="speculative: share of its own cache that the draft reads, or all.",
            metavar="FRACTION|all",
            show_default="auto chooses; otherwise all",
        ),
    ] = None,
    draft_reach: Annotated[
        str | None,
        typer.Option(
            help="Tokens back that the draft sees while it reads the prompt, besides the first 64, or all.",
            metavar="TOKENS|all",
            show_default="4096",
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="specattn, should it run: how to choose what is read: default or paper.",
            show_default="default",
        ),
    ] = None,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from this many of the likeliest tokens; 0 is all.")] = 0,
    min_p: Annotated[
        float, typer.Option(help="Draw from tokens with at least this share of the likeliest one's probability.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: tokens that the text holds become less likely.")
    ] = 1.0,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="A text that ends the output, which ends before it; may be given again.", metavar="TEXT"),
    ] = None,
    seed: options.TextSeed = 0,
    dtype: options.Dtype = "auto",
    alignment: options.AlignmentFolder = None,
    mesh: options.Mesh = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Say on stderr why auto decodes as it does, and when it changes its mind.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Continue a prompt; the text streams to stdout."""
    _check_selection(mode, {"--p": p, "--kv-reduction": kv_reduction, "--policy": policy, "--alignment": alignment})
    if lossless and mode != "auto":
        raise UserError(f"--lossless is for --mode auto, but --mode is {mode}; leave one of them out.")
    _check_numbers(p, max_new_tokens)
    jobs = _find_jobs(prompt, prompt_file, prompts, out, batch)
    text = _read_prompt(prompt, prompt_file[0] if prompt_file else None) if jobs is None else ""

    with importing():
        from specattn_jax.loading.pair import NO_DRAFT, load_pair
        from specattn_jax.models.sharding import describe_split
        from specattn_jax.planning.mesh_choice import Wanted, default_mesh
        from specattn_jax.runtime.generate import generate
        from specattn_jax.runtime.request import NEVER_DRAFTED, Request
        from specattn_jax.runtime.session import DRAFT_REACH
        from specattn_jax.selection.policy import load_policy

    policy = policy or "default"
    load_policy(policy)
    # Refuses a wrong number before models are loaded.
    request = Request(
        max_new_tokens=max_new_tokens,
        mode=mode,
        lossless=lossless,
        window=_window(window),
        draft_reads=_share(draft_reads),
        draft_reach=DRAFT_REACH.recent if draft_reach is None else _reach(draft_reach),
        policy=policy,
        p=p,
        kv_reduction=kv_reduction,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=tuple(stop or ()),
        seed=seed,
    )
    request.check_drafted(draft)
    batch = batch or DEFAULT_BATCH
    if jobs is not None and out is not None:
        models = {"target": target, "draft": draft, "alignment": alignment, "dtype": dtype, "chat": chat}
        results = Results(out, jobs, {**models, **dataclasses.asdict(request)}, batch)
    with stage_bar(keep=jobs is not None) as bar:
        bar.wait("starting")
        drafting = draft if request.may_draft else NO_DRAFT
        # About four letters are a token.
        texts = [text] if jobs is None else [job.text or "" for job in jobs]
        wanted = Wanted(min(batch, len(texts)), max(map(len, texts), default=0) // 4 + 1, max_new_tokens)
        pair = load_pair(
            target,
            drafting,
            alignment=(alignment or "default") if request.may_be_sparse else None,
            dtype=dtype,
            mesh=mesh or default_mesh(target, drafting, dtype, wanted),
            progress=bar.bytes,
        )
        if verbose and pair.target.split is not None:
            bar.hide()
            say(describe_split(pair.target, pair.draft))
        shown = sys.stderr if as_json else sys.stdout

        def on_prefill(done: int, total: int) -> None:
            bar.steps("reading the prompt", done, total) if done < total else bar.wait("compiling")

        def on_text(_: int, text: str) -> None:
            bar.hide()
            print(text, end="", file=shown, flush=True)

        told: list[Decision] = []

        def on_decision(decision: Decision) -> None:
            # Without predictions there was no choice, which is not what auto promises.
            if verbose or not decision.predictions:
                bar.hide()
                _explain(decision, told)
            told.append(decision)

        if jobs is not None:
            done = answer(pair, jobs, request, results, batch=batch, chat=chat, bar=bar, on_decision=on_decision)
            bar.hide()
            if as_json:
                print_json({**done, "out": str(out)})
            else:
                print_table([(name.replace("_", " "), f"{value:.4g}") for name, value in done.items()])
            return
        bar.wait("measuring the device" if request.chooses else "compiling")
        run = generate(
            pair,
            [Job("--prompt", 1, text).encode(pair, chat)],
            request,
            on_text=on_text,
            on_prefill=on_prefill,
            on_decision=on_decision,
        )
    print(file=shown, flush=True)
    say_notes(run.notes)
    result = run.results[0]
    report = {
        **_report(run),
        "requested_mode": mode,
        "target": target,
        "draft": None if draft == NO_DRAFT or result.mode in NEVER_DRAFTED else draft,
        "policy": None if result.lossless else policy,
        "seed": seed,
    }
    if as_json:
        print_json(report)
    else:
        print_table(_rows(report))


def _explain(decision: Decision, before: list[Decision]) -> None:
    """Says on stderr what was decided and why; a text that streams there goes on in a line of its own."""
    if before:
        say("")
    for line in decision.explain():
        say(line, style="dim")


def _check_selection(mode: str, given: dict[str, object]) -> None:
    """Refuses options that contradict each other."""
    named = [name for name, value in given.items() if value is not None]
    if mode in ("autoregressive", "lookup", "self", "speculative", "hierarchical") and named:
        raise UserError(f"{named[0]} says what mode specattn reads, but --mode is {mode}; leave one of them out.")
    if {"--p", "--kv-reduction"} <= set(named):
        raise UserError("--p and --kv-reduction both say how much to read; give one of them.")


def _share(text: str | None) -> float | None:
    """What `--draft-reads` says."""
    if text is None or text == "all":
        return None if text is None else 1.0
    try:
        share = float(text)
    except ValueError as error:
        raise UserError(f"--draft-reads is {text!r}; expected a share above 0, of at most 1, or all.") from error
    # Not a number is no share either.
    if not 0.0 < share <= 1.0:
        raise UserError(f"--draft-reads is {text}; expected a share above 0, of at most 1, or all.")
    return share


def _window(text: str | None) -> int | Literal["auto"] | None:
    """What `--window` says."""
    if text is None:
        return None
    if text == "auto":
        return "auto"
    return _number("--window", text, "drafted tokens, or auto")


def _reach(text: str) -> int | None:
    """What `--draft-reach` says."""
    if text == "all":
        return None
    return _number("--draft-reach", text, "tokens, or all")


def _number(option: str, text: str, expected: str) -> int:
    """The whole number that an option says where it says no word."""
    try:
        return int(text)
    except ValueError as error:
        raise UserError(f"{option} is {text!r}; expected a number of {expected}.") from error


def _check_numbers(p: float | None, max_new_tokens: int) -> None:
    """Refuses what is wrong whatever the models are, before they are loaded."""
    if p is not None and not 0.0 < p <= 1.0:
        raise UserError(f"--p is {p}; expected a number in (0, 1].")
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {max_new_tokens}; expected at least 1.")


def _find_jobs(
    prompt: str | None, prompt_file: list[str] | None, prompts: Path | None, out: Path | None, batch: int | None
) -> list[Job] | None:
    """The prompts whose answers go into a file; None where there is one that goes to stdout."""
    if batch is not None and batch < 1:
        raise UserError(f"--batch is {batch}; expected at least 1.")
    if out is None:
        for name, given in {"--prompts": prompts, "--batch": batch}.items():
            if given is not None:
                raise UserError(f"{name} is given, but no --out; name a file for the answers with --out FILE.")
        if prompt_file and len(prompt_file) > 1:
            raise UserError(
                f"--prompt-file is given {len(prompt_file)} times, but no --out; name a file for the answers with "
                "--out FILE."
            )
        return None
    if (prompt is not None) + bool(prompt_file) + (prompts is not None) != 1:
        raise UserError("--out: expected one of --prompt TEXT, --prompt-file FILE and --prompts FILE with it.")
    if prompt is not None:
        return [Job("--prompt", 1, _read_prompt(prompt, None))]
    return read_jobs(prompts) if prompts is not None else read_prompt_files(prompt_file or [])


def _read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The text to continue."""
    if (prompt is None) == (prompt_file is None):
        raise UserError("expected a prompt: give either --prompt TEXT or --prompt-file FILE ('-' for stdin).")
    if prompt_file is not None:
        return read_prompt_file(prompt_file)
    assert prompt is not None
    if not prompt.strip():
        raise UserError("the prompt is empty; expected some text.")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:  # bytes of the command line that were not UTF-8
        raise UserError(
            f"--prompt is not valid UTF-8 at character {error.start + 1}; pass the text as UTF-8."
        ) from error
    return prompt


def _report(run: Generations) -> dict[str, Any]:
    """What the run says, for programs."""
    timing = run.timing
    return {
        **describe(run.results[0]),
        "prefill_s": timing.prefill_s,
        "decode_s": timing.decode_s,
        "tokens_per_s": run.tokens_per_s,
        "compile_s": timing.compile_s,
    }


def _how(report: dict[str, Any]) -> str:
    """Mode, window, policy, and who chose."""
    parts = [report["mode"]]
    if report["window"]:
        parts.append(f"window {report['window']}")
    if report["policy"]:
        parts.append(f"policy {report['policy']}")
    if report["requested_mode"] == "auto":
        parts.append("chosen by auto")
    return ", ".join(parts)


def _rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What the run says, for people."""
    seconds = [f"{kind} {report[f'{kind}_s']:.2f} s" for kind in ("prefill", "decode", "compile")]
    rows = [
        ("mode", _how(report)),
        ("tokens", f"{report['new_tokens']} new after {report['prompt_tokens']} of prompt"),
        ("speed", f"{report['tokens_per_s']:.1f} tokens/s"),
        ("time", ", ".join(seconds)),
    ]
    if report["window"]:
        accepted = f"{report['accepted_per_window']:.2f} per window, {report['windows']} windows"
        rows.insert(2, ("drafts accepted", accepted))
    if report["policy"]:
        rows.insert(3, ("cache reads saved", f"{report['kv_reduction']:.1%}"))
        rows.insert(4, ("the draft reads", f"{report['draft_reads']:.1%} of its own cache"))
    return rows
