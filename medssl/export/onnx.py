"""The encoder as an ONNX graph: a whole image in, tokens and the pooled vector out; run again by onnxruntime before it counts."""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from medssl.errors import RequestError, WeightsError
from medssl.export.manifest import UNKNOWN, Weights, exported_manifest, is_unknown
from medssl.export.slices import JOINT, slice_encoder_of
from medssl.export.verify import ExportReport, compare, random_image, source_encoder
from medssl.weights import write_atomic

NAME = "encoder"
OPSET = 18  # the oldest that torch's exporter writes without converting
TOLERANCE = 1e-4  # float32 by another library; of the largest feature where that is above 1
LARGEST = 2**31 - 2**20  # bytes: a protobuf message holds less than 2 GiB, and the graph needs some
NEEDED = ("onnx", "onnxscript", "onnxruntime")
USE = "Research only. Not for diagnostic use."
ANY_SIZE = ("monai.SegResNet", "dynamic_network_architectures.ResidualEncoderUNet", "timm")
FACTS = (
    *("axis_order", "token_order", "intensity", "spacing_mm", "spacing_source", "channels", "patch_size", "image_size", "clip"),
    *("domains", "licence", "weights_hash"),
)


class Graph(nn.Module):
    """What is traced: `forward_features` of a whole image, without masks, dropped tokens or validity.

    Args:
        encoder: Any encoder of images, volumes or clips.
    """

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens (B, N, E) and pooled (B, E) of images (B, C, *size)."""
        output = self.encoder.forward_features(image)
        return output.tokens, output.pooled


def write(folder: Path, weights: Weights) -> ExportReport:
    """Write `encoder.onnx` and `encoder.json`; run the file with onnxruntime on other batches (and sizes) than it was traced with.

    Args:
        folder: Existing, empty.
        weights: Of any encoder; of a joint encoder the slice encoder is taken.

    Raises:
        RequestError: The extra `onnx` is not installed.
        WeightsError: The encoder cannot be traced, is too large for one file, or onnxruntime gives other features.
    """
    require_packages()
    if weights.manifest["library"] == JOINT or weights.manifest["part"] == "aggregator":
        weights = slice_encoder_of(weights, "onnx")
    encoder = source_encoder(weights).float()
    size = traced_size(encoder, weights)
    axes, notes = [0], [f"only whole images: masks and dropped tokens are not in the graph; traced at {_by(size)}"]
    path = folder / f"{NAME}.onnx"
    traced = None
    if weights.manifest["library"] in ANY_SIZE and getattr(encoder, "only_size", None) is None:
        try:
            traced = trace(encoder, size, [0, *range(2, 2 + len(size))])
            axes = [0, *range(2, 2 + len(size))]
        except WeightsError:
            notes.append("the graph of this network depends on the size of the image, so the size is fixed; the batch is free")
    traced = traced or trace(encoder, size, axes)
    sizes = [size, [n + m for n, m in zip(reversed(size), multiples(encoder), strict=True)]] if len(axes) > 1 else [size]
    manifest = exported_manifest(weights.manifest, to="onnx", load_into="onnxruntime.InferenceSession", **graph_facts(size, axes))
    model = described(traced, manifest)
    write_atomic(path, model.SerializeToString())
    write_atomic(path.with_suffix(".json"), json.dumps(manifest, indent=2, sort_keys=True).encode())
    worst = check(path, encoder, sizes)
    free = "batch and size are free" if len(axes) > 1 else "the batch is free, the size is not"
    return ExportReport(
        files=(path, path.with_suffix(".json")),
        matched=tuple(sorted(weights.state)),
        missing=(),
        unexpected=(),
        max_feature_difference=worst,
        notes=(
            f"load with onnxruntime.InferenceSession; input image (B, {encoder.in_channels}, ...) float32, {free}",
            *notes,
            f"float32 in onnxruntime {_version('onnxruntime')} against torch, at most {TOLERANCE:g} is accepted, of the largest "
            "feature where that is above 1",
        ),
    )


def require_packages() -> None:
    """Raise RequestError where one of the extra's packages is absent."""
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        raise RequestError(f'export to onnx needs {", ".join(absent)}; install the extra with `pip install "medssl[onnx]"`')


def multiples(encoder: Any) -> tuple[int, ...]:
    """Return what image sizes must be multiples of."""
    return tuple(getattr(encoder, "multiple", encoder.patch_size))


def traced_size(encoder: Any, weights: Weights) -> list[int]:
    """Return the image size of the graph: that of the position table, else that of the pretraining, else 2, 3, ... patches.

    A graph of free size is traced at the small one, whose axes differ, so that no two are taken for the same.
    """
    args, steps = encoder.config()["args"], multiples(encoder)
    small = [k * m for k, m in zip((2, 3, 4), steps)]
    fixed = getattr(encoder, "only_size", None) or args.get("image_size")
    if fixed:
        return [int(n) for n in fixed]
    if getattr(encoder, "takes_images", False) and encoder.net.pretrained_cfg.get("fixed_input_size", False):
        return [int(n) for n in encoder.net.pretrained_cfg["input_size"][1:]]
    trained = weights.manifest.get("image_size")
    if weights.manifest["library"] in ANY_SIZE or not trained:
        return small
    return [int(n) for n in trained]


def trace(encoder: Any, size: Sequence[int], axes: Sequence[int]) -> Any:
    """Return torch's ONNX program of the encoder.

    Args:
        encoder: In eval mode, float32.
        size: Image size.
        axes: Axes of the input (B, C, *size) that stay free.

    Raises:
        WeightsError: The encoder cannot be traced; the sentence says where it stopped.
    """
    image = random_image(encoder.in_channels, size).float().expand(2, -1, *[-1] * len(size))
    # the steps are spelled out because the solver does not find them in networks with skips around strided convolutions
    steps = {axis: step for axis, step in enumerate(multiples(encoder), start=2)}
    free: dict[int, Any] = {
        axis: steps[axis] * torch.export.Dim(f"n{axis}", min=1, max=4096) if axis in steps else torch.export.Dim("batch", min=1)
        for axis in axes
    }
    shapes = {"image": free}
    try:
        with quiet():
            return torch.onnx.export(
                Graph(encoder).eval(),
                (image.contiguous(),),
                dynamo=True,
                input_names=["image"],
                output_names=["tokens", "pooled"],
                dynamic_shapes=shapes,
                opset_version=OPSET,
                verbose=False,
            )
    except Exception as err:  # torch raises many kinds, and wraps some of them
        reason = str(err.__cause__ or err).strip().splitlines()[0]
        raise WeightsError(
            f"export to onnx: the encoder {encoder.name} cannot be traced ({reason}); export to safetensors, or to a stock network "
            "and convert that with its own tools"
        ) from err


@contextmanager
def quiet() -> Iterator[None]:
    """Hide what torch's exporter warns and logs about its own insides."""
    from medssl.encoders.video_vit import factorised_positions

    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
        factorised_positions.cache_clear()  # the tracer leaves a tensor without values there, which the next clip would meet


def described(traced: Any, manifest: Mapping[str, Any]) -> Any:
    """Return the ONNX model with what a user must know in its metadata, and without paths of the machine that traced it.

    Raises:
        WeightsError: It is larger than one ONNX file may be.
    """
    model = traced.model_proto
    if model.ByteSize() > LARGEST:
        raise WeightsError(
            f"export to onnx: the graph has {model.ByteSize() / 2**30:.1f} GiB and one ONNX file holds less than 2; export to safetensors"
        )
    graphs = [model.graph, *model.functions]
    for graph in graphs:
        for node in graph.node:  # the tracer notes the lines of code that a node comes from, with their files
            del node.metadata_props[:]
            node.doc_string = ""
        for value in graph.value_info:
            del value.metadata_props[:]
    del model.graph.metadata_props[:]
    version = manifest["export"]["versions"]["medssl"]
    props = {"use": USE, "medssl_version": version, **facts_of(manifest), "encoder": manifest["encoder"]}
    del model.metadata_props[:]
    for name, value in props.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = name, value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    model.doc_string = USE
    return model


def facts_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the metadata of a graph say of its weights; `unknown` where nobody has said it of imported ones."""
    return {name: UNKNOWN if is_unknown(manifest, name) else manifest[name] for name in FACTS if name in manifest}


def graph_facts(size: Sequence[int], axes: Sequence[int]) -> dict[str, Any]:
    """Return what the manifest says about the graph."""
    shape = ["batch", "channels", *("free" if axis in axes else n for axis, n in enumerate(size, start=2))]
    return {
        "use": USE,
        "opset": OPSET,
        "input": {"name": "image", "shape": shape, "dtype": "float32"},
        "outputs": {"tokens": "(batch, tokens, features), in token_order", "pooled": "(batch, features)"},
        "runtime": {"onnx": _version("onnx"), "onnxruntime": _version("onnxruntime"), "tolerance": TOLERANCE},
    }


def check(path: Path, encoder: Any, sizes: Sequence[Sequence[int]]) -> float:
    """Run the file with onnxruntime for batches of 1 and 3 and every size, and compare with the encoder.

    Args:
        path: The file.
        encoder: In eval mode, float32.
        sizes: Image sizes.

    Returns:
        The largest difference, in units of the largest feature where that is above 1.

    Raises:
        WeightsError: onnxruntime does not take the file, or the features differ by more than `TOLERANCE`.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as err:
        raise WeightsError(f"export to onnx: onnxruntime does not take the graph ({err}); nothing was written") from err
    pairs = []
    for batch, size in [(1, sizes[0]), (3, sizes[-1])]:
        image = torch.cat([random_image(encoder.in_channels, size, seed) for seed in range(batch)]).float()
        found = [torch.from_numpy(np.array(value)) for value in session.run(["tokens", "pooled"], {"image": image.numpy()})]
        with torch.no_grad():
            output = encoder.forward_features(image)
        for mine, theirs in zip((output.tokens, output.pooled), found, strict=True):
            scale = max(1.0, float(mine.abs().max()))
            pairs.append((theirs / scale, mine / scale))
    return compare(pairs, "onnx", tolerance=TOLERANCE)


def _by(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
