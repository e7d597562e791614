"""Feature files: one per slide, HDF5, written aside and renamed, readable by users of TRIDENT and CLAM.

`features` (N, D) and `coords` (N, 2) int64 in level-0 pixels; attributes at the root say everything that made them. `coords` carries the
names that TRIDENT's readers look for. A file that has its name is complete: it was written as `NAME.part`, flushed to disk and renamed.
A slide without tissue has a file too, with N = 0.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from medssl.domains.slides.backends import missing_extra
from medssl.domains.slides.grid import TileGrid
from medssl.domains.slides.slide import Slide
from medssl.domains.slides.tiles import BadTiles, Tiles, tile_loader
from medssl.errors import RequestError, StoreError
from medssl.weights import disk_error, private_folder

SCHEMA = 1
DTYPES = ("float16", "float32")
_ROWS = 1024
"""Rows of an HDF5 chunk."""


@dataclass(frozen=True)
class PatchEncoder:
    """What turns tiles into features, and the tiles that it was made for.

    Args:
        name: Its name, see `PATCH_ENCODERS`, or another.
        encode: (B, 3, P, P) uint8 tensor -> (B, D) tensor; normalisation is its own business.
        dim: D.
        tile_px: Edge of its tiles.
        mpp: Micrometres per pixel of its tiles.
        weights: Hash of its weights.
        transform: What it does to pixels, in words.
    """

    name: str
    encode: Callable[[Any], Any]
    dim: int
    tile_px: int
    mpp: float
    weights: str = ""
    transform: str = ""


PATCH_ENCODERS: dict[str, tuple[int, int, int]] = {
    "uni_v1": (1024, 256, 20), "uni_v2": (1536, 256, 20), "conch_v1": (512, 512, 20), "conch_v15": (768, 512, 20),
    "virchow": (2560, 224, 20), "virchow2": (2560, 224, 20), "phikon": (768, 224, 20), "phikon_v2": (1024, 224, 20),
    "gigapath": (1536, 256, 20), "hoptimus0": (1536, 224, 20), "hoptimus1": (1536, 224, 20), "h0-mini": (768, 224, 20),
    "musk": (1024, 384, 20), "midnight12k": (3072, 224, 20), "openmidnight": (1536, 224, 20), "gpfm": (1024, 224, 20),
    "genbio-pathfm": (4608, 224, 20), "hibou_l": (1024, 224, 20), "lunit": (384, 224, 20), "keep": (768, 256, 20),
    "kaiko-vits": (384, 256, 20), "kaiko-vitb": (768, 256, 20), "kaiko-vitl": (1024, 256, 20), "ctranspath": (768, 256, 10),
    "resnet50": (1024, 256, 20),
}  # fmt: skip
"""Published encoders: D, edge of a tile, nominal magnification, at which 10 / magnification micrometres per pixel are meant."""


def published(name: str, encode: Callable[[Any], Any], **more: Any) -> PatchEncoder:
    """Return an encoder with the numbers that its authors gave it.

    Raises:
        RequestError: An unknown name.
    """
    if name not in PATCH_ENCODERS:
        raise RequestError(f"patch encoder {name!r}; known: {', '.join(PATCH_ENCODERS)}; others are made with PatchEncoder(...)")
    dim, tile_px, power = PATCH_ENCODERS[name]
    return PatchEncoder(name, encode, dim, tile_px, 10.0 / power, **more)


def check_encoder(encoder: PatchEncoder, grid: TileGrid, *, force: bool = False) -> None:
    """Refuse a grid whose tiles an encoder was not made for.

    Raises:
        RequestError: Another tile size or scale, unless forced.
    """
    if force or (encoder.tile_px == grid.tile_px and math.isclose(encoder.mpp, grid.mpp, rel_tol=0.02)):
        return
    raise RequestError(
        f"encoder {encoder.name} takes tiles of {encoder.tile_px} px at {encoder.mpp:g} um/px; the grid has {grid.tile_px} px at "
        f"{grid.mpp:g}; lay the grid at its scale, or pass force=True"
    )


def attributes(
    slide: Slide, grid: TileGrid, *, slide_id: str, encoder: PatchEncoder | None = None, more: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the attributes of a feature file: no path, no name of a file, nothing of a patient.

    Args:
        slide: The slide.
        grid: The grid.
        slide_id: Series id.
        encoder: What made the features.
        more: Further attributes.
    """
    import medssl

    info = slide.info
    return {
        "schema": SCHEMA,
        "slide_id": slide_id,
        "backend": f"{info.backend} {info.backend_version}",
        "mpp0": info.mpp,
        "mpp0_x": info.mpp_x,
        "mpp0_y": info.mpp_y,
        "mpp_source": info.mpp_source,
        "target_mpp": grid.mpp,
        "patch_size": grid.tile_px,
        "patch_size_level0": grid.field0[0],
        "overlap": grid.overlap_px,
        "edge": grid.edge,
        "level0_width": info.width,
        "level0_height": info.height,
        "encoder": encoder.name if encoder else "",
        "encoder_weights": encoder.weights if encoder else "",
        "encoder_transform": encoder.transform if encoder else "",
        "min_tissue": grid.min_tissue,
        "tissue": json.dumps(grid.tissue_params, sort_keys=True),
        "medssl_version": medssl.__version__,
        **(more or {}),
    }


class FeatureWriter:
    """Writes one feature file; a context manager. Without `commit` by the end of the block, nothing appears.

    Args:
        path: The file; `path.part` exists while it is written.
        dim: D.
        attrs: Attributes, see `attributes`.
        dtype: `float16` or `float32`.
    """

    def __init__(self, path: Path, dim: int, attrs: Mapping[str, Any], *, dtype: str = "float32") -> None:
        if dtype not in DTYPES:
            raise RequestError(f"features of type {dtype!r}; {' or '.join(DTYPES)} are accepted")
        self.path, self.dim, self.attrs, self.dtype = Path(path), int(dim), dict(attrs), dtype
        self.part = self.path.with_name(self.path.name + ".part")
        self._file: Any = None

    def __enter__(self) -> FeatureWriter:
        h5py = _h5py()
        try:
            private_folder(self.path.parent)
            self._file = h5py.File(self.part, "w")
        except OSError as err:
            raise disk_error(err, self.path) from err
        # A chunk of no columns is not allowed; D = 0 is a grid without features.
        width = max(1, self.dim)
        self._file.create_dataset("features", (0, self.dim), self.dtype, maxshape=(None, self.dim), chunks=(_ROWS, width))
        self._file.create_dataset("coords", (0, 2), "int64", maxshape=(None, 2), chunks=(_ROWS, 2))
        return self

    def append(self, features: np.ndarray, coords: np.ndarray) -> None:
        """Add rows.

        Args:
            features: (B, D).
            coords: (B, 2) level-0 pixels.

        Raises:
            RequestError: Shapes that do not fit, or features that are not finite.
        """
        features, coords = np.asarray(features), np.asarray(coords)
        if features.shape != (len(coords), self.dim) or coords.shape[1:] != (2,):
            raise RequestError(f"features {features.shape} and coords {coords.shape}; (B, {self.dim}) and (B, 2) are needed")
        with np.errstate(over="ignore"):
            features = features.astype(self.dtype)
        if not np.isfinite(features).all():
            raise RequestError(f"features that are not finite in {self.dtype}; check the encoder, or write float32")
        start = len(self._file["coords"])
        for name, rows in (("features", features), ("coords", coords.astype(np.int64))):
            self._file[name].resize(start + len(rows), axis=0)
            self._file[name][start:] = rows

    def commit(self) -> Path:
        """Write attributes, flush to disk, and give the file its name.

        Raises:
            StoreError: The disk is full.
        """
        for name, value in self.attrs.items():
            self._file.attrs[name] = value
        for name in ("patch_size", "patch_size_level0", "overlap", "level0_width", "level0_height"):
            if name in self.attrs:
                self._file["coords"].attrs[name] = self.attrs[name]
        self._file["coords"].attrs["name"] = self.attrs.get("slide_id", "")
        try:
            self._file.close()
            self._file = None
            with open(self.part, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(self.part, self.path)
            _sync_folder(self.path.parent)
        except OSError as err:
            raise disk_error(err, self.path) from err
        return self.path

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        self.part.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Flush a rename to disk, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def write_features(
    path: Path, features: np.ndarray, coords: np.ndarray, attrs: Mapping[str, Any], *, dtype: str = "float32"
) -> Path:
    """Write a whole feature file.

    Args:
        path: The file.
        features: (N, D), N = 0 included.
        coords: (N, 2) level-0 pixels.
        attrs: Attributes.
        dtype: `float16` or `float32`.
    """
    with FeatureWriter(path, np.asarray(features).shape[1], attrs, dtype=dtype) as writer:
        writer.append(features, coords)
        return writer.commit()


@dataclass(frozen=True)
class Features:
    """A feature file, of ours, TRIDENT's or CLAM's.

    Args:
        features: (N, D), or (N, 0) in a file of coordinates.
        coords: (N, 2) int64 level-0 pixels.
        patch_size: Edge of a tile in its own pixels, or None.
        patch_size_level0: The same in level-0 pixels, or None when the file does not let it be known.
        overlap: In tile pixels.
        target_mpp: Scale of tiles; None in files that know magnification only.
        target_magnification: As stated by TRIDENT: a nominal number, never turned into mpp.
        slide_id: As stated.
        origin: `medssl`, `trident`, `clam` or `unknown`.
        attrs: All attributes.
    """

    features: np.ndarray
    coords: np.ndarray
    patch_size: int | None = None
    patch_size_level0: float | None = None
    overlap: int = 0
    target_mpp: float | None = None
    target_magnification: float | None = None
    slide_id: str = ""
    origin: str = "unknown"
    attrs: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.coords)


def read_features(path: Path) -> Features:
    """Read a feature file, or a file of coordinates, whoever wrote it.

    Raises:
        StoreError: It cannot be opened or holds no coordinates.
    """
    h5py = _h5py()
    try:
        with h5py.File(path, "r") as file:
            coords = np.asarray(file["coords"])
            features = np.asarray(file["features"]) if "features" in file else np.zeros((len(coords), 0), dtype=np.float32)
            attrs = {**_plain(file.attrs), **{k: v for k, v in _plain(file["coords"].attrs).items() if k not in file.attrs}}
    except (OSError, KeyError) as err:
        raise StoreError(f"{path}: {type(err).__name__}; a finished HDF5 file with `coords` is needed; write it again") from err
    features = features[0] if features.ndim == 3 and len(features) == 1 else features
    coords = coords.reshape(-1, 2).astype(np.int64)
    if len(features) != len(coords):
        raise StoreError(f"{path}: {len(features)} features for {len(coords)} coordinates; write it again")
    size = _number(attrs, "patch_size")
    return Features(
        features=features,
        coords=coords,
        patch_size=None if size is None else int(size),
        patch_size_level0=_size_level0(attrs, size),
        overlap=int(_number(attrs, "overlap") or 0),
        target_mpp=_number(attrs, "target_mpp"),
        target_magnification=_number(attrs, "target_magnification"),
        slide_id=str(attrs.get("slide_id") or attrs.get("name") or ""),
        origin=_origin(attrs),
        attrs=attrs,
    )


def read_shape(path: Path) -> tuple[int, int, str]:
    """Return how many features a file holds, how wide they are, and what made them as far as it says ("" when it does not).

    Raises:
        StoreError: It cannot be opened or holds no features.
    """
    h5py = _h5py()
    try:
        with h5py.File(path, "r") as file:
            shape = file["features"].shape
            maker = str(_plain(file.attrs).get("encoder") or "")
    except (OSError, KeyError) as err:
        raise StoreError(f"{path}: {type(err).__name__}; a finished HDF5 file with `features` is needed; write it again") from err
    return int(np.prod(shape[:-1])), int(shape[-1]), maker


def _size_level0(attrs: Mapping[str, Any], size: float | None) -> float | None:
    stated = _number(attrs, "patch_size_level0")
    if stated is not None or size is None:
        return stated
    # CLAM: pixels at `patch_level`, of which `downsample` is the factor; `custom_downsample` shrinks the tile after that.
    custom = _number(attrs, "custom_downsample") or 1.0
    if "downsample" in attrs:
        return size * float(np.ravel(attrs["downsample"])[0]) * custom
    return size * custom if _number(attrs, "patch_level") == 0 else None


def _origin(attrs: Mapping[str, Any]) -> str:
    if "schema" in attrs and "medssl_version" in attrs:
        return "medssl"
    if "patch_size_level0" in attrs:
        return "trident"
    return "clam" if "patch_level" in attrs else "unknown"


def _number(attrs: Mapping[str, Any], name: str) -> float | None:
    try:
        value = float(np.ravel(attrs[name])[0])
    except (KeyError, TypeError, ValueError, IndexError):
        return None
    return value if math.isfinite(value) else None


def _plain(attrs: Any) -> dict[str, Any]:
    return {name: value.decode(errors="replace") if isinstance(value, bytes) else value for name, value in attrs.items()}


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as err:
        raise missing_extra("h5py") from err
    return h5py


def encode_slide(
    tiles: Tiles,
    encoder: PatchEncoder,
    path: Path,
    *,
    slide_id: str,
    batch: int = 64,
    workers: int = 0,
    context: str | None = None,
    dtype: str = "float16",
    force: bool = False,
) -> dict[str, Any]:
    """Encode all tiles of a slide into one feature file.

    Args:
        tiles: The tiles.
        encoder: What encodes them.
        path: The feature file.
        slide_id: Series id.
        batch: Tiles per call of the encoder.
        workers: Processes that read tiles.
        context: How they start, see `tile_loader`.
        dtype: Of the file.
        force: Take tiles that the encoder was not made for.

    Returns:
        Facts for the run state: `tiles`, `bad_tiles`, `single_level`, `bytes`.

    Raises:
        ImageError: More than a hundredth of the tiles cannot be decoded; no file is left.
    """
    import torch

    check_encoder(encoder, tiles.grid, force=force)
    bad = BadTiles(tiles.slide.name, len(tiles))
    attrs = attributes(tiles.slide, tiles.grid, slide_id=slide_id, encoder=encoder)
    with FeatureWriter(path, encoder.dim, attrs, dtype=dtype) as writer:
        for part in tile_loader(tiles, batch=batch, workers=workers, context=context) if len(tiles) else ():
            bad.add(int((~part["ok"]).sum()))
            with torch.inference_mode():
                rows = encoder.encode(part["image"])
            writer.append(rows.detach().float().cpu().numpy(), part["coords"].numpy())
        writer.attrs["bad_tiles"] = bad.bad
        writer.commit()
    return {
        "tiles": len(tiles),
        "bad_tiles": bad.bad,
        # Without a pyramid, coarse tiles are read from the finest level: about five times slower, which a report should show.
        "single_level": len(tiles.slide.info.level_dimensions) == 1,
        "bytes": path.stat().st_size,
    }


class Bags:
    """Bags of features for multiple-instance learning: a map-style data set with bags of one length, padded, with a mask.

    Args:
        files: One feature file per slide, or None where it is missing.
        labels: One per slide, or None.
        tokens: Length of a bag: that many features are drawn without replacement; fewer are padded with zeros.
        seed: Seed of the draw; `set_epoch` changes it.
    """

    def __init__(
        self, files: list[Path | None], labels: list[int | float] | None = None, *, tokens: int = 1024, seed: int = 0
    ) -> None:
        if labels is not None and len(labels) != len(files):
            raise RequestError(f"{len(labels)} labels for {len(files)} feature files; one each is needed")
        self.files, self.labels, self.tokens, self.seed, self.epoch = files, labels, tokens, seed, 0

    def __len__(self) -> int:
        return len(self.files)

    def set_epoch(self, epoch: int) -> None:
        """Draw other features in the next pass."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return features (tokens, D), coords (tokens, 2), valid (tokens,) bool, True = a real feature, and the label.

        A missing file is a bag without valid features; its D is 0 unless another file of the set tells it.
        """
        from medssl.seeding import counter_rng

        path = self.files[index]
        found = None if path is None else read_features(path)
        dim = self._dim() if found is None else found.features.shape[1]
        out: dict[str, Any] = {
            "features": np.zeros((self.tokens, dim), dtype=np.float32),
            "coords": np.zeros((self.tokens, 2), dtype=np.int64),
            "valid": np.zeros(self.tokens, dtype=bool),
        }
        if found is not None and len(found):
            rows = np.arange(len(found))
            if len(rows) > self.tokens:
                rng = counter_rng(self.seed, self.epoch, index)
                rows = np.sort(rng.choice(len(rows), self.tokens, replace=False))
            n = len(rows)
            out["features"][:n], out["coords"][:n], out["valid"][:n] = found.features[rows], found.coords[rows], True
        if self.labels is not None:
            out["label"] = self.labels[index]
        return out

    def _dim(self) -> int:
        first = next((path for path in self.files if path is not None), None)
        return 0 if first is None else int(read_features(first).features.shape[1])
