"""Name -> class tables. Adding an encoder, objective, domain, task network or matcher is one line here.

An entry is "module:Class", imported on first use so that `import medssl` stays cheap. A recipe may also name an outside class by an
import path with a colon ("mypackage.encoders:MyEncoder"); `medssl.testing` checks such a plug-in in one line.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from medssl.errors import RegistryError, near, near_or_all

ENCODERS: dict[str, str] = {
    "vit3d": "medssl.encoders.vit3d:ViT3D",
    "segresnet3d": "medssl.encoders.segresnet3d:SegResNet3D",
    "swin3d": "medssl.encoders.swin3d:Swin3D",
    "resenc3d": "medssl.encoders.resenc3d:ResEnc3D",
    "image2d": "medssl.encoders.image2d:Image2D",
    "slice_volume": "medssl.encoders.slice_volume:SliceVolumeEncoder",
    "video_vit": "medssl.encoders.video_vit:VideoViT",
}
OBJECTIVES: dict[str, str] = {
    "mae": "medssl.objectives.mae:MAE",
    "mae_cnn": "medssl.objectives.mae_cnn:MAECNN",
    "alice": "medssl.objectives.alice:Alice",
    "intra_inter_clustering": "medssl.objectives.intra_inter_clustering:IntraInterClustering",
    "graph_matching": "medssl.objectives.graph_matching:GraphMatching",
    "global_local_contrast": "medssl.objectives.global_local_contrast:GlobalLocalContrast",
    "anatomical_embedding": "medssl.objectives.anatomical_embedding:AnatomicalEmbedding",
    "cluster_distillation": "medssl.objectives.cluster_distillation:ClusterDistillation",
    "video_mae": "medssl.objectives.video_mae:VideoMAE",
    "relative_speed": "medssl.objectives.relative_speed:RelativeSpeed",
}
MATCHERS: dict[str, str] = {
    "embedding": "medssl.matching.embedding:EmbeddingMatcher",
    "affine": "medssl.matching.affine:AffineMatcher",
    "body_axis": "medssl.matching.body_axis:BodyAxisMatcher",
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
    "swin_unetr": "medssl.networks.segmentation:build_swin_unetr",
    "resenc_unet": "medssl.networks.segmentation:build_resenc_unet",
    "pyramid": "medssl.networks.pyramid_segmentation:build_pyramid",
    "flexible_unet": "medssl.networks.flexible_unet:build_flexible_unet",
}
TABLES: dict[str, dict[str, str]] = {
    "encoder": ENCODERS,
    "objective": OBJECTIVES,
    "domain": DOMAINS,
    "network": NETWORKS,
    "matcher": MATCHERS,
}


def lookup(kind: str, name: str) -> Any:
    """Return the class or function registered for a name.

    Args:
        kind: `encoder`, `objective`, `domain`, `network` or `matcher`.
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


def argument_faults(path: str, target: Any, args: Mapping[str, Any], given: Iterable[str] = ()) -> list[str]:
    """Compare the arguments of a component with the signature of its constructor.

    Args:
        path: Dotted path of the component in the recipe.
        target: Class or function.
        args: What the recipe gives.
        given: What the builder gives.
    """
    parameters = inspect.signature(target).parameters
    accepted = [name for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD and name not in ("self", *given)]
    faults = [f"{path}.{name}: unknown key{near_or_all(name, accepted)}" for name in args if name not in accepted]
    needed = [name for name in accepted if parameters[name].default is inspect.Parameter.empty]
    return faults + [f"{path}.{name}: required and missing" for name in needed if name not in args]


def component_faults(path: str, kind: str, component: Any, given: Iterable[str] = ()) -> list[str]:
    """Check the name and the arguments of a registered component (anything with `name` and `args`)."""
    try:
        target = lookup(kind, component.name)
    except RegistryError as err:
        return [f"{path}.name: {err}"]
    return argument_faults(path, target, component.args, given)
