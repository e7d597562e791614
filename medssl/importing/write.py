"""Bring published weights in: a run's `weights` folder that fine-tuning, evaluation and exports take; nothing is written before all fits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medssl.errors import RequestError, WeightsError, near
from medssl.importing.files import AVERAGED, read_tensors
from medssl.importing.layouts import READERS, Asked, Converted, adapt_channels
from medssl.registry import argument_faults, lookup
from medssl.weights import folder_aside, load_part, save_part, write_atomic

UNUSED = "norm_cross_attn"  # of MONAI's ViT, on no path; older files lack it
INDICES = "relative_position_index"  # of MONAI's Swin, follows from the window
UNKNOWN = "unknown"
NORMALIZATIONS = ("zscore", "percentile", "none")


@dataclass(frozen=True)
class ImportReport:
    """What came in.

    Args:
        path: Folder that was written.
        files: Its files.
        layout: What the file was taken for.
        encoder: `{"name", "args"}`.
        matched: Tensors of the network that the file filled.
        missing: Tensors of the network that the file lacks: such as no path uses or that follow from the arguments, never others.
        unexpected: Tensors of the file that have no place in the network (heads, decoders of other forms) and were left out.
        resized: Tensors that were interpolated.
        notes: For people: everything that was changed or assumed.
    """

    path: Path
    files: tuple[Path, ...]
    layout: str
    encoder: dict[str, Any]
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    resized: tuple[str, ...]
    notes: tuple[str, ...]


def import_weights(
    file: Path | str,
    encoder: str,
    out: Path | str,
    *,
    args: Mapping[str, Any] | None = None,
    channels: int | None = None,
    image_size: Sequence[int] | None = None,
    spacing_mm: Sequence[float] | None = None,
    normalize: str | Mapping[str, Any] | None = None,
    domain: str | None = None,
    licence: str = UNKNOWN,
    source: str = UNKNOWN,
) -> ImportReport:
    """Load a file of published weights into one of our encoders and write `weights/` as a run does.

    Every tensor of the encoder must be in the file with its shape. What the file does not say (heads of a ViT, spacing, normalisation) is
    taken from here, and where it had to be assumed the notes say so.

    Args:
        file: `.safetensors`, or a pickle that `torch.load(weights_only=True)` opens.
        encoder: One of `READERS`.
        out: Folder to create; it must not exist, or be empty.
        args: Arguments of the encoder that tensors do not tell.
        channels: Input channels wanted: one is spread over several, several are summed to one.
        image_size: Size of the views of the pretraining, in voxels.
        spacing_mm: Spacing of the views of the pretraining.
        normalize: Normalisation of the pretraining: `zscore`, `percentile`, `none` or `{"window": [lo, hi]}`.
        domain: Registered domain of the images.
        licence: Of the weights.
        source: Where they are from, for the manifest.

    Raises:
        RequestError: An unknown encoder or argument, or `out` is taken.
        WeightsError: The file cannot be opened, or its tensors are not those of the encoder.
        StoreError: The disk is full, or the folder cannot be written.
    """
    file, out = Path(file), Path(out)
    if encoder not in READERS:
        raise RequestError(f'import: no layout for encoder "{encoder}"{near(encoder, READERS)}; known: {", ".join(READERS)}')
    asked = Asked(dict(args or {}), channels, image_size)
    _check(encoder, asked, spacing_mm, normalize, domain)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError(f"import: {out} exists and is not an empty folder; choose another one, or remove it first")
    opened = read_tensors(file)
    converted = adapt_channels(encoder, READERS[encoder](opened, asked), channels)
    module, matched, missing = _fill(encoder, converted)
    size = converted.image_size or (list(image_size) if image_size else None)
    spacing = list(spacing_mm) if spacing_mm else converted.spacing_mm
    how = normalize or converted.normalize
    averaged = [f"tensors are the average over steps, {key} of the file" for key in opened.inside if key in AVERAGED]
    notes = [*averaged, *converted.notes, *_unknown(size, spacing, how)]
    facts = {
        "image_size": size,
        "spacing_mm": spacing,
        "spacing_source": "views" if spacing else UNKNOWN,
        "intensity": {"normalize": how} if how else {},
        "licence": licence,
        "data_cards": [],
        "unknown": _not_said(size, spacing, how, domain),
        "imported": {
            "layout": converted.layout,
            "source": source,
            "sha256": opened.sha256,
            "inside": list(opened.inside),
            "notes": notes,
        },
        **({"domains": [domain]} if domain else {}),
    }
    parts = [group for group in module.key_groups if group in ("encoder", "decoder") and _has(module, group, matched)]
    files = _write(out, module, parts, facts)
    return ImportReport(
        path=out,
        files=files,
        layout=converted.layout,
        encoder=module.config(),
        matched=tuple(sorted(matched)),
        missing=tuple(sorted(missing)),
        unexpected=tuple(sorted(converted.left_out)),
        resized=tuple(converted.resized),
        notes=tuple(notes),
    )


def _check(
    encoder: str,
    asked: Asked,
    spacing_mm: Sequence[float] | None,
    normalize: str | Mapping[str, Any] | None,
    domain: str | None,
) -> None:
    faults = argument_faults("import", lookup("encoder", encoder), asked.args)
    if asked.channels is not None and asked.channels < 1:
        faults.append(f"channels is {asked.channels}; accepted: 1 or more")
    for name, values in (("image size", asked.image_size), ("spacing", spacing_mm)):
        if values is not None and (len(values) not in (2, 3) or not all(float(v) > 0 for v in values)):
            faults.append(f"{name} is {list(values)}; accepted: two or three numbers above 0")
    window = dict(normalize).get("window") if isinstance(normalize, Mapping) else None
    if normalize is not None and normalize not in NORMALIZATIONS and not (window and len(window) == 2 and window[0] < window[1]):
        faults.append(f"normalize is {normalize!r}; accepted: {', '.join(NORMALIZATIONS)}, or window with two numbers")
    if domain is not None:
        lookup("domain", domain)
    if faults:
        raise RequestError("; ".join(faults))


def _fill(encoder: str, converted: Converted) -> tuple[Any, list[str], list[str]]:
    """Build the encoder and load the tensors, all of them or none.

    Returns:
        The encoder, the names that were filled, and those that the file lacks without harm.
    """
    try:
        module = lookup("encoder", encoder)(**converted.args)
    except (TypeError, ValueError, RequestError) as err:
        raise WeightsError(f"{converted.layout}: the tensors describe a {encoder} that cannot be built ({err})") from err
    own: dict[str, Tensor] = module.net.state_dict()
    groups = module.key_groups
    state = {key: value.float() if value.is_floating_point() else value for key, value in converted.state.items()}
    decoder = tuple(groups.get("decoder", ()))
    if decoder and not all(key in state and state[key].shape == own[key].shape for key in own if key.startswith(decoder)):
        lost = [key for key in state if key.startswith(decoder)]  # a part of it, or one of another form
        converted.left_out += lost
        state = {key: value for key, value in state.items() if key not in lost}
    wanted = [key for key in own if key.startswith(tuple(groups["encoder"]))]
    absent = [key for key in wanted if key not in state]
    harmless = [key for key in absent if UNUSED in key or key.endswith(INDICES)]
    faults = [f"missing {key}" for key in absent if key not in harmless]
    faults += [f"unexpected {key}" for key in state if key not in own]
    faults += [
        f"{key} has shape {tuple(value.shape)}, expected {tuple(own[key].shape)}"
        for key, value in state.items()
        if key in own and value.shape != own[key].shape
    ]
    if faults:
        raise WeightsError(
            f"{converted.layout}: the tensors do not fit encoder {encoder} as built ({_brief(module.config()['args'])}): {len(faults)} "
            f"fault(s), first {faults[0]}; nothing was written; give the encoder's arguments as key=value, or another encoder"
        )
    module.net.load_state_dict(state, strict=False)
    return module.eval(), list(state), harmless


def _brief(args: Mapping[str, Any]) -> str:
    text = ", ".join(f"{key} {value}" for key, value in args.items() if value not in (None, {}, []))
    return text if len(text) <= 300 else text[:300] + " ..."


def _has(module: Any, group: str, matched: Sequence[str]) -> bool:
    return group == "encoder" or any(key.startswith(tuple(module.key_groups[group])) for key in matched)


def _unknown(size: Sequence[int] | None, spacing: Sequence[float] | None, how: Any) -> list[str]:
    lacking = [("image size", "--image-size", size), ("spacing", "--spacing", spacing), ("normalisation", "--normalize", how)]
    return [f"{name} of the pretraining unknown; {option} says it" for name, option, value in lacking if not value]


def _not_said(size: Sequence[int] | None, spacing: Sequence[float] | None, how: Any, domain: str | None) -> list[str]:
    """Return the keys of the manifest that say nothing of the pretraining: no file tells how images lay, and which images they were."""
    found = {"image_size": size, "spacing_mm": spacing, "intensity": how, "domains": domain, "axis_order": None, "data_cards": None}
    return [key for key, value in found.items() if not value]


def _write(out: Path, module: Any, parts: Sequence[str], facts: Mapping[str, Any]) -> tuple[Path, ...]:
    """Write `weights/` aside, read it back, and rename it into place."""
    files: list[Path] = []
    with folder_aside(out) as aside:
        (aside / "weights" / "last").mkdir(parents=True)
        for group in parts:
            part = module.part(group)
            state = {key: value for key, value in module.net.state_dict().items() if key.startswith(tuple(part.keys or ("",)))}
            path = save_part(aside / "weights" / "last", group, state, {**part.manifest, **facts})
            found, _ = load_part(path)
            if any(not torch.equal(found[key], value) for key, value in state.items()):
                raise WeightsError(
                    f"{path.name} differs from what was imported after writing; nothing was left behind; import it again"
                )
            files += [path, path.with_suffix(".json")]
        index = aside / "weights" / "index.json"
        write_atomic(index, json.dumps({"default": "encoder", "parts": list(parts)}).encode())
    return tuple(out / path.relative_to(aside) for path in [*files, index])
