"""One self-contained HTML page about an archive: what is in it, what was left out and why, what nobody knows.

The page is drawn from the counts that it is handed (`archive.facts.collect_facts`) and reads no archive itself. Counts are exact,
so the page is for those who may see the archive; what may leave comes from `medssl archive release`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medssl.errors import RequestError
from medssl.report import figures
from medssl.report.page import _STYLE, Section, absent, decimal, image, table, text
from medssl.weights import write_atomic

MAX_CELLS = 16  # rows of a table before the rest is summed up
THUMBNAIL = 150  # pixels

_TITLES = {
    "modality": "Modality",
    "role": "Role",
    "vendor": "Vendor",
    "body_region": "Body region",
    "year": "Year",
    "sex": "Sex",
    "age_band": "Age",
    "site": "Site",
    "in_plane_spacing_mm": "In-plane spacing (mm)",
    "slice_step_mm": "Distance between slices (mm)",
    "in_plane_pixels": "Longer side (pixels)",
    "slices": "Slices or frames",
}
_HISTOGRAMS = ("in_plane_spacing_mm", "slice_step_mm", "in_plane_pixels", "slices")
_SORTED = ("year", "age_band")


@dataclass(frozen=True)
class Picture:
    """One small picture of a series.

    Args:
        plane: (rows, columns) or (rows, columns, 3), from top to bottom and left to right; colour in 0 to 255.
        aspect: Height of a pixel over its width.
        caption: Plain text.
    """

    plane: np.ndarray
    aspect: float
    caption: str


def archive_report(facts: Mapping[str, Any], out: Path, *, pictures: Sequence[Picture] | None = None) -> Path:
    """Write the page, mode 0600; return its path.

    Args:
        facts: What `archive.facts.collect_facts` returned.
        out: File to write; replaced at once when the page is complete.
        pictures: Pictures of patients, or None for a page without any.

    Raises:
        RequestError: `out` is a folder.
        StoreError: The page cannot be written.
    """
    if out.is_dir():
        raise RequestError(f"{out}: is a folder; name the HTML file to write, for instance {out / 'report.html'}")
    write_atomic(out, render(facts, pictures=pictures).encode())
    os.chmod(out, 0o600)
    return out


def render(facts: Mapping[str, Any], *, pictures: Sequence[Picture] | None = None) -> str:
    """Return the page as text."""
    tables = facts["tables"]
    sections = [
        Section("overview", "Overview", _overview(facts)),
        Section("content", "What is in it", _content(tables)),
        Section("geometry", "Spacing and size", _geometry(facts["geometry"], tables)),
        Section("left_out", "What was left out, and why", _left_out(facts)),
        Section("flags", "Quality and privacy flags", _flags(facts)),
        Section("unknown", "What nobody knows", _unknown(facts["unknown"])),
        *([] if pictures is None else [Section("images", "Images", _images(pictures))]),
        Section("caveats", "Before you use this", _caveats(facts, pictures is not None)),
    ]
    nav = " ".join(f'<a href="#{part.id}">{text(part.title)}</a>' for part in sections)
    body = "\n".join(f'<section id="{s.id}">\n<h2>{text(s.title)}</h2>\n{s.body}\n</section>' for s in sections)
    shows = "It shows images of patients." if pictures is not None else "It shows no images."
    return _PAGE.format(style=_STYLE + _MORE_STYLE, nav=nav, body=body, privacy=f"Private: exact counts. {shows}")


def count(value: Any) -> str:
    """Return a whole number with thin spaces between thousands, or a dash."""
    return "–" if value is None else f"{int(value):,}".replace(",", "\u202f")


def size(n_bytes: Any) -> str:
    """Return bytes as a person would say them."""
    value = float(n_bytes or 0)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.1f} {unit}"


def percent(share: float) -> str:
    """Return a share as a percentage that is 0 or 100 only when it is."""
    if 0 < share < 0.001:
        return "< 0.1 %"
    if 0.999 < share < 1:
        return "> 99.9 %"
    return f"{100 * share:.0f} %" if share in (0, 1) or 0.1 <= share <= 0.99 else f"{100 * share:.1f} %"


def bar(share: float) -> str:
    """Return a horizontal bar that fills a share of its cell."""
    width = 100 * min(max(share, 0.0), 1.0)
    if width == 0:
        return ""
    return f'<span class="track"><span class="bar" style="width:{width:.1f}%"></span></span>'


def _tile(value: str, label: str) -> str:
    return f'<div class="tile"><b>{value}</b><span>{label}</span></div>'


def _overview(facts: Mapping[str, Any]) -> str:
    files, series = facts["files"], facts["series"]
    unknown = series["patients_unknown"]
    patients = count(series["patients"] - unknown)
    tiles = [
        _tile(count(series["usable"]), f"usable series<br>of {count(series['all'])}"),
        _tile(patients, "patients" + (f"<br>and {count(unknown)} studies of unknown people" if unknown else "")),
        _tile(count(series["studies"]), "studies"),
        _tile(count(files["used"]), f"files used<br>of {count(files['seen'])} seen"),
        _tile(size(series["bytes"]), "in usable series"),
    ]
    parts = [f'<div class="tiles">{"".join(tiles)}</div>']
    total = None if files["used"] is None else files["used"] + sum(row["files"] for row in files["reasons"])
    if total is not None and files["seen"] is not None and total != files["seen"]:
        parts.append('<p class="warn">Files used and files left out do not add up to files seen: index again.</p>')
    modalities = [cell["value"] for cell in facts["tables"]["modality"]]
    rows = [
        [
            text(row["split"]),
            count(row["patients"]),
            count(row["series"]),
            *(count(row["modalities"].get(name)) if row["modalities"].get(name) else "–" for name in modalities),
        ]
        for row in facts["by_split"]
    ]
    if [row["split"] for row in facts["by_split"]] == ["unknown"]:
        parts.append(absent("The archive has no split.", "<code>medssl archive split</code> makes one, by patient."))
    elif rows:
        torn = facts["series"]["patients_torn"]
        caption = "Series by split and modality." + ("" if torn else " Every patient is in one split.")
        if torn:
            parts.append(
                f'<p class="warn">{count(torn)} patients are in more than one of train, val and test: correct the splits table.</p>'
            )
        parts.append(table(["split", "patients", "series", *(text(name) for name in modalities)], rows, caption=caption))
    return "\n".join(parts)


def _counts(cells: Sequence[Mapping[str, Any]], title: str, *, keep_all: bool = False) -> str:
    """Return one table of counts with bars; the longest bar is the largest count."""
    shown = list(cells) if keep_all else list(cells[:MAX_CELLS])
    rest = cells[len(shown) :]
    most = max((cell["series"] for cell in cells), default=1) or 1
    rows = [
        [text(str(cell["value"]).replace("_", " ")), count(cell["series"]), count(cell["patients"]), bar(cell["series"] / most)]
        for cell in shown
    ]
    if rest:
        rows.append([f"{len(rest)} others", count(sum(cell["series"] for cell in rest)), "", ""])
    return f'<div class="counts">{table([text(title), "series", "patients", ""], rows)}</div>'


def _content(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    parts = []
    for name in (name for name in tables if name not in _HISTOGRAMS):
        cells = list(tables[name])
        if name in _SORTED:
            cells.sort(key=lambda cell: (cell["value"] == "unknown", _leading_number(str(cell["value"]))))
        if [cell["value"] for cell in cells] != ["unknown"]:
            parts.append(_counts(cells, _TITLES.get(name, name.replace("_", " ")), keep_all=name in _SORTED))
    silent = [_TITLES.get(name, name).lower() for name in tables if [cell["value"] for cell in tables[name]] == ["unknown"]]
    if silent:
        parts.append(absent(f"Unknown for every series: {text(', '.join(silent))}.", ""))
    return f'<div class="grid">{"".join(parts)}</div>' if parts else absent("There is no usable series.", "")


def _leading_number(value: str) -> float:
    digits = "".join(char for char in value.split("-")[0] if char.isdigit())
    return float(digits) if digits else 0.0


def _geometry(rows: Sequence[Mapping[str, Any]], tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    lines = [
        [
            text(row["modality"]),
            count(row["series"]),
            decimal(row["in_plane_mm"], 2),
            decimal(row["step_mm"], 2),
            count(row["pixels"]),
            count(row["slices"]),
            size(row["bytes"]),
        ]
        for row in rows
    ]
    if not lines:
        return absent("There is no usable series.", "")
    head = ["modality", "series", "in-plane (mm)", "step (mm)", "longer side", "slices", "size"]
    caption = "Medians of the series that say. Nothing is assumed for those that do not."
    charts = "".join(_counts(tables[name], _TITLES[name], keep_all=True) for name in _HISTOGRAMS)
    return f'{table(head, lines, caption=caption)}<div class="grid">{charts}</div>'


def _explained(rows: Sequence[Mapping[str, Any]], unit: str, whole: int) -> str:
    lines = [
        [
            text(row["code"].replace("_", " ")),
            count(row[unit]),
            percent(row[unit] / whole) if whole else "–",
            text(row["meaning"]) or "–",
        ]
        for row in rows
    ]
    return f'<div class="explained">{table(["reason", unit, "of all", "meaning"], lines)}</div>'


def _left_out(facts: Mapping[str, Any]) -> str:
    files, series = facts["files"], facts["series"]
    parts = ["<h3>Series</h3>"]
    if series["rejected"]:
        parts.append(_explained(series["rejected"], "series", series["all"]))
    else:
        parts.append(absent("Every series can be used.", ""))
    parts.append("<h3>Files</h3>")
    if files["reasons"]:
        parts.append(_explained(files["reasons"], "files", files["seen"] or 0))
        parts.append(
            "<p>A file of a series that cannot be used has the reason of its series. Used and left out add up to seen.</p>"
        )
    else:
        parts.append(absent("Every file is used.", ""))
    return "\n".join(parts)


def _flags(facts: Mapping[str, Any]) -> str:
    parts = []
    for title, key, whole, none in (
        ("Quality, of usable series", "flags", facts["series"]["usable"], "No usable series has a quality flag."),
        ("Privacy, of all series", "privacy_flags", facts["series"]["all"], "No series has a privacy flag; that is no proof."),
    ):
        parts.append(f"<h3>{title}</h3>")
        rows = facts[key]
        parts.append(_explained(rows, "series", whole).replace(">reason<", ">flag<") if rows else absent(none, ""))
    return "\n".join(parts)


def _unknown(shares: Mapping[str, float]) -> str:
    rows = [
        [f"<code>{text(name)}</code>", percent(share), bar(share)]
        for name, share in sorted(shares.items(), key=lambda item: (-item[1], item[0]))
    ]
    if not rows:
        return absent("There is no usable series.", "")
    half = (len(rows) + 1) // 2
    head = ["column", "unknown", ""]
    tables = "".join(f'<div class="counts">{table(head, part)}</div>' for part in (rows[:half], rows[half:]) if part)
    said = "<p>A condition on such a column loses these series; <code>medssl archive ls --where</code> says how many.</p>"
    return f'{said}<div class="grid">{tables}</div>'


def _images(pictures: Sequence[Picture]) -> str:
    if not pictures:
        return absent("No picture could be read.", "")
    shown = []
    for one in pictures:
        shown.append(image(thumbnail_png(one.plane, one.aspect), one.caption, caption=text(one.caption)))
    return f'<div class="thumbs">{"".join(shown)}</div>'


def thumbnail_png(plane: np.ndarray, aspect: float) -> bytes:
    """Return a picture of at most `THUMBNAIL` pixels a side, pixels square, grey values between the 1st and 99.5th percentile.

    Args:
        plane: (rows, columns) or (rows, columns, 3).
        aspect: Height of a pixel over its width.
    """
    from matplotlib.image import imsave

    rows, columns = plane.shape[:2]
    scale = THUMBNAIL * figures.DPI / 96 / max(rows * aspect, columns)
    high, wide = max(1, round(rows * aspect * scale)), max(1, round(columns * scale))
    down = np.minimum((np.arange(high) + 0.5) * rows / high, rows - 1).astype(int)
    across = np.minimum((np.arange(wide) + 0.5) * columns / wide, columns - 1).astype(int)
    cut = plane[down][:, across]
    rgb = cut / 255.0 if cut.ndim == 3 else figures.grey(cut, figures.window_of(np.asarray(plane, dtype=np.float32)))
    buffer = io.BytesIO()
    imsave(buffer, np.ascontiguousarray(np.clip(rgb, 0, 1)), format="png", pil_kwargs={"optimize": True})
    return buffer.getvalue()


def _caveats(facts: Mapping[str, Any], with_images: bool) -> str:
    series = facts["series"]
    said = [
        "Counts are exact and may single people out: this page is for those who may see the archive. For counts that may leave, "
        "run medssl archive release.",
        "An archive is pseudonymised personal data. Ids are keyed hashes; whoever has the key and the files can undo them.",
        "Privacy flags say where somebody should look. A series without one may still show a name or a face.",
    ]
    if series["patients_unknown"]:
        said.append(
            f"{count(series['patients_unknown'])} studies name no usable patient: how many people they are is not known, and they are "
            "left out of val and test."
        )
    if with_images:
        said.append("This page shows images of patients: keep it where those images may be.")
    return "<ul>" + "".join(f"<li>{text(line)}</li>" for line in said) + "</ul>"


_MORE_STYLE = """
h3{font-size:15px;margin:14px 0 4px}
.tiles{display:flex;flex-wrap:wrap;gap:12px;margin:4px 0 18px}
.tile{background:var(--panel);border-radius:8px;padding:10px 16px;min-width:130px}
.tile b{display:block;font-size:23px;font-weight:600;line-height:1.25}
.tile span{color:var(--soft);font-size:13px;line-height:1.35;display:block}
.grid{columns:2 400px;column-gap:40px}
.grid .counts{break-inside:avoid;padding-bottom:6px}
.grid .wide{margin-bottom:8px}
.counts table{width:100%}
.counts th[scope=col]:not(:first-child):not(:last-child),.counts td:not(:last-child),
section>.wide td,section>.wide th:not(:first-child){text-align:right}
.counts tbody th{white-space:nowrap;width:9.5em}
.counts td{width:4.5em}
.counts td:last-child{width:auto;vertical-align:middle;padding-right:0;min-width:90px}
.explained td:nth-child(2),.explained td:nth-child(3),.explained th:nth-child(2),.explained th:nth-child(3){text-align:right}
.explained td:last-child{white-space:normal;color:var(--soft)}
.explained tbody th{white-space:nowrap}
.track{display:block;height:10px}
.bar{display:block;height:10px;background:var(--accent);border-radius:0 2px 2px 0;min-width:1px;opacity:.8;print-color-adjust:exact}
.thumbs{display:flex;flex-wrap:wrap;gap:14px 16px}
.thumbs figure{margin:0;width:150px}.thumbs img{background:#000;border-radius:3px}
"""

# The policy makes the browser itself refuse any request, should a string ever slip through.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>medssl archive</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header>
<h1>medssl archive</h1>
<div class="lead">What the index found, what it left out, and why. {privacy}</div>
<nav aria-label="Sections">{nav}</nav>
</header>
<main>
{body}
</main>
<footer>Made by medssl from one index. This page requests nothing and runs no scripts.</footer>
</body>
</html>
"""
