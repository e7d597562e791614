"""ViT-B/16 masked autoencoder at 96^3 on one GPU: rate, share of the matrix rate, data wait, memory, and MONAI beside it.

    python -m benchmarks.gpu_step --peak-tflops 989        # 989: dense bf16 of an H100 or H200 SXM

Two parts for each batch size:

1. The step alone, images already on the device: forward, backward, clipping, AdamW, in turns with the same step of
   MONAI's `MaskedAutoEncoderViT` (same widths: mlp_dim = 4 * hidden, 75 % hidden, loss over hidden voxels), as it comes
   and with the fused attention and compiled blocks that ours uses.
2. The real loop (`training.loop.train`): threads read ahead from a store, views with rotation and scale are made on the
   device. Time per step is wall time of the second half of the run, data wait the share of it that metrics.jsonl calls
   waiting. Reading alone and views alone stand beside it, so that the table says what a slow loop waits for.

Without a GPU it runs on the CPU (`--device cpu`), which proves the script and nothing else.
"""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common import (
    Check,
    Result,
    Seconds,
    finish,
    interleave,
    milliseconds,
    parser,
    synthetic_ct,
    times_faster,
    without_monai_warnings,
)
from medssl.data_sources import random_views
from medssl.domains.ct import CT
from medssl.domains.statistics import intensity_stats
from medssl.encoders.vit3d import ViT3D
from medssl.layers.tokens import patchify
from medssl.objectives.mae import MAE
from medssl.sampling.samplers import CropSampler
from medssl.sampling.source import ImageSource
from medssl.store.reader import StoreReader
from medssl.store.writer import create_store, write_item
from medssl.training.distributed import World
from medssl.training.engine import Engine, frozen_names
from medssl.training.loop import train
from medssl.training.optim import OptimSettings, build_optimiser, parameter_groups
from medssl.training.run_folder import RunFolder
from medssl.training.settings import LoopSettings, Stage
from medssl.types import DrawKey, ImageMeta, Sample, StepContext, Views
from medssl.views.pipeline import Crop, VolumeViews

OURS, STOCK, TUNED, MATMUL = "medssl mae", "MONAI MaskedAutoEncoderViT", "MONAI, fused and compiled", "matrix product alone"
RATIO = 0.75
OPTIM = OptimSettings(lr=1e-4, betas=(0.9, 0.98), clip_grad=1.0)


@dataclass(frozen=True)
class Sizes:
    """The network.

    Args:
        size: Edge of the crop in voxels.
        patch: Edge of a patch in voxels.
        hidden: Width of the encoder; its MLP is four times as wide, in the decoder too.
        layers: Encoder blocks.
        heads: Encoder heads.
        decoder: Width of the decoder.
        decoder_layers: Decoder blocks.
        decoder_heads: Decoder heads.
    """

    size: int
    patch: int
    hidden: int
    layers: int
    heads: int
    decoder: int
    decoder_layers: int
    decoder_heads: int

    @property
    def tokens(self) -> int:
        """Tokens of a crop."""
        return (self.size // self.patch) ** 3

    @property
    def visible(self) -> int:
        """Tokens that enter the encoder."""
        return self.tokens - int(RATIO * self.tokens)


def step_flops(sizes: Sizes) -> float:
    """Return the floating point operations of the matrix products in one forward and backward pass of one volume.

    A product of (m, k) with (k, n) counts 2mkn. The backward pass costs twice the forward one, except at the patch embedding,
    whose input needs no gradient. Recomputation inside fused attention is not counted.
    """
    voxels = sizes.patch**3

    def blocks(tokens: int, width: int, count: int) -> int:
        projections = 8 * width**2  # query, key, value and output: 4 products of width x width
        mlp = 16 * width**2  # two products of width x (4 * width)
        attention = 4 * tokens * width  # scores, and the sum they weight
        return count * tokens * (projections + mlp + attention)

    embedding = 2 * sizes.tokens * voxels * sizes.hidden
    forward = (
        embedding
        + blocks(sizes.visible, sizes.hidden, sizes.layers)
        + 2 * sizes.visible * sizes.hidden * sizes.decoder
        + blocks(sizes.tokens, sizes.decoder, sizes.decoder_layers)
        + 2 * sizes.tokens * sizes.decoder * voxels
    )
    return float(3 * forward - embedding)


def make_mae(sizes: Sizes) -> MAE:
    """Build our objective."""
    crop = (sizes.size,) * 3
    encoder = ViT3D(
        image_size=crop, patch_size=sizes.patch, hidden_size=sizes.hidden, num_layers=sizes.layers, num_heads=sizes.heads
    )
    return MAE(
        encoder,
        image_size=crop,
        decoder_dim=sizes.decoder,
        decoder_depth=sizes.decoder_layers,
        decoder_heads=sizes.decoder_heads,
    )


def make_monai(sizes: Sizes, *, tuned: bool) -> nn.Module:
    """Build MONAI's masked autoencoder of the same size; `tuned` switches its attention to the fused kernel and compiles its blocks."""
    from monai.networks.nets import MaskedAutoEncoderViT

    net = MaskedAutoEncoderViT(
        in_channels=1,
        img_size=(sizes.size,) * 3,
        patch_size=(sizes.patch,) * 3,
        hidden_size=sizes.hidden,
        mlp_dim=4 * sizes.hidden,
        num_layers=sizes.layers,
        num_heads=sizes.heads,
        masking_ratio=RATIO,
        decoder_hidden_size=sizes.decoder,
        decoder_mlp_dim=4 * sizes.decoder,
        decoder_num_layers=sizes.decoder_layers,
        decoder_num_heads=sizes.decoder_heads,
    )
    for block in (*net.blocks, *net.decoder_blocks):
        if tuned and hasattr(block, "attn"):
            block.attn.use_flash_attention = True
    # Under autocast MONAI writes bfloat16 rows into float32 mask tokens, which torch refuses; one cast lets it run.
    net.decoder_embed.register_forward_hook(lambda _module, _inputs, output: output.float())
    made: nn.Module = net
    return made


def compile_monai(net: Any) -> None:
    """Compile the transformer blocks of encoder and decoder, one by one."""
    for block in (*net.blocks, *net.decoder_blocks):
        if hasattr(block, "attn"):
            block.compile()


def monai_loss(net: nn.Module, images: Tensor, patch: int) -> Tensor:
    """Return the mean squared error over hidden voxels."""
    prediction, mask = net(images)
    error = (prediction.float() - patchify(images, (patch,) * 3)).square() * mask[..., None]
    loss: Tensor = error.sum() / (mask.sum() * prediction.shape[2])
    return loss


class Stepper:
    """Optimiser steps of one network on fixed images.

    Args:
        loss: Forward pass.
        parameters: What is clipped.
        optimiser: Stepped.
        options: Precision, device and steps per call.
    """

    def __init__(
        self, loss: Callable[[], Tensor], parameters: list[nn.Parameter], optimiser: torch.optim.Optimizer, options: Namespace
    ) -> None:
        self.loss, self.parameters, self.optimiser, self.options = loss, parameters, optimiser, options

    def __call__(self) -> None:
        """Do some steps and wait for the device."""
        for _ in range(self.options.inner):
            with torch.autocast(self.options.device.type, dtype=torch.bfloat16, enabled=self.options.precision == "bf16"):
                loss = self.loss()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
        synchronise(self.options.device)


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def our_stepper(sizes: Sizes, views: Views, options: Namespace) -> Stepper:
    """Return steps of our objective as the loop's engine prepares it."""
    objective = make_mae(sizes).to(options.device)
    settings = LoopSettings(batch=views.batch_size, precision=options.precision, compile=options.compile)
    world = World(0, 1, options.device)
    frozen = frozen_names(objective)
    stage = Stage("step", 1, OPTIM)
    engine = Engine(objective, stage, settings, world, find_unused=False, encoders=[objective.encoder], frozen=frozen, first=True)
    engine.model.train()
    context = StepContext()
    return Stepper(lambda: engine.model(views, context)["loss"], engine.parameters(), engine.optimiser, options)


def monai_stepper(sizes: Sizes, views: Views, options: Namespace, *, tuned: bool) -> Stepper:
    """Return steps of MONAI's network with the same optimiser."""
    with without_monai_warnings():
        net = make_monai(sizes, tuned=tuned)
    net.to(options.device).train()
    if tuned and options.compile:
        compile_monai(net)
    optimiser = build_optimiser(parameter_groups(net.named_parameters(), OPTIM, None), OPTIM)
    images = views["volume"][:, 0]
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    return Stepper(lambda: monai_loss(net, images, sizes.patch), parameters, optimiser, options)


def matmul_call(options: Namespace) -> Callable[[], None]:
    """Return square matrix products in the precision of the run: what the device reaches with nothing else to do."""
    kind = torch.bfloat16 if options.precision == "bf16" else torch.float32
    a, b = (torch.randn(options.matmul, options.matmul, device=options.device, dtype=kind) for _ in range(2))

    def call() -> None:
        for _ in range(options.inner):
            torch.mm(a, b)
        synchronise(options.device)

    return call


def warm_up(call: Callable[[], None], device: torch.device, before_gib: float) -> dict[str, float | None]:
    """Run a call three times; return seconds of the first and the memory it needs on a GPU beyond what was there before."""
    begin = time.perf_counter()
    call()
    first = time.perf_counter() - begin
    for _ in range(2):
        call()
    if device.type != "cuda":
        return {"first_call_s": first, "peak_gib": None}
    return {"first_call_s": first, "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 - before_gib}


def allocated_gib(device: torch.device) -> float:
    """Return what the device holds now, and start a new peak."""
    if device.type != "cuda":
        return 0.0
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device) / 2**30


def step_rows(sizes: Sizes, batch: int, options: Namespace) -> tuple[list[dict[str, Any]], Seconds]:
    """Time the step alone, in turns with MONAI's and with plain matrix products."""
    maker = VolumeViews(size=sizes.size, mask={"ratio": RATIO, "cell": sizes.patch})
    views = random_views(maker, batch, 1, options.device)
    makers: dict[str, Callable[[], Callable[[], None]]] = {
        OURS: lambda: our_stepper(sizes, views, options),
        STOCK: lambda: monai_stepper(sizes, views, options, tuned=False),
        TUNED: lambda: monai_stepper(sizes, views, options, tuned=True),
        MATMUL: lambda: matmul_call(options),
    }
    calls: dict[str, Callable[[], None]] = {}
    warm: dict[str, dict[str, float | None]] = {}
    for name, make in makers.items():
        before = allocated_gib(options.device)
        calls[name] = make()
        warm[name] = warm_up(calls[name], options.device, before)
    seconds = interleave(calls, repeats=options.repeats)
    per_second = {name: options.inner / statistics.median(values) for name, values in seconds.items()}
    matrix_rate = 2 * options.matmul**3 * per_second[MATMUL]
    rows = []
    for name in calls:
        row: dict[str, Any] = {"batch": batch, "what": name, **milliseconds(seconds, name)}
        if name == MATMUL:
            rows.append({**row, "tflops": matrix_rate / 1e12})
            continue
        row |= {"volumes_per_s": batch * per_second[name], **warm[name], "ours_is_times_faster": times_faster(seconds, OURS, name)}
        if name == OURS:
            rate = step_flops(sizes) * batch * per_second[name]
            row["tflops"] = rate / 1e12
            row["share_of_measured_matrix_rate"] = rate / matrix_rate
            row["share_of_peak"] = rate / (options.peak_tflops * 1e12) if options.peak_tflops else None
        rows.append(row)
    return rows, seconds


def make_source(store: Path, sizes: Sizes, batch: int, options: Namespace) -> ImageSource:
    """Write synthetic volumes and return a source with the views of recipes/pretrain/mae_vit3d_ct.yaml at the item's spacing."""
    if not store.exists():
        create_store(store, CT())
        for number in range(options.volumes):
            image = synthetic_ct(options.shape, number)
            mask = image > -500
            meta = ImageMeta(f"{number:032x}", "ct", stats=intensity_stats(image, mask))
            write_item(Sample(image[None], (1.5, 1.5, 1.5), np.eye(4), None, meta), store, patient_id=str(number), mask=mask)
    reader = StoreReader(store)
    series = dict(enumerate(reader.series_ids()))
    views = VolumeViews(
        size=sizes.size,
        normalize={"window": [-1000, 1000]},
        rotate_deg=10,
        scale=(0.85, 1.2),
        mask={"ratio": RATIO, "cell": sizes.patch},
    )
    sampler = CropSampler("main", sorted(series), lambda item: reader.record(series[item]), views.box_size_mm, batch=batch)
    return ImageSource("main", "ct", reader, series, sampler, views, item=Crop)


def parts_of_the_road(source: ImageSource, batch: int, options: Namespace) -> dict[str, float]:
    """Return volumes per second of reading alone (one thread, and the loop's threads) and of making views alone."""
    turns = max(options.repeats // 2, 1)
    keys = [[DrawKey(1, step, position) for position in range(batch)] for step in range(turns + 1)]
    fetched = source.fetch(keys[0])
    source.views(fetched, options.device)
    synchronise(options.device)
    reading, viewing = [], []
    for turn in range(turns):
        begin = time.perf_counter()
        fetched = source.fetch(keys[turn + 1])
        reading.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        source.views(fetched, options.device)
        synchronise(options.device)
        viewing.append(time.perf_counter() - begin)
    with ThreadPoolExecutor(options.workers) as pool:
        begin = time.perf_counter()
        list(pool.map(source.fetch, keys[1:]))
        together = time.perf_counter() - begin
    return {
        "read_volumes_per_s": batch / statistics.median(reading),
        "read_in_threads_volumes_per_s": batch * turns / together,
        "view_volumes_per_s": batch / statistics.median(viewing),
    }


def loop_row(folder: Path, sizes: Sizes, batch: int, options: Namespace) -> dict[str, Any]:
    """Train through the real loop and return what its own metrics say; the first half, which compiles, does not count."""
    source = make_source(folder / "store", sizes, batch, options)
    parts = parts_of_the_road(source, batch, options)
    before = allocated_gib(options.device)
    objective = make_mae(sizes).to(options.device)
    run = RunFolder(folder / f"run_{batch}")
    run.create("benchmark: gpu_step\n", {})
    every = max(options.loop_steps // 10, 1)
    settings = LoopSettings(
        batch=batch,
        precision=options.precision,
        workers=options.workers,
        compile=options.compile,
        checkpoint_every=10**9,
        log_every=every,
    )
    stages = [Stage("loop", options.loop_steps, OPTIM)]
    world = World(0, 1, options.device)
    stamps: dict[int, float] = {}  # taken when a line is logged, which waits for the device
    begin = time.perf_counter()
    train(
        objective,
        {"main": source},
        stages=stages,
        settings=settings,
        run=run,
        world=world,
        encoders=[objective.encoder],
        on_step=lambda done, _total, _metrics: stamps.__setitem__(done, time.perf_counter()),
    )
    whole = time.perf_counter() - begin
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "data_wait" in line]
    counted = [(before["step"], line) for before, line in pairwise(lines) if before["step"] >= options.loop_steps // 2]
    first, last = counted[0][0], counted[-1][1]["step"]
    spent = stamps[last] - stamps[first]
    per_step = spent / (last - first)
    waited = sum(line["data_wait"] * line["seconds_per_step"] * (line["step"] - since) for since, line in counted)
    on_gpu = options.device.type == "cuda"
    return {
        "batch": batch,
        "what": "the real loop, reading ahead",
        "mean_ms": 1000 * per_step,
        "volumes_per_s": batch / per_step,
        "data_wait": waited / spent,
        "peak_gib": torch.cuda.max_memory_allocated(options.device) / 2**30 - before if on_gpu else None,
        "whole_run_s": whole,
        **parts,
    }


def add_options(options_parser: Any) -> None:
    """Add what this benchmark takes."""
    options_parser.add_argument("--device", type=torch.device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    options_parser.add_argument("--peak-tflops", type=float, default=None, help="the card's dense matrix rate in this precision")
    options_parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    options_parser.add_argument("--compile", choices=["auto", "on", "off"], default="auto", help="compile blocks; auto: on a GPU")
    options_parser.add_argument("--batches", type=int, nargs="+", default=[8, 64])
    options_parser.add_argument("--inner", type=int, default=5, help="steps in each timed call")
    options_parser.add_argument("--matmul", type=int, default=8192, help="edge of the plain matrix product")
    options_parser.add_argument("--loop-steps", type=int, default=200)
    options_parser.add_argument("--workers", type=int, default=8, help="threads that read ahead")
    options_parser.add_argument("--volumes", type=int, default=16)
    options_parser.add_argument("--shape", type=int, nargs=3, default=[256, 256, 200])
    for name, value in (("size", 96), ("patch", 16), ("hidden", 768), ("layers", 12), ("heads", 12)):
        options_parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in (("decoder", 384), ("decoder-layers", 4), ("decoder-heads", 12)):
        options_parser.add_argument(f"--{name}", type=int, default=value)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options_parser = parser(__doc__)
    add_options(options_parser)
    options = options_parser.parse_args(argv)
    options.compile = options.compile == "on" or (options.compile == "auto" and options.device.type == "cuda")
    sizes = Sizes(**{name: getattr(options, name) for name in Sizes.__dataclass_fields__})
    rows, checks, details = [], [], {}
    with tempfile.TemporaryDirectory() as temporary:
        for batch in options.batches:
            torch.manual_seed(0)
            if options.compile:
                # Every variant is compiled for its own shapes, as it would be in a run of its own.
                torch._dynamo.reset()
                torch._dynamo.config.automatic_dynamic_shapes = False
                torch._dynamo.config.recompile_limit = 64
            found, details[str(batch)] = step_rows(sizes, batch, options)
            row = loop_row(Path(temporary), sizes, batch, options)
            row["share_of_the_step_alone"] = row["volumes_per_s"] / found[0]["volumes_per_s"]
            rows += [*found, row]
            checks.append(Check(f"batch {batch}: share of step time waiting for data", row["data_wait"], 0.05, at_least=False))
    notes = [
        f"{prod([sizes.size] * 3)} voxels, {sizes.tokens} tokens, {sizes.visible} visible; {step_flops(sizes) / 1e9:.4g} GFLOP per volume "
        "in matrix products, forward and backward, counted from the formula in step_flops",
        f"times of the step alone are for {options.inner} steps; those of the loop are for one",
        f"compiled blocks: {options.compile}; precision {options.precision} (autocast); attention fused in ours and in the tuned MONAI",
        "MONAI's decoder_embed is cast to float32: as it is, the network fails under autocast (index_put of unequal types)",
        "peak_gib is what the variant needs beyond what was on the device before it was built",
    ]
    settings = {**vars(options), "device": str(options.device), "gflop_per_volume": step_flops(sizes) / 1e9}
    return finish(Result("gpu_step", rows, checks, settings, notes, {"seconds": details}), options.out)


if __name__ == "__main__":
    main()
