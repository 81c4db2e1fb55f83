"""What a Jupyter server of the course does besides: saved explorers keep their picture.

A live explorer is known to the running kernel alone. Saved as it is, it would be an error message
the next day; saved without its live part, it is its picture, and a line that says how to get the
sliders back.
"""

import warnings

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


def keep_pictures(model: dict, **details: object) -> None:
    """Take the live part out of each output that has a picture as well, in what is saved."""
    if model["type"] != "notebook" or not model.get("content"):
        return
    for cell in model["content"]["cells"]:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                data.pop(WIDGET_VIEW, None)


# Jupyter takes its settings in twice, and would warn of the second time.
warnings.filterwarnings("ignore", message="Overriding existing pre_save_hook")
# Jupyter defines it where it reads this file.
c = get_config()  # type: ignore[name-defined]  # noqa: F821
c.ContentsManager.pre_save_hook = keep_pictures
