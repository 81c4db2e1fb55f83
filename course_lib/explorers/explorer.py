"""What every interactive explorer is: sliders above a picture, drawn anew when a slider moves.

Where no live widget can be shown (on GitHub, on a printed page, in a saved notebook), an explorer
shows the picture of its first setting, with a line that says how to get the sliders.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable
from typing import Any

import ipywidgets
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from course_lib import style
from course_lib.explorers import frames

DPI = 144  # sharp on a screen that is zoomed to 150 %
WIDTH = "900px"
WORKING = "Working ..."
HOW_TO_GET_SLIDERS = "A picture of one setting. Run this cell to get the sliders."

# A slider's handle has no name, and its value is a place in a list: a screen reader would say
# "slider, 1". The browser runs this as a picture arrives, and gives the handle the words beside it.
_NAME_HANDLES = """
for (const slider of this.closest('.widget-vbox')?.querySelectorAll('.widget-slider') ?? []) {
  const handle = slider.querySelector('[role=slider]');
  const value = slider.querySelector('.widget-readout');
  const say = () => {
    if (handle.ariaValueText !== value.textContent) handle.ariaValueText = value.textContent;
  };
  if (!handle.ariaLabel) new MutationObserver(say).observe(handle, {attributes: true});
  handle.ariaLabel = slider.querySelector('.widget-label').textContent;
  say();
}
"""


class Explorer(ipywidgets.VBox):
    """Controls above a figure, or above a line that says why there is none.

    Where a picture is kept for what the controls are set to, it is shown at once and nothing runs.

    Args:
        draw: makes the figure; is called with one keyword argument for each control.
        controls: ipywidgets with a ``value``, by the name that ``draw`` knows them under.

    Attributes:
        controls: the controls, by name.
        working: what it says while it draws.
    """

    working = WORKING

    def __init__(self, draw: Callable[..., Figure], **controls: ipywidgets.ValueWidget) -> None:
        self._draw = draw
        self.controls = controls
        self._kept = frames.frames_of(draw, controls)
        self._png = b""
        # A screen reader announces what changes in it: the settings, and what the picture says.
        self._status = ipywidgets.HTML()
        self._picture = ipywidgets.HTML()
        for control in controls.values():
            control.style.description_width = "190px"
            control.layout.width = "480px"
            control.observe(self._refresh, names="value")
        super().__init__([*controls.values(), self._status, self._picture])
        self.layout.align_items = "flex-start"
        self._refresh()

    @property
    def values(self) -> dict[str, Any]:
        """What the controls are set to."""
        return {name: control.value for name, control in self.controls.items()}

    def draw(self, **values: Any) -> Figure:
        """The figure, drawn now, of ``values`` or else of what the controls are set to."""
        with style.look():
            return self._draw(**(values or self.values))

    def _refresh(self, change: object = None) -> None:
        self._png = b""
        place = self._kept.place(self.values) if self._kept else None
        if self._kept is None or place is None:
            self._show_drawn()
        else:
            svg = self._kept.frames[place].encode()
            self._show(svg, "image/svg+xml", self._kept.titles[place])

    def _show_drawn(self) -> None:
        self._say(self.working)
        try:
            self._png, titles = self._as_png()
        except Exception as error:
            self._picture.value = ""
            first_line = next(iter(str(error).splitlines()), "")
            self._say(f"{type(error).__name__}: {first_line}")
        else:
            self._show(self._png, "image/png", titles)

    def _as_png(self) -> tuple[bytes, str]:
        """The picture, drawn now, and what it says of itself."""
        open_before = set(plt.get_fignums())
        try:
            with style.look():
                figure = self.draw()
                buffer = io.BytesIO()
                figure.savefig(buffer, format="png", dpi=DPI)
            return buffer.getvalue(), titles_of(figure)
        finally:
            for number in set(plt.get_fignums()) - open_before:
                plt.close(number)

    def _show(self, picture: bytes, kind: str, titles: str) -> None:
        description = f"{self._settings()}. {titles}"
        self._picture.value = _image(picture, kind, description)
        self._say(description, is_shown=False)

    def _say(self, text: str, is_shown: bool = True) -> None:
        hidden = "" if is_shown else ' style="position: absolute; left: -9999px"'
        self._status.value = f'<div role="status"{hidden}>{html.escape(text)}</div>'

    def _settings(self) -> str:
        return ", ".join(
            f"{control.description}: {control.value}" for control in self.controls.values()
        )

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self.values.items())
        return f"<explorer: {settings}>"

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        bundle = super()._repr_mimebundle_(**kwargs)
        bundle["text/plain"] = repr(self)
        if self._kept and not self._png:
            self._png, _ = self._as_png()
        if self._png:
            bundle["image/png"] = base64.b64encode(_with_line_below(self._png)).decode()
        return bundle


def choice(label: str, options: list, value: Any) -> ipywidgets.SelectionSlider:
    """A slider over ``options``, which updates when it is let go."""
    return ipywidgets.SelectionSlider(
        description=label, options=options, value=value, continuous_update=False
    )


def titles_of(figure: Figure) -> str:
    """What the figure says of itself, for those who do not see it."""
    titles = [ax.get_title(loc) for ax in figure.axes for loc in ("left", "center")]
    return "; ".join(title for title in titles if title)


def _image(picture: bytes, kind: str, description: str) -> str:
    data = base64.b64encode(picture).decode()
    return (
        f'<img src="data:{kind};base64,{data}" alt="{html.escape(description, quote=True)}" '
        f'style="width: {WIDTH}; max-width: 100%" onload="{html.escape(_NAME_HANDLES)}">'
    )


def _with_line_below(png: bytes) -> bytes:
    """The picture with :data:`HOW_TO_GET_SLIDERS` below it, in fewer pixels: it is stored."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    size = round(picture.width * 100 / DPI), round(picture.height * 100 / DPI)
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    whole = Image.new("RGB", (picture.width, picture.height + 24), "white")
    whole.paste(picture)
    font = ImageFont.load_default(size=13)
    ImageDraw.Draw(whole).text((12, picture.height + 3), HOW_TO_GET_SLIDERS, style.INK, font)
    buffer = io.BytesIO()
    whole.save(buffer, format="png", optimize=True)
    return buffer.getvalue()
