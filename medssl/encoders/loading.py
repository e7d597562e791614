"""Loading saved tensors back into an encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from medssl.encoders.base import Encoder
from medssl.errors import WeightsError
from medssl.layers.pos_embed import resize_positions

POSITIONS = "patch_embedding.position_embeddings"


DRAWS = (
    *(Tensor.uniform_, Tensor.normal_, Tensor.erfinv_),  # a truncated normal is made of the first and the third
    *(nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_),  # those of torch.nn.init that the mode sees before their tensor
)


class NoRandomStart(TorchFunctionMode):
    """Within this context networks are built without drawing start weights, which takes longer than reading the real ones.

    What would have been drawn is left as the memory is: load tensors over it, and ask `unfilled` whether any remain.
    """

    def __init__(self) -> None:
        super().__init__()
        self.skipped: list[Tensor] = []  # kept, so that their memory is not given to other tensors

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Leave out the draws and do everything else."""
        given = dict(kwargs or {})
        if func in DRAWS:
            tensor: Tensor = args[0] if args else given["tensor"]
            self.skipped.append(tensor)
            return tensor
        return func(*args, **given)

    def unfilled(self, encoder: nn.Module, state: Mapping[str, Tensor]) -> bool:
        """Whether a tensor of the encoder was to be drawn and is not in the state that was loaded into `encoder.net`."""
        places = {tensor.untyped_storage().data_ptr() for tensor in self.skipped}
        tensors = {**dict(encoder.named_parameters()), **dict(encoder.named_buffers())}
        return any(
            tensor.untyped_storage().data_ptr() in places and name.removeprefix("net.") not in state
            for name, tensor in tensors.items()
        )


def refuse_foreign(manifest: Mapping[str, Any], parts: Iterable[str]) -> None:
    """Raise WeightsError at an export whose tensors have the names of another library.

    Args:
        manifest: Manifest of the weights.
        parts: Parts that the encoder loads, its `key_groups`.
    """
    to = dict(manifest.get("export") or {}).get("to")
    if to is not None and manifest["part"] not in parts and manifest["part"] not in ("decoder", "aggregator"):
        raise WeightsError(
            f"these weights are an export to {to}, under the names that {to} asks for; medssl takes the run folder that they were exported "
            "from, or an export to safetensors, unetr, segresnet or swin-unetr; or bring this file in with `medssl import`"
        )


def load_into(encoder: Encoder, state: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> None:
    """Load the tensors of a part into `encoder.net`, strictly but for what the part does not hold (a decoder).

    Args:
        encoder: Built from the manifest, possibly with another `image_size`.
        state: Tensors of the part.
        manifest: Its manifest.

    Raises:
        WeightsError: The part is none that the encoder loads, or a tensor is missing, unknown or of another shape; nothing has been
            loaded then.
    """
    refuse_foreign(manifest, encoder.key_groups)
    if manifest["part"] not in encoder.key_groups:
        raise WeightsError(
            f"these weights are the part {manifest['part']}, and {encoder.name} loads {', '.join(encoder.key_groups)}; "
            "give the path of one of these, or build the module that the part belongs to and load its tensors into that"
        )
    own = encoder.net.state_dict()
    given = dict(state)
    if POSITIONS in given and given[POSITIONS].shape != own[POSITIONS].shape:
        old = [n // p for n, p in zip(manifest["encoder"]["args"]["image_size"], encoder.patch_size)]
        new = [n // p for n, p in zip(encoder.config()["args"]["image_size"], encoder.patch_size)]
        given[POSITIONS] = resize_positions(given[POSITIONS], old, new)
    group = tuple(encoder.key_groups[manifest["part"]])
    wanted = {name for name in own if name.startswith(group)}
    faults = [f"missing {name}" for name in sorted(wanted - given.keys())]
    faults += [f"unexpected {name}" for name in sorted(given.keys() - own.keys())]
    faults += [
        f"{name} has shape {tuple(given[name].shape)}, expected {tuple(own[name].shape)}"
        for name in sorted(given.keys() & own.keys())
        if given[name].shape != own[name].shape
    ]
    if faults:
        raise WeightsError(
            f"weights of {manifest['encoder']['name']} do not fit {encoder.name}: {len(faults)} fault(s), first {faults[0]}; "
            "build the encoder with the arguments in the manifest"
        )
    encoder.net.load_state_dict(given, strict=False)
