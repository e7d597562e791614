"""What pages are made of: escaped text, numbers, tables, pictures inside the page, and the style that all pages share."""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medssl.report import figures
from medssl.report.collect import number
from medssl.report.headline import Estimate

PRIVATE_KEYS = {"host", "hostname", "node", "user", "username", "home", "cwd", "argv", "command", "path", "pid", "ip"}


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Args:
        id: Anchor.
        title: Heading, plain text.
        body: HTML, already escaped.
    """

    id: str
    title: str
    body: str


_LINK = re.compile(r"\b[A-Za-z][A-Za-z0-9+.-]*://\S*")


_PATH = re.compile(r"""(?<![\w.)])(?:~?/|[A-Za-z]:[\\/]|\\\\)[^\s"'<>),;]+""")


def whole_page(
    title: str, heading: str, lead: str, sections: Sequence[Section], *, footer: str, before: str = "", style: str = ""
) -> str:
    """Return a page with a heading, links to its sections, and these.

    Args:
        title: Of the browser's window.
        heading: HTML.
        lead: HTML under the heading.
        sections: In order.
        footer: HTML; that the page requests nothing is added.
        before: HTML above the first section.
        style: Further CSS.
    """
    nav = " ".join(f'<a href="#{part.id}">{text(part.title)}</a>' for part in sections)
    body = "\n".join(f'<section id="{s.id}">\n<h2>{text(s.title)}</h2>\n{s.body}\n</section>' for s in sections)
    return PAGE.format(
        title=text(title), heading=heading, lead=lead, nav=nav, body=before + body, footer=footer, style=STYLE + style
    )


def text(value: Any) -> str:
    """Return a value as escaped text, with every absolute path and link replaced."""
    words = _PATH.sub("(path)", _LINK.sub("(link)", str(value)))
    return html.escape(words, quote=True)


def decimal(value: float | None, digits: int = 3, *, sign: bool = False) -> str:
    """Return a number with a true minus sign, or a dash when there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    written = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return written.replace("-", "−")


def plain(value: Any) -> str:
    """Return any JSON value as short escaped text."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return text(f"{value:.4g}").replace("-", "−")
    if isinstance(value, Mapping):
        if "name" in value:  # a component of a recipe
            inner = plain(value.get("args") or {k: v for k, v in value.items() if k not in ("name", "args")})
            return f"{text(value['name'])} ({inner})" if inner else text(value["name"])
        parts = [f"{text(k)} {plain(v)}" for k, v in value.items() if v is not None and str(k).lower() not in PRIVATE_KEYS]
        return ", ".join(parts)
    if isinstance(value, (list, tuple)):
        if value and all(isinstance(v, (int, float)) for v in value):
            return " × ".join(plain(v) for v in value)
        return ", ".join(plain(v) for v in value)
    return text(value)


def duration(seconds: Any) -> str:
    """Return seconds as a person would say them."""
    value = number(seconds)
    if value is None:
        return "–"
    if value < 60:
        return f"{value:.1f} s"
    minutes = round(value / 60, 1)
    return f"{int(value // 60)} min {int(value % 60)} s" if minutes < 60 else f"{value / 3600:.1f} h"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "", numeric: bool = True) -> str:
    """Return a table; cells are HTML already, the first column is its row's heading."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = []
    for row in rows:
        first, *rest = row
        lines.append(f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>")
    kind = ' class="numbers"' if numeric else ""
    said = f"<caption>{caption}</caption>" if caption else ""
    return f'<div class="wide"><table{kind}>{said}<thead><tr>{top}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def absent(what: str, how: str) -> str:
    """Return the sentence for a part that is not there."""
    return f'<p class="absent">{what} {how}</p>'


def image(png: bytes, alt: str, *, dark: bytes | None = None, caption: str = "") -> str:
    """Return a figure whose PNG is inside the page, with another one for dark screens when given."""
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    width = round(int.from_bytes(png[16:20], "big") * 96 / figures.DPI)  # of the PNG header, in CSS pixels
    inner = f'<img src="{source}" width="{width}" alt="{html.escape(alt, quote=True)}">'
    if dark is not None:
        other = f"data:image/png;base64,{base64.b64encode(dark).decode()}"
        query = "screen and (prefers-color-scheme: dark)"
        inner = f'<picture><source media="{query}" srcset="{other}">{inner}</picture>'
    said = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f"<figure>{inner}{said}</figure>"


def charts(
    parts: Sequence[figures.Chart], alt: str, caption: str = "", *, columns: int = 3, panel: tuple[float, float] = (3.3, 2.3)
) -> str:
    """Return charts drawn for light and for dark screens."""
    light, dark = (figures.charts_png(parts, theme, columns=columns, panel=panel) for theme in (figures.LIGHT, figures.DARK))
    return image(light, alt, dark=dark, caption=caption)


def written(estimate: Estimate, *, sign: bool = False) -> str:
    """Return a value with its interval as HTML."""
    if estimate.value is None:
        return "–"
    value = decimal(estimate.value, sign=sign)
    if estimate.low is None or estimate.high is None:
        return f"{value} <small>(no interval)</small>"
    return f"{value} <small>({decimal(estimate.low, sign=sign)} to {decimal(estimate.high, sign=sign)})</small>"


def interval_svg(marks: Sequence[tuple[str, Estimate]], low: float, high: float) -> str:
    """Return a small drawing of estimates with their intervals on a common scale.

    Args:
        marks: (CSS class, estimate), drawn from top to bottom.
        low: Value at the left end.
        high: Value at the right end.
    """
    width, step = 180.0, 11.0
    span = max(high - low, 1e-9)

    def place(value: float) -> str:
        return f"{4 + (min(max(value, low), high) - low) / span * (width - 8):.1f}"

    shapes = []
    for k, (kind, estimate) in enumerate(marks):
        if estimate.value is None:
            continue
        y = f"{step * (k + 0.5):.1f}"
        if estimate.low is not None and estimate.high is not None:
            x1, x2 = place(estimate.low), place(estimate.high)
            shapes.append(f'<line class="{kind}" x1="{x1}" x2="{x2}" y1="{y}" y2="{y}"/>')
        shapes.append(f'<circle class="{kind}" cx="{place(estimate.value)}" cy="{y}" r="3.4"/>')
    height = step * len(marks)
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    return f'<svg class="intervals" aria-hidden="true" {size}>{"".join(shapes)}</svg>'


def span_of(estimates: Iterable[Estimate]) -> tuple[float, float]:
    """Return the ends of a scale on which estimates and their intervals have room; 0 to 1 without any."""
    ends = [v for e in estimates for v in (e.value, e.low, e.high) if v is not None]
    if not ends:
        return 0.0, 1.0
    margin = 0.05 * (max(ends) - min(ends)) or 0.05
    return min(ends) - margin, max(ends) + margin


STYLE = """
:root{--bg:#fff;--ink:#1d2430;--soft:#5a6472;--rule:#dfe3e8;--panel:#f5f7f9;--accent:#0b62a8;--other:#c2540a;
 --warn:#8a4b00;--warnbg:#fff4e2}
@media screen and (prefers-color-scheme:dark){:root{--bg:#14181e;--ink:#e4e8ee;--soft:#9aa5b3;--rule:#333b46;
 --panel:#1c222a;--accent:#6cb8f5;--other:#f5a25d;--warn:#ffc46b;--warnbg:#33260f}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main,header,footer{max-width:1080px;margin:0 auto;padding:0 24px}
header{padding-top:26px}
h1{font-size:25px;margin:0 0 2px}
h2{font-size:19px;margin:0 0 10px;padding-top:18px;border-top:1px solid var(--rule)}
nav{margin:12px 0 18px;font-size:14px}nav a{margin-right:14px;white-space:nowrap}
a{color:var(--accent);text-decoration:none}a:hover{text-decoration:underline}
section{margin:0 0 26px}
.lead,.absent,figcaption,caption,small{color:var(--soft)}
#result p{margin:0 0 4px}
#result .verdict{font-size:18px;font-weight:600;margin:0 0 6px}
#result .wide{margin-top:14px}
.fault,.warn{color:var(--warn)}
.fault{background:var(--warnbg);border:1px solid var(--warn);border-radius:6px;padding:10px 16px;margin:0 0 20px}
.fault ul{margin:4px 0;padding-left:20px}
.wide{overflow-x:auto;margin:0 0 14px}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}
caption{caption-side:bottom;text-align:left;padding-top:6px;font-size:13px}
th,td{padding:5px 14px 5px 0;border-bottom:1px solid var(--rule);text-align:left;vertical-align:top;font-weight:400}
thead th{color:var(--soft);font-size:13px;vertical-align:bottom}
table.numbers tbody th{font-weight:600}
table.numbers td{white-space:nowrap}
table:not(.numbers) tbody th{color:var(--soft);white-space:nowrap}
table:not(.numbers) td{overflow-wrap:anywhere}
.columns{columns:3 300px;column-gap:34px}
.columns .wide{break-inside:avoid}
.columns table{width:100%}
figure{margin:0 0 18px}
figure img{max-width:100%;height:auto;display:block}
figcaption{font-size:13px;margin-top:4px}
svg.intervals{display:block;margin-top:1px}
svg line{stroke-width:2;stroke:currentColor}svg circle{fill:currentColor}
svg .scratch,.key.scratch{color:var(--other)}svg .pretrained,.key.pretrained{color:var(--accent)}
.key::before{content:"●";margin-right:4px}
.tag{border:1px solid var(--rule);border-radius:8px;padding:0 6px;font-weight:400}
code{font:13px ui-monospace,Menlo,Consolas,monospace;background:var(--panel);padding:1px 4px;border-radius:3px}
details summary{cursor:pointer;color:var(--accent)}
footer{color:var(--soft);font-size:13px;padding-bottom:28px}
@media print{nav{display:none}main,header,footer{max-width:none;padding:0}body{font-size:12px}
 figure,tr,.verdict{break-inside:avoid}h2{break-after:avoid}.wide{overflow:visible}@page{margin:14mm}}
"""

# The policy makes the browser itself refuse any request, should a string ever slip through.
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header>
<h1>{heading}</h1>
<div class="lead">{lead}</div>
<nav aria-label="Sections">{nav}</nav>
</header>
<main>
{body}
</main>
<footer>{footer} This page requests nothing and runs no scripts.</footer>
</body>
</html>
"""
