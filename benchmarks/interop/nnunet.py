"""nnU-Net's own code on a checkpoint of `medssl export --to nnunet`. The two do not live in one environment (nnU-Net pins timm).

    .venv/bin/python -m benchmarks.interop.nnunet prepare --folder /tmp/interop        # where medssl is
    python3.11 -m venv NNUNET
    NNUNET/bin/pip install -c constraints-cpu.txt torch torchvision nnunetv2==2.8.1 fire
    NNUNET/bin/pip install --no-deps --force-reinstall NNUNET_SOURCES
    NNUNET/bin/python benchmarks/interop/nnunet.py check --folder /tmp/interop --out nnunet.json
    NNUNET/bin/python benchmarks/interop/nnunet.py train --folder /tmp/interop --data ../shared/data/msd_hippocampus --out nnunet.json

The package `nnunetv2` 2.8.1 of PyPI has no fine-tuning from nnssl checkpoints (`nnUNetv2_preprocess_like_nnssl`, `PretrainedTrainer`); its
repository has, under the same number. With the package alone `check` does only what the package can: the plain `-pretrained_weights` road.
Beside CPU torch torchvision of PyPI does not import, and with it timm and nnU-Net's trainer; `medssl/_compat/torchvision_ops.py`, which needs
nothing of medssl, is loaded from its file first, and nnU-Net's commands are called from here for the same reason.

`prepare` writes a checkpoint of random weights, an image and the features that our encoder and decoder make of it. `check` loads the file
into nnU-Net's network as its trainer does, with one and with three input channels, and compares. `train` lets nnU-Net plan, preprocess and
train ten iterations on a Decathlon folder, or one with `images` and `labels`, everything below `--folder`. `--run` takes a real run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

TOLERANCE = 1e-3  # float32, other order of additions
TOY = {"features_per_stage": [16, 32, 64, 64], "n_blocks_per_stage": [1, 2, 2, 2], "strides": [1, 2, 2, [2, 2, 1]]}
SIZE = [48, 64, 32]  # X, Y, Z


def prepare(folder: Path, run: Path | None) -> None:
    """Export weights and leave an image with our features of it."""
    import torch

    from benchmarks.interop import leave_facts
    from medssl.build import load_encoder
    from medssl.encoders.resenc3d import ResEnc3D
    from medssl.export.write import export_weights
    from medssl.weights import find_part, load_part, save_part

    leave_facts(folder)
    if run is None:
        torch.manual_seed(0)
        run, encoder = folder / "run", ResEnc3D(**TOY)  # type: ignore[arg-type]
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        facts = {"image_size": SIZE, "spacing_mm": [1.0, 1.0, 1.0], "spacing_source": "views", "intensity": {"normalize": "zscore"}}
        for group, keys in encoder.key_groups.items():
            state = {key: value for key, value in encoder.net.state_dict().items() if key.startswith(tuple(keys))}
            save_part(run / "weights" / "last", group, state, {**encoder.part(group).manifest, **facts})
        (run / "weights" / "index.json").write_text(json.dumps({"default": "encoder"}))
    decoder = find_part(run, "decoder").is_file()
    report = export_weights(run, "nnunet", folder / "export", decoder=decoder)
    print("\n".join(report.notes))
    encoder = load_encoder(run)
    if decoder:
        encoder.net.load_state_dict(load_part(run, "decoder")[0], strict=False)
    image = torch.randn(1, 1, *(3 * p if axis else 2 * p for axis, p in enumerate(encoder.patch_size)))
    with torch.no_grad():
        maps = encoder(image.expand(-1, encoder.in_channels, -1, -1, -1)).pyramid
        finest = encoder.forward_decoder(maps) if decoder else None
    torch.save({"image": image, "maps": list(maps), "finest": finest}, folder / "expected.pt")


def torchvision_imports() -> None:
    """Let torchvision import beside CPU torch, see `medssl/_compat/torchvision_ops.py`."""
    file = Path(__file__).resolve().parents[2] / "medssl" / "_compat" / "torchvision_ops.py"
    spec = importlib.util.spec_from_file_location("torchvision_ops", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.ensure()


def call(command: str, arguments: list[str]) -> None:
    """Run one of nnU-Net's commands in this process, as its console script does."""
    (entry,) = [point for point in entry_points(group="console_scripts") if point.name == command]
    before = sys.argv
    sys.argv = [command, *arguments]
    try:
        entry.load()()
    finally:
        sys.argv = before


def build(plan: dict[str, Any], channels: int, classes: int = 2) -> Any:
    """Build nnU-Net's network of a plan; a preset goes by its name, as in nnU-Net's repository."""
    import pydoc

    import dynamic_network_architectures.architectures.unet as architectures

    architecture = plan["architecture_plans"]
    name = architecture["arch_class_name"]
    if name == "ResEncL":
        from nnunetv2.utilities.get_network_via_name import get_network_from_name

        return get_network_from_name(name, channels, classes, plan["recommended_downstream_patchsize"]).eval()
    arguments = dict(architecture["arch_kwargs"])
    for key in architecture["arch_kwargs_requiring_import"]:
        arguments[key] = pydoc.locate(arguments[key]) if arguments.get(key) else None
    return getattr(architectures, name.rpartition(".")[2])(
        input_channels=channels, num_classes=classes, deep_supervision=False, **arguments
    ).eval()


def check(folder: Path) -> dict[str, Any]:
    """Load as nnU-Net loads, by both of its roads, and compare features."""
    import torch

    file = folder / "export" / "checkpoint_final.pth"
    checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    expected = torch.load(folder / "expected.pt", map_location="cpu", weights_only=True)
    plan = checkpoint["nnssl_adaptation_plan"]
    rows = adapted(file, plan, expected) + ([plain(file, plan, expected)] if expected["finest"] is not None else [])
    for row in rows:
        print(row)
    return {"rows": rows, "met": all(row["max_difference"] <= TOLERANCE for row in rows), "tolerance": TOLERANCE}


def adapted(file: Path, plan: dict[str, Any], expected: dict[str, Any]) -> list[dict[str, Any]]:
    """Load encoder and stem as the trainer for nnssl checkpoints does; nothing where nnU-Net has no such trainer."""
    import torch

    try:
        from nnunetv2.training.nnUNetTrainer.pretraining.pretrainedTrainer import PretrainedTrainer
    except ModuleNotFoundError:
        print("this nnunetv2 has no PretrainedTrainer: the package of PyPI; install the repository's for the adaptation plan")
        return []
    patch, pretrained = plan["recommended_downstream_patchsize"], plan["pretrain_num_input_channels"]
    rows = []
    for channels in sorted({pretrained, 3} if pretrained == 1 else {pretrained}):
        network, repeated = PretrainedTrainer.load_pretrained_weights(
            build(plan, channels),
            pretrained_weights_path=str(file),
            pt_input_channels=pretrained,
            downstream_input_channels=channels,
            pt_input_patchsize=patch,
            downstream_input_patchsize=patch,
            pt_key_to_encoder=plan["key_to_encoder"],
            pt_key_to_stem=plan["key_to_stem"],
            pt_keys_to_in_proj=tuple(plan["keys_to_in_proj"]),
            pt_key_to_lpe=plan["key_to_lpe"],
        )
        image = expected["image"].permute(0, 1, 4, 3, 2).expand(-1, channels, -1, -1, -1)
        with torch.no_grad():
            maps = network.encoder(image)
        found = max(float((a.permute(0, 1, 4, 3, 2) - b).abs().max()) for a, b in zip(maps, expected["maps"], strict=True))
        rows.append({
            "road": "adaptation plan",
            "what": f"encoder maps, {channels} channel(s){', repeated by nnU-Net' if repeated else ''}",
            "max_difference": found,
            "spread": min(float(level.std()) for level in expected["maps"]),
        })  # fmt: skip
    return rows


def plain(file: Path, plan: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """Load the whole network as `nnUNetv2_train -pretrained_weights` does, which asserts every tensor but the last convolutions."""
    import torch
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

    channels = plan["pretrain_num_input_channels"]
    network = build(plan, channels)
    load_pretrained_weights(network, str(file))
    network.decoder.seg_layers[-1] = torch.nn.Identity()
    with torch.no_grad():
        image = expected["image"].permute(0, 1, 4, 3, 2).expand(-1, channels, -1, -1, -1)
        found = float((network(image).permute(0, 1, 4, 3, 2) - expected["finest"]).abs().max())
    spread = float(expected["finest"].std())
    return {"road": "-pretrained_weights", "what": "finest map of the decoder", "max_difference": found, "spread": spread}


def raw_folder(folder: Path, data: Path, cases: int) -> int:
    """Lay the first cases of a data set out as nnU-Net's raw folder; return the number of the data set."""
    images, labels = (data / name for name in ("images", "labels"))
    if not images.is_dir():
        images, labels = data / "imagesTr", data / "labelsTr"
    target = folder / "raw" / "Dataset004_Hippocampus"
    for name in ("imagesTr", "labelsTr"):
        (target / name).mkdir(parents=True, exist_ok=True)
    chosen = sorted(path for path in images.glob("*.nii.gz") if path.name[0] != ".")[:cases]
    for path in chosen:
        for source, place in (
            (path, f"imagesTr/{path.name.removesuffix('.nii.gz')}_0000.nii.gz"),
            (labels / path.name, f"labelsTr/{path.name}"),
        ):
            (target / place).unlink(missing_ok=True)
            (target / place).symlink_to(source.resolve())
    content = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "anterior": 1, "posterior": 2},
        "numTraining": len(chosen),
        "file_ending": ".nii.gz",
    }
    (target / "dataset.json").write_text(json.dumps(content))
    return 4


def train(folder: Path, data: Path, iterations: int, cases: int) -> dict[str, Any]:
    """Let nnU-Net plan from the checkpoint, preprocess and train a few iterations on the CPU."""
    for name in ("raw", "preprocessed", "results"):
        (folder / name).mkdir(exist_ok=True)
        os.environ[f"nnUNet_{name}"] = str(folder / name)
    os.environ.update(nnUNet_compile="f")
    os.environ.setdefault("nnUNet_n_proc_DA", "1")
    begin = time.perf_counter()
    number = str(raw_folder(folder, data, cases))
    file = str(folder / "export" / "checkpoint_final.pth")
    like = ["-d", number, "-n", "medssl", "-pc", file, "-am", "like_pretrained", "-np", "2", "--overwrite_pp"]
    for name, arguments in {
        "nnUNetv2_extract_fingerprint": ["-d", number, "-np", "2"],
        "nnUNetv2_plan_experiment": ["-d", number],
        "nnUNetv2_preprocess_like_nnssl": like,
    }.items():
        call(name, arguments)
    prepared = time.perf_counter() - begin
    import torch
    from nnunetv2.run.run_training_from_pretrained import get_trainer_from_args

    (plans,) = (folder / "preprocessed").glob(f"Dataset{int(number):03d}_*/ptPlans__medssl*.json")
    plan = json.loads(plans.read_text())
    trainer: Any = get_trainer_from_args(number, "3d_fullres", 0, "PretrainedTrainer", plans.stem, torch.device("cpu"))
    trainer.initialize()
    given = torch.load(file, map_location="cpu", weights_only=True)["network_weights"]
    start = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    loaded = [key for key in start if key.startswith("encoder.") and torch.equal(start[key], given[key])]
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    for group in trainer.optimizer.param_groups:
        group["lr"] = 1e-3  # the warm-up starts at 2e-5, which would move little in ten iterations
    losses = [float(trainer.train_step(next(trainer.dataloader_train))["loss"]) for _ in range(iterations)]
    end = trainer.network.state_dict()
    moved = sum(not torch.equal(end[key], start[key]) for key in loaded)
    patch = plan["configurations"]["3d_fullres"]["patch_size"]
    for loader in (trainer.dataloader_train, trainer.dataloader_val):
        if hasattr(loader, "_finish"):
            loader._finish()
    found = {
        "cases": cases,
        "patch_zyx": list(patch),
        "spacing_zyx": list(plan["configurations"]["3d_fullres"]["spacing"]),
        "encoder_tensors_as_in_the_checkpoint": len(loaded),
        "encoder_tensors": sum(key.startswith("encoder.") for key in start),
        "encoder_tensors_moved_by_training": moved,
        "losses": [round(loss, 4) for loss in losses],
        "prepare_s": round(prepared),
        "train_s": round(time.perf_counter() - begin - prepared),
    }
    print(found)
    all_loaded = len(loaded) == found["encoder_tensors"]
    return {**found, "met": all_loaded and moved == len(loaded) and all(loss == loss and abs(loss) < 1e6 for loss in losses)}


def main(argv: list[str] | None = None) -> None:
    """Run one of the three steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("prepare", "check", "train"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--run", type=Path, help="prepare: run folder of a resenc3d; default random weights")
    parser.add_argument("--data", type=Path, help="train: a folder with images and labels, or a Decathlon folder")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--cases", type=int, default=20, help="train: how many of them are used")
    parser.add_argument("--source", default="PyPI", help="where nnunetv2 was installed from, for the record")
    parser.add_argument("--out", type=Path, help="check, train: JSON file that the result is added to")
    given = parser.parse_args(argv)
    given.folder.mkdir(parents=True, exist_ok=True)
    folder = given.folder.resolve()
    if given.step == "prepare":
        prepare(folder, given.run)
        return
    if given.step == "train" and given.data is None:
        parser.error("train needs --data")
    torchvision_imports()
    found = check(folder) if given.step == "check" else train(folder, given.data, given.iterations, given.cases)
    if given.out:
        before = json.loads(given.out.read_text()) if given.out.is_file() else {"benchmark": "interop_nnunet"}
        packages = ("nnunetv2", "dynamic_network_architectures", "torch", "timm", "numpy")
        facts = {
            "python": sys.version.split()[0],
            "versions": {name: version(name) for name in packages},
            "nnunetv2_from": given.source,
            "made_by": json.loads((folder / "made_by.json").read_text()),
        }
        key = given.step if given.step == "train" or found["rows"][0]["road"] == "adaptation plan" else "check of the package"
        given.out.write_text(json.dumps({**before, key: {**facts, **found}}, indent=1) + "\n")
    if not found["met"]:
        sys.exit(f"{given.step}: not met, see above")


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # a worker that nnU-Net spawned
    torchvision_imports()
