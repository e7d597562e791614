"""Whole-slide images at an exact scale: regions as samples, and grids of tiles for what is too large to be one.

Magnification is not resolution: everything goes by micrometres per pixel, in floats. A slide that does not state them, and for which
the user gives none, is refused. Label and overview images may show a name and are never read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medssl.domains.base import named
from medssl.domains.slides.grid import MIN_TISSUE, TileGrid, make_grid
from medssl.domains.slides.slide import Region, Slide, read_mpp_table
from medssl.domains.slides.tiles import Tiles
from medssl.domains.slides.tissue import TissueMask, find_tissue, saturation_of, tissue_params
from medssl.domains.statistics import intensity_stats, rounded
from medssl.errors import ImageError, RequestError
from medssl.types import ImageMeta, Sample

SERIES_ID = re.compile("[0-9a-f]{32}")
MAX_PIXELS = 64_000_000
"""Of a sample that is one region, in pixels at `mpp`: 8,000 x 8,000, 192 MB."""


class WSI:
    """Reads regions of slides, and lays grids of tiles over them.

    Args:
        mpp: Micrometres per pixel of samples and tiles.
        slide_mpp: Of level 0, for slides that state a wrong one or none.
        mpp_csv: CSV with the columns `slide` (series id) and `mpp`, or such a table as a mapping; wins over `slide_mpp`, which
            wins over the file. Names of files are refused here: they would end in the store's manifest.
        tissue: Preset (`tcga`, `biopsy`, `resection`, `otsu`, `none`) or a mapping, see `slides.tissue.TissueParams`.
        tile_px: Edge of a tile.
        overlap_px: Pixels that neighbouring tiles share.
        min_tissue: Smallest tissue share of a tile; 0 keeps whatever tissue touches.
        edge: `drop` tiles that reach beyond the slide, or `pad` them with white.
        backend: `auto`, `openslide`, `tifffile` or `pillow`.
        icc: Convert colours to sRGB where the slide has an ICC profile.
        max_pixels: Largest region that is read as one sample.
    """

    name = "wsi"
    version = 1
    kinds = ("image",)

    def __init__(
        self,
        mpp: float = 0.5,
        slide_mpp: float | None = None,
        mpp_csv: str | Path | Mapping[str, float] | None = None,
        tissue: str | Mapping[str, Any] = "tcga",
        tile_px: int = 256,
        overlap_px: int = 0,
        min_tissue: float = MIN_TISSUE,
        edge: str = "drop",
        backend: str = "auto",
        icc: bool = False,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        if not 0.05 < mpp <= 100:
            raise RequestError(f"wsi: mpp {mpp:g}; micrometres per pixel above 0.05 up to 100 are accepted")
        self.mpp, self.slide_mpp = float(mpp), slide_mpp
        self.mpp_table = (
            dict(mpp_csv) if isinstance(mpp_csv, Mapping) else ({} if mpp_csv is None else read_mpp_table(Path(mpp_csv)))
        )
        if not all(SERIES_ID.fullmatch(key) for key in self.mpp_table):
            raise RequestError("wsi: mpp_csv names slides that are no series ids (32 hex digits); `medssl archive ls` lists them")
        self.tissue_params = tissue_params(tissue)
        self._tissue = tissue
        self.tile_px, self.overlap_px, self.min_tissue, self.edge = tile_px, overlap_px, min_tissue, edge
        self.backend, self.icc, self.max_pixels = backend, icc, max_pixels

    def params(self) -> dict[str, Any]:
        """Return the arguments that decide about pixels; a table is returned as such, without the name of its file."""
        return {
            "mpp": self.mpp,
            "slide_mpp": self.slide_mpp,
            "mpp_csv": dict(sorted(self.mpp_table.items())) or None,
            "tissue": self._tissue if isinstance(self._tissue, str) else dict(self._tissue),
            "backend": self.backend,
            "icc": self.icc,
        }

    def slide(self, files: Sequence[Path], *, series_id: str = "") -> Slide:
        """Return the slide that these files are; it opens when it is read.

        Args:
            files: As `Archive.files` gives them: one file, or those of a DICOM or MIRAX slide, of which any opens the whole.
            series_id: Its pseudonymous id.
        """
        if not files:
            raise ImageError("vanished", "no file was given; name the files of one slide")
        # Of a MIRAX slide only the .mrxs opens; DICOM files are equal, and the first will do.
        path = next((path for path in files if Path(path).suffix.lower() in (".mrxs", ".vms", ".vmu")), files[0])
        return Slide(path, mpp=self.slide_mpp, mpp_table=self.mpp_table, backend=self.backend, icc=self.icc, slide_id=series_id)

    def read(self, files: Sequence[Path], *, series_id: str, part: Mapping[str, Any] | None = None) -> Sample:
        """Read a region.

        Args:
            files: Files of one slide.
            series_id: Its pseudonymous id.
            part: `{"box": [x, y, width, height]}` in level-0 pixels; None is the whole slide, where it is small enough. The result
                has round(width / s) columns, s being `mpp` over that of level 0, and covers as many level-0 pixels as they span.

        Returns:
            image (3, H, W) uint8, spacing_mm (mpp / 1000, mpp / 1000).

        Raises:
            ImageError: `too_large`, `no_spacing`, `unreadable` and others of opening.
        """
        try:
            slide = self.slide(files, series_id=series_id)
            x, y, width, height = self._box(slide, part)
            region = slide.read(x, y, (width, height), self.mpp)
        except ImageError as err:
            raise named(err, series_id) if series_id not in str(err) else err from err
        return self._sample(slide, region, series_id)

    def _box(self, slide: Slide, part: Mapping[str, Any] | None) -> tuple[float, float, int, int]:
        sx, sy = slide.scale(self.mpp)
        box = [0, 0, slide.info.width, slide.info.height]
        if part is not None:
            if set(part) != {"box"} or len(part["box"]) != 4:
                raise ImageError(
                    "unsupported_format",
                    f"a part of the kind {'/'.join(sorted(part))}; slides have parts by box, [x, y, width, height] in level-0 pixels; "
                    "label and overview images may show a name and are not read",
                )
            box = list(part["box"])
        x, y, width, height = (float(value) for value in box)
        columns, rows = round(width / sx), round(height / sy)
        if columns < 1 or rows < 1 or x >= slide.info.width or y >= slide.info.height or x + width <= 0 or y + height <= 0:
            raise ImageError(
                "geometry", f"a box of {columns}x{rows} pixels at {self.mpp:g} um/px outside the slide; give one inside"
            )
        if columns * rows > self.max_pixels:
            raise ImageError(
                "too_large",
                f"{columns}x{rows} pixels at {self.mpp:g} um/px; at most {self.max_pixels / 1e6:g} million are read as one sample; read "
                'tiles (WSI.grid and WSI.tiles), a part {"box": [x, y, width, height]}, or a coarser mpp',
            )
        return x, y, columns, rows

    def _sample(self, slide: Slide, region: Region, series_id: str) -> Sample:
        image = np.ascontiguousarray(region.image.transpose(2, 0, 1))
        valid = region.valid
        if valid is not None and not valid.any():
            raise ImageError("no_finite_voxels", f"series {series_id}: nothing was scanned in this box; give another one")
        mask = self._foreground(region.image, valid)
        stats = dict(intensity_stats(image, np.broadcast_to(mask, image.shape), _broadcast(valid, image.shape)))
        for k, channel in enumerate(image):
            found = intensity_stats(channel[None], mask[None], None if valid is None else valid[None])
            stats |= {f"{name}_{k}": value for name, value in found.items() if name != "foreground_fraction"}
        info = slide.info
        flags = {"objective": ["mpp_estimated"], "user": ["mpp_user"], "user_table": ["mpp_user"]}.get(info.mpp_source, [])
        if len(info.level_dimensions) == 1:
            flags = [*flags, "single_level"]
        meta = ImageMeta(
            series_id=series_id,
            domain=self.name,
            modality="SM",
            stats=rounded(stats),
            flags=tuple(flags),
            kind="image",
            channels=("red", "green", "blue"),
            facts={
                "mpp0_x": info.mpp_x,
                "mpp0_y": info.mpp_y,
                "mpp_source": info.mpp_source,
                "vendor": info.vendor,
                "backend": info.backend,
                "native": region.native,
            },
        )
        return Sample(image, (self.mpp / 1000, self.mpp / 1000), None, valid, meta)

    def foreground(self, sample: Sample) -> np.ndarray:
        """Return stained pixels (H, W) bool: saturation above the preset's threshold; everything valid where there are none."""
        return self._foreground(sample.image.transpose(1, 2, 0), sample.valid)

    def _foreground(self, image: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
        mask: np.ndarray = saturation_of(image) > self.tissue_params.saturation
        if valid is not None:
            mask &= valid
        if mask.any() and self.tissue_params.method != "none":
            return mask
        return np.ones(image.shape[:2], dtype=bool) if valid is None else valid

    def tissue(self, files: Sequence[Path], *, series_id: str = "") -> TissueMask:
        """Find tissue on a slide; a slide without any has the status `empty_tissue`."""
        return find_tissue(self.slide(files, series_id=series_id), self.tissue_params)

    def grid(self, files: Sequence[Path], *, series_id: str = "", tissue: TissueMask | None = None) -> TileGrid:
        """Lay a grid of tiles over the tissue of a slide.

        Args:
            files: Files of one slide.
            series_id: Its pseudonymous id.
            tissue: A mask of one's own; None finds it.
        """
        slide = self.slide(files, series_id=series_id)
        return make_grid(
            slide,
            mpp=self.mpp,
            tile_px=self.tile_px,
            overlap_px=self.overlap_px,
            tissue=find_tissue(slide, self.tissue_params) if tissue is None else tissue,
            min_tissue=self.min_tissue,
            edge=self.edge,
        )

    def tiles(self, files: Sequence[Path], grid: TileGrid, *, series_id: str = "") -> Tiles:
        """Return the tiles of a grid, to iterate or to give to `torch.utils.data.DataLoader` (see `slides.tiles.tile_loader`)."""
        return Tiles(self.slide(files, series_id=series_id), grid)


def _broadcast(valid: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray | None:
    return None if valid is None else np.broadcast_to(valid, shape)
