"""Table and pictures of a decode benchmark."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from specattn_jax.bench.decode_cases import AUTO, AUTOREGRESSIVE, CHOICES, RIVAL, SPECULATIVE, by_case
from specattn_jax.reporting.plots import as_png, new_figure

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
    for points in by_case(report["points"]).values():
        parts.append(_real_section(points) if _is_real(points[0]) else _section(points))
    if report.get("auto"):
        parts.append(_auto_section(report["auto"]))
    if peers is not None:
        parts.append(_peer_section(peers))
    return "\n".join(parts)


def _is_real(point: dict[str, Any]) -> bool:
    return not point["case"]["accepted"]


def _heading(case: dict[str, Any]) -> str:
    return f"{case['target']} drafted by {case['draft']}, {case['batch']} x {case['slots']:,} slots"


def _rows(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _section(points: list[dict[str, Any]]) -> str:
    case = points[0]["case"]
    accepted = sum(case["accepted"]) / len(case["accepted"])
    head = (
        f"### {_heading(case)}\n\nContext {points[0]['context']:,}, window {case['window']}, {accepted:g} accepted, "
        f"{case['density']:.0%} read by sparse verification.\n"
    )
    notes = [f"\n{point['method']}: {point['note']}.\n" for point in points if point.get("note")]
    return f"{head}\n{_rows(_COLUMNS, [_row(point) for point in points])}" + "".join(notes)


def _row(point: dict[str, Any]) -> tuple[str, ...]:
    if point["failure"] is not None:
        failure = point["failure"].replace("|", "/")
        return (point["method"], "failed", failure, *("",) * (len(_COLUMNS) - 3))
    parts, over = point.get("parts", {}), point.get("speedup_over", {})
    speedups = (over.get(name) for name in (AUTOREGRESSIVE, SPECULATIVE, RIVAL))
    return (
        point["method"],
        f"{point['tokens_per_second']:.1f}",
        f"{point['window_seconds'] * 1e3:.2f}",
        *(f"{parts[name] * 1e3:.2f}" if name in parts else "" for name in _PARTS),
        f"{point['density']:.1%}",
        f"{point['share_of_copy_bandwidth']:.0%}",
        *("" if value is None else f"{value:.2f}" for value in speedups),
        f"{point['compile_seconds']:.1f} s",
    )


def _real_section(points: list[dict[str, Any]]) -> str:
    """Speeds of the real pair, and the texts themselves."""
    good = [point for point in points if point["failure"] is None]
    columns = ("method", "tokens/s", "ms/window", "accepted", "read", "over autoregressive", "over speculative")
    rows = []
    for point in points:
        if point["failure"] is not None:
            rows.append((point["method"], "failed", point["failure"].replace("|", "/"), *("",) * (len(columns) - 3)))
            continue
        over = point.get("speedup_over", {})
        speedups = (over.get(name) for name in (AUTOREGRESSIVE, SPECULATIVE))
        rows.append(
            (
                f"{AUTO}: {point['plan']}" if point["method"] == AUTO else point["method"],
                f"{point['tokens_per_second']:.1f}",
                f"{point['window_seconds'] * 1e3:.2f}",
                f"{point['accepted_per_window']:.2f}",
                f"{point['density']:.1%}",
                *("" if value is None else f"{value:.2f}" for value in speedups),
            )
        )
    texts = "".join(f"\n{point['method']}:\n\n{_quoted(point['text'])}\n" for point in good)
    head = f"### {points[0]['case']['target']}, real weights\n"
    if good:
        after = f"After the first {good[0]['prompt_tokens']:,} tokens of {good[0]['book']}"
        head += f"\n{after}; median of {good[0]['repeats']} runs, all methods in turns.\n"
    return f"{head}\n{_rows(columns, rows)}{texts}"


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines())


def _auto_section(choices: list[dict[str, Any]]) -> str:
    """What `auto` would choose, against the best of what it chooses from."""
    rows = []
    for choice in choices:
        times = [choice["methods"].get(name, {}) for name in CHOICES]
        rows.append(
            (
                _heading(choice["case"]),
                choice["chosen"],
                choice["best"],
                "" if choice["of_best"] is None else f"{choice['of_best']:.2f}",
                *(
                    " / ".join("-" if seconds is None else f"{seconds * 1e3:.2f}" for seconds in one.values())
                    for one in times
                ),
            )
        )
    head = (
        "### What `--mode auto` chooses\n\nWith the window and acceptance of the case; `of best` is its tokens/s over "
        "those of the fastest of the three. Times of a window are in ms: predicted / measured.\n"
    )
    return f"{head}\n{_rows(('case', 'chosen', 'fastest', 'of best', *CHOICES), rows)}"


def _peer_section(peers: dict[str, Any]) -> str:
    """One forward of Hugging Face transformers over a full cache."""
    rows = [
        (
            point["pair"],
            str(point["batch"]),
            f"{point['context']:,}",
            str(point["tokens"]),
            *(
                ("failed", point["failure"].replace("|", "/"))
                if point["failure"]
                else (f"{point['seconds'] * 1e3:.1f}", f"{point['batch'] / point['seconds']:.1f}")
            ),
        )
        for point in peers["points"]
    ]
    head = (
        f"### Hugging Face transformers {peers['versions']['transformers']}\n\nDevice {peers['device']}, torch "
        f"{peers['versions']['torch']}, sdpa, DynamicCache, bfloat16: one forward of the target. With one new token "
        "that is autoregressive decoding, with six the verification of a window; tokens/s count one per sequence and "
        "forward.\n"
    )
    return f"{head}\n{_rows(_HF_COLUMNS, rows)}"


def draw_decode(points: list[dict[str, Any]]) -> dict[str, bytes]:
    """The plots, as PNG by file name: speed over context, and the parts of a window."""
    good = [point for point in points if point["failure"] is None and not _is_real(point)]
    return {"speed.png": _speed(good), "parts.png": _bars([point for point in good if "parts" in point])}


def _speed(points: list[dict[str, Any]]) -> bytes:
    """Tokens per second over context, a panel for each pair and batch."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for point in points:
        name = "{target}, batch {batch}".format(**point["case"])
        panels[name][point["method"]].append((point["context"], point["tokens_per_second"]))
    axes_of, figure = _panels(len(panels))
    for axes, (name, lines) in zip(axes_of, panels.items(), strict=False):
        for label, line in lines.items():
            axes.plot(*zip(*sorted(line), strict=True), "o-", markersize=3, linewidth=1, label=label)
        axes.set(xlabel="tokens in the cache", ylabel="tokens/s", xscale="log")
        axes.set_ylim(bottom=0)
        axes.set_title(name, fontsize="small")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="xx-small")
    return as_png(figure)


def _bars(points: list[dict[str, Any]]) -> bytes:
    """Milliseconds of a window by part, stacked, a panel for each case."""
    cases = by_case(points)
    axes_of, figure = _panels(len(cases))
    for axes, members in zip(axes_of, cases.values(), strict=False):
        names = [point["method"] for point in members]
        left = [0.0] * len(members)
        for part in _PARTS:
            widths = [max(0.0, point["parts"][part]) * 1e3 for point in members]
            axes.barh(names, widths, left=left, label=part)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.invert_yaxis()
        axes.set_xlabel("ms per window")
        axes.set_title(_heading(members[0]["case"]), fontsize="small")
        axes.tick_params(labelsize="x-small")
        axes.legend(fontsize="xx-small")
    return as_png(figure)


def _panels(count: int) -> tuple[list[Any], Any]:
    """So many places to draw in, at most three in a row, and their figure."""
    columns = min(3, max(1, count))
    rows = max(1, -(-count // columns))
    figure = new_figure(5.5 * columns, 4.2 * rows, dpi=110)
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for empty in places[count:]:
        empty.remove()
    return places, figure
