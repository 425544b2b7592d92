"""From a comparison's report to one SVG: bars of every server, load by load."""

from collections.abc import Iterator
from typing import Any
from xml.sax.saxutils import escape

from peers import OURS, PLAIN

PANELS = (
    ("tokens/s in all", "tokens/s in all: longer is better"),
    ("TTFT p50, ms", "time to first token, p50, ms: shorter is better"),
)
COLOURS = {OURS: "#1f6fb2", PLAIN: "#8fbbdd"}
OTHERS = ("#8c8c8c", "#b5b5b5", "#d0d0d0", "#e2e2e2")
BAR, GAP, HEAD, FOOT, MARGIN = 15, 14, 56, 24, 20
NAMES, WIDTH = 130, 300
"""Room for a load's name, and the length of its longest bar."""


def draw(report: dict[str, Any]) -> str:
    """Medians over rounds, with a line from the smallest to the largest; each load has a scale of its own."""
    servers = list(report["servers"])
    others = [name for name in servers if name not in COLOURS]
    colours = COLOURS | dict(zip(others, OTHERS, strict=False))
    loads = [load["name"] for load in report["loads"]]
    panel = NAMES + WIDTH + 90
    width, group = 2 * panel + MARGIN, len(servers) * BAR + GAP
    height = HEAD + len(loads) * group + FOOT
    facts = report["machine"]
    machine = f"{facts['processor']} ({facts['model']}), {facts['threads']} threads"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{MARGIN}" y="{height - 10}" fill="#666">{escape(machine)}</text>',
    ]
    for index, name in enumerate(servers):
        x = MARGIN + index * 150
        lines.append(f'<rect x="{x}" y="10" width="12" height="12" fill="{colours.get(name, OTHERS[-1])}"/>')
        lines.append(f'<text x="{x + 17}" y="20">{escape(name)}</text>')
    for index, (figure, title) in enumerate(PANELS):
        left = MARGIN + index * panel
        lines.append(f'<text x="{left}" y="44" font-weight="bold">{escape(title)}</text>')
        rows = {row["load"]: row for row in report["figures"] if row["name"] == figure}
        for place, load in enumerate(loads):
            top = HEAD + place * group
            lines.append(f'<text x="{left}" y="{top + group / 2}">{escape(load)}</text>')
            if load in rows:
                lines.extend(_bars(rows[load], servers, colours, left + NAMES, top))
    return "\n".join([*lines, "</svg>\n"])


def _bars(
    row: dict[str, Any], servers: list[str], colours: dict[str, str], left: int, top: int
) -> Iterator[str]:
    values, spreads = row["values"], row["spreads"]
    scale = WIDTH / max((high for _, high in spreads.values()), default=1)
    for index, name in enumerate(servers):
        y = top + index * BAR
        if name not in values:
            yield f'<text x="{left + 4}" y="{y + 11}" fill="#666">none</text>'
            continue
        low, high = (end * scale for end in spreads[name])
        value = values[name]
        yield (
            f'<rect x="{left}" y="{y}" width="{value * scale:.1f}" height="{BAR - 2}" '
            f'fill="{colours.get(name, OTHERS[-1])}"><title>{escape(name)}: {value:,.1f}</title></rect>'
        )
        yield f'<path d="M{left + low:.1f} {y + 6.5}H{left + high:.1f}" stroke="#333"/>'
        yield f'<text x="{left + high + 5:.1f}" y="{y + 11}">{value:,.0f}</text>'
