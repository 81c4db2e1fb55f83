"""The page of formulas: each is Python in docs/formulas.md, and a drawn formula on the web page."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

from notebook_tools import ROOT

PAGE = ROOT / "docs" / "formulas.md"
_ROW = re.compile(r"^(\| (?!\|)[^|]+ \| )`([^`]+)`( \| \[\d\d\]\([^)]+\) \| )`([^`]+)`( \|)$", re.M)
_PART = re.compile(r"^## (.*)\n\n((?:[^|\n#].*\n)*)", re.M)
_SIGNS: dict[type, str] = {ast.Add: " + ", ast.Sub: " - ", ast.Mult: r" \, "}
_STRENGTH: dict[type, int] = {ast.Add: 1, ast.Sub: 1, ast.Mult: 2}


@dataclass(frozen=True)
class Formula:
    """A row: what it is, the formula, its lesson, and the call that gives the same."""

    what: str
    formula: str
    lesson: str
    code: str


@dataclass(frozen=True)
class Part:
    """A stretch of the page: its heading, the letters that it needs besides, and its rows."""

    title: str
    letters: str
    rows: list[Formula]


def letters() -> str:
    """What the letters stand for, in Markdown: a paragraph."""
    return PAGE.read_text(encoding="utf-8").partition("\n## ")[0].strip().split("\n\n")[-1]


def parts() -> list[Part]:
    """All parts of the page, in its order."""
    text = PAGE.read_text(encoding="utf-8")
    found = list(_PART.finditer(text))
    ends = [each.start() for each in found[1:]] + [len(text)]
    return [
        Part(each[1], each[2].strip(), _formulas(text[each.end() : end]))
        for each, end in zip(found, ends, strict=True)
    ]


def formulas() -> list[Formula]:
    """All rows of the page."""
    return [row for part in parts() for row in part.rows]


def _formulas(text: str) -> list[Formula]:
    return [
        Formula(row[0].strip("| "), row[1], row[2].partition("[")[2][:2], row[3])
        for row in _ROW.findall(text)
    ]


def drawn(text: str) -> str:
    """The text of the page with its formulas in LaTeX."""
    return _ROW.sub(lambda row: f"{row[1]}${as_latex(row[2])}${row[3]}`{row[4]}`{row[5]}", text)


def as_latex(formula: str) -> str:
    """A formula of Python, with +, -, *, / and calls of functions, as LaTeX."""
    return _latex(ast.parse(formula, mode="eval").body)


def _latex(node: ast.expr) -> str:
    match node:
        case ast.Name(name) | ast.Constant(name):
            return str(name)
        case ast.BinOp(left, ast.Div(), right):
            return rf"\frac{{{_latex(left)}}}{{{_latex(right)}}}"
        case ast.BinOp(left, sign, right):
            least = _STRENGTH[type(sign)]
            return _within(left, least) + _SIGNS[type(sign)] + _within(right, least)
        case ast.Call(ast.Name("ceil"), [value]):
            return rf"\lceil {_latex(value)} \rceil"
        case ast.Call(ast.Name("sqrt"), [value]):
            return rf"\sqrt{{{_latex(value)}}}"
        case ast.Call(ast.Name("log2"), [value]):
            return rf"\log_2 {_latex(value)}"
        case ast.Call(ast.Name(name), values):
            return rf"\{name}({', '.join(map(_latex, values))})"
    raise ValueError(f"no LaTeX for {ast.unparse(node)}")


def _within(node: ast.expr, least: int) -> str:
    """With parentheses, where it would else be read otherwise."""
    strength = _STRENGTH.get(type(node.op), 3) if isinstance(node, ast.BinOp) else 3
    return rf"({_latex(node)})" if strength < least else _latex(node)
