"""Encoder step of VideoMAE by visible tokens, and peak memory of one training step on long clips.

    python -m benchmarks.video_step

Time: forward and backward of the encoder alone (ViT-S, 64 frames of 112 x 112, tubelet 2, patch 16: 1,568 tokens), v and 2v of them
visible, in turns; twice the tokens may take 2.2 times as long. Memory: one step of `video_mae` and of `cluster_distillation` on a batch of
64-frame clips, forward, backward and AdamW, each in a process of its own: the high-water mark of the process (VmHWM) on the CPU, the peak
that torch allocated on a GPU.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Check, Result, finish, interleave, milliseconds, parser
from medssl.encoders.video_vit import VideoViT

LIMIT = 2.2
"""Times the step of v visible tokens that one of 2v may take."""
ROOT = Path(__file__).resolve().parents[1]
CHILD = """
import json, sys, time
import torch
from medssl.registry import lookup
from medssl.testing import toy_views
from medssl.types import StepContext, ViewSpec

job = json.loads(sys.argv[1])
torch.manual_seed(0)
torch.set_num_threads(job["threads"])
device = torch.device(job["device"])
size, seconds = tuple(job["size"]), 0.0
if job["objective"]:
    encoder = lookup("encoder", "video_vit")(image_size=size, **job["encoder"])
    specs = {"clip": ViewSpec("clip", size)}
    objective = lookup("objective", job["objective"])(encoder, view_specs=specs, **job["args"]).to(device).train()
    optimiser = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-4)
    views = toy_views(objective, batch=job["batch"])
    views.data["clip"] = views["clip"].to(device)
    views.meta.valid["clip"] = torch.ones_like(views.meta.valid["clip"], device=device)
    begin = time.perf_counter()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=job["precision"] == "bf16"):
        loss = objective(views, StepContext())["loss"]
    loss.backward()
    optimiser.step()
    loss.item()
    seconds = time.perf_counter() - begin
if device.type == "cuda":
    peak = torch.cuda.max_memory_allocated()
else:
    peak = int(dict(line.split(":", 1) for line in open("/proc/self/status"))["VmHWM"].split()[0]) * 1024
print(json.dumps({"peak_gb": peak / 1e9, "seconds": seconds}))
"""


def step(encoder: VideoViT, clips: torch.Tensor, visible: int) -> Callable[[], None]:
    """Return a call that does forward and backward with so many visible tokens."""
    tokens = prod(n // p for n, p in zip(clips.shape[2:], encoder.patch_size))
    keep = torch.stack([torch.randperm(tokens)[:visible].sort().values for _ in clips])

    def call() -> None:
        encoder.zero_grad()
        encoder.forward_features(clips, keep=keep).tokens.square().mean().backward()

    return call


def peak(job: dict[str, Any]) -> dict[str, float]:
    """Do one training step in a fresh process; without an objective, import and do nothing."""
    done = subprocess.run([sys.executable, "-c", CHILD, json.dumps(job)], capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        raise RuntimeError(f"{job['objective']} ended with {done.returncode}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options_parser = parser(__doc__)
    options_parser.add_argument("--frames", type=int, default=64)
    options_parser.add_argument("--size", type=int, default=112)
    options_parser.add_argument("--hidden", type=int, default=384)
    options_parser.add_argument("--layers", type=int, default=12)
    options_parser.add_argument("--heads", type=int, default=6)
    options_parser.add_argument("--visible", type=int, nargs="+", default=[160, 320, 640], help="each beside twice as many")
    options_parser.add_argument("--clips", type=int, default=1, help="clips of a timed step")
    options_parser.add_argument("--batch", type=int, default=4, help="clips of the step whose memory is measured")
    options_parser.add_argument("--head-prototypes", type=int, default=16384)
    options_parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    options_parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options_parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = options_parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    size = (options.frames, options.size, options.size)
    network = {"hidden_size": options.hidden, "num_layers": options.layers, "num_heads": options.heads}
    encoder = VideoViT(image_size=size, **network)
    clips = torch.randn(options.clips, 1, *size)
    rows: list[dict[str, Any]] = []
    checks, details = [], {}
    for visible in options.visible:
        calls = {str(n): step(encoder, clips, n) for n in (visible, 2 * visible)}
        seconds = interleave(calls, repeats=options.repeats)
        ratio = statistics.median(b / a for a, b in zip(*seconds.values(), strict=True))
        for name in calls:
            rows.append({"what": "encoder step", "visible_tokens": int(name), **milliseconds(seconds, name)})
        checks.append(Check(f"t({2 * visible}) / t({visible}) visible tokens", ratio, LIMIT, at_least=False))
        details[str(visible)] = seconds
    job = {"size": size, "encoder": network, "batch": options.batch, "threads": options.threads, "device": options.device}
    job |= {"precision": options.precision}
    heads = {"head_prototypes": options.head_prototypes}
    for name, args in (("", {}), ("video_mae", {}), ("cluster_distillation", heads)):
        found = peak({**job, "objective": name, "args": args})
        rows.append({"what": f"peak memory, {name or 'nothing trained'}", "clips": options.batch, **found})
    notes = [
        f"{options.frames} frames of {options.size} x {options.size}; memory on {options.device}, {options.precision}, weights and AdamW moments "
        "included; on the CPU Python and torch too",
        "the timed step is float32 on the CPU; patches of all tokens are embedded before those hidden are dropped",
    ]
    return finish(Result("video_step", rows, checks, vars(options), notes, details), options.out)


if __name__ == "__main__":
    main()
