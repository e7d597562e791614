"""Image libraries quote file content and paths in warnings and logs, which end on stderr; none of it may be shown.

pydicom names a bad character set or value, tifffile the file. Can go when each of them offers messages without content.
"""

from __future__ import annotations

import logging
import warnings

LIBRARIES = (
    "pydicom",
    "nibabel",
    "SimpleITK",
    "tifffile",
    "PIL",
    "imagecodecs",
    "openslide",
    "wsidicom",
    "highdicom",
    "libav",
    "pylibjpeg",
)


def silence_libraries() -> None:
    """Show no warning and no log line of an image library in this process; worker processes need a call of their own."""
    warnings.filterwarnings("ignore", module="|".join(LIBRARIES))
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.CRITICAL)
