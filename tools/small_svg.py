"""A figure as a small SVG, whose colours follow the page's theme."""

from __future__ import annotations

import io
import re

from matplotlib.figure import Figure

# Colours that the page's dark theme changes. Elsewhere the second is what holds.
THEMED = {
    "#ffffff": "var(--ground,#fff)",
    "#222222": "var(--ink,#222)",
    "#000000": "var(--ink,#222)",
    "#8a8a8a": "var(--grey,#8a8a8a)",
    "#ededed": "var(--pale,#ededed)",
}

# A shape that Matplotlib defines, and then uses in one place alone.
_USED_ONCE = re.compile(
    r'<defs><path id="(\w+)" d="([^"]*)"( style="[^"]*")?/></defs>(<g clip-path="[^"]*">)'
    r'<use href="#\1" x="([^"]*)" y="([^"]*)"( style="[^"]*")/>(?!<use href="#\1")'
)


def as_svg(figure: Figure) -> str:
    """A figure as a small SVG: text is text, places are tenths of a point."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = re.sub(r"^.*?(?=<svg )|<metadata>.*?</metadata>|<!--.*?-->", "", buffer.getvalue(),
                 flags=re.DOTALL)  # fmt: skip
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<svg [^>]*(viewBox=\"[^\"]*\")[^>]*>", _root, svg, count=1)
    svg = re.sub(r">\s+<", "><", svg)
    svg = re.sub(r"<[^>]*>", _small_tag, svg)
    svg = _USED_ONCE.sub(r'\4<path d="\2" transform="translate(\5 \6)"\7/>', svg)
    while "<g></g>" in svg:
        svg = svg.replace("<g></g>", "")
    return svg


def _small_tag(found: re.Match) -> str:
    tag = re.sub(r"\s+", " ", found[0])
    tag = re.sub(r' id="[A-Za-z.]+(2d)?_\d+"', "", tag)  # of groups; nothing refers to them
    tag = re.sub(r' transform="rotate\(-0 [^"]*"', "", tag).replace("xlink:href", "href")
    tag = re.sub(r"-?\d+\.\d+(?:e-\d+)?", _rounded, tag)
    tag = re.sub(r"font-size: ([\d.]+)px; font-family: [^;\"]*", r"font-size:\1px", tag)
    tag = re.sub(r"([;:]) ", r"\1", tag)
    for color, themed in THEMED.items():
        tag = tag.replace(color, themed)
    return re.sub(r' d="[^"]*"', _small_path, tag)


def _small_path(found: re.Match) -> str:
    path = re.sub(r" ?([MLCQz]) ?", r"\1", found[0])
    path = re.sub(r"M(\S+) ([^L]+)L\1 ([^L]+)L([^L ]+) \3L\4 \2z", r"M\1 \2V\3H\4V\2z", path)
    return re.sub(r"M(\S+) ([^L]+)L([^L ]+) \2L\3 ([^L]+)L\1 \4z", r"M\1 \2H\3V\4H\1z", path)


def _root(found: re.Match) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {found[1]} '
        'style="stroke-linejoin:round;font-family:DejaVu Sans,Verdana,sans-serif">'
    )


def _rounded(found: re.Match) -> str:
    return f"{round(float(found[0]), 1) + 0:.6g}"  # + 0, since -0 is 0


def words_in(svg: str) -> list[str]:
    """All that is written in a picture."""
    return re.findall(r"<text[^>]*>(.*?)</text>", svg)
