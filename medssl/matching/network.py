"""A trained matcher: its network from a run folder, and the embedding of a whole volume."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.encoders.loading import load_into
from medssl.errors import RequestError, WeightsError
from medssl.layers.dense_embedding import DenseEmbedding
from medssl.matching.base import MatchVolume, filled
from medssl.matching.cells import CellMap, VolumeEmbedding, quantise
from medssl.matching.store import EmbeddingManifest
from medssl.registry import lookup
from medssl.types import Box, DrawKey, Sample
from medssl.views.pipeline import Crop, VolumeViews
from medssl.weights import load_part

TILE_VERSION = 1
"""Raised when the same volume and weights would give another embedding."""


class MatcherNetwork:
    """Encoder and maps of a run of the objective `anatomical_embedding`.

    Args:
        weights: Run folder, or its encoder's safetensors file with `embedding.safetensors` beside it.
        step_mm: Between cells of the fine map, a whole multiple of the network's own; None is the network's own. Twice that is an
            eighth of the bytes.
        spacing_mm: Spacing that the caller believes in; None believes the weights.
        device: Where it runs.

    Raises:
        WeightsError: The weights are no matcher.
        RequestError: They were trained at another spacing, or the step is no multiple.
    """

    def __init__(
        self,
        weights: Path | str,
        *,
        step_mm: float | None = None,
        spacing_mm: Any = None,
        device: torch.device | str = "cpu",
    ) -> None:
        state, manifest = load_part(weights, "encoder")
        try:
            head_state, head = load_part(weights, "embedding")
        except WeightsError as err:
            raise WeightsError(
                f"{weights} holds no matcher ({err}); train one with the objective anatomical_embedding, for instance "
                "`medssl pretrain recipes/pretrain/anatomical_embedding_segresnet3d_ct.yaml`"
            ) from err
        facts = head.get("embedding")
        if not isinstance(facts, dict) or manifest.get("spacing_source") != "views" or not manifest.get("image_size"):
            raise WeightsError(f"the manifest of {weights} does not say at which spacing the matcher works; save the weights again")
        self.spacing_mm = tuple(float(s) for s in manifest["spacing_mm"])
        check_spacing(self.spacing_mm, spacing_mm)
        self.image_size = tuple(int(n) for n in manifest["image_size"])
        self.normalize = manifest["intensity"]["normalize"]
        self.device = torch.device(device)
        self.encoder = lookup("encoder", manifest["encoder"]["name"])(**manifest["encoder"]["args"])
        load_into(self.encoder, state, manifest)
        self.encoder.eval().requires_grad_(False).to(self.device)
        self.fine_stride, self.coarse_stride = int(facts["fine_stride"]), int(facts["coarse_stride"])
        self.first = facts["centres"] == "first"
        self.dim = int(facts["dim"])
        with torch.no_grad():
            zeros = torch.zeros(1, self.encoder.in_channels, *self.image_size, device=self.device)
            pyramid = self.encoder.forward_features(zeros).pyramid
        strides = [self.image_size[0] // level.shape[2] for level in pyramid]
        self.head = DenseEmbedding([level.shape[1] for level in pyramid], strides, fine_stride=self.fine_stride, dim=self.dim)
        self.head.load_state_dict(head_state)
        self.head.eval().requires_grad_(False).to(self.device)
        self.pool = pooling(self.spacing_mm, self.fine_stride, step_mm)
        self.weights_hash = hashlib.blake2b((manifest["weights_hash"] + head["weights_hash"]).encode(), digest_size=16).hexdigest()

    def manifest(self, store_key: str = "") -> EmbeddingManifest:
        """Return what embeddings made by this network of the volumes of a store are filed under."""
        recipe = {"normalize": self.normalize, "tile": list(self.image_size), "version": TILE_VERSION, "store": store_key}
        return EmbeddingManifest(
            weights_hash=self.weights_hash,
            spacing_mm=self.spacing_mm,
            step_mm=tuple(s * self.fine_stride * self.pool for s in self.spacing_mm),
            coarse_step_mm=tuple(s * self.coarse_stride for s in self.spacing_mm),
            channels=self.dim,
            preprocessing=hashlib.blake2b(json.dumps(recipe, sort_keys=True).encode(), digest_size=8).hexdigest(),
            store_key=store_key,
        )

    def embed(self, volume: MatchVolume, store_key: str = "") -> VolumeEmbedding:
        """Embed a whole volume in overlapping tiles of the size that the network was trained on.

        Group norms make a cell depend on what else is in its crop; tiles of the training size keep that as it was in training, and the
        mean over overlapping ones evens it out.
        """
        sample = volume.read()
        image, body = self._resampled(sample)
        fine, coarse = self._tiled(image)
        size = np.asarray(image.shape[2:])
        spacing = np.asarray(self.spacing_mm)
        step = self.fine_stride * self.pool
        fine = F.normalize(F.avg_pool3d(fine, self.pool), dim=1) if self.pool > 1 else fine
        inside = cell_body(body, step, size // step)
        vectors = fine[0].permute(1, 2, 3, 0).cpu().numpy()
        anchors = [0.0 if self.first else (stride - 1) / 2 for stride in (self.fine_stride, self.coarse_stride)]
        vectors, _ = quantise(np.where(inside[..., None], vectors, np.float32(0)))
        origin = (anchors[0] + self.fine_stride * (self.pool - 1) / 2 + 0.5) * spacing
        coarse_vectors, _ = quantise(coarse[0].permute(1, 2, 3, 0).cpu().numpy())
        return VolumeEmbedding(
            CellMap(vectors, origin, step * spacing),
            CellMap(coarse_vectors, (anchors[1] + 0.5) * spacing, self.coarse_stride * spacing),
            self.manifest(store_key).key,
            volume.name,
        )

    def _resampled(self, sample: Sample) -> tuple[Tensor, np.ndarray]:
        """Return a volume at the matcher's spacing, at least one tile large: image (1, C, *n), body (*n) bool."""
        assert sample.spacing_mm is not None
        if sample.image.shape[0] != self.encoder.in_channels:
            raise RequestError(
                f"series {sample.meta.series_id} has {sample.image.shape[0]} channels and the matcher takes {self.encoder.in_channels}; "
                "choose series of the kind that it was trained on"
            )
        spacing = np.asarray(self.spacing_mm)
        multiple = math.lcm(self.coarse_stride, self.fine_stride * self.pool)
        wanted = np.maximum(np.asarray(sample.image.shape[1:]) * np.asarray(sample.spacing_mm) / spacing, self.image_size)
        size = [math.ceil((float(n) - 1e-3) / multiple) * multiple for n in wanted]
        views = VolumeViews(
            "volume", size=size, spacing_mm=self.spacing_mm, normalize=self.normalize, points={"seeds": 1, "negatives": 0}
        )
        valid = np.ones(sample.image.shape[1:], dtype=bool) if sample.valid is None else sample.valid
        edges = np.asarray(size) * spacing
        box = Box((0.0, 0.0, 0.0), (float(edges[0]), float(edges[1]), float(edges[2])))
        key = DrawKey(0, 0, 0)
        crop = Crop(sample.image, valid, sample.spacing_mm, (0.0, 0.0, 0.0), box, sample.meta.stats, key, 0)
        made = views.apply([crop], [[views.draw(key, 0)]], self.device)
        return made["volume"][0], made["volume_body"][0, 0].cpu().numpy()

    @torch.no_grad()
    def _tiled(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return fine and coarse maps of an image (1, C, *n), means over tiles, of unit length."""
        size, sums = image.shape[2:], []
        for stride in (self.fine_stride, self.coarse_stride):
            sums.append(torch.zeros(1, self.dim, *(n // stride for n in size), device=image.device))
        ramps = [tile_weight(self.image_size, stride).to(image.device) for stride in (self.fine_stride, self.coarse_stride)]
        for start in tile_starts(size, self.image_size, self.coarse_stride):
            tile = image[(slice(None), slice(None), *(slice(s, s + n) for s, n in zip(start, self.image_size)))]
            maps = self.head(self.encoder.forward_features(tile).pyramid)
            for total, found, ramp, stride in zip(sums, maps, ramps, (self.fine_stride, self.coarse_stride)):
                at = tuple(slice(s // stride, s // stride + n) for s, n in zip(start, found.shape[2:]))
                total[(slice(None), slice(None), *at)] += found * ramp
        return F.normalize(sums[0], dim=1), F.normalize(sums[1], dim=1)


def check_spacing(trained: tuple[float, ...], asked: Any) -> None:
    """Raise when a matcher is asked to work at a spacing that it was not trained at.

    Raises:
        RequestError: The spacings differ by more than 1 %.
    """
    if asked is None:
        return
    values = np.broadcast_to(np.asarray(asked, dtype=np.float64), 3)
    if not np.allclose(values, trained, rtol=0.01):
        raise RequestError(
            f"the matcher was trained at a spacing of {'x'.join(f'{s:g}' for s in trained)} mm and {'x'.join(f'{s:g}' for s in values)} mm is "
            "asked for; leave the spacing out, or train a matcher at that spacing (volumes of any spacing are resampled to the matcher's)"
        )


def pooling(spacing_mm: tuple[float, ...], stride: int, step_mm: float | None) -> int:
    """Return how many fine cells make one of the wanted step along each axis.

    Raises:
        RequestError: The step is no multiple of the network's own.
    """
    if step_mm is None:
        return 1
    own = max(spacing_mm) * stride
    factor = round(step_mm / own)
    if factor not in (1, 2, 4) or abs(factor * own - step_mm) > 0.01 * own:
        raise RequestError(f"step_mm is {step_mm:g}; accepted with these weights: {own:g}, {2 * own:g} or {4 * own:g}")
    return factor


def tile_starts(size: Any, tile: Any, multiple: int) -> list[tuple[int, ...]]:
    """Return the first voxels of tiles that cover a volume and overlap by about half, all multiples of `multiple`."""
    axes = []
    for n, t in zip(size, tile):
        hop = max(multiple, t // 2 // multiple * multiple)
        axes.append(sorted({*range(0, max(n - t, 0), hop), max(n - t, 0)}))
    return [(x, y, z) for x in axes[0] for y in axes[1] for z in axes[2]]


def tile_weight(tile: Any, stride: int) -> Tensor:
    """Return the weight of each cell of a tile, (*grid) float32: highest in the middle, never 0."""
    ramps = []
    for n in tile:
        cells = n // stride
        place = torch.arange(cells) + 0.5
        ramps.append(torch.minimum(place, cells - place) / (cells / 2))
    x, y, z = ramps
    weight: Tensor = x[:, None, None] * y[None, :, None] * z[None, None, :]
    return weight


def cell_body(body: np.ndarray, step: int, grid: Any) -> np.ndarray:
    """Return which cells are in or next to the body, its holes (lungs, bowel gas) filled slice by slice.

    Args:
        body: (*n) bool voxels at the matcher's spacing.
        step: Voxels per cell and axis.
        grid: Cells along each axis.
    """
    from scipy import ndimage

    x, y, z = (int(n) for n in grid)
    cells = np.asarray(body[: x * step, : y * step, : z * step].reshape(x, step, y, step, z, step).any(axis=(1, 3, 5)))
    cells = filled(cells)
    if not cells.any():
        return np.ones_like(cells)
    return np.asarray(ndimage.binary_dilation(cells))
