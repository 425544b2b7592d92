"""From the answers of a load to figures, to a table, to JSON and to a plot: pure functions.

Times are milliseconds in what comes out, under names that end in `_ms`.
"""

from collections.abc import Sequence
from html import escape
from typing import Any

from rich.table import Table

from server.bench_load import Answer

Figures = dict[str, Any]

PANEL_WIDTH, PANEL_HEIGHT, MARGIN, BARS = 640, 200, 50, 60


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which a share of them lies, linear between neighbours (numpy's default)."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def gaps(answer: Answer) -> list[float]:
    """Seconds between an event and the next one."""
    return [later - sooner for sooner, later in zip(answer.arrivals, answer.arrivals[1:], strict=False)]


def decode_speed(answer: Answer) -> float | None:
    """Tokens a second after the first one, if there was more than one."""
    seconds = answer.ended - answer.arrivals[0]
    return (answer.output_tokens - 1) / seconds if answer.output_tokens > 1 and seconds > 0 else None


def summarize(answers: Sequence[Answer]) -> Figures:
    """All figures of a load, in all and for each request; what cannot be known is None."""
    seconds = max(answer.ended for answer in answers) - min(answer.started for answer in answers)
    tokens = sum(answer.output_tokens for answer in answers)
    speeds = [speed for answer in answers if (speed := decode_speed(answer)) is not None]
    lengths = [answer.prompt_tokens for answer in answers if answer.prompt_tokens is not None]
    return {
        "requests": len(answers),
        "seconds": round(seconds, 4),
        "prompt_tokens": sum(lengths) if lengths else None,
        "prompt_tokens_each": [min(lengths), max(lengths)] if lengths else None,
        "output_tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 2),
        "decode_tokens_per_second": round(percentile(speeds, 0.5), 2) if speeds else None,
        "ttft_ms": _spread([_ttft(answer) for answer in answers]),
        "gap_ms": _spread([gap for answer in answers for gap in gaps(answer)]),
        "each": [_one(answer) for answer in answers],
    }


def _ttft(answer: Answer) -> float:
    return answer.arrivals[0] - answer.started


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    """Seconds -> p50, p90, p99 and the largest in milliseconds."""
    if not values:
        return None
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: _ms(percentile(values, share)) for name, share in shares.items()}


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _one(answer: Answer) -> Figures:
    between = gaps(answer)
    return {
        "prompt_tokens": answer.prompt_tokens,
        "output_tokens": answer.output_tokens,
        "ttft_ms": _ms(_ttft(answer)),
        "total_ms": _ms(answer.ended - answer.started),
        "gap_p50_ms": _ms(percentile(between, 0.5)) if between else None,
        "gap_p99_ms": _ms(percentile(between, 0.99)) if between else None,
    }


def table(title: str, figures: Figures) -> Table:
    """What a person wants to see of them."""
    shown = Table(title=title, title_justify="left")
    for name in ("", "p50", "p90", "p99", "max"):
        shown.add_column(name, justify="right" if name else "left")
    for name, key in (("time to first token, ms", "ttft_ms"), ("gap between tokens, ms", "gap_ms")):
        spread = figures[key]
        if spread is not None:
            shown.add_row(name, *(f"{value:,.1f}" for value in spread.values()))
    shown.add_section()
    shown.add_row("tokens/s in all", f"{figures['tokens_per_second']:,.1f}")
    if figures["decode_tokens_per_second"] is not None:
        shown.add_row("decode tokens/s, one client", f"{figures['decode_tokens_per_second']:,.1f}")
    each = figures["prompt_tokens_each"]
    shown.add_row("prompt tokens, each", "unknown" if each is None else "-".join(map(str, sorted(set(each)))))
    shown.add_row("output tokens", f"{figures['output_tokens']:,}")
    shown.add_row("seconds", f"{figures['seconds']:,.2f}")
    return shown


def plot(title: str, answers: Sequence[Answer]) -> str:
    """An SVG with the distributions of TTFT and of gaps: bars of counts, lines at p50 and p99."""
    panels = [
        _panel("time to first token, ms", [_ttft(answer) * 1000 for answer in answers], 40),
        _panel(
            "gap between tokens, ms",
            [gap * 1000 for answer in answers for gap in gaps(answer)],
            40 + PANEL_HEIGHT + 2 * MARGIN,
        ),
    ]
    width, height = PANEL_WIDTH + 2 * MARGIN, 40 + 2 * (PANEL_HEIGHT + 2 * MARGIN)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" font-family="sans-serif" font-size="12">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            f'<text x="{MARGIN}" y="24" font-size="15">{escape(title)}</text>',
            *panels,
            "</svg>\n",
        ]
    )


def _panel(name: str, values: Sequence[float], top: int) -> str:
    """One histogram from 0 to the largest value."""
    bottom = top + MARGIN // 2 + PANEL_HEIGHT
    lines = [f'<text x="{MARGIN}" y="{top + 12}" font-weight="bold">{escape(name)}</text>']
    if not values:
        return "\n".join([*lines, f'<text x="{MARGIN}" y="{bottom}">none</text>'])
    end = max(*values, 1e-9) * 1.02
    counts = [0] * BARS
    for value in values:
        counts[min(max(int(value / end * BARS), 0), BARS - 1)] += 1
    step = PANEL_WIDTH / BARS
    for bar, count in enumerate(counts):
        if count:
            high = count / max(counts) * PANEL_HEIGHT
            lines.append(
                f'<rect x="{MARGIN + bar * step:.1f}" y="{bottom - high:.1f}" width="{step - 1:.1f}" '
                f'height="{high:.1f}" fill="#4682b4"><title>{count}</title></rect>'
            )
    right = MARGIN + PANEL_WIDTH
    lines.append(f'<path d="M{MARGIN} {bottom}H{right}" stroke="black"/>')
    for tick in range(5):
        x, value = MARGIN + tick / 4 * PANEL_WIDTH, tick / 4 * end
        lines.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{value:.3g}</text>')
    for label, share, colour in (("p50", 0.5, "#2e8b57"), ("p99", 0.99, "#b22222")):
        found = percentile(values, share)
        x = MARGIN + found / end * PANEL_WIDTH
        place = bottom + (32 if label == "p50" else 46)
        lines.append(
            f'<path d="M{x:.1f} {bottom - PANEL_HEIGHT}V{bottom}" stroke="{colour}" stroke-dasharray="4 3"/>'
            f'<text x="{x:.1f}" y="{place}" text-anchor="middle" fill="{colour}">{label} {found:.3g}</text>'
        )
    return "\n".join(lines)
