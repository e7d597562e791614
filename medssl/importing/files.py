"""Opening a file of tensors that others wrote: safetensors, or a pickle that torch reads with `weights_only=True`."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medssl.errors import WeightsError

# where a checkpoint keeps its tensors, the first one found is taken: an average over steps before what was averaged, a teacher before its student
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
WRAPPERS = ("network_weights", *AVERAGED, "state_dict", "model_state_dict", "model", "teacher", "student", "net")
_WRAPPED = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")
MAX_DEPTH = 3


@dataclass
class Opened:
    """What a file holds.

    Args:
        tensors: By name, without what wrappers (DDP, FSDP, compile) put before names.
        inside: Keys that led to them, outermost first.
        content: Everything at the top level of the file but the tensors.
        config: `config.json` beside the file, as timm and the Hugging Face hub write it; empty where there is none.
        sha256: Of the file.
    """

    tensors: dict[str, Tensor]
    inside: tuple[str, ...] = ()
    content: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""


def read_tensors(path: Path) -> Opened:
    """Read a file.

    Raises:
        WeightsError: It is absent, damaged, holds objects other than tensors and plain values, or no tensors at all. Its content is
            not quoted, and nothing in it was run.
    """
    if not path.is_file():
        raise WeightsError(f"{path} is no file; give the file of the weights (.safetensors, .pt, .pth, .ckpt, .bin)")
    content = _safetensors(path) if path.suffix == ".safetensors" else _pickle(path)
    tensors, inside = _tensors(content)
    if not tensors:
        raise WeightsError(
            f"{path} holds no tensors by name; accepted: a state dict, or one under {', '.join(WRAPPERS)}; save the network's "
            "state_dict() with torch.save in the project that made it"
        )
    named = _plain_names(tensors)
    broken = [key for key, value in named.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if broken:
        raise WeightsError(f"{path}: {len(broken)} tensors hold NaN or infinity, first {broken[0]}; choose another checkpoint")
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    top = {key: value for key, value in content.items() if not isinstance(value, Tensor) and key not in inside}
    return Opened(named, inside, top, _config(path.with_name("config.json")), digest)


def _safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as err:
        raise _unreadable(path, err) from err


def _pickle(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as err:
        raise WeightsError(
            f"{path} holds objects or code besides tensors and plain values, and was not opened; accepted is what "
            "torch.load(weights_only=True) takes; save the network's state_dict() alone in the project that made it"
        ) from err
    except (
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as err:  # what any other file looks like
        raise _unreadable(path, err) from err
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors; save the network's state_dict()")
    return {str(key): value for key, value in content.items()}


def _unreadable(path: Path, err: Exception) -> WeightsError:
    return WeightsError(f"{path} cannot be read ({type(err).__name__}): it is cut short or no file of weights; copy it again")


def _tensors(content: Mapping[str, Any]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    inside: list[str] = []
    for _ in range(MAX_DEPTH):
        below = [key for key in WRAPPERS if isinstance(content.get(key), Mapping)]
        if not below:
            break
        inside.append(below[0])
        content = content[below[0]]
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}, tuple(inside)


def _plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = {_WRAPPED.sub("", key): value for key, value in tensors.items()}
    while all(key.startswith("module.") for key in named):
        named = {key.removeprefix("module."): value for key, value in named.items()}
    return named


def _config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
