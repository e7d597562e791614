"""Pictures of the page of a run: what was hidden and filled in, labels beside predictions, clips and their regressions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from medssl.report import clip_figures, figures
from medssl.report.collect import Leftovers, Segmentation, spacing_of
from medssl.report.elements import Section, absent, decimal, image, text

MAX_CASES = 3  # pictured per section: a page is read, not scrolled


def pictures(found: Leftovers, with_images: bool) -> list[Section]:
    """Return the sections with pictures; a page about clips, or about an evaluation alone, says nothing of volumes that are not there."""
    elsewhere = bool(found.clips) or found.only_evaluated
    sections = []
    if found.reconstructions or not elsewhere:
        sections.append(Section("reconstructions", "Reconstructions", _reconstructions(found, with_images)))
    if found.segmentations or not elsewhere:
        sections.append(Section("segmentation", "Segmentation", _segmentation(found, with_images)))
    if found.clips:
        sections.append(Section("clips", "Clips", _clips(found)))
    if found.regressions:
        sections.append(Section("predictions", "Predicted numbers", _predictions(found)))
    return sections


def _no_images() -> str:
    return absent("Left out.", "This page was made without images of patients, so that it can be shared.")


def _reconstructions(found: Leftovers, with_images: bool) -> str:
    if not with_images:
        return _no_images()
    parts: list[str] = []
    for arrays in found.reconstructions:
        for i in range(len(arrays["input"])):
            if len(parts) == MAX_CASES:
                break
            shown, hidden, output = arrays["input"][i], arrays["mask"][i].astype(bool), arrays["output"][i]
            share = f"{100 * hidden.mean():.0f} % hidden"
            error = hidden_error(shown, hidden, output)
            said = (
                ""
                if error is None
                else f"; error where hidden {decimal(error, 2)} of the variance there (1 = no better than the mean)"
            )
            png = figures.reconstruction_png(shown, hidden, output, spacing_of(arrays, i))
            caption = f"Volume {len(parts) + 1}: {share}{said}."
            parts.append(image(png, f"Input, masked input, completed image and error in three planes, {share}", caption=caption))
    if not parts:
        return absent("No figures/reconstruction.npz was found.", "<code>medssl pretrain</code> writes one at its end.")
    lead = (
        "Blue blocks were hidden. “Completed” keeps what was visible and shows the output where it was hidden: the loss "
        "looks nowhere else. Error: blue too dark, orange too bright. Right of the patient is on the left."
    )
    return f"<p>{lead}</p>" + "".join(parts)


def hidden_error(shown: np.ndarray, hidden: np.ndarray, output: np.ndarray) -> float | None:
    """Return the mean squared error at hidden voxels over the variance of the input there; None when undefined.

    Args:
        shown: (X, Y, Z) input.
        hidden: (X, Y, Z) bool.
        output: (X, Y, Z) prediction.
    """
    truth, guess = shown[hidden].astype(np.float64), output[hidden].astype(np.float64)
    if truth.size == 0 or not np.isfinite(guess).all() or truth.var() <= 0:
        return None
    return float(((guess - truth) ** 2).mean() / truth.var())


def _segmentation(found: Leftovers, with_images: bool) -> str:
    if not with_images:
        return _no_images()
    arms = _one_group(found.segmentations)
    cases = _paired_cases(arms)
    if not cases:
        return absent("No figures/segmentation.npz was found.", "<code>medssl finetune</code> writes one.")
    parts: list[str] = []
    for cuts, structures, dice in cases[:MAX_CASES]:
        said = ", ".join(f"{text(arm)} {decimal(value, 2)}" for arm, value in dice.items() if value is not None)
        caption = f"Test case {len(parts) + 1}" + (f": mean Dice {said}." if said else ".")
        alt = f"Label and predictions over the image{'' if figures.PICTURE in cuts else ' in three planes'}: {', '.join(dice)}"
        parts.append(image(figures.segmentation_png(cuts, structures), alt, caption=caption))
    labels, seed = (text(word) for word in arms[0].group)
    of = f"Fine-tuned with {labels} labelled cases, seed {seed}. " if labels else ""
    lead = f"{of}The first test cases in the order of the cohort, not chosen by their result."
    return f"<p>{lead}</p>" + "".join(parts)


def _clips(found: Leftovers) -> str:
    parts = []
    for place, clip in enumerate(found.clips[:MAX_CASES], start=1):
        branches = ", ".join(clip.prototypes)
        of = f", and the prototypes that its tokens were assigned to ({text(branches)})" if branches else ""
        alt = f"Frames of a clip over time{of}"
        parts.append(image(clip_figures.strip_png(clip), alt, caption=f"Clip {place}: frames over time{of}."))
    lead = "Black is outside the sector. Blue squares were hidden from the student, at all times alike. A prototype has one colour throughout."
    return f"<p>{lead}</p>" + "".join(parts)


def _predictions(found: Leftovers) -> str:
    parts = []
    for name, target, predicted in found.regressions[:MAX_CASES]:
        light, dark = (clip_figures.scatter_png(target, predicted, theme) for theme in (figures.LIGHT, figures.DARK))
        caption = f"{text(name)}: predictions on patients of other folds. Dotted: always saying the mean."
        parts.append(image(light, "Predicted over measured values", dark=dark, caption=caption))
    return "".join(parts)


def _one_group(found: Sequence[Segmentation]) -> list[Segmentation]:
    """Return the runs of one number of labels and one seed: where most arms are, then the first in the folder."""
    groups: dict[tuple[str, ...], dict[str, Segmentation]] = {}
    for part in found:
        groups.setdefault(part.group, {}).setdefault(part.arm, part)
    best = max(groups.values(), key=len, default={})
    return sorted(best.values(), key=lambda part: part.arm != "scratch")


def _paired_cases(
    arms: Sequence[Segmentation],
) -> list[tuple[dict[str, figures.Cut], list[str], dict[str, float | None]]]:
    """Put the arms of the same test case side by side: cuts with one map per arm, structures, Dice per arm."""
    cases: list[tuple[dict[str, figures.Cut], list[str], dict[str, float | None]]] = []
    for part in arms:
        names = part.structures or [f"structure {k}" for k in range(1, 1 + _largest(part))]
        for case in part.cases:
            known = next((c for c in cases if part.arm not in c[2] and _same_image(c[0], case.cuts)), None)
            if known is None:
                maps = {plane: {"label": cut.maps["label"]} for plane, cut in case.cuts.items()}
                known = ({p: figures.Cut(c.image, maps[p], c.spacing_mm) for p, c in case.cuts.items()}, names, {})
                cases.append(known)
            cuts, _, dice = known
            for plane, cut in case.cuts.items():
                old = cuts[plane]
                cuts[plane] = figures.Cut(old.image, {**old.maps, part.arm: cut.maps["prediction"]}, old.spacing_mm)
            dice[part.arm] = case.dice
    return cases


def _largest(part: Segmentation) -> int:
    return max((int(labels.max()) for case in part.cases for cut in case.cuts.values() for labels in cut.maps.values()), default=0)


def _same_image(a: Mapping[str, figures.Cut], b: Mapping[str, figures.Cut]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[p].image, b[p].image, equal_nan=True) for p in a)
