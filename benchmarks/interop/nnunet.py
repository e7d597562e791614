"""nnU-Net's own code on a checkpoint of `medssl export --to nnunet`. The two do not live in one environment (nnU-Net pins timm).

    .venv/bin/python -m benchmarks.interop.nnunet prepare --folder /tmp/interop        # where medssl is
    NNUNET/bin/python benchmarks/interop/nnunet.py check --folder /tmp/interop         # where nnunetv2 is
    NNUNET/bin/python benchmarks/interop/nnunet.py train --folder /tmp/interop --data Task04_Hippocampus

`prepare` writes a checkpoint of random weights, an image and the features that our encoder and decoder make of it. `check` loads the file
into nnU-Net's network as its trainer does, with one and with three input channels, and compares. `train` lets nnU-Net plan, preprocess and
train ten iterations on a Medical Segmentation Decathlon folder, everything below `--folder`. `--run` takes the weights of a real run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TOLERANCE = 1e-3  # float32, other order of additions
TOY = {"features_per_stage": [16, 32, 64, 64], "n_blocks_per_stage": [1, 2, 2, 2], "strides": [1, 2, 2, [2, 2, 1]]}
SIZE = [48, 64, 32]  # X, Y, Z


def prepare(folder: Path, run: Path | None) -> None:
    """Export weights and leave an image with our features of it."""
    import torch

    from medssl.build import load_encoder
    from medssl.encoders.resenc3d import ResEnc3D
    from medssl.export.write import export_weights
    from medssl.weights import find_part, load_part, save_part

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


def build(plan: dict[str, Any], channels: int, classes: int = 2) -> Any:
    """Build nnU-Net's network of a plan, as its trainer does."""
    from nnunetv2.training.nnUNetTrainer.pretraining.pretrainedTrainer import PretrainedTrainer

    architecture = plan["architecture_plans"]
    return PretrainedTrainer.build_network_architecture(
        architecture_class_name=architecture["arch_class_name"],
        arch_init_kwargs=architecture["arch_kwargs"],
        arch_init_kwargs_req_import=architecture["arch_kwargs_requiring_import"],
        input_patch_size=plan["recommended_downstream_patchsize"],
        num_input_channels=channels,
        num_output_channels=classes,
        enable_deep_supervision=False,
    ).eval()


def check(folder: Path) -> None:
    """Load as nnU-Net loads, and compare features; leave with status 1 where they differ."""
    import torch
    from nnunetv2.training.nnUNetTrainer.pretraining.pretrainedTrainer import PretrainedTrainer

    file = folder / "export" / "checkpoint_final.pth"
    checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    expected = torch.load(folder / "expected.pt", map_location="cpu", weights_only=True)
    plan = checkpoint["nnssl_adaptation_plan"]
    patch, pretrained = plan["recommended_downstream_patchsize"], plan["pretrain_num_input_channels"]
    worst = 0.0
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
        print(f"{channels} channel(s){', repeated by nnU-Net' if repeated else ''}: features differ by {found:.1e}")
        worst = max(worst, found)
    if expected["finest"] is not None:
        network = build(plan, pretrained)
        result = network.load_state_dict(checkpoint["network_weights"], strict=False)
        lost = [key for key in result.missing_keys if ".seg_layers." not in key]
        print(f"whole network: {len(lost)} missing, {len(result.unexpected_keys)} unexpected")
        if lost or result.unexpected_keys:
            sys.exit(f"the plain -pretrained_weights road would stop at {(lost or result.unexpected_keys)[0]}")
        network.decoder.seg_layers[-1] = torch.nn.Identity()
        with torch.no_grad():
            image = expected["image"].permute(0, 1, 4, 3, 2).expand(-1, pretrained, -1, -1, -1)
            found = float((network(image).permute(0, 1, 4, 3, 2) - expected["finest"]).abs().max())
        print(f"decoder: its finest map differs by {found:.1e}")
        worst = max(worst, found)
    if not worst <= TOLERANCE:
        sys.exit(f"features differ by {worst:.1e}, at most {TOLERANCE:g} is accepted")


def train(folder: Path, data: Path, iterations: int) -> None:
    """Let nnU-Net plan from the checkpoint, preprocess and train a few iterations on the CPU."""
    for name in ("raw", "preprocessed", "results"):
        (folder / name).mkdir(exist_ok=True)
        os.environ[f"nnUNet_{name}"] = str(folder / name)
    os.environ.setdefault("nnUNet_compile", "f")
    os.environ.setdefault("nnUNet_n_proc_DA", "1")
    number = int(data.name.removeprefix("Task").split("_")[0])
    tools = Path(sys.executable).parent
    file = folder / "export" / "checkpoint_final.pth"
    for command in (
        ["nnUNetv2_convert_MSD_dataset", "-i", str(data), "-np", "2"],
        ["nnUNetv2_plan_and_preprocess", "-d", str(number), "--no_pp", "-np", "2"],
        [
            "nnUNetv2_preprocess_like_nnssl",
            "-d",
            str(number),
            "-n",
            "medssl",
            "-pc",
            str(file),
            "-am",
            "default_nnunet",
            "-np",
            "2",
        ],
    ):
        subprocess.run([str(tools / command[0]), *command[1:]], check=True)
    import torch
    from nnunetv2.training.nnUNetTrainer.pretraining.pretrainedTrainer import PretrainedTrainer

    (dataset,) = (folder / "preprocessed").glob(f"Dataset{number:03d}_*")
    (plans,) = dataset.glob("ptPlans__medssl*.json")
    content = json.loads((dataset / "dataset.json").read_text())
    trainer = PretrainedTrainer(json.loads(plans.read_text()), "3d_fullres", 0, content, device=torch.device("cpu"))
    trainer.initialize()
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    losses = [float(trainer.train_step(next(trainer.dataloader_train))["loss"]) for _ in range(iterations)]
    print("losses:", " ".join(f"{loss:.4f}" for loss in losses))
    if not all(loss == loss and abs(loss) < 1e6 for loss in losses):
        sys.exit("a loss is no number")


def main(argv: list[str] | None = None) -> None:
    """Run one of the three steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("prepare", "check", "train"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--run", type=Path, help="prepare: run folder of a resenc3d; default random weights")
    parser.add_argument("--data", type=Path, help="train: a Decathlon folder, for instance Task04_Hippocampus")
    parser.add_argument("--iterations", type=int, default=10)
    given = parser.parse_args(argv)
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.step == "prepare":
        prepare(given.folder, given.run)
    elif given.step == "check":
        check(given.folder)
    elif given.data is None:
        parser.error("train needs --data")
    else:
        train(given.folder, given.data, given.iterations)


if __name__ == "__main__":
    main()
