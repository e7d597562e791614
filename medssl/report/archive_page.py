"""One self-contained HTML page about an archive: what is in it, what was left out and why, what nobody knows.

The page is drawn from the counts that it is handed (`archive.facts.collect_facts`) and reads no archive itself. Counts are exact,
so the page is for those who may see the archive; what may leave comes from `medssl archive release`.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medssl.errors import RequestError
from medssl.report import figures
from medssl.report.elements import STYLE, Section, absent, image, table, text
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
    "slice_step_mm": "Slice step (mm)",
    "in_plane_pixels": "Longer side (pixels)",
    "slices": "Slices or frames",
}
_WORDS: dict[str, dict[str, str]] = {
    "modality": {
        "CR": "CR, X-ray",
        "DX": "DX, X-ray",
        "US": "US, ultrasound",
        "SM": "SM, slides",
        "GM": "GM, microscopy",
        "PT": "PT, PET",
        "MG": "MG, mammography",
        "XA": "XA, angiography",
        "NM": "NM, nuclear medicine",
        "OT": "OT, other",
    },
    "vendor": {"ge": "GE", "united_imaging": "United Imaging"},
    "sex": {"F": "female", "M": "male", "O": "other"},
}
"""Values of the index that are not words, as words."""
_CAPITALS = ("vendor",)
_HISTOGRAMS = ("in_plane_spacing_mm", "slice_step_mm", "in_plane_pixels", "slices")
_SORTED = ("year", "age_band")


_NO_DOMAIN = (
    "Usable series of a modality that is unknown or has no reader here: {n}. For files that do not say what they show (NIfTI, pictures), say "
    "it with <code>medssl index --modality</code>."
)


@dataclass(frozen=True)
class Picture:
    """One small picture of a series.

    Args:
        plane: (rows, columns) or (rows, columns, 3), from top to bottom and left to right; colour in 0 to 255.
        aspect: Height of a pixel over its width.
        caption: Plain text.
        window: Values shown black and white; None for the 1st and 99.5th percentile.
    """

    plane: np.ndarray
    aspect: float
    caption: str
    window: tuple[float, float] | None = None


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
    write_atomic(out, render(facts, pictures=pictures).encode(), mode=0o600)
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
        Section("pixels", "What the pixels say", _pixels(facts["pixels"])),
        Section("unknown", "What nobody knows", _unknown(facts["unknown"])),
        *(
            []
            if pictures is None
            else [Section("images", "Images", _images(pictures, facts["series"]["usable"], facts["series"]["no_domain"]))]
        ),
        Section("caveats", "Before you use this", _caveats(facts, pictures is not None)),
    ]
    nav = " ".join(f'<a href="#{part.id}">{text(part.title)}</a>' for part in sections)
    body = "\n".join(f'<section id="{s.id}">\n<h2>{text(s.title)}</h2>\n{s.body}\n</section>' for s in sections)
    shows = "It shows images of patients." if pictures is not None else "It shows no images."
    return _PAGE.format(style=STYLE + _MORE_STYLE, nav=nav, body=body, privacy=f"Private: exact counts. {shows}")


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


def plural(n: int, one: str, many: str) -> str:
    """Return the word for a count."""
    return one if n == 1 else many


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
    known = series["patients"] - unknown
    strangers = f"<br>and {count(unknown)} {plural(unknown, 'study', 'studies')} of unknown people" if unknown else ""
    tiles = [
        _tile(count(series["usable"]), f"usable series<br>of {count(series['all'])}"),
        _tile(count(known), plural(known, "patient", "patients") + strangers),
        _tile(count(series["studies"]), plural(series["studies"], "study", "studies")),
        _tile(count(files["used"]), f"files used<br>of {count(files['seen'])} seen"),
        _tile(size(series["bytes"]), "in usable series"),
    ]
    parts = [f'<div class="tiles">{"".join(tiles)}</div>']
    if series["no_domain"]:
        parts.append(f"<p>{_NO_DOMAIN.format(n=count(series['no_domain']))}</p>")
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
                f'<p class="warn">{count(torn)} {plural(torn, "patient is", "patients are")} in more than one of train, val and test: '
                "correct the splits table.</p>"
            )
        parts.append(
            table(["split", "patients", "series", *(word("modality", name) for name in modalities)], rows, caption=caption)
        )
    return "\n".join(parts)


def word(table_name: str, value: Any) -> str:
    """Return a value of the index as a person would say it."""
    known = _WORDS.get(table_name, {}).get(str(value))
    if known is not None or table_name == "site":  # what the user wrote stays as it is
        return text(known or value)
    said = str(value).replace("_", " ")
    if table_name in _CAPITALS and said not in ("unknown", "other"):
        said = said.capitalize()
    return text(said.replace("-", "\u2013") if table_name == "age_band" else said)


def measure(value: float | None) -> str:
    """Return a length with three significant digits and no exponent: 0.000499, 0.742, 1.25, 5, 1,024 as 1\u202f024."""
    if value is None:
        return "–"
    if value == 0 or abs(value) >= 1000:
        return count(round(value))
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    written = f"{value:.{digits}f}"
    return written.rstrip("0").rstrip(".") if "." in written else written


def _range(spread: Mapping[str, float] | None) -> str:
    """Return a median, and between which values four of five lie."""
    if spread is None:
        return "–"
    low, middle, high = (measure(spread[name]) for name in ("low", "median", "high"))
    return middle if low == high else f"{middle} <small>({low} to {high})</small>"


def _counts(name: str, cells: Sequence[Mapping[str, Any]], *, keep_all: bool = False) -> str:
    """Return one table of counts with bars; the longest bar is the largest count of a known value."""
    shown = list(cells) if keep_all else list(cells[:MAX_CELLS])
    rest = cells[len(shown) :]
    if rest and rest[-1]["value"] == "unknown":
        shown.append(rest[-1])
        rest = rest[:-1]
    whole = sum(cell["series"] for cell in cells) or 1
    most = max((cell["series"] for cell in cells if cell["value"] != "unknown"), default=1) or 1
    rows = []
    for cell in shown:
        unknown = cell["value"] == "unknown"
        if unknown and rest:
            rows.append(_others(rest, whole))
        label = '<span class="unknown">unknown</span>' if unknown else word(name, cell["value"])
        share = percent(cell["series"] / whole)
        rows.append([label, count(cell["series"]), share, count(cell["patients"]), "" if unknown else bar(cell["series"] / most)])
    if rest and shown[-1]["value"] != "unknown":
        rows.append(_others(rest, whole))
    title = _TITLES.get(name, name.replace("_", " "))
    return f'<div class="counts">{table([text(title), "series", "share", "patients", ""], rows)}</div>'


def _others(cells: Sequence[Mapping[str, Any]], whole: int) -> list[str]:
    series = sum(cell["series"] for cell in cells)
    return [f"{len(cells)} others", count(series), percent(series / whole), "", ""]


def _content(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    parts = []
    for name in (name for name in tables if name not in _HISTOGRAMS):
        cells = list(tables[name])
        if name in _SORTED:
            cells.sort(key=lambda cell: (cell["value"] == "unknown", _leading_number(str(cell["value"]))))
        if cells and [cell["value"] for cell in cells] != ["unknown"]:
            parts.append(_counts(name, cells, keep_all=name in _SORTED))
    silent = [_TITLES.get(name, name) for name in tables if [cell["value"] for cell in tables[name]] == ["unknown"]]
    if not any(tables.values()):
        return absent("There is no usable series.", "")
    said = "Of usable series. Patients are those with a usable identity. Bars compare what is known; unknown has none."
    if silent:
        said += f" Unknown for every series: {', '.join(name[0].lower() + name[1:] for name in silent)}."
    return f'<p class="absent">{text(said)}</p><div class="grid">{"".join(parts)}</div>'


def _leading_number(value: str) -> float:
    digits = "".join(char for char in value.split("-")[0] if char.isdigit())
    return float(digits) if digits else 0.0


def _geometry(rows: Sequence[Mapping[str, Any]], tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    lines = [
        [
            word("modality", row["modality"]),
            count(row["series"]),
            _range(row["in_plane_mm"]),
            _range(row["step_mm"]),
            _range(row["pixels"]),
            _range(row["slices"]),
            size(row["bytes"]),
        ]
        for row in rows
    ]
    if not lines:
        return absent("There is no usable series.", "")
    head = ["modality", "series", "in plane (mm)", "slice step (mm)", "longer side (pixels)", "slices or frames", "total size"]
    caption = (
        "Medians of the series that say, in brackets the range of the middle 80 %. Nothing is assumed for those that do not. Where a volume "
        "names no slice direction (NIfTI), the axis of the largest spacing counts as it."
    )
    shown = [name for name in _HISTOGRAMS if [cell["value"] for cell in tables[name]] != ["unknown"]]
    charts = "".join(_counts(name, tables[name], keep_all=True) for name in shown)
    return f'{table(head, lines, caption=caption)}<div class="grid">{charts}</div>'


def _explained(rows: Sequence[Mapping[str, Any]], unit: str, whole: int, *, first: str = "reason") -> str:
    lines = [
        [
            text(row["code"].replace("_", " ")),
            count(row[unit]),
            percent(row[unit] / whole) if whole else "–",
            text(row["meaning"]) or "–",
        ]
        for row in rows
    ]
    return f'<div class="explained">{table([first, unit, "of all", "meaning"], lines)}</div>'


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
        parts.append(_explained(rows, "series", whole, first="flag") if rows else absent(none, ""))
    return "\n".join(parts)


_NO_PIXELS = "<code>medssl index SRC... --out ARCHIVE --pixels</code> looks for blank and saturated images, near-duplicates and text in them."


def _pixels(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return absent("Nobody has looked at the pixels: what is said above comes from headers alone.", _NO_PIXELS)
    whole, near = found["series"], found["near_duplicates"]
    missing = f", {count(found['waiting'])} not looked at yet (run the same again)" if found["waiting"] else ""
    unread = sum(row["series"] for row in found["failed"])
    missing += f", {count(unread)} given up" if unread else ""
    parts = [f"<p>{count(found['read'])} of {count(whole)} usable series were read{missing}.</p>"]
    if found["failed"]:
        parts += ["<h3>Given up, and why</h3>", _explained(found["failed"], "series", whole)]
    parts.append("<h3>Quality</h3>")
    if found["quality"]:
        parts.append(_explained(found["quality"], "series", whole, first="flag"))
    else:
        parts.append(absent("No blank, constant, saturated or low-contrast image was found.", ""))
    parts.append("<h3>Text in the picture</h3>")
    if found["privacy"]:
        parts.append(_explained(found["privacy"], "series", whole, first="flag"))
    else:
        parts.append(absent("No text is suspected; small, faint and hand-written text is often missed.", ""))
    groups, several = near.get("groups", 0), near.get("groups_of_several_patients", 0)
    parts.append("<h3>Near-duplicates</h3>")
    if groups:
        said = f"{count(near.get('series'))} series look alike in {count(groups)} {plural(groups, 'group', 'groups')}; "
        said += f"{count(several)} of them {plural(several, 'holds', 'hold')} several patients. "
        parts.append(f"<p>{said}Repeats and phases of one patient look alike too: a suspicion, not a proof.</p>")
    else:
        parts.append(absent("No two series look alike.", ""))
    return "\n".join(parts)


def _unknown(found: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            f"<code>{text(one['column'])}</code>",
            f"{count(one['unknown'])} of {count(one['series'])} {text(one['which'])}".rstrip(),
            percent(one["unknown"] / one["series"]),
            bar(one["unknown"] / one["series"]),
        ]
        for one in found
    ]
    if not rows:
        return absent("There is no usable series.", "")
    half = (len(rows) + 1) // 2
    head = ["column", "unknown", "share", ""]
    tables = "".join(f'<div class="counts">{table(head, part)}</div>' for part in (rows[:half], rows[half:]) if part)
    said = (
        "<p>A condition on such a column loses these series; <code>medssl archive ls --where</code> says how many. "
        "Only series that could say something are asked: MR for its field strength, slides for their resolution.</p>"
    )
    return f'{said}<div class="grid">{tables}</div>'


def _images(pictures: Sequence[Picture], usable: int, no_domain: int) -> str:
    if not pictures:
        return absent("No picture could be read.", _NO_DOMAIN.format(n=count(no_domain)) if no_domain else "")
    shown = []
    for one in pictures:
        shown.append(image(thumbnail_png(one.plane, one.aspect, one.window), one.caption, caption=text(one.caption)))
    said = (
        f"{count(len(pictures))} of {count(usable)} usable series: one of every modality and patient before a second. Middle slice or frame; "
        "CT from -160 to 240 HU, 8 bits as they are, others between the 1st and 99.5th percentile."
    ).replace("-160", "\u2212160")
    return f'<p class="absent">{text(said)}</p><div class="thumbs">{"".join(shown)}</div>'


def thumbnail_png(plane: np.ndarray, aspect: float, window: tuple[float, float] | None = None) -> bytes:
    """Return a picture of at most `THUMBNAIL` pixels a side, pixels square.

    Args:
        plane: (rows, columns) or (rows, columns, 3).
        aspect: Height of a pixel over its width.
        window: Values shown black and white; the 1st and 99.5th percentile when None.
    """
    from matplotlib.image import imsave

    rows, columns = plane.shape[:2]
    scale = THUMBNAIL * figures.DPI / 96 / max(rows * aspect, columns)
    high, wide = max(1, round(rows * aspect * scale)), max(1, round(columns * scale))
    down = np.minimum((np.arange(high) + 0.5) * rows / high, rows - 1).astype(int)
    across = np.minimum((np.arange(wide) + 0.5) * columns / wide, columns - 1).astype(int)
    cut = plane[down][:, across]
    rgb = cut / 255.0 if cut.ndim == 3 else figures.grey(cut, window or figures.window_of(np.asarray(plane, dtype=np.float32)))
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
            f"Studies that name no usable patient: {count(series['patients_unknown'])}. How many people they are of is not known, and they "
            "are left out of val and test."
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
.counts tbody th,.counts thead th:first-child{white-space:nowrap;width:9em}
.counts td{width:4.2em}
.counts td:last-child{width:auto;vertical-align:middle;padding-right:0;min-width:80px}
.unknown{color:var(--soft);font-weight:400}
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
