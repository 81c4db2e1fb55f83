"""The interactive explorers: sliders above a picture, drawn anew when a slider moves.

Where no live widget can be shown (on GitHub, on a printed page), an explorer shows the picture of
its first setting.
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

from course_lib import style


class Explorer(ipywidgets.VBox):
    """Controls above a figure, or above a line that says why there is none.

    Args:
        draw: makes the figure; is called with one keyword argument for each control.
        controls: ipywidgets with a ``value``, by the name that ``draw`` knows them under.
    """

    def __init__(self, draw: Callable[..., Figure], **controls: ipywidgets.ValueWidget) -> None:
        self._draw = draw
        self._controls = controls
        self._picture = ipywidgets.Image(format="png")
        self._picture.layout.width, self._picture.layout.max_width = "900px", "100%"
        self._error = ipywidgets.HTML()
        for control in controls.values():
            control.style.description_width = "190px"
            control.layout.width = "480px"
            control.observe(self._refresh, names="value")
        super().__init__([*controls.values(), self._picture])
        self.layout.align_items = "flex-start"
        self._refresh()

    @property
    def values(self) -> dict[str, Any]:
        """What the controls are set to."""
        return {name: control.value for name, control in self._controls.items()}

    def _refresh(self, change: object = None) -> None:
        self._picture.layout.opacity = "0.4"  # a sign of work going on
        open_before = set(plt.get_fignums())
        buffer = io.BytesIO()
        try:
            with style.look():
                self._draw(**self.values).savefig(buffer, format="png", dpi=100)
        except Exception as error:
            first_line = next(iter(str(error).splitlines()), "")
            self._error.value = html.escape(f"{type(error).__name__}: {first_line}")
            self._show(self._error)
        else:
            self._picture.value = buffer.getvalue()
            self._show(self._picture)
        finally:
            self._picture.layout.opacity = "1"
            for number in set(plt.get_fignums()) - open_before:
                plt.close(number)

    def _show(self, result: ipywidgets.DOMWidget) -> None:
        self.children = [*self._controls.values(), result]

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self.values.items())
        return f"<explorer: {settings}>"

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        bundle = super()._repr_mimebundle_(**kwargs)
        bundle["text/plain"] = repr(self)
        if self._picture in self.children:
            bundle["image/png"] = base64.b64encode(self._picture.value).decode()
        return bundle


def choice(label: str, options: list, value: Any) -> ipywidgets.SelectionSlider:
    """A slider over ``options``, which updates when it is let go."""
    return ipywidgets.SelectionSlider(
        description=label, options=options, value=value, continuous_update=False
    )
