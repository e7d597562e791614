"""Loading every form of export into its stock network, at about 100 million parameters or the largest that the form has.

    python -m benchmarks.export_loading

What is timed is what a user does with the files: read the tensors and put them into a network that stands already (building one is the other
library's time, reported beside it), a bundle and an ONNX graph by their own loaders. Files are in the page cache. Target: under 2 s for 100 M
parameters; a form whose largest encoder is smaller or larger is scaled to 100 M by its number of parameters, and says so.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Check, Result, finish, parser
from medssl._compat import torchvision_ops
from medssl.build import build_encoder, load_encoder
from medssl.export.write import export_weights
from medssl.weights import save_part

VIT = {"name": "vit3d", "args": {"image_size": [96, 96, 96], "hidden_size": 768, "num_heads": 12}}
VIT2D = {"name": "image2d", "args": {"model": "vit_base_patch16_224"}}
ENCODERS: dict[str, dict[str, Any]] = {
    "safetensors": VIT,
    "unetr": VIT,
    "segresnet": {"name": "segresnet3d", "args": {"init_filters": 64}},
    "swin-unetr": {"name": "swin3d", "args": {"feature_size": 48}},  # as published; checking a larger one takes over 10 GB
    "monai-bundle": VIT,
    "nnunet": {"name": "resenc3d", "args": {}},
    "timm": VIT2D,
    "torchvision": {"name": "image2d", "args": {"model": "wide_resnet101_2", "in_channels": 3}},
    "resnet": {"name": "image2d", "args": {"model": "resnet200"}},
    "flexible-unet": {"name": "image2d", "args": {"model": "resnet200"}},
    "retinanet": {"name": "image2d", "args": {"model": "resnet200"}},
    "joint": {"name": "slice_volume", "args": {"slice_encoder": VIT2D["args"]}},
    "aggregator": {"name": "slice_volume", "args": {"slice_encoder": {"model": "resnet18"}, "dim": 1024}},
    "onnx": VIT2D,
    "hf": VIT2D,
}
OF_100M = 2.0  # seconds


def save_run(description: dict[str, Any], folder: Path) -> None:
    """Write a run folder of random weights, as the training loop does."""
    encoder = build_encoder(description)
    named = encoder.parts() if hasattr(encoder, "parts") else {"encoder": encoder.part("encoder")}
    facts = {"image_size": [96, 96, 96], "spacing_mm": [1.0] * 3, "spacing_source": "views", "intensity": {"normalize": "zscore"}}
    for name, part in named.items():
        tensors = {key[len(part.prefix) :]: value for key, value in part.module.state_dict().items() if key.startswith(part.prefix)}
        state = {key: value for key, value in tensors.items() if key.startswith(tuple(part.keys or [""]))}
        save_part(folder / "weights" / "last", name, state, {**part.manifest, **facts, "domains": ["mri"]})
    (folder / "weights" / "index.json").write_text(json.dumps({"default": next(iter(named))}))


def loader(form: str, out: Path, description: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """Return what builds the stock network, and what loads the files into it."""
    from safetensors.torch import load_file

    args = description["args"]
    files = sorted(out.glob("*.safetensors"))

    def fill(network: Any, inside: str = "") -> Any:
        target = network.get_submodule(inside) if inside else network
        return target.load_state_dict(load_file(files[0]), strict=False)

    if form in ("safetensors", "joint"):
        return (lambda: None), (lambda _: load_encoder(files[0]))
    if form == "unetr":
        from medssl.export.unetr import stock_network

        return (lambda: stock_network(build_args(description))), (lambda network: fill(network, "vit"))
    if form == "segresnet":
        from medssl.export.segresnet import stock_network as stock

        return (lambda: stock(build_args(description))), fill
    if form == "swin-unetr":
        from monai.networks.nets import SwinUNETR

        build = lambda: SwinUNETR(in_channels=1, out_channels=2, feature_size=args["feature_size"])  # noqa: E731
        return build, lambda network: network.load_from(torch.load(out / "swin_unetr_load_from.pt", weights_only=True))
    if form == "monai-bundle":
        from medssl.export.monai_bundle import load_network

        return (lambda: load_network(out)), (
            lambda network: network.load_state_dict(torch.load(out / "models" / "model.pt", weights_only=True))
        )
    if form == "nnunet":
        from medssl.export.nnunet import network_of_plan

        plan = torch.load(out / "checkpoint_final.pth", weights_only=True)["nnssl_adaptation_plan"]
        return (lambda: network_of_plan(plan)), (
            lambda network: network.load_state_dict(
                torch.load(out / "checkpoint_final.pth", weights_only=True)["network_weights"], strict=False
            )
        )
    if form == "onnx":
        import onnxruntime

        return (lambda: None), (
            lambda _: onnxruntime.InferenceSession(str(out / "encoder.onnx"), providers=["CPUExecutionProvider"])
        )
    if form == "aggregator":
        from medssl.layers.deformable import SliceAggregator

        return (lambda: SliceAggregator(**json.loads((out / "aggregator.json").read_text())["export"]["args"])), fill
    if form in ("timm", "hf"):
        import timm

        if form == "hf":  # under the names of transformers, which need not be installed
            from medssl.export.hf import timm_state

            return (lambda: timm.create_model(args["model"], in_chans=1, num_classes=0)), (
                lambda network: network.load_state_dict(timm_state(load_file(files[0])))
            )
        return (lambda: timm.create_model(args["model"], in_chans=1, num_classes=0)), fill
    from medssl.export.write import TRUNKS

    target = TRUNKS[form]
    dims = 3 if form == "retinanet" else 2
    return (lambda: target.build(args["model"], args.get("in_channels", 1), dims)[0]), fill


def build_args(description: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of an encoder with its defaults."""
    with torch.device("meta"):
        return dict(build_encoder(description).config()["args"])


def measure(form: str, repeats: int) -> dict[str, Any]:
    """Export, then time the loading; return one row."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        run, out = Path(folder) / "run", Path(folder) / "out"
        save_run(ENCODERS[form], run)
        begin = time.perf_counter()
        how = {"channels": 3} if form == "torchvision" else {}
        report = export_weights(run, form, out, **how)  # type: ignore[arg-type]
        exported = time.perf_counter() - begin
        build, load = loader(form, out, ENCODERS[form])
        built, spent = [], []
        for _ in range(repeats):
            begin = time.perf_counter()
            network = build()
            built.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            load(network)
            spent.append(time.perf_counter() - begin)
        biggest = max(path.stat().st_size for path in report.files)
    parameters = biggest / 4e6  # float32; what is in the file, not what the stock network has besides
    seconds = statistics.median(spent)
    return {
        "form": form,
        "encoder": ENCODERS[form]["args"].get("model", ENCODERS[form]["name"]),
        "million": parameters,
        "load_s": seconds,
        "load_s_of_100M": seconds * 100 / parameters,
        "build_s": statistics.median(built),
        "export_s": exported,
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options_parser = parser(__doc__)
    options_parser.add_argument("--forms", nargs="+", default=list(ENCODERS), choices=list(ENCODERS))
    options = options_parser.parse_args(argv)
    torchvision_ops.ensure()
    forms = [form for form in options.forms if form != "onnx" or find_spec("onnxruntime")]
    rows = []
    for form in forms:
        rows.append(measure(form, options.repeats))
        print(rows[-1], flush=True)
    checks = [
        Check(f"{row['form']}: seconds to load 100 M parameters", max(row["load_s"], row["load_s_of_100M"])
              if row["million"] >= 50 else row["load_s"], OF_100M, at_least=False)
        for row in rows
    ]  # fmt: skip
    notes = [
        "million: float32 numbers in the largest file, in millions; forms under 50 are held to 2 s as they are, others also scaled to 100 M",
        "safetensors and joint are opened by medssl.load_encoder, which builds the network too",
    ]
    return finish(Result("export_loading", rows, checks, vars(options), notes), options.out)


if __name__ == "__main__":
    main()
