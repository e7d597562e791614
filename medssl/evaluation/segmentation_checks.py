"""What the label maps of a cohort must hold before a segmentation network is trained on them, looked at once, before the first step.

Test labels are looked at for faults, which would otherwise show after all training; they are scored after the last step and choose nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from medssl.errors import GeometryError, ImageError, RequestError
from medssl.evaluation.cohort import Case
from medssl.evaluation.volumes import CaseReader, Volume, known_values, structure_values


@dataclass(frozen=True)
class Drawn:
    """What the label map of one case says.

    Args:
        labelled: Structures that it labels.
        present: Those of them that have a voxel.
    """

    labelled: frozenset[int]
    present: frozenset[int]

    @classmethod
    def of(cls, volume: Volume, structures: Iterable[int], raters: str = "majority") -> Drawn:
        """Return it for a volume; with `raters` `draw` a voxel of any rater counts, else one of the majority."""
        labelled = frozenset(value for value in structures if volume.labels(value))
        found = structure_values(volume) if raters == "draw" else set(volume.points)
        return cls(labelled, labelled & found)


def look_through(reader: CaseReader, cases: Sequence[Case], structures: Iterable[int], raters: str = "majority") -> list[Drawn]:
    """Read cases one after another and return what each labels.

    Raises:
        ImageError: Images or label maps cannot be used; all such cases are named. A GeometryError where all lie on other grids.
    """
    values, found, faults = list(structures), list[Drawn](), list[ImageError]()
    for case in cases:
        try:
            volume = reader(case)
            known_values(volume, values, case)
            found.append(Drawn.of(volume, values, raters))
        except ImageError as err:
            faults.append(_of_case(err, case))
    if len(faults) == 1:
        raise faults[0]
    if faults:
        text = f"{len(faults)} of {len(cases)} cases cannot be used: " + "; ".join(map(str, faults))
        grids = all(isinstance(fault, GeometryError) for fault in faults)
        raise GeometryError(text, faults[0].reason) if grids else ImageError(faults[0].reason, text)
    return found


def _of_case(err: ImageError, case: Case) -> ImageError:
    """Return the error with the number of the case and without its file name."""
    text = str(err)
    if text.startswith(f"case {case.id}"):
        return err
    for image in (case.image, *case.further):
        text = text.replace(str(image), "image").replace(image.name, "image")
    text = f"case {case.id}: {text}"
    return GeometryError(text, err.reason) if isinstance(err, GeometryError) else ImageError(err.reason, text)


def refuse_unlearnable(name: str, training: Sequence[Drawn], structures: Mapping[int, str], *, one_fold: bool) -> None:
    """Refuse training cases that cannot teach a structure: none labels it, or it has no voxel in those that do.

    Args:
        name: Of the cohort.
        training: What the training cases label.
        structures: Value to public name.
        one_fold: Whether folds were dealt.

    Raises:
        RequestError: They cannot.
    """
    faults = []
    where = f"the {len(training)} training cases" + (" of a fold" if one_fold else "")
    unlabelled = [called for value, called in structures.items() if not any(value in one.labelled for one in training)]
    if unlabelled:
        faults.append(
            f"class {', '.join(unlabelled)} is labelled by none of {where} (label files call structures by the names of the list)"
        )
    empty = [
        called
        for value, called in structures.items()
        if called not in unlabelled and not any(value in one.present for one in training)
    ]
    if empty:
        faults.append(f"class {', '.join(empty)} has no voxel in {where}")
    if faults:
        raise RequestError(
            f"cohort {name}: {'; '.join(faults)}; give more labels{', ask for fewer folds' if one_fold else ''}, correct the labels, or leave "
            "the class out of dataset.json and of the maps"
        )


def refuse_unscorable(name: str, tested: Sequence[Drawn]) -> None:
    """Refuse test cases of which none has a structure.

    Raises:
        RequestError: None has one.
    """
    if not any(one.present for one in tested):
        raise RequestError(
            f"cohort {name}: none of the {len(tested)} test cases has a voxel of a structure that it labels, so nothing can be scored; mark other "
            "cases as test, or correct their labels"
        )
