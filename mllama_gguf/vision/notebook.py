"""Objects as notebooks show them: `_repr_html_`. Every text of others is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from ..words import printable

_LINE = "color-mix(in srgb, currentColor 25%, transparent)"  # fits light and dark notebooks
_MOST = 20_000  # characters of a text


def card(
    title: str,
    facts: Mapping[str, object],
    *,
    text: str | None = None,
    images: Sequence[str] = (),
    columns: int = 1,
    side: int = 120,
) -> str:
    """HTML of an object.

    title:   its class
    facts:   its values by their names
    text:    what it says, in lines
    images:  addresses (data URLs), in `columns` columns, each `side` pixels wide, with lines between them
    """
    parts = [f'<div style="font-weight:600">{_escaped(title)}</div>']
    if images:
        shown = "".join(
            f'<img src="{escape(one)}" alt="" width="{side}" height="{side}" style="display:block;margin:0">'
            for one in images
        )
        style = (
            f"display:inline-grid;grid-template-columns:repeat({columns},{side}px);gap:2px;margin:.4em 0;"
            f"padding:2px;background:{_LINE}"
        )
        parts.append(f'<div style="{style}">{shown}</div>')
    if text is not None:
        cut = text if len(text) <= _MOST else f"{text[:_MOST]}..."
        parts.append(f'<div style="white-space:pre-wrap;margin:.3em 0">{_escaped(cut)}</div>')
    rows = " &middot; ".join(f"{_escaped(name)} {_escaped(value)}" for name, value in facts.items())
    parts.append(f'<div style="opacity:.75;font-size:.9em">{rows}</div>')
    frame = (
        f"display:inline-block;padding:.5em .8em;border:1px solid {_LINE};border-radius:.6em;max-width:48em"
    )
    return f'<div style="{frame}">{"".join(parts)}</div>'


def _escaped(value: object) -> str:
    return escape(printable(str(value)))
