"""Name -> class tables. Adding an encoder, objective, domain or task network is one line here.

An entry is "module:Class", imported on first use so that `import medssl` stays cheap. A recipe may also name an outside class by an
import path with a colon ("mypackage.encoders:MyEncoder"); `medssl.testing` checks such a plug-in in one line.
"""

from __future__ import annotations

import importlib
from typing import Any

from medssl.errors import RegistryError, near

ENCODERS: dict[str, str] = {
    "vit3d": "medssl.encoders.vit3d:ViT3D",
    "segresnet3d": "medssl.encoders.segresnet3d:SegResNet3D",
}
OBJECTIVES: dict[str, str] = {
    "mae": "medssl.objectives.mae:MAE",
    "mae_cnn": "medssl.objectives.mae_cnn:MAECNN",
    "intra_inter_clustering": "medssl.objectives.intra_inter_clustering:IntraInterClustering",
    "graph_matching": "medssl.objectives.graph_matching:GraphMatching",
    "global_local_contrast": "medssl.objectives.global_local_contrast:GlobalLocalContrast",
}
DOMAINS: dict[str, str] = {
    "mri": "medssl.domains.mri:MRI",
    "ct": "medssl.domains.ct:CT",
    "wsi": "medssl.domains.wsi:WSI",
    "xray": "medssl.domains.xray:XRay",
    "ultrasound": "medssl.domains.ultrasound:Ultrasound",
    "microscopy": "medssl.domains.microscopy:Microscopy",
}
NETWORKS: dict[str, str] = {
    "unetr": "medssl.networks.segmentation:build_unetr",
    "segresnet": "medssl.networks.segmentation:build_segresnet",
}
TABLES: dict[str, dict[str, str]] = {
    "encoder": ENCODERS,
    "objective": OBJECTIVES,
    "domain": DOMAINS,
    "network": NETWORKS,
}


def lookup(kind: str, name: str) -> Any:
    """Return the class or function registered for a name.

    Args:
        kind: `encoder`, `objective`, `domain` or `network`.
        name: A registered name, or an import path "module:Class".

    Raises:
        RegistryError: The name is unknown; near matches are listed.
    """
    table = TABLES[kind]
    target = table.get(name, name)
    if ":" not in target:
        raise RegistryError(f'unknown {kind} "{name}"{near(name, table)}; known: {", ".join(sorted(table))}')
    module, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as err:
        raise RegistryError(f'{kind} "{name}": cannot import {target} ({err}); check the import path') from err
