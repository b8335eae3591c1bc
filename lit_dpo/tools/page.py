"""What a tool shows: one HTML file that needs nothing else, or a terminal of any width.

A page is made of parts, each of which is HTML that one of the functions here made; whatever text is given to them is
escaped, so that no data row can become markup.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from rich.console import Console

from lit_dpo.checkpoints.durable import new_file, part_beside, put, refuse_unwritable_file
from lit_dpo.version import __version__

_STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --back: #ffffff; --line: #d1d9e0; --soft: #59636e; --panel: #f6f8fa;
  --good: #116329; --bad: #a40e26; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --back: #0d1117; --line: #3d444d; --soft: #9198a1;
  --panel: #151b23; --good: #56d364; --bad: #ff7b72; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); margin: 0 auto;
  padding: 1rem; max-width: 75rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .7rem; text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; white-space: nowrap; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--panel); border-left: 4px solid var(--line);
  margin: .4rem 0; padding: .5rem .7rem; }
pre.chosen { border-color: var(--good); } pre.rejected { border-color: var(--bad); } pre.prompt { color: var(--soft); }
pre.tokens.chosen { color: var(--good); } pre.tokens.rejected { color: var(--bad); }
.special { outline: 1px solid; border-radius: 3px; } .masked { opacity: .55; }
.label { color: var(--soft); font-size: .85rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 1rem; }
img { max-width: 100%; height: auto; } details { margin: .5rem 0; } summary { cursor: pointer; }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); gap: 0 1rem; }
@media (max-width: 40rem) { table { font-size: .85rem; } th, td { padding: .3rem .35rem; }
  td:first-child { overflow-wrap: anywhere; min-width: 7rem; } }
footer { color: var(--soft); font-size: .85rem; margin-top: 2rem; }
"""
_NUMBER = ' class="number"'
# Nothing, a number, a share, two lengths, or an interval.
_NUMERIC = re.compile(r"([-+<>]?\d[\d.,e%/+-]*(( to)? [-+±]?[\d.,e-]+)?|-?inf|nan)?")


def page(title: str, parts: Iterable[str], refresh: int = 0) -> str:
    """A whole page: no network, light or dark as the reader's system is, readable from 400 px on.

    Args:
        title: Its heading.
        parts: HTML made by the functions of this file.
        refresh: Seconds after which a browser reads the file again; 0 for never.
    """
    again = f'<meta http-equiv="refresh" content="{refresh}">\n' if refresh else ""
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{again}<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f"{body}\n<footer>Written by lit_dpo {escape(__version__)}.</footer>\n</body>\n</html>\n"
    )


def heading(text: str) -> str:
    """A heading below the title."""
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def block(text: str, kind: str = "", label: str = "") -> str:
    """Text as it is, lines and spaces kept; `kind` is `prompt`, `chosen`, `rejected` or nothing.

    >>> block("1 < 2", "chosen")
    '<pre class="chosen">1 &lt; 2</pre>'
    """
    above = f'<div class="label">{escape(label)}</div>' if label else ""
    mark = f' class="{escape(kind)}"' if kind else ""
    return f"{above}<pre{mark}>{escape(text)}</pre>"


def marked(pieces: Iterable[tuple[str, str]], kind: str = "", label: str = "") -> str:
    """Text as `block` shows it, in pieces of which some are `special` or `masked`; the others are marked with ""."""
    spans = (f'<span class="{escape(mark)}">{escape(text)}</span>' if mark else escape(text) for text, mark in pieces)
    return block("", f"tokens {kind}", label).replace("></pre>", f">{''.join(spans)}</pre>")


def details(summary: str, parts: Iterable[str], opened: bool = False) -> str:
    """Parts that are shown once their summary is clicked."""
    return f"<details{' open' if opened else ''}><summary>{escape(summary)}</summary>{''.join(parts)}</details>"


def beside(columns: Iterable[Iterable[str]]) -> str:
    """Columns of parts beside each other, below each other where the page is narrow."""
    return "\n".join(['<div class="beside">', *(f"<div>{''.join(parts)}</div>" for parts in columns), "</div>"])


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table that scrolls by itself where the page is narrow; columns of numbers alone are aligned at the right.

    >>> [table(("share",), [["<1%"], [last]]).count('class="number"') for last in (0.5, "", "█ 5")]
    [3, 3, 0]
    """
    lines = [[_text(value) for value in row] for row in rows]
    marks = [_NUMBER if all(map(_NUMERIC.fullmatch, column)) else "" for column in zip(*lines, strict=True)]
    marks = marks or [""] * len(head)
    names = "".join(f"<th{mark}>{escape(name)}</th>" for name, mark in zip(head, marks, strict=True))
    cells = (
        "".join(f"<td{mark}>{escape(cell)}</td>" for cell, mark in zip(line, marks, strict=True)) for line in lines
    )
    body = "".join(f"<tr>{line}</tr>" for line in cells)
    return f'<div class="wide"><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>'


def _text(value: object) -> str:
    return number(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def number(value: float) -> str:
    """A number as tables show it: whole numbers with separators, others with four digits.

    >>> number(12345), number(0.123456)
    ('12,345', '0.1235')
    """
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def pictures(drawn: Iterable[tuple[str, bytes, bytes]]) -> str:
    """Pictures beside each other, below each other where the page is narrow.

    Args:
        drawn: Of each what it shows, for those who cannot see it, and the PNG file for light and for dark.
    """
    found = [
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{_inline(dark)}">'
        f'<img alt="{escape(what)}" src="{_inline(light)}"></picture>'
        for what, light, dark in drawn
    ]
    return "\n".join(['<div class="pictures">', *found, "</div>"])


def _inline(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def terminal() -> Console:
    """Where a tool prints: plain in a pipe and with NO_COLOR, as wide as the terminal, 80 columns in a pipe."""
    return Console(highlight=False, markup=False, emoji=False)


def refuse_taken(path: str | Path, overwrite: bool = False, *, endings: Sequence[str] = ()) -> Path:
    """The path of a file to write, found out before anything is computed.

    Args:
        path: Its name.
        overwrite: Whether a regular file of that name may be replaced.
        endings: What the name must end in; any will do if there are none.

    Raises:
        ValueError: The name ends in something else.
        FileExistsError: Something is there; with `overwrite`, something that is no regular file.
        OSError: It cannot be written there.
    """
    target = Path(path)
    if endings and target.suffix not in endings:
        raise ValueError(f"`output` must end in {' or '.join(endings)}, got `{target}`.")
    plain = target.is_file() and not target.is_symlink()
    if os.path.lexists(target) and not (plain and overwrite):
        remedy = "name another file, or add `--overwrite`" if plain else "name a file"
        raise FileExistsError(f"`{target}` exists already: {remedy}.")
    refuse_unwritable_file(target)
    return target


def refuse_any_taken(paths: Sequence[str | None], overwrite: bool = False) -> None:
    """The same for several files, of which none may be another one.

    Raises:
        ValueError: Two are one file.
        FileExistsError: Something is in the place of one.
    """
    given = [refuse_taken(path, overwrite) for path in paths if path is not None]
    if len({path.absolute() for path in given}) < len(given):
        raise ValueError(f"Two files cannot be written to `{given[0]}`: name another one.")


def write(path: str | Path, content: str | bytes, overwrite: bool = False) -> Path:
    """Write a file that appears whole or not at all; its folders are made.

    Raises:
        FileExistsError: Something is there and may not be replaced, or has appeared meanwhile.
    """
    target = refuse_taken(path, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    with part_beside(target) as part:
        with new_file(part) as file:
            file.write(content.encode() if isinstance(content, str) else content)
        if overwrite:
            put(part, target)
        else:
            os.link(part, target)  # fails where a file has appeared; a rename would replace it
    return target
