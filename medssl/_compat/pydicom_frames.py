"""pydicom 3: `Decoder.iter_array` reads uncompressed YBR_FULL_422 rightly in its first frame alone.

After that frame it takes the colour model of its output (RGB, three bytes a pixel) for that of the file (two), so all later frames start at
wrong bytes. `tests/compat/test_pydicom_frames.py` shows when this can go.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np


def decoded_frames(decoder: Any, header: Any, indices: Sequence[int]) -> Iterator[np.ndarray]:
    """Yield the frames of a data set in the order of `indices`, as `decoder.iter_array` should."""
    if decoder.is_native and str(header.PhotometricInterpretation) == "YBR_FULL_422":
        for index in indices:
            yield decoder.as_array(header, index=index, correct_unused_bits=False)[0]
        return
    for frame, _ in decoder.iter_array(header, indices=list(indices), correct_unused_bits=False):
        yield frame
