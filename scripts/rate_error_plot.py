"""The rate-error curve as an SVG: bytes per row against the L1 error, and against the error of the full ULD.

Of a line with figures for both stores, the Zarr store's bytes are drawn.
"""

import math

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, GAP = 470, 380, 64, 48, 52, 24
COLOURS = {"half": "#d68910", "compact": "#1f618d", "sketch": "#1e8449", "others": "#7f8c8d"}
BYTES = (8, 16, 32, 64, 128, 256)
Line = dict[str, object]


def draw(lines: list[Line]) -> str:
    """Two panels over the same axis of bytes; both axes logarithmic."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH + GAP} {HEIGHT + 24}" '
        'font-family="sans-serif" font-size="11">'
    )
    panels = [
        _panel(lines, "l1_mean", 0, "mean L1 error of storing a row, k = 64 (numbers: steps of 2^-b)"),
        _panel(lines, "uld_error_mean", WIDTH + GAP, "mean absolute error of the full ULD, Gemma-3 to SmolLM2"),
    ]
    legend = [
        _text(LEFT + 90 * number, HEIGHT + 12, name, f'fill="{colour}" font-weight="bold"')
        for number, (name, colour) in enumerate(COLOURS.items())
    ]
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *panels, *legend, "</svg>\n"])


def _panel(lines: list[Line], error: str, offset: float, title: str) -> str:
    shown = [line for line in lines if _bytes(line) and float(line[error]) > 1e-5 and _belongs(line, error)]
    errors = [float(line[error]) for line in shown]
    low, high = math.floor(math.log10(min(errors))), math.ceil(math.log10(max(errors)))

    def x(size: float) -> float:
        share = math.log(size / BYTES[0]) / math.log(1.3 * BYTES[-1] / BYTES[0])
        return offset + LEFT + share * (WIDTH - LEFT)

    def y(value: float) -> float:
        return TOP + (high - math.log10(value)) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [_text(offset + LEFT, 24, title, 'font-size="13"')]
    for power in range(low, high + 1):
        at = y(10.0**power)
        parts.append(f'<line x1="{x(BYTES[0]):.1f}" y1="{at:.1f}" x2="{offset + WIDTH}" y2="{at:.1f}" stroke="#ddd"/>')
        parts.append(_text(offset + LEFT - 6, at + 4, f"{10.0**power:g}", 'text-anchor="end"'))
    for size in BYTES:
        parts.append(_text(x(size), HEIGHT - BOTTOM + 18, str(size), 'text-anchor="middle"'))
    parts.append(_text(offset + (LEFT + WIDTH) / 2, HEIGHT - 14, "bytes per row", 'text-anchor="middle"'))
    for name, colour in COLOURS.items():
        family = sorted((line for line in shown if _family(line) == name), key=_bytes)
        for number, line in enumerate(family):
            at_x, at_y = x(_bytes(line)), y(float(line[error]))
            parts.append(f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="3.5" fill="{colour}"/>')
            more = f'fill="{colour}" font-size="9"'
            if name in ("sketch", "others") and number % 2:  # crowded: below left, above right, by turns
                parts.append(_text(at_x - 6, at_y + 12, _label(line, error), more + ' text-anchor="end"'))
            else:
                parts.append(_text(at_x + 6, at_y - 4, _label(line, error), more))
    return "\n".join(parts)


def _bytes(line: Line) -> float:
    return float(line.get("zarr_bytes") or line.get("arrow_bytes") or 0)


def _family(line: Line) -> str:
    return str(line["what"]) if line["what"] in COLOURS else "others"


def _belongs(line: Line, error: str) -> bool:
    """The left panel compares equal k; the right one leaves out what only repeats it."""
    if error == "l1_mean":
        return line["k"] == 64
    return line["what"] in ("sketch", "half") or (line["what"] == "compact" and line.get("step_bits") == 13)


def _label(line: Line, error: str) -> str:
    if line["what"] == "sketch":
        return f"{line['k']} + {line['bins']}, 2^-{line['step_bits']}"
    if _family(line) == "others":
        return str(line["what"])
    return f"2^-{line['step_bits']}" if error == "l1_mean" and "step_bits" in line else f"k = {line['k']}"


def _text(x: float, y: float, words: str, more: str = "") -> str:
    words = words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{words}</text>'
