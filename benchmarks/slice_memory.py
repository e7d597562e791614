"""Peak memory of one training step of `slice_volume` on a long volume, slices embedded in chunks.

    python -m benchmarks.slice_memory

Forward, backward and optimiser step on one float32 volume of 400 slices of 224 x 224, on the CPU, each in a process of its own
that reports its high-water mark (VmHWM). The same network on two chunks shows that the peak does not grow with the slices, and on
a few slices without chunks what one slice costs when everything is kept. Linux only.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import Check, Result, finish, parser

GROWTH = 1.5
"""How many times the memory of two chunks a long volume may take; the volume itself is part of it."""
ROOT = Path(__file__).resolve().parents[1]
CHILD = """
import json, sys, time
import torch
from medssl.encoders.slice_volume import SliceVolumeEncoder

job = json.loads(sys.argv[1])
torch.manual_seed(0)
torch.set_num_threads(job["threads"])
if job["slices"]:
    encoder = SliceVolumeEncoder(slice_encoder={"model": job["model"]}, pool="stages", chunk=job["chunk"])
    optimiser = torch.optim.AdamW(encoder.parameters(), lr=1e-4)
    volume = torch.rand(1, 1, job["size"], job["size"], job["slices"])
    z_mm = 2.5 * torch.arange(job["slices"])[None]
    begin = time.perf_counter()
    encoder.forward_features(volume, z_mm=z_mm).pooled.square().sum().backward()
    optimiser.step()
    seconds = time.perf_counter() - begin
else:
    encoder, seconds = SliceVolumeEncoder(slice_encoder={"model": job["model"]}), 0.0
peak = dict(line.split(":", 1) for line in open("/proc/self/status"))["VmHWM"].split()[0]
print(json.dumps({"peak_gb": int(peak) * 1024 / 1e9, "seconds": seconds}))
"""


def run(model: str, slices: int, chunk: int, size: int, threads: int) -> dict[str, float]:
    """Train one step in a fresh process; with no slices, build the network and do nothing."""
    job = json.dumps({"model": model, "slices": slices, "chunk": chunk, "size": size, "threads": threads})
    done = subprocess.run([sys.executable, "-c", CHILD, job], capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        raise RuntimeError(f"{model} on {slices} slices ended with {done.returncode}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options_parser = parser(__doc__, repeats=1)
    options_parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50"])
    options_parser.add_argument("--slices", type=int, default=400)
    options_parser.add_argument("--chunk", type=int, default=16)
    options_parser.add_argument("--whole", type=int, default=32, help="slices of the run that keeps everything")
    options_parser.add_argument("--size", type=int, default=224)
    options_parser.add_argument("--threads", type=int, default=2)
    options = options_parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    checks = []
    for model in options.models:
        runs = {
            "nothing trained": (0, options.chunk),
            f"{2 * options.chunk} slices in chunks": (2 * options.chunk, options.chunk),
            f"{options.slices} slices in chunks": (options.slices, options.chunk),
            f"{options.whole} slices at once": (options.whole, options.whole),
        }
        peaks = {}
        for name, (slices, chunk) in runs.items():
            found = [run(model, slices, chunk, options.size, options.threads) for _ in range(options.repeats)]
            peaks[name] = max(one["peak_gb"] for one in found)
            seconds = min(one["seconds"] for one in found)
            rows.append({"model": model, "run": name, "peak_gb": peaks[name], "step_s": seconds, "slices": slices})
        bare, two, chunked, whole = peaks.values()
        per_slice = (whole - bare) / options.whole
        rows.append(
            {"model": model, "run": f"{options.slices} slices at once, extrapolated", "peak_gb": bare + options.slices * per_slice}
        )
        what = f"{model}, peak for {options.slices} slices against {2 * options.chunk}, both in chunks"
        checks.append(Check(what, chunked / two, GROWTH, at_least=False))
    notes = [
        f"float32, slices {options.size} x {options.size}, chunk {options.chunk}, AdamW; peaks include Python, torch, weights, moments",
        "at once, extrapolated: the network alone plus the slices of the run that keeps everything, linearly",
    ]
    return finish(Result("slice_memory", rows, checks, vars(options), notes), options.out)


if __name__ == "__main__":
    main()
