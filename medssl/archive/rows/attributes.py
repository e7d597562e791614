"""From header values to the closed-vocabulary columns of the index: scanner, technique, anatomy, person.

Free text is searched for known words and never kept. Where several words could be meant the answer is `unknown`: a wrong label costs
more than a missing one, and every selection says how many rows it lost to `unknown`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from medssl.archive.headers.image_scale import heart_rate
from medssl.archive.rows.dates import age_band, age_of, parse_date

Header = Mapping[str, Any]

MODALITIES = frozenset("CT MR CR DX RG RF MG US IVUS XA PT NM SM GM XC OT SC SEG SR RTDOSE ES OP OCT BI ECG IO".split())  # noqa: SIM905
VENDORS = {
    "ge": ("ge medical", "ge health", "general electric", "g.e. medical"),
    "siemens": ("siemens",),
    "philips": ("philips", "picker", "marconi"),
    "canon": ("canon", "toshiba"),
    "fujifilm": ("fuji", "hitachi", "sonosite"),
    "united_imaging": ("uih", "united imaging"),
    "agfa": ("agfa",),
    "carestream": ("carestream", "kodak"),
    "hologic": ("hologic", "lorad"),
    "samsung": ("samsung", "medison"),
    "konica": ("konica",),
    "mindray": ("mindray",),
}
MODEL_CLASSES = (
    "hispeed", "lightspeed", "brightspeed", "optima", "revolution", "discovery", "signa", "logiq", "vivid", "voluson", "somatom", "magnetom",
    "avanto", "aera", "skyra", "prisma", "trio", "verio", "vida", "espree", "symphony", "sonata", "mmr", "acuson", "brilliance", "ingenuity",
    "iqon", "gemini", "achieva", "ingenia", "intera", "epiq", "affiniti", "ie33", "cx50", "aquilion", "aplio", "vantage", "titan", "supria",
    "scenaria", "echelon", "uct", "umr", "ysio", "mobilett", "fluorospot", "drx", "digitaldiagnost",
)  # fmt: skip
"""Scanner families, told by a word of the model's name."""
REGIONS = {
    "head": ("head", "brain", "skull", "neuro", "orbit", "sinus", "iac", "pituitary", "face", "cranium", "kopf", "cerveau", "schaedel", "hirn"),
    "neck": ("neck", "carotid", "thyroid", "larynx", "hals", "cou"),
    "chest": ("chest", "thorax", "thor", "lung", "heart", "cardiac", "coronary", "torax", "herz", "poumon", "echocardiogram"),
    "abdomen": ("abdomen", "liver", "kidney", "pancreas", "abdo", "spleen", "leber", "foie", "abd"),
    "pelvis": ("pelvis", "prostate", "bladder", "uterus", "rectum", "becken", "bassin"),
    "breast": ("breast", "mamma", "mammo", "brust"),
    "spine": ("spine", "lspine", "cspine", "tspine", "lumbar", "cervical", "thoracic spine", "ws"),
    "limb": (
        "knee", "shoulder", "hip", "ankle", "foot", "hand", "wrist", "elbow", "leg", "arm", "extremity", "femur", "tibia", "knie", "schulter",
        "calf", "finger", "toe",
    ),
    "whole_body": ("wholebody", "whole body", "ganzkoerper", "corps entier"),
}  # fmt: skip
BODY_REGIONS = (*REGIONS, "other")
KERNEL_CLASSES = ("soft", "lung", "bone", "head", "unknown")
RECON_METHODS = ("fbp", "iterative", "deep", "unknown")
CONTRAST_STATES = ("none", "given", "unknown")
CONTRAST_PHASES = ("native", "arterial", "portal", "delayed", "unknown")
MR_TYPES = ("se", "ir", "gr", "ep", "mixed", "unknown")
WEIGHTINGS = ("t1", "t2", "t2star", "pd", "flair", "dwi", "adc", "swi", "perfusion", "bold", "angio", "unknown")
COMPONENTS = ("magnitude", "phase", "real", "imaginary", "unknown")
LATERALITIES = ("left", "right", "both", "unknown")
VIEWS = ("ap", "pa", "lateral", "oblique", "other", "unknown")
PROJECTIONS = frozenset({"CR", "DX", "RG", "MG"})
"""Modalities of projection radiography with a view and with twins."""
POSITIONS = ("hfs", "hfp", "ffs", "ffp", "hfdr", "hfdl", "ffdr", "ffdl", "unknown")
SUBJECTS = ("human", "phantom", "animal", "unknown")
INTENTS = ("presentation", "processing", "unknown")
STAGES = ("rest", "stress", "unknown")
VARYING = (
    "echo_number", "temporal_position", "b_value", "image_type", "trigger_time", "echo_time", "inversion_time", "acquisition_number",
    "repetition_time", "flip_angle", "kvp", "kernel", "slice_thickness", "patient_position",
)  # fmt: skip
"""Header values that one volume should have once: where they differ, the flag `varying_<name>` records it. Clocks, exposure and
rescaling differ from slice to slice by right."""
SAME = 1e-3
"""Relative difference up to which two numbers of a header are one."""

_DESCRIPTIONS = ("series_description", "protocol", "study_description")


def words_of(header: Header, names: Sequence[str] = _DESCRIPTIONS) -> str:
    """Return the descriptions of a header as lower-case words between single spaces, one at each end."""
    text = " ".join(str(header.get(name) or "") for name in names).lower()
    return f" {' '.join(re.split(r'[^a-z0-9+*]+', text))} ".replace("  ", " ")


def _has(words: str, *known: str) -> bool:
    return any(f" {word} " in words for word in known)


def attributes(headers: Sequence[Header], modality: str) -> dict[str, Any]:
    """Return the columns of `SeriesRow` that follow from header values.

    Args:
        headers: Headers of the files of one series; the first speaks for all but the b-values and the privacy flags.
        modality: The series' modality.
    """
    first = headers[0]
    words = words_of(first)
    region = body_region(first)
    found = {
        "vendor": vendor(first.get("manufacturer")),
        "model_class": model_class(first.get("model")),
        "field_strength_t": field_strength(first.get("field_strength")),
        "kvp": positive(first.get("kvp")),
        "patient_position": one_of(first.get("patient_position"), POSITIONS),
        "contrast_state": contrast_state(first, words),
        "subject_kind": subject_kind(first, words),
        "intent": {"FOR PRESENTATION": "presentation", "FOR PROCESSING": "processing"}.get(_upper(first.get("intent")), "unknown"),
        "lossy_ratio": positive(first.get("lossy_ratio")),
        "padding_value": padding_value(first),
        "implant": yes_no(first.get("implant")),
        "source_deid": yes_no(first.get("deidentified")),
        "laterality": laterality(first),
        "privacy_flags": privacy_flags(headers),
        "heart_rate": heart_rate(first),
        **region,
        **person(first),
    }
    if modality == "CT":
        found |= ct_columns(first, words)
    if modality == "MR":
        found |= mr_columns(headers, words)
    if modality == "US":
        found["stage"] = stage(first)
    if modality in PROJECTIONS:
        found |= {"view": view(_upper(first.get("view_position"))), "mas": exposure_mas(first)}
    if modality == "PT":
        found["suv_ready"] = suv_ready(first)
    if modality in ("CT", "MR"):
        found["face_possible"] = yes_no(first.get("recognisable")) or face_possible(region["body_region"])
        if found["face_possible"]:
            found["privacy_flags"] = (*found["privacy_flags"], "face_possible")
    return found


def _upper(value: Any) -> str:
    return str(value or "").strip().upper()


def positive(value: Any) -> float | None:
    """Return a finite number above zero, or None."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and number > 0 else None


def one_of(value: Any, known: Sequence[str]) -> str:
    """Return the lower-case value if it is known, else `unknown`."""
    text = _upper(value).lower()
    return text if text in known else "unknown"


def yes_no(value: Any) -> bool | None:
    """Return True for YES, False for NO, None for anything else."""
    return {"YES": True, "NO": False}.get(_upper(value))


def vendor(text: Any) -> str:
    """Return the vendor, `other`, or `unknown` when nothing is said."""
    low = str(text or "").lower()
    if not low.strip():
        return "unknown"
    return next((name for name, parts in VENDORS.items() if any(part in low for part in parts)), "other")


def model_class(text: Any) -> str:
    """Return the scanner family, `other`, or `unknown` when nothing is said."""
    low = str(text or "").lower()
    if not low.strip():
        return "unknown"
    return next((name for name in MODEL_CLASSES if name in low), "other")


def field_strength(value: Any) -> float | None:
    """Return tesla; some old scanners write gauss."""
    number = positive(value)
    if number is None:
        return None
    number = number / 10_000 if number > 100 else number
    return round(number, 3) if number < 25 else None


def ct_columns(header: Header, words: str) -> dict[str, Any]:
    """Return the columns of a CT: exposure, kernel, reconstruction, energy, contrast phase."""
    kernel = header.get("kernel") or ()
    kev = mono_energy(header, str(kernel[0]) if kernel else "")
    return {
        "mas": exposure_mas(header),
        "ctdi": _rounded(positive(header.get("ctdi"))),
        "kernel_class": kernel_class(vendor(header.get("manufacturer")), str(kernel[0]) if kernel else ""),
        "recon_method": recon_method(header, str(kernel[0]) if kernel else ""),
        "kev": kev,
        "dual_energy": dual_energy(header, words, kev),
        "contrast_phase": contrast_phase(words),
    }


def exposure_mas(header: Header) -> float | None:
    """Return mAs from Exposure, else from Exposure in uAs."""
    stated = positive(header.get("exposure_mas"))
    micro = positive(header.get("exposure_uas"))
    return stated if stated is not None or micro is None else micro / 1000


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def mono_energy(header: Header, kernel: str = "") -> float | None:
    """Return the keV of a monoenergetic image: the tag, else `70 keV` in ImageType, kernel or series description."""
    stated = positive(header.get("kev"))
    if stated is None:
        text = " ".join((*(header.get("image_type") or ()), kernel, str(header.get("series_description") or "")))
        match = re.search(r"(?<![0-9.])(\d{2,3})[ _]?KEV(?![A-Z])", text.upper())
        stated = None if match is None else float(match[1])
    return stated if stated is not None and 20 <= stated <= 300 else None


def dual_energy(header: Header, words: str, kev: float | None) -> bool | None:
    """Return whether a CT was acquired with several energies; None when nothing says so."""
    stated = yes_no(header.get("multi_energy"))
    if stated is not None:
        return stated
    image_type = {_upper(value) for value in header.get("image_type") or ()}
    named = _has(words, "dual energy", "dect", "spectral", "monoenergetic", "mono+", "gsi", "vnc", "vmi")
    return True if kev is not None or named or {"VMI", "MONOENERGETIC", "DUAL_ENERGY", "GSI MONO"} & image_type else None


def suv_ready(header: Header) -> bool | None:
    """Return whether SUV can be computed from a PET header; None without units.

    Values that are SUV already (GML), Philips counts with their factor, and Bq/ml that are decay corrected, with the patient's
    weight, the injected dose and, where the correction refers to the start of the scan, the half-life.
    """
    units = _upper(header.get("units"))
    if not units:
        return None
    if units == "GML":
        return True
    if units == "CNTS":
        return positive(header.get("suv_factor_philips")) is not None
    injection, corrected = header.get("injection") or {}, _upper(header.get("decay_correction"))
    known = positive(header.get("weight")) is not None and positive(injection.get("dose_bq")) is not None
    half_life = corrected == "ADMIN" or positive(injection.get("half_life_s")) is not None
    return units == "BQML" and corrected in ("START", "ADMIN") and known and half_life


def padding_value(header: Header) -> int | None:
    """Return PixelPaddingValue in the sign of the pixels: it is read as 16 unsigned bits whatever they are."""
    value = header.get("padding")
    if not isinstance(value, int):
        return None
    return value - 65536 if header.get("pixel_representation") == 1 and 32767 < value < 65536 else value


def varying(headers: Sequence[Header]) -> tuple[str, ...]:
    """Return flags for the header values of one volume that differ although they should not (`VARYING`)."""
    return tuple(f"varying_{name}" for name in VARYING if len(headers) > 1 and _differs([header.get(name) for header in headers]))


def _differs(values: list[Any]) -> bool:
    if values.count(values[0]) == len(values):
        return False
    if all(isinstance(value, int | float) for value in values):
        low, high = min(values), max(values)
        return bool(high - low > SAME * max(abs(low), abs(high)))
    return len({str(value) for value in values}) > 1


def kernel_class(maker: str, kernel: str) -> str:
    """Return the class of a convolution kernel by the vendor's naming.

    Siemens: B/I/Br/Bl/Hr and a number, where below 50 is soft and above is sharp, `l` is lung and H the head. GE: words. Philips and
    Canon: a letter or FC and a number.
    """
    text = kernel.strip().upper()
    words = {
        "STANDARD": "soft", "STND": "soft", "STD": "soft", "STD+": "soft", "SOFT": "soft", "DETAIL": "soft", "CHEST": "soft",
        "LUNG": "lung", "BONE": "bone",
        "BONEPLUS": "bone", "EDGE": "bone", "HD LUNG": "lung", "ULTRA": "bone",
    }  # fmt: skip
    if text in words:
        return words[text]
    if maker == "siemens":
        match = re.match(r"([A-Z]+?)(\d{2})", text.split("/")[0])
        if match is None:
            return "unknown"
        family, number = match[1], int(match[2])
        if family.startswith("H") or family == "J" or family == "C":
            return "head" if number < 55 else "bone"
        if family.endswith("L") and len(family) > 1:
            return "lung"
        if family[0] in "BIDQU":
            return "soft" if number < 50 else ("lung" if number < 60 or (number in (70, 80) and family == "B") else "bone")
        return "unknown"
    if maker == "philips":
        return {
            "A": "soft",
            "B": "soft",
            "C": "soft",
            "L": "lung",
            "D": "bone",
            "E": "bone",
            "YA": "lung",
            "YB": "lung",
            "YC": "bone",
        }.get(text, "unknown")
    if maker == "canon" and (match := re.match(r"FC(\d{2})", text)):
        number = int(match[1])
        return (
            "soft"
            if number < 20
            else "head"
            if number < 30
            else "bone"
            if number in (30, 31, 35, 80, 81)
            else "lung"
            if 50 <= number < 60
            else "unknown"
        )
    return "unknown"


def recon_method(header: Header, kernel: str) -> str:
    """Return how a CT was reconstructed, as far as tag, kernel or description say."""
    text = f"{_upper(header.get('recon_algorithm'))} {kernel.upper()} {words_of(header, ('series_description',)).upper()}"
    if any(name in text for name in ("TRUE FIDELITY", "TRUEFIDELITY", "AICE", "DLIR", "DEEP")):
        return "deep"
    if any(name in text for name in ("ITERATIVE", "SAFIRE", "ADMIRE", "ASIR", "IDOSE", "AIDR", "VEO")) or re.search(
        r"\b[IJQ]\d{2}[A-Z]?\b", text
    ):
        return "iterative"
    return "fbp" if "FILTER_BACK_PROJ" in text or re.search(r"\bB\d{2}[A-Z]\b", text) else "unknown"


def contrast_state(header: Header, words: str) -> str:
    """Return whether contrast medium was given."""
    agent = str(header.get("contrast_agent") or "").strip().lower()
    if agent in ("none", "no", "0", "ohne", "sans", "nativ", "native"):
        return "none"
    if agent:
        return "given"
    without = (
        _has(words, "native", "nativ", "noncontrast", "nc", "unenhanced", "ohne", "sans", "plain", "nect", "without")
        or " non contrast " in words
    )
    given = _has(
        words,
        "ce",
        "c+",
        "+c",
        "cm",
        "km",
        "arterial",
        "arteriell",
        "portal",
        "venous",
        "venos",
        "gd",
        "gad",
        "post",
        "cta",
        "cect",
        "contrast",
    )
    return (
        "none" if without and not _has(words, "ce", "c+", "+c", "gd", "post") else "given" if given and not without else "unknown"
    )


def contrast_phase(words: str) -> str:
    """Return the phase of a contrast CT from its description, unknown when several are named."""
    phases = {
        "native": _has(words, "native", "nativ", "unenhanced", "plain", "nect"),
        "arterial": _has(words, "arterial", "arteriell", "artphase", "cta", "art"),
        "portal": _has(words, "portal", "venous", "venos", "pv", "portovenous", "veineux"),
        "delayed": _has(words, "delayed", "delay", "late", "spaet", "spat", "excretory", "tardif"),
    }
    named = [name for name, found in phases.items() if found]
    return named[0] if len(named) == 1 else "unknown"


def mr_columns(headers: Sequence[Header], words: str) -> dict[str, Any]:
    """Return the columns of an MR: sequence, weighting, fat suppression, component, b-values."""
    first = headers[0]
    sequence = {_upper(value) for value in first.get("scanning_sequence") or ()} & {"SE", "IR", "GR", "EP", "RM"}
    kind = "mixed" if len(sequence - {"RM"}) > 1 else next(iter(sequence - {"RM"}), "unknown").lower()
    b_values = all_b_values(headers, words)
    options = {_upper(value) for value in first.get("scan_options") or ()}
    suppressed = _upper(first.get("suppression"))
    fat: bool | None = None
    by_options = suppressed in ("FAT", "FAT_AND_WATER") or {"FS", "FATSAT", "SPIR", "SPAIR", "FAT_SAT"} & options
    if by_options or _has(words, "fs", "fatsat", "stir", "spair", "spir", "fat"):
        fat = True
    elif suppressed in ("NONE", "WATER"):
        fat = False
    return {
        "tr": positive(first.get("repetition_time")),
        "te": positive(first.get("echo_time")),
        "ti": positive(first.get("inversion_time")),
        "flip": positive(first.get("flip_angle")),
        "mr_type": kind if kind in MR_TYPES else "unknown",
        "weighting": weighting(first, words, b_values),
        "fat_sat": fat,
        "component": component(first),
        "b_values": tuple(b_values),
    }


def all_b_values(headers: Sequence[Header], words: str) -> list[float]:
    """Return the b-values of a series, ascending, each once.

    GE and Philips write zero into their private elements on series without diffusion: zeros alone count only where the standard
    tag holds them or the description says diffusion.
    """
    found = sorted({value for header in headers if (value := b_value(header)) is not None})
    standard = any(header.get("b_value") is not None for header in headers)
    return found if standard or any(found) or _has(words, *_DIFFUSION) else []


def b_value(header: Header) -> float | None:
    """Return the diffusion b-value in s/mm2 from the standard tag or the vendors'.

    GE writes it as the first number of (0043,1039), with 10^9 added to mark some acquisitions.
    """
    for name in ("b_value", "b_value_siemens", "b_value_philips"):
        if header.get(name) is not None:
            return _b(header[name])
    values = header.get("b_value_ge") or ()
    try:
        return _b(float(values[0]) % 1e9) if values and vendor(header.get("manufacturer")) == "ge" else None
    except (TypeError, ValueError, OverflowError):
        return None


def _b(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return round(number, 3) if 0 <= number <= 100_000 else None


_DIFFUSION = ("dwi", "dti", "diff", "diffusion", "ep2d_diff")
_CONTRASTS = {
    "T1": "t1", "T2": "t2", "T2_STAR": "t2star", "PROTON_DENSITY": "pd", "FLUID_ATTENUATED": "flair", "DIFFUSION": "dwi",
    "PERFUSION": "perfusion", "TOF": "angio",
}  # fmt: skip
"""AcquisitionContrast (0008,9209) -> weighting; of other values the description decides."""


def weighting(header: Header, words: str, b_values: Sequence[float] = ()) -> str:
    """Return the weighting: AcquisitionContrast, words of the description, diffusion, then the times of a plain spin echo.

    TR above 1,500 ms with TE above 60 ms is T2, TR below 900 ms with TE below 30 ms is T1, long TR with short TE is PD.
    """
    image_type = {_upper(value) for value in header.get("image_type") or ()}
    if "ADC" in image_type or _has(words, "adc"):
        return "adc"
    stated = _CONTRASTS.get(_upper(header.get("contrast_type")))
    if stated is not None:
        return stated
    if _has(words, "swi", "swan", "suszeptibilitaet", "venbold"):
        return "swi"
    if _has(words, "flair", "tirm") or "darkfluid" in words or "dark fluid" in words:
        return "flair"
    if _has(words, *_DIFFUSION) or len(b_values) > 1 or any(value > 0 for value in b_values):
        return "dwi"
    if _has(words, "perfusion", "perf", "dsc", "dce", "asl", "pcasl"):
        return "perfusion"
    if _has(words, "bold", "fmri", "rsfmri"):
        return "bold"
    if _has(words, "tof", "mra", "angio", "angiography"):
        return "angio"
    named = {
        "t1": _has(words, "t1", "t1w", "mprage", "vibe", "lava", "bravo", "spgr"),
        "t2star": _has(words, "t2*", "t2star", "t2s", "merge", "medic", "gre"),
        "t2": _has(words, "t2", "t2w", "haste", "trufi", "space"),
        "pd": _has(words, "pd", "pdw", "dp"),
    }
    found = [name for name, given in named.items() if given]
    if len(found) == 1:
        return found[0]
    tr, te, ti = (positive(header.get(name)) for name in ("repetition_time", "echo_time", "inversion_time"))
    sequence = {_upper(value) for value in header.get("scanning_sequence") or ()}
    if found or sequence != {"SE"} or tr is None or te is None or ti is not None:
        return "unknown"
    if tr > 1500:
        return "t2" if te > 60 else "pd" if te < 30 else "unknown"
    return "t1" if tr < 900 and te < 30 else "unknown"


def component(header: Header) -> str:
    """Return magnitude, phase, real or imaginary: the tag, then ImageType, then GE's raw data type."""
    stated = one_of(header.get("component"), COMPONENTS)
    if stated != "unknown":
        return stated
    values = [_upper(value) for value in header.get("image_type") or ()]
    for name, marks in {
        "phase": ("P", "PHASE"),
        "real": ("R", "REAL"),
        "imaginary": ("I", "IMAGINARY"),
        "magnitude": ("M", "MAGNITUDE"),
    }.items():
        if any(value in marks for value in values[2:]):
            return name
    if vendor(header.get("manufacturer")) == "ge" and header.get("raw_type_ge") in (0, 1, 2, 3):
        return ("magnitude", "phase", "real", "imaginary")[header["raw_type_ge"]]
    return "unknown"


def body_region(header: Header) -> dict[str, Any]:
    """Return `body_region` and where it comes from: the tag, else words of the descriptions."""
    tag = str(header.get("body_part") or "").lower().strip()
    if tag:
        found = tuple(name for name, parts in REGIONS.items() if any(part in tag for part in parts if len(part) > 3 or part == tag))
        return {"body_region": found or ("other",), "body_region_source": "tag"}
    words = words_of(header)
    found = tuple(name for name, parts in REGIONS.items() if _has(words, *parts))
    return {"body_region": found, "body_region_source": "text" if found else "unknown"}


def face_possible(regions: Sequence[str]) -> bool | None:
    """Return whether a CT or MR may show a face; None when nobody says what it shows."""
    if not regions:
        return None
    return bool({"head", "neck", "whole_body"} & set(regions))


def laterality(header: Header) -> str:
    """Return the side, from ImageLaterality or Laterality."""
    text = _upper(header.get("image_laterality")) or _upper(header.get("laterality"))
    return {"L": "left", "R": "right", "B": "both"}.get(text, "unknown")


_PROJECTIONS = {
    "AP": "ap", "PA": "pa", "LL": "lateral", "RL": "lateral", "LAT": "lateral", "LATERAL": "lateral", "ML": "lateral", "LM": "lateral",
    "LLO": "oblique", "RLO": "oblique", "OBL": "oblique", "OBLIQUE": "oblique", "LAO": "oblique", "RAO": "oblique", "LPO": "oblique",
    "RPO": "oblique", "MLO": "oblique", "LMO": "oblique",
}  # fmt: skip
"""LLD and RLD, lying on one side, say nothing of the direction of the beam: they are `other`."""


def view(position: str) -> str:
    """Return the projection that a ViewPosition, in capitals, means: of `VIEWS`."""
    return _PROJECTIONS.get(position, "other" if position else "unknown")


def stage(header: Header) -> str:
    """Return rest or stress from StageName."""
    text = str(header.get("stage") or "").lower()
    if any(word in text for word in ("stress", "peak", "exercise", "dose")):
        return "stress"
    return "rest" if any(word in text for word in ("rest", "baseline", "pre")) else "unknown"


def subject_kind(header: Header, words: str) -> str:
    """Return human, phantom or animal when something says so."""
    species = str(header.get("species") or "").lower()
    if species:
        return "human" if "homo" in species or "human" in species else "animal"
    if header.get("breed"):
        return "animal"
    if _has(words, "phantom", "qa", "qc", "phantomscan", "kalibrierung", "calibration"):
        return "phantom"
    return "unknown"


def privacy_flags(headers: Sequence[Header]) -> tuple[str, ...]:
    """Return what in the headers of a series says that its files or pixels may identify somebody."""
    flags = {
        "burned_in_stated": any(_upper(header.get("burned_in")) == "YES" for header in headers),
        "overlay": any(header.get("overlay") or header.get("overlay_rows") for header in headers),
        "private_tags": any(header.get("private_tags") for header in headers),
    }
    return tuple(name for name, holds in flags.items() if holds)


def person(header: Header) -> dict[str, Any]:
    """Return sex, age band, adult, year, and the flags of impossible dates and ages (`flags`).

    The date of the series, then of the acquisition, stands in for a study date that is absent, not for one that cannot be.
    """
    dates = (header.get(name) for name in ("study_date", "series_date", "acquisition_date"))
    study = next((date for date in dates if (date or "").strip(" \0")), None)
    years, flags = age_of(header.get("age"), header.get("birth_date"), study)
    date, _ = parse_date(study)
    return {
        "sex": header["sex"] if header.get("sex") in ("F", "M", "O") else "unknown",
        "age_band": age_band(years),
        "adult": None if years is None else years >= 18,
        "year": None if date is None else date.year,
        "flags": flags,
    }


def twin_key(header: Header, modality: str) -> str | None:
    """Return what FOR PROCESSING and FOR PRESENTATION images of one exposure share, or None.

    They have different series and instance UIDs; what they share is study, view, side, size and the moment of acquisition.
    """
    if modality not in PROJECTIONS or not header.get("study_uid") or not header.get("acquisition_time"):
        return None
    names = ("study_uid", "view_position", "laterality", "image_laterality", "body_part", "acquisition_time")
    return "\x1f".join(str(header.get(name) or "") for name in names)
