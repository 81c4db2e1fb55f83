"""What the pictures of the course share: a small writer of SVG, and what each colour stands for.

A picture is 900 pixels wide, on a white rounded ground of its own, so that it reads the same in a
light and a dark theme. Its text stays text. Colour never stands alone: every shape has a label.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from io import BytesIO
from math import atan2, cos, sin
from pathlib import Path
from xml.sax.saxutils import escape, unescape

import resvg_py
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from course_lib.style import BLUE, GREEN, GREY, INK, ORANGE, PALE, PURPLE, SKY

WIDTH = 900
PNG_WIDTH = 1350  # sharp at 150 %
FONTS = "Helvetica Neue, Helvetica, Arial, Liberation Sans, DejaVu Sans, sans-serif"
CODE_FONTS = "SFMono-Regular, Menlo, Consolas, Liberation Mono, DejaVu Sans Mono, monospace"

# What a colour stands for, in every picture.
LAYER = FORWARD = BLUE  # a layer, its parameters, and its forward pass
ACTIVATION = ORANGE  # what a layer computes and passes on
GRADIENT = BACKWARD = GREEN  # a gradient, and the backward pass that computes it
OPTIMIZER = PURPLE  # the optimizer, and what it remembers
DATA = SKY  # samples
DEVICE = GREY  # the host and the GPUs
SOFT = "#5A5A5A"  # for words that explain; dark enough to read

Point = tuple[float, float]


def tint(colour: str, strength: float = 0.25) -> str:
    """``colour`` mixed with white; strength 1 is the colour itself, 0 is white."""
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(255 - strength * (255 - part)):02X}" for part in parts)


class Picture:
    """An SVG drawing; every method adds one thing, on top of those before it.

    Args:
        height: in pixels; the width is always ``WIDTH``.
        title, description: what a screen reader says.
    """

    def __init__(self, height: float, title: str, description: str) -> None:
        self._height = height
        self._parts = [
            f"<title>{escape(title)}</title>",
            f"<desc>{escape(description)}</desc>",
            '<defs><pattern id="hatch" width="9" height="9" patternUnits="userSpaceOnUse" '
            f'patternTransform="rotate(45)"><rect width="9" height="9" fill="white"/>'
            f'<path d="M0 0V9" stroke="{tint(GREY, 0.6)}" stroke-width="2.5"/></pattern></defs>',
        ]
        self.rect(0.5, 0.5, WIDTH - 1, height - 1, fill="white", stroke=PALE, radius=14)

    def rect(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str = "none",
        stroke: str = "none",
        thickness: float = 1.5,
        radius: float = 4,
        dashed: bool = False,
    ) -> None:
        """A rectangle with round corners; ``fill="url(#hatch)"`` gives it stripes."""
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        line = "" if stroke == "none" else f' stroke="{stroke}" stroke-width="{thickness:g}"'
        self._parts.append(
            f'<rect x="{_number(x)}" y="{_number(y)}" width="{_number(width)}" '
            f'height="{_number(height)}" rx="{radius:g}" fill="{fill}"{line}{dashes}/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        size: float = 14,
        anchor: str = "middle",
        bold: bool = False,
        colour: str = INK,
        lead: str = "",
        code: bool = False,
    ) -> None:
        """One line of text whose middle is at height ``y``; ``lead`` comes first, in bold.

        Args:
            anchor: ``"start"``, ``"middle"`` or ``"end"``: which part of the line is at ``x``.
        """
        look = (' font-weight="bold"' if bold else "") + (
            f' font-family="{CODE_FONTS}" xml:space="preserve"' if code else ""
        )
        first = f'<tspan font-weight="bold">{escape(lead)}</tspan> ' if lead else ""
        self._parts.append(
            f'<text x="{_number(x)}" y="{_number(y + 0.35 * size)}" font-size="{size:g}" '
            f'text-anchor="{anchor}" fill="{colour}"{look}>{first}{escape(words)}</text>'
        )

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        words: str | Sequence[str] = "",
        colour: str = GREY,
        size: float = 14,
        bold: bool = False,
        strength: float = 0.25,
        radius: float = 4,
    ) -> None:
        """A box in a light tint of ``colour``, its words in the middle, one string a line."""
        self.rect(x, y, width, height, tint(colour, strength), colour, radius=radius)
        lines = [words] if isinstance(words, str) else words
        for i, line in enumerate(lines):
            down = (i - (len(lines) - 1) / 2) * size * 1.2
            if line:
                self.text(x + width / 2, y + height / 2 + down, line, size, bold=bold)

    def device(self, x: float, y: float, width: float, height: float) -> None:
        """The outline of the host or of a GPU; put its name in it."""
        self.rect(x, y, width, height, tint(DEVICE, 0.1), DEVICE, thickness=2, radius=10)

    def line(
        self, *points: Point, colour: str = INK, thickness: float = 2, dashed: bool = False
    ) -> None:
        """A line through ``points``."""
        path = "M" + "L".join(f"{_number(x)} {_number(y)}" for x, y in points)
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self._parts.append(
            f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{thickness:g}" '
            f'stroke-linejoin="round"{dashes}/>'
        )

    def arrow(
        self,
        *points: Point,
        colour: str = INK,
        thickness: float = 2,
        dashed: bool = False,
        both: bool = False,
    ) -> None:
        """A line through ``points`` with a head at its end, or one at each end."""
        length = 5 + 2.5 * thickness
        route = list(points)
        heads = [(route[-2], route[-1])] + ([(route[1], route[0])] if both else [])
        route[-1] = _shorten(*heads[0], length)
        if both:
            route[0] = _shorten(*heads[1], length)
        self.line(*route, colour=colour, thickness=thickness, dashed=dashed)
        for start, end in heads:
            self._head(start, end, length, colour)

    def _head(self, start: Point, end: Point, length: float, colour: str) -> None:
        angle = atan2(end[1] - start[1], end[0] - start[0])
        corners = [end]
        for side in (-0.45, 0.45):
            x = end[0] - length * cos(angle) - side * length * sin(angle)
            y = end[1] - length * sin(angle) + side * length * cos(angle)
            corners.append((x, y))
        points = " ".join(f"{_number(x)},{_number(y)}" for x, y in corners)
        self._parts.append(f'<polygon points="{points}" fill="{colour}"/>')

    def bracket(self, left: float, right: float, y: float, words: str) -> None:
        """A brace over a part of a row, and what that part is called."""
        self.line((left, y + 8), (left, y), (right, y), (right, y + 8), colour=SOFT, thickness=1.5)
        self.text((left + right) / 2, y - 12, words, size=15, bold=True)

    def uncover(self, x: float, y: float, width: float, height: float, seconds: float) -> None:
        """Hide what was drawn there so far, and show it from left to right, twice; then it stays.

        Where nothing moves (in the PNG, on paper, for readers who ask for less motion), all of it
        is there from the start.
        """
        place = f'x="{_number(x)}" y="{_number(y)}" width="{_number(width)}" height="{height:g}"'
        name = f"cover{len(self._parts)}"
        # The cover moves to the right, out of the room in which it can be seen, and waits there.
        self._parts.append(
            f"<style>@media (prefers-reduced-motion: no-preference) {{ .{name} {{ "
            f"animation: {name} {seconds * 4 / 3:g}s linear 2 }} }} "
            f"@keyframes {name} {{ 0% {{ visibility: visible; transform: none }} 75%, 100% "
            f"{{ visibility: visible; transform: translateX({_number(width)}px) }} }}</style>"
            f'<clipPath id="{name}"><rect {place}/></clipPath><g clip-path="url(#{name})">'
            f'<rect class="{name}" {place} fill="white" visibility="hidden"/></g>'
        )

    def svg(self) -> str:
        """The whole file."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{self._height:g}" '
            f'viewBox="0 0 {WIDTH} {self._height:g}" role="img" font-family="{FONTS}">'
        )
        return "\n".join([head, *self._parts, "</svg>"]) + "\n"


def save(script: str, svg: str) -> None:
    """Write ``svg`` beside the script that drew it, under the script's name, and a PNG of it.

    A notebook shows the PNG, which is seen wherever it is opened. It carries the words for a screen
    reader, and a sum of the SVG that it was made of.
    """
    Path(script).with_suffix(".svg").write_bytes(svg.encode())
    title, description = (_between(svg, tag) for tag in ("title", "desc"))
    words = PngInfo()
    words.add_itxt("Description", f"{title}. {description}")
    words.add_text("Source", sha256(svg.encode()).hexdigest())
    pixels = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=PNG_WIDTH))
    # A hundred colours are enough for flat shapes, and a third of the bytes.
    drawn = Image.open(BytesIO(pixels)).convert("RGBA")
    ground = Image.new("RGBA", drawn.size, "white")  # behind the rounded corners
    picture = Image.alpha_composite(ground, drawn).convert("RGB").quantize(128)
    picture.save(Path(script).with_suffix(".png"), optimize=True, pnginfo=words)


def _between(svg: str, tag: str) -> str:
    return unescape(svg.split(f"<{tag}>")[1].split(f"</{tag}>")[0])


def _number(value: float) -> str:
    return f"{round(value, 2) + 0:g}"


def _shorten(start: Point, end: Point, length: float) -> Point:
    """A point a little before ``end``, so that a line does not stick out of its arrowhead."""
    angle = atan2(end[1] - start[1], end[0] - start[0])
    return end[0] - 0.8 * length * cos(angle), end[1] - 0.8 * length * sin(angle)
