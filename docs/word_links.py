"""In a lesson, the first use of each word of the glossary is a link to it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

from stage_site import anchor_of

_ROW = re.compile(r"^\| (?!word \|)(\w[^|]*) \| [^|]* \| \[\d\d\]", re.MULTILINE)
GLOSSARY = (Path(__file__).parent / "glossary.md").read_text(encoding="utf-8")
WORDS = _ROW.findall(GLOSSARY)
# The longest first: "sequence parallelism" is not a use of another word inside it.
_ANY = re.compile(
    r"\b(" + "|".join(re.escape(word) for word in sorted(WORDS, key=len, reverse=True)) + r")s?\b",
    re.IGNORECASE,
)
# Where a link would be one too many.
_NOT_IN = nodes.title, nodes.reference, nodes.literal, nodes.literal_block, nodes.table, nodes.math


class WordLinks(SphinxPostTransform):
    default_priority = 900

    def run(self, **kwargs: object) -> None:
        docname = self.env.docname
        if not docname.startswith("notebooks/"):
            return
        seen: set[str] = set()
        target = self.app.builder.get_relative_uri(docname, "glossary")
        for paragraph in list(self.document.findall(nodes.paragraph)):
            for text in list(_plain_texts(paragraph)):
                _link_words(text, target, seen)


def _plain_texts(paragraph: nodes.paragraph) -> Iterator[nodes.Text]:
    for text in paragraph.findall(nodes.Text):
        above = text.parent
        while above is not None and not isinstance(above, _NOT_IN):
            above = above.parent
        if above is None:
            yield text


def _link_words(text: nodes.Text, target: str, seen: set[str]) -> None:
    words = text.astext()
    pieces: list[nodes.Node] = []
    end = 0
    for found in _ANY.finditer(words):
        word = found[1].lower()
        if word in seen:
            continue
        seen.add(word)
        pieces.append(nodes.Text(words[end : found.start()]))
        uri = f"{target}#{anchor_of(word)}"
        pieces.append(nodes.reference("", found[0], refuri=uri, internal=True, classes=["word"]))
        end = found.end()
    if pieces:
        parent = text.parent
        assert parent is not None and not isinstance(parent, addnodes.pending_xref)
        parent.replace(text, [*pieces, nodes.Text(words[end:])])


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_post_transform(WordLinks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
