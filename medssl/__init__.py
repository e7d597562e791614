"""medssl: self-supervised pretraining for medical images, from an archive of files to weights that load into MONAI.

The Python API mirrors the command line. Names load on first use, so that `import medssl` stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from medssl.archive.index import index
    from medssl.build import load_encoder, pretrain
    from medssl.recipe import Recipe

__all__ = ["Recipe", "__version__", "index", "load_encoder", "pretrain"]

_HOME = {
    "index": "medssl.archive.index",
    "pretrain": "medssl.build",
    "load_encoder": "medssl.build",
    "Recipe": "medssl.recipe",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'medssl' has no attribute {name!r}; it has {', '.join(__all__)}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
