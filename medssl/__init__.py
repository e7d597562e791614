"""medssl: self-supervised pretraining for medical images, from an archive of files to weights that load into MONAI.

The Python API mirrors the command line. Names load on first use, so that `import medssl` stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from medssl.api import cache, evaluate, finetune, index, label_curve, pretrain
    from medssl.build import load_encoder
    from medssl.correspondence import embed, match
    from medssl.export.write import export_weights
    from medssl.importing.write import import_weights
    from medssl.recipe import Recipe

_HOME = {
    "Recipe": "medssl.recipe",
    "cache": "medssl.api",
    "embed": "medssl.correspondence",
    "evaluate": "medssl.api",
    "export_weights": "medssl.export.write",
    "finetune": "medssl.api",
    "import_weights": "medssl.importing.write",
    "index": "medssl.api",
    "label_curve": "medssl.api",
    "load_encoder": "medssl.build",
    "match": "medssl.correspondence",
    "pretrain": "medssl.api",
}

__all__ = [
    "Recipe",
    "__version__",
    "cache",
    "embed",
    "evaluate",
    "export_weights",
    "finetune",
    "import_weights",
    "index",
    "label_curve",
    "load_encoder",
    "match",
    "pretrain",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'medssl' has no attribute {name!r}; it has {', '.join(__all__)}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
