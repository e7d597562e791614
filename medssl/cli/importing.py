"""import."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from medssl.cli import show

ENCODERS = ("swin3d", "vit3d", "resenc3d", "image2d")  # medssl.importing.layouts.READERS, which would import torch for --help


def import_(
    file: Annotated[Path, typer.Argument(help="Published weights: .safetensors, .pt, .pth, .ckpt or .bin.")],
    encoder: Annotated[str, typer.Option("--as", help=f"Encoder: {', '.join(ENCODERS)}; see docs/export.md.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write, as a run leaves its weights.")],
    args: Annotated[
        list[str] | None,
        typer.Argument(help="key=value arguments of the encoder that tensors do not tell, for instance num_heads=12."),
    ] = None,
    channels: Annotated[
        int | None, typer.Option(help="Input channels, where not those of the file: one from or to several.")
    ] = None,
    image_size: Annotated[str | None, typer.Option("--image-size", help="Of the pretraining, for instance 96,96,96.")] = None,
    spacing: Annotated[str | None, typer.Option("--spacing", help="Of the pretraining in mm, for instance 1,1,1.")] = None,
    normalize: Annotated[
        str | None, typer.Option("--normalize", help="Of the pretraining: zscore, percentile, none, or window:LOW,HIGH.")
    ] = None,
    domain: Annotated[str | None, typer.Option("--domain", help="Of the images, for instance ct.")] = None,
    licence: Annotated[str, typer.Option("--licence", help="Of the weights.")] = "unknown",
    source: Annotated[str, typer.Option("--source", help="Where the weights are from, for the manifest.")] = "unknown",
    json: Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.")] = False,
) -> None:
    """Bring published weights into one of medssl's encoders; finetune, evaluate and export take the folder like a run's."""
    from medssl.importing.write import import_weights
    from medssl.recipe import apply_overrides

    size = show.numbers("--image-size", image_size)
    done = import_weights(
        file,
        encoder,
        out,
        args=apply_overrides({}, args or []),
        channels=channels,
        image_size=None if size is None else [int(n) for n in size],
        spacing_mm=show.numbers("--spacing", spacing),
        normalize=_normalize(normalize),
        domain=domain,
        licence=licence,
        source=source,
    )
    text = "\n".join(
        [
            f"{done.layout} as {encoder}: {len(done.matched)} tensors matched, {len(done.missing)} missing, {len(done.unexpected)} "
            f"unexpected, {len(done.resized)} resized",
            *_groups("missing (on no path, or they follow from the arguments)", done.missing),
            *_groups("unexpected (left out)", done.unexpected),
            *_groups("resized", done.resized),
            *done.notes,
            f"licence {licence}; source {source}",
            *map(str, done.files),
        ]
    )
    show.result({**asdict(done), "path": str(done.path), "files": [str(path) for path in done.files]}, json, text)


def _groups(what: str, keys: Sequence[str]) -> list[str]:
    counts = Counter(key.partition(".")[0] for key in keys)
    return [f"{what}: " + ", ".join(f"{name} {count}" for name, count in counts.items())] if counts else []


def _normalize(text: str | None) -> Any:
    kind, _, window = (text or "").partition(":")
    return {"window": show.numbers("--normalize window", window)} if kind == "window" else text
