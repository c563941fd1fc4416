"""Table and pictures of a decode benchmark."""

from __future__ import annotations

import dataclasses
from typing import Any

from specattn_jax.bench.decode_cases import DecodeCase, by_case, case_of
from specattn_jax.bench.decode_methods import AUTO, AUTOREGRESSIVE, CHOICES, RIVAL, SPECULATIVE
from specattn_jax.bench.drawing import draw_lines, failed_row, gather, make_panels, markdown
from specattn_jax.reporting.plots import as_png

_PARTS = ("draft", "select", "verify", "rest")
_COLUMNS = (
    "method", "tokens/s", "ms/window", *_PARTS, "read", "of copy",
    "over autoregressive", "over speculative", "over rival", "compile",
)  # fmt: skip
_HF_COLUMNS = ("pair", "sequences", "cache", "new tokens", "ms", "tokens/s")


def decode_table(report: dict[str, Any], peers: dict[str, Any] | None = None) -> str:
    """The points as Markdown, a table for each case, then what real weights wrote.

    Args:
        report: what decode.json holds.
        peers: what hf.json holds.
    """
    flags = f" XLA_FLAGS `{report['xla_flags']}`." if report["xla_flags"] else ""
    parts = [
        f"Device {report['device']}, jax {report['versions']['jax']}, commit {report['commit'][:7]}, copy "
        f"{report['copy_bytes_per_second'] / 1e9:.0f} GB/s.{flags} Random weights: acceptance is imposed and the share "
        "read is set, alike for all methods of a case. Parts are in ms, each measured alone, rest is the window less "
        "these; `read` is the share of the target's cache, `of copy` the bytes that a window must move over its time, "
        f"as a share of the copy bandwidth; rival is: {RIVAL}.\n"
    ]
    if not report["complete"]:
        parts.append("The run stopped before its end.\n")
    if any(case.mesh for case in by_case(report["points"])):
        parts.append(mesh_table(report))
    for case, points in by_case(report["points"]).items():
        parts.append(_real_section(case, points) if case.real else _section(case, points))
    if report.get("auto"):
        parts.append(_auto_section(report["auto"]))
    if peers is not None:
        parts.append(_peer_section(peers))
    return "\n".join(parts)


def mesh_table(report: dict[str, Any]) -> str:
    """What meshes gain over one device of the same run, as Markdown."""
    good = [point for point in report["points"] if point["failure"] is None]
    alone = {(case_of(point), point["method"]): point for point in good if not point["case"]["mesh"]}
    rows = []
    for point in good:
        case = case_of(point)
        one = alone.get((dataclasses.replace(case, mesh=""), point["method"]))
        if one is None:
            continue
        gain = one["window_seconds"] / point["window_seconds"]
        shares = f"{gain:.2f}", f"{gain / case.devices:.0%}", f"{point['share_of_copy_bandwidth']:.0%}"
        what = f"{case.batch} x {case.slots:,}", point["method"], case.mesh or "one device"
        rows.append((*what, *_speeds(point), *shares))
    columns = ("caches", "method", "mesh", "tokens/s", "ms/window", "over one device", "of as many", "of copy")
    return f"### Devices together\n{describe_links(report)}\n{markdown(columns, rows)}"


def describe_links(report: dict[str, Any]) -> str:
    """How fast devices meet on the meshes of a report, a sentence for each; empty where they do not."""
    links = {mesh: link for mesh, link in report.get("links", {}).items() if link is not None}
    return "".join(
        f"\nOn {mesh} devices meet in {link['latency_s'] * 1e6:.0f} us, and send {link['bandwidth'] / 1e9:.1f} GB/s.\n"
        for mesh, link in links.items()
    )


def _heading(case: DecodeCase) -> str:
    where = f" on {case.mesh}" if case.mesh else ""
    return f"{case.target} drafted by {case.draft}, {case.batch} x {case.slots:,} slots{where}"


def _section(case: DecodeCase, points: list[dict[str, Any]]) -> str:
    head = (
        f"### {_heading(case)}\n\nContext {case.context:,}, window {case.window}, {case.mean_accepted:g} accepted, "
        f"{case.density:.0%} read by sparse verification.\n"
    )
    notes = [f"\n{point['method']}: {point['note']}.\n" for point in points if point.get("note")]
    return f"{head}\n{markdown(_COLUMNS, [_row(point) for point in points])}" + "".join(notes)


def _row(point: dict[str, Any]) -> tuple[str, ...]:
    if point["failure"] is not None:
        return failed_row((point["method"],), point["failure"], len(_COLUMNS))
    parts = point.get("parts", {})
    return (
        point["method"],
        *_speeds(point),
        *(f"{parts[name] * 1e3:.2f}" if name in parts else "" for name in _PARTS),
        f"{point['density']:.1%}",
        f"{point['share_of_copy_bandwidth']:.0%}",
        *_speedups(point, AUTOREGRESSIVE, SPECULATIVE, RIVAL),
        f"{point['compile_seconds']:.1f} s",
    )


def _speeds(point: dict[str, Any]) -> tuple[str, str]:
    return f"{point['tokens_per_second']:.1f}", f"{point['window_seconds'] * 1e3:.2f}"


def _speedups(point: dict[str, Any], *names: str) -> list[str]:
    over = point.get("speedup_over", {})
    return [f"{over[name]:.2f}" if name in over else "" for name in names]


def _real_section(case: DecodeCase, points: list[dict[str, Any]]) -> str:
    """Speeds of the real pair, and the texts themselves."""
    good = [point for point in points if point["failure"] is None]
    columns = ("method", "tokens/s", "ms/window", "accepted", "read", "over autoregressive", "over speculative")
    rows = [
        failed_row((point["method"],), point["failure"], len(columns))
        if point["failure"] is not None
        else (
            f"{AUTO}: {point['plan']}" if point["method"] == AUTO else point["method"],
            *_speeds(point),
            f"{point['accepted_per_window']:.2f}",
            f"{point['density']:.1%}",
            *_speedups(point, AUTOREGRESSIVE, SPECULATIVE),
        )
        for point in points
    ]
    texts = "".join(f"\n{point['method']}:\n\n{_quoted(point['text'])}\n" for point in good)
    head = f"### {case.target}, real weights\n"
    if good:
        after = f"After the first {good[0]['prompt_tokens']:,} tokens of {good[0]['book']}"
        head += f"\n{after}; median of {good[0]['repeats']} runs, all methods in turns.\n"
    return f"{head}\n{markdown(columns, rows)}{texts}"


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines())


def _auto_section(choices: list[dict[str, Any]]) -> str:
    """What `auto` would choose, against the best of what it chooses from."""

    def times(choice: dict[str, Any], name: str) -> str:
        seconds = choice["methods"].get(name, {}).values()
        return " / ".join("-" if one is None else f"{one * 1e3:.2f}" for one in seconds)

    rows = [
        (
            _heading(case_of(choice)),
            choice["chosen"],
            choice["best"],
            "" if choice["of_best"] is None else f"{choice['of_best']:.2f}",
            *(times(choice, name) for name in CHOICES),
        )
        for choice in choices
    ]
    head = (
        "### What `--mode auto` chooses\n\nWith the window and acceptance of the case; `of best` is its tokens/s over "
        "those of the fastest of the three. Times of a window are in ms: predicted / measured.\n"
    )
    return f"{head}\n{markdown(('case', 'chosen', 'fastest', 'of best', *CHOICES), rows)}"


def _peer_section(peers: dict[str, Any]) -> str:
    """One forward of Hugging Face transformers over a full cache."""
    rows = []
    for point in peers["points"]:
        cells = (point["pair"], str(point["batch"]), f"{point['context']:,}", str(point["tokens"]))
        if point["failure"]:
            rows.append(failed_row(cells, point["failure"], len(_HF_COLUMNS)))
        else:
            rows.append((*cells, f"{point['seconds'] * 1e3:.1f}", f"{point['batch'] / point['seconds']:.1f}"))
    head = (
        f"### Hugging Face transformers {peers['versions']['transformers']}\n\nDevice {peers['device']}, torch "
        f"{peers['versions']['torch']}, sdpa, DynamicCache, bfloat16: one forward of the target. With one new token "
        "that is autoregressive decoding, with six the verification of a window; tokens/s count one per sequence and "
        "forward.\n"
    )
    return f"{head}\n{markdown(_HF_COLUMNS, rows)}"


def draw_decode(points: list[dict[str, Any]]) -> dict[str, bytes]:
    """The plots, as PNG by file name: speed over context, and the parts of a window."""
    good = [point for point in points if point["failure"] is None and not case_of(point).real]
    return {"speed.png": _speed(good), "parts.png": _bars([point for point in good if "parts" in point])}


def _speed(points: list[dict[str, Any]]) -> bytes:
    """Tokens per second over context, a panel for each pair and batch."""
    panels = gather(
        (
            "{target}, batch {batch}".format(**point["case"]),
            point["method"],
            point["context"],
            point["tokens_per_second"],
        )
        for point in points
    )
    return draw_lines(panels, "tokens in the cache", "tokens/s", bottom=0)


def _bars(points: list[dict[str, Any]]) -> bytes:
    """Milliseconds of a window by part, stacked, a panel for each case."""
    cases = by_case(points)
    places, figure = make_panels(len(cases))
    for axes, (case, members) in zip(places, cases.items(), strict=True):
        names = [point["method"] for point in members]
        left = [0.0] * len(members)
        for part in _PARTS:
            widths = [max(0.0, point["parts"][part]) * 1e3 for point in members]
            axes.barh(names, widths, left=left, label=part)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.invert_yaxis()
        axes.set_xlabel("ms per window")
        axes.set_title(_heading(case), fontsize="small")
        axes.tick_params(labelsize="x-small")
        axes.legend(fontsize="xx-small")
    return as_png(figure)
