"""Phantoms of card alice, section 10.1, in a store, and a matcher trained on them without any recipe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medssl.domains.mri import MRI
from medssl.domains.statistics import foreground, intensity_stats, rounded
from medssl.encoders.segresnet3d import SegResNet3D
from medssl.objectives.anatomical_embedding import AnatomicalEmbedding
from medssl.sampling.pairs import PairSampler, PairSource
from medssl.seeding import counter_rng
from medssl.store.reader import StoreReader
from medssl.store.writer import create_store, write_item
from medssl.types import DrawKey, ImageMeta, Sample, StepContext
from medssl.views.pipeline import Crop, VolumeViews
from medssl.weights import save_part, write_atomic

SPACING = 2.0
ORGANS = (((0.35, 0.05, 0.25), 0.40, 0.85), ((-0.40, 0.25, -0.05), 0.30, 0.65), ((0.05, -0.30, -0.45), 0.27, 0.15))
"""Centre and radius as a share of the body's half-axes, and brightness; the body's is 0.4."""
BODY_MM = np.array([46.0, 40.0, 50.0])
SHIFT_MM = 8.0
"""Standard deviation of where a body lies, along each axis, cut at twice that."""


def phantom(
    seed: int, size: int = 64, spacing: float = SPACING, *, affine: np.ndarray | None = None, at_mm: Sequence[float] | None = None
) -> tuple[Sample, np.ndarray]:
    """Return an ellipsoid body with three organs, scaled by 0.9 to 1.1 along each axis and shifted, and the organs' centres in world mm."""
    rng = counter_rng("matcher_phantom", seed)
    scale = rng.uniform(0.9, 1.1, 3)
    shift = np.clip(rng.normal(0, SHIFT_MM, 3), -2 * SHIFT_MM, 2 * SHIFT_MM) if at_mm is None else np.asarray(at_mm)
    step = size * SPACING / round(size * SPACING / spacing)
    n = round(size * SPACING / step)
    line = (np.arange(n) + 0.5) * step - size * SPACING / 2
    grid = np.stack(np.meshgrid(line, line, line, indexing="ij"), axis=-1) - shift

    def inside(centre: np.ndarray, radii: np.ndarray) -> np.ndarray:
        return np.asarray((((grid - centre) / radii) ** 2).sum(axis=-1) < 1)

    body = inside(np.zeros(3), BODY_MM * scale)
    image = np.where(body, 0.4, 0.0)
    spine = body & ((((grid - BODY_MM * scale * [0, -0.8, 0])[..., :2]) ** 2).sum(axis=-1) < 36)
    image[spine] = 0.95
    centres = []
    for centre, radius, brightness in ORGANS:
        middle = np.asarray(centre) * BODY_MM * scale
        image[inside(middle, radius * BODY_MM * scale * np.exp(rng.normal(0, 0.03, 3))) & body] = brightness
        centres.append(middle + shift)
    image = (1000 * np.clip(image + 0.02 * rng.standard_normal(image.shape), 0, None)).astype(np.int16)
    affine = np.eye(4) if affine is None else affine.copy()
    affine[:3, :3] = affine[:3, :3] * step
    affine[:3, 3] += affine[:3, :3] @ np.full(3, 0.5 - n / 2)
    mask = foreground(image)
    meta = ImageMeta(f"{seed:032x}", "mri", "MR", "arbitrary", 2, rounded(intensity_stats(image, mask)))
    world = np.stack(centres) / step @ affine[:3, :3].T
    return Sample(image[None], (step,) * 3, affine, None, meta), world


def filled(folder: Path, seeds: Sequence[int], spacing: float = SPACING) -> StoreReader:
    """Return a store of phantoms, one patient each."""
    create_store(folder, MRI())
    for seed in seeds:
        sample, _ = phantom(seed, spacing=spacing)
        write_item(sample, folder, patient_id=f"{seed + 1000:032x}", mask=foreground(sample.image[0]))
    return StoreReader(folder)


def make_objective(
    size: int = 32, filters: int = 8, spacing: float = SPACING, seed: int = 0, **changes: Any
) -> AnatomicalEmbedding:
    torch.manual_seed(seed)
    encoder = SegResNet3D(init_filters=filters, blocks_down=(1, 1, 2, 2), blocks_up=(1, 1, 1))
    given: dict[str, Any] = {"dim": 32, "hard": (200, 50), **changes}
    return AnatomicalEmbedding(encoder, image_size=(size,) * 3, spacing_mm=(spacing,) * 3, **given)


def pair_source(
    reader: StoreReader, *, size: int = 32, batch: int = 2, seeds: int = 60, shift: float = 0.3, **views: Any
) -> PairSource:
    """Two crops of one volume, as the matcher is trained on."""
    series = dict(enumerate(reader.series_ids()))
    given = {"scale": (0.85, 1.2), "noise_std": 0.1, **views}
    maker = VolumeViews("volume", size=size, spacing_mm=SPACING, count=2, points={"seeds": seeds, "negatives": 300}, **given)
    sampler = PairSampler(
        "toy",
        sorted(series),
        lambda item: reader.record(series[item]),
        {item: reader.record(name).patient_id for item, name in series.items()},
        maker.box_size_mm,
        lambda item: None,  # type: ignore[arg-type, return-value]  # nothing is matched
        batch=batch,
        pairs="same_volume",
        shift=shift,
    )
    return PairSource("toy", "mri", reader, series, sampler, maker, item=Crop)


def train(model: AnatomicalEmbedding, source: PairSource, *, steps: int, batch: int = 2, lr: float = 2e-3, log: Any = None) -> None:
    """A few steps of AdamW with a cosine."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.01)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20) * (0.02 + 0.98 * (1 + np.cos(np.pi * step / steps)) / 2)
        views = source.views(source.fetch([DrawKey(0, step, place) for place in range(batch)]), torch.device("cpu"))
        parts = model(views, StepContext(step=step))
        optimiser.zero_grad()
        parts["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if log is not None:
            log(step, {name: float(value.detach()) for name, value in parts.items()})


def save(model: AnatomicalEmbedding, folder: Path, *, spacing: float = SPACING, size: int = 32) -> Path:
    """Write the parts as a run does."""
    facts = {
        "spacing_mm": [spacing] * 3,
        "spacing_source": "views",
        "image_size": [size] * 3,
        "intensity": {"normalize": "zscore"},
        "domains": ["mri"],
    }
    for name, part in model.exported().items():
        state = {
            key[len(part.prefix) :]: value
            for key, value in part.module.state_dict().items()
            if key.startswith(part.prefix) and (part.keys is None or key[len(part.prefix) :].startswith(part.keys))
        }
        save_part(folder / "weights" / "last", name, state, {**part.manifest, **facts})
    write_atomic(folder / "weights" / "index.json", json.dumps({"default": "encoder", "parts": ["embedding", "encoder"]}).encode())
    return folder
