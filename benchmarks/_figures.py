"""Charts as SVG text: the same results give the same file, and nothing need be installed."""

import math
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 360, 60, 190, 36, 48
COLOURS = ("#1f6f8b", "#d1495b", "#5b8c5a", "#8d6a9f", "#c58b2a", "#555555", "#2b9eb3", "#a0522d")


def _document(title: str, note: str, body: list[str], height: int = HEIGHT) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height + 18}" '
        'font-family="sans-serif" font-size="11">'
    )
    parts = [
        head,
        f'<rect width="{WIDTH}" height="{height + 18}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="13" font-weight="bold">{escape(title)}</text>',
        *body,
        f'<text x="8" y="{height + 10}" font-size="9" fill="#555">{escape(note)}</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if log:
        first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
        return [10.0**exponent for exponent in range(first, last + 1)]
    step = 10 ** math.floor(math.log10((high - low) or 1.0))
    step = next(step * f for f in (0.1, 0.2, 0.5, 1, 2) if (high - low) / (step * f) <= 8)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def lines(
    title: str,
    note: str,
    series: dict[str, list[tuple[float, float]]],
    x: str,
    y: str,
    *,
    log: bool = False,
    level: float | None = None,
) -> str:
    """series: name -> points, drawn as a line with dots. level: a dashed horizontal line."""
    points = [p for values in series.values() for p in values]
    lows, highs = ([pick(p[i] for p in points) for i in (0, 1)] for pick in (min, max))
    if level is not None:
        lows[1], highs[1] = min(lows[1], level), max(highs[1], level)
    if log:
        lows, highs = [v / 1.5 for v in lows], [v * 1.5 for v in highs]
    else:
        span = (highs[1] - lows[1]) or 1.0
        lows[1], highs[1] = lows[1] - 0.06 * span, highs[1] + 0.06 * span
        highs[0] = highs[0] if highs[0] > lows[0] else lows[0] + 1.0

    def place(value: float, axis: int) -> float:
        f = math.log if log else float
        share = (f(value) - f(lows[axis])) / (f(highs[axis]) - f(lows[axis]))
        if axis:
            return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    body = [
        f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="#333"/>',
        f'<text x="{(LEFT + right) / 2:.0f}" y="{HEIGHT - 10}" text-anchor="middle">'
        f"{escape(x)}</text>",
        f'<text x="14" y="{(TOP + bottom) / 2:.0f}" text-anchor="middle" '
        f'transform="rotate(-90 14 {(TOP + bottom) / 2:.0f})">{escape(y)}</text>',
    ]
    for value in _ticks(lows[0], highs[0], log):
        at = place(value, 0)
        body.append(f'<text x="{at:.1f}" y="{bottom + 14}" text-anchor="middle">{value:g}</text>')
    for value in _ticks(lows[1], highs[1], log):
        at = place(value, 1)
        body.append(f'<text x="{LEFT - 5}" y="{at + 4:.1f}" text-anchor="end">{value:g}</text>')
        body.append(f'<path d="M{LEFT} {at:.1f}H{right}" stroke="#ddd"/>')
    if level is not None:
        at = place(level, 1)
        body.append(f'<path d="M{LEFT} {at:.1f}H{right}" stroke="#333" stroke-dasharray="4 3"/>')
    for index, (name, values) in enumerate(series.items()):
        colour = COLOURS[index % len(COLOURS)]
        placed = [(place(a, 0), place(b, 1)) for a, b in sorted(values)]
        path = "L".join(f"{a:.1f} {b:.1f}" for a, b in placed)
        body.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        body += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.6" fill="{colour}"/>' for a, b in placed]
        at = TOP + 8 + 16 * index
        body.append(f'<circle cx="{right + 14}" cy="{at}" r="4" fill="{colour}"/>')
        body.append(f'<text x="{right + 22}" y="{at + 4}">{escape(name)}</text>')
    return _document(title, note, body)


def bars(title: str, note: str, stacks: dict[str, dict[str, float]], unit: str) -> str:
    """stacks: bar -> part -> size; one stacked horizontal bar each, parts in the same colours."""
    parts = list(dict.fromkeys(part for stack in stacks.values() for part in stack))
    most = max(sum(stack.values()) for stack in stacks.values())
    height = TOP + 34 * len(stacks) + 16
    height = max(height, TOP + 16 * len(parts) + 24)
    body = []
    for row, (name, stack) in enumerate(stacks.items()):
        y, x = TOP + 34 * row, float(LEFT + 30)
        body.append(f'<text x="{LEFT + 24}" y="{y + 15}" text-anchor="end">{escape(name)}</text>')
        for part, size in stack.items():
            width = size / most * (WIDTH - LEFT - RIGHT - 80)
            colour = COLOURS[parts.index(part) % len(COLOURS)]
            body.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="22" fill="{colour}"/>'
            )
            x += width
        body.append(f'<text x="{x + 5:.1f}" y="{y + 15}">{sum(stack.values()):.1f} {unit}</text>')
    for index, part in enumerate(parts):
        at = TOP + 8 + 16 * index
        colour = COLOURS[index % len(COLOURS)]
        body.append(f'<circle cx="{WIDTH - RIGHT + 14}" cy="{at}" r="4" fill="{colour}"/>')
        body.append(f'<text x="{WIDTH - RIGHT + 22}" y="{at + 4}">{escape(part)}</text>')
    return _document(title, note, body, height)
