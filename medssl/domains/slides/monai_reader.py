"""Let a slide feed `monai.data.PatchWSIDataset`: `PatchWSIDataset(data, patch_size=256, reader=SlideReader(), level=0)`.

MONAI asks for levels; the levels are the file's own. Readers of MONAI guess a scale where a file states none; this one refuses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.data.wsi_reader import BaseWSIReader

from medssl.domains.slides.slide import Slide
from medssl.errors import RequestError


class SlideReader(BaseWSIReader):  # type: ignore[misc]
    """A MONAI reader on top of `Slide`.

    Args:
        slide_options: Arguments of `Slide`, for instance `mpp` or `backend`.
        kwargs: Arguments of MONAI's base class: `level`, `mpp`, `power`, `channel_dim`, `dtype`.
    """

    supported_suffixes = ("svs", "tif", "tiff", "ndpi", "mrxs", "scn", "bif", "svslide", "dcm", "png", "jpg", "jpeg")
    backend = "medssl"

    def __init__(self, slide_options: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.slide_options = dict(slide_options or {})

    def read(self, data: Sequence[str | Path] | str | Path, **kwargs: Any) -> Any:
        """Return a `Slide`, or a list of them for several paths."""
        paths = [data] if isinstance(data, str | Path) else list(data)
        found = [Slide(path, **{**self.slide_options, **kwargs}) for path in paths]
        return found if len(found) > 1 else found[0]

    def get_level_count(self, wsi: Slide) -> int:
        """Return the number of levels."""
        return len(wsi.info.level_dimensions)

    def get_size(self, wsi: Slide, level: int) -> tuple[int, int]:
        """Return (height, width) of a level."""
        width, height = wsi.info.level_dimensions[level]
        return height, width

    def get_downsample_ratio(self, wsi: Slide, level: int) -> float:
        """Return the downsample of a level."""
        return wsi.info.level_downsamples[level]

    def get_file_path(self, wsi: Slide) -> str:
        """Return the path, which MONAI keeps in the metadata of each patch."""
        return str(wsi.path)

    def get_mpp(self, wsi: Slide, level: int) -> tuple[float, float]:
        """Return micrometres per pixel of a level between rows and between columns."""
        factor = self.get_downsample_ratio(wsi, level)
        return wsi.info.mpp_y * factor, wsi.info.mpp_x * factor

    def get_power(self, wsi: Slide, level: int) -> float:
        """Return the objective's power at a level.

        Raises:
            RequestError: The slide does not state it.
        """
        if wsi.info.objective is None:
            raise RequestError(f"{wsi.name} does not state the power of its objective; ask for mpp or level instead")
        return wsi.info.objective / self.get_downsample_ratio(wsi, level)

    def _get_patch(
        self, wsi: Slide, location: tuple[int, int], size: tuple[int, int], level: int, dtype: Any, mode: str
    ) -> np.ndarray:
        """Return a patch at a level; `location` (row, column) is in level-0 pixels, `size` is (height, width)."""
        if mode != "RGB":
            raise RequestError(f"patches of mode {mode}; slides are read as RGB")
        factor = self.get_downsample_ratio(wsi, level)
        # Both axes have one downsample but may have two scales: reading by the level keeps its pixels.
        pixels = wsi.read_level(level, location[1] / factor, location[0] / factor, (size[1], size[0])).image
        return np.moveaxis(pixels, -1, self.channel_dim).astype(dtype)
