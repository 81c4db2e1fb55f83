"""Where the course is on the web, and every link that follows from it.

``[project.urls]`` in pyproject.toml is the one place that says so::

    [project.urls]
    Repository = "https://github.com/OWNER/NAME"
    Homepage = "https://OWNER.github.io/NAME"    # where the web page is published

With both, ``python tools/addresses.py`` (``make badges``) writes the links to start the course with
one click into README.md. Without them there is nothing to lead to, and README.md has none.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlencode

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
FIRST = "00_meet_your_gpus.ipynb"
# Where the workflow puts what tools/hosted.py makes: with solutions, and without.
BRANCH, STUDENT_BRANCH = "lessons", "student"
_UNKNOWN = "<the address of this repository>"
_BADGES = re.compile(r"(<!-- badges -->\n).*?(<!-- /badges -->)", re.DOTALL)
_CLONE = re.compile(r"(?<=git clone ).*(?= multi-gpu-by-hand$)", re.MULTILINE)
_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")


@dataclass(frozen=True)
class Addresses:
    """The repository on GitHub and the web page, without a slash at the end."""

    repository: str
    page: str
    version: str

    @property
    def owner_and_name(self) -> str:
        return self.repository.removeprefix("https://github.com/")

    @property
    def wheel(self) -> str:
        """Beside the web page, where the workflow puts it."""
        return f"{self.page}/wheel/multi_gpu_by_hand-{self.version}-py3-none-any.whl"

    @property
    def binder(self) -> str:
        place = urlencode({"urlpath": f"lab/tree/my_lessons/{FIRST}"}, safe="/")
        return f"https://mybinder.org/v2/gh/{self.owner_and_name}/main?{place}"

    @property
    def codespaces(self) -> str:
        return f"https://codespaces.new/{self.owner_and_name}"

    def colab(self, lesson: str = FIRST) -> str:
        """A lesson of the hosted edition, whose first cell installs the course."""
        return (
            "https://colab.research.google.com/github/"
            f"{self.owner_and_name}/blob/{BRANCH}/colab/{lesson}"
        )

    def hub(self, hub: str, branch: str = BRANCH) -> str:
        """What learners of the JupyterHub at the address ``hub`` click: nbgitpuller fetches all."""
        folder = self.owner_and_name.partition("/")[2]
        query = {
            "repo": self.repository,
            "branch": branch,
            "urlpath": f"lab/tree/{folder}/hub/{FIRST}",
        }
        return f"{hub.rstrip('/')}/hub/user-redirect/git-pull?{urlencode(query, quote_via=quote)}"


def addresses() -> Addresses | None:
    """What pyproject.toml says; None if the course has no public address.

    Raises:
        ValueError: one of the two is missing, or the repository is not on GitHub.
    """
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    urls = project.get("urls", {})
    repository, page = (urls.get(name, "").rstrip("/") for name in ("Repository", "Homepage"))
    if not repository and not page:
        return None
    if not page or not repository.startswith("https://github.com/"):
        raise ValueError(
            "[project.urls] in pyproject.toml needs both Repository = "
            '"https://github.com/OWNER/NAME" and Homepage, the address of the web page'
        )
    return Addresses(repository, page, project["version"])


def relinked(text: str, known: Addresses | None, lesson: Callable[[str], str] | None) -> str:
    """A lesson's Markdown as it is read outside of the repository.

    ``lesson`` says where another lesson is, None that it is where it was. What else was linked to
    in the repository is at its address, or, if it has none, words without a link.
    """

    def moved(link: re.Match) -> str:
        words, target, place = link[1], link[2], link[3] or ""
        file = Path(os.path.normpath(ROOT / "notebooks" / target))
        if not file.is_file():
            return link[0]  # code that looks like a link
        if file.suffix == ".ipynb":
            return f"[{words}]({lesson(target) if lesson else target}{place})"
        if known is None:
            return str(words)
        at = file.relative_to(ROOT).as_posix()
        return f"[{words}]({known.repository}/blob/main/{at}{place})"

    return _LINK.sub(moved, text)


def with_addresses(readme: str, known: Addresses | None) -> str:
    """README.md with its badges and the address to clone from, as far as they are known."""
    readme = _BADGES.sub(lambda found: found[1] + _badges(known) + found[2], readme)
    return _CLONE.sub(known.repository if known else _UNKNOWN, readme)


def _badges(known: Addresses | None) -> str:
    if known is None:
        return ""
    badges = [
        ("Open in Colab", "https://colab.research.google.com/assets/colab-badge.svg",
         known.colab()),
        ("Start on Binder", "https://mybinder.org/badge_logo.svg", known.binder),
        ("Open in Codespaces", "https://github.com/codespaces/badge.svg", known.codespaces),
    ]  # fmt: skip
    links = "\n".join(f"[![{words}]({image})]({to})" for words, image, to in badges)
    return f"In one click, without installing anything:\n\n{links}\n\n"


if __name__ == "__main__":
    README.write_text(
        with_addresses(README.read_text(encoding="utf-8"), addresses()), encoding="utf-8"
    )
