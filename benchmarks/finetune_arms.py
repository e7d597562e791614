"""Standalone study: what makes few-label fine-tuning on hippocampus unstable. Scores on the 20 validation cases, never on test.

Plain MONAI, outside the package on purpose: it was written to choose the defaults that docs/fine_tuning.md explains. Every finished arm
is one line of benchmarks/results/finetune_arms.jsonl.
"""

import argparse
import csv
import json
import math
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from monai.networks.nets import SegResNet

torch.set_num_threads(1)
D = Path(__file__).resolve().parents[2] / "shared" / "data" / "msd_hippocampus"


def load(split, n=None):
    with open(D / "split.csv") as stream:
        rows = [r for r in csv.DictReader(stream) if r["split"] == split]
    if split == "train":
        rows.sort(key=lambda r: int(r["few_label_rank"]))
    out = []
    for r in rows[:n]:
        x = np.asanyarray(nib.as_closest_canonical(nib.load(D / "images" / r["file"])).dataobj).astype(np.float32)
        y = np.asanyarray(nib.as_closest_canonical(nib.load(D / "labels" / r["file"])).dataobj).astype(np.int64)
        out.append(((x - x.mean()) / x.std(), y))
    return out


def padto(a, size, val=0):
    p = [max(0, s - n) for s, n in zip(size, a.shape)]
    return np.pad(a, [(q // 2, q - q // 2) for q in p], constant_values=val)


def crop(rng, x, y, size, fg):
    x, y = padto(x, size), padto(y, size)
    hi = [n - s for n, s in zip(x.shape, size)]
    if rng.random() < fg:
        c = rng.integers(1, 3)
        pts = np.argwhere(y == c)
        p = pts[rng.integers(len(pts))]
        st = [int(np.clip(q - s // 2, 0, h)) for q, s, h in zip(p, size, hi)]
    else:
        st = [int(rng.integers(0, h + 1)) for h in hi]
    sl = tuple(slice(a, a + s) for a, s in zip(st, size))
    return x[sl], y[sl]


def augment(rng, x, y, kind):
    # x (1,1,*s) float, y (1,1,*s)
    if kind == "none":
        return x, y
    rot = 15 if kind in ("light", "strong") else 0
    a = [math.radians(rng.uniform(-rot, rot)) for _ in range(3)]
    sc = rng.uniform(*((0.9, 1.1) if kind == "light" else (0.8, 1.25)))
    c, s = np.cos, np.sin
    Rx = np.array([[1, 0, 0], [0, c(a[0]), -s(a[0])], [0, s(a[0]), c(a[0])]])
    Ry = np.array([[c(a[1]), 0, s(a[1])], [0, 1, 0], [-s(a[1]), 0, c(a[1])]])
    Rz = np.array([[c(a[2]), -s(a[2]), 0], [s(a[2]), c(a[2]), 0], [0, 0, 1]])
    M = Rx @ Ry @ Rz * sc
    size = np.array(x.shape[2:][::-1], float)
    A = np.diag(1 / size) @ M @ np.diag(size)
    th = torch.tensor(np.c_[A, np.zeros(3)], dtype=torch.float32)[None]
    g = F.affine_grid(th, x.shape, align_corners=False)
    x = F.grid_sample(x, g, padding_mode="border", align_corners=False)
    y = F.grid_sample(y.float(), g, mode="nearest", padding_mode="zeros", align_corners=False).long()
    x = x * rng.uniform(0.8, 1.2) + rng.uniform(-0.2, 0.2)
    if rng.random() < 0.3:
        x = x + torch.from_numpy(rng.standard_normal(x.shape).astype(np.float32)) * 0.1 * rng.random()
    if rng.random() < 0.3:
        lo, hi = x.min(), x.max()
        x = ((x - lo) / (hi - lo)).pow(float(rng.uniform(0.7, 1.5))) * (hi - lo) + lo
    return x, y


def loss_fn(z, y, o):
    z = z.float()
    p = z.softmax(1)
    t = F.one_hot(y[:, 0], 3).movedim(-1, 1).float()
    L = 0
    if "ce" in o.loss.split("+"):
        w = torch.tensor([1.0, o.cew, o.cew]) if o.cew != 1 else None
        L = L + F.cross_entropy(z, y[:, 0], weight=w)
    if "dice" in o.loss:
        dims = (0, 2, 3, 4) if o.batchdice else (2, 3, 4)
        i = (p * t).sum(dims)
        s = p.sum(dims) + t.sum(dims)
        d = 1 - (2 * i + 1e-5) / (s + 1e-5)
        if not o.bg:
            d = d[..., 1:]
        L = L + d.mean()
    return L


def dice(p, y):
    return [2 * ((p == c) & (y == c)).sum() / max(1, (p == c).sum() + (y == c).sum()) for c in (1, 2)]


@torch.no_grad()
def evaluate(net, cases, o, sliding=False):
    net.eval()
    r = []
    for x, y in cases:
        xt = torch.from_numpy(x)[None, None]
        if sliding:
            from monai.inferers import sliding_window_inference

            z = sliding_window_inference(xt, o.size, 4, net, overlap=0.5, mode="gaussian")
        else:
            n = [-(-k // 8) * 8 for k in x.shape]
            n = [max(a, b) for a, b in zip(n, o.size)] if o.evalfull else n
            p = [k - m for k, m in zip(n, x.shape)]
            q = [v for k in p[::-1] for v in (k // 2, k - k // 2)]
            z = net(F.pad(xt, q).to(memory_format=torch.channels_last_3d))
            z = z[(..., *tuple(slice(k // 2, k // 2 + m) for k, m in zip(p, x.shape)))]
        r.append(dice(z.argmax(1)[0].numpy(), y))
    net.train()
    return np.mean(r, 0)


@torch.no_grad()
def dead(net, cases):
    out = {}
    h = net.conv_final[1].register_forward_hook(lambda m, i, z: out.__setitem__("f", z.detach().clone()))
    r = []
    conf = []
    for x, y in cases:
        n = [-(-k // 8) * 8 for k in x.shape]
        xt = F.pad(torch.from_numpy(x)[None, None], [v for k, m in zip(x.shape[::-1], n[::-1]) for v in (0, m - k)])
        z = net(xt).softmax(1)[0][:, : x.shape[0], : x.shape[1], : x.shape[2]].numpy()
        conf.append([[z[k][y == c].mean() for k in range(3)] for c in range(3)])
        f = out["f"][0][:, : x.shape[0], : x.shape[1], : x.shape[2]].numpy()
        alldead = (f <= 0).all(0)
        r.append([alldead[y == c].mean() for c in range(3)] + [(f > 0).mean()])
    h.remove()
    return [round(float(v), 3) for v in np.mean(r, 0)], [round(float(v), 3) for v in (f > 0).mean((1, 2, 3))]


def main():
    a = argparse.ArgumentParser()
    a.add_argument("--tag", required=True)
    a.add_argument("--n", type=int, default=5)
    a.add_argument("--seed", type=int, default=0)
    a.add_argument("--size", type=int, nargs=3, default=[32, 40, 32])
    a.add_argument("--batch", type=int, default=2)
    a.add_argument("--steps", type=int, default=400)
    a.add_argument("--lr", type=float, default=1e-3)
    a.add_argument("--wd", type=float, default=1e-5)
    a.add_argument("--warm", type=int, default=0)
    a.add_argument("--cos", type=int, default=0)
    a.add_argument("--clip", type=float, default=0)
    a.add_argument("--loss", default="dice+ce")
    a.add_argument("--batchdice", type=int, default=0)
    a.add_argument("--bg", type=int, default=1)
    a.add_argument("--cew", type=float, default=1)
    a.add_argument("--aug", default="none")
    a.add_argument("--fg", type=float, default=0.5)
    a.add_argument("--init", type=int, default=8)
    a.add_argument("--blocks", type=int, nargs=4, default=[1, 2, 2, 4])
    a.add_argument("--norm", default="group")
    a.add_argument("--evalfull", type=int, default=0)
    a.add_argument("--every", type=int, default=100)
    a.add_argument("--opt", default="adamw")
    a.add_argument("--beta2", type=float, default=0.999)
    a.add_argument("--ncurve", type=int, default=8)
    a.add_argument("--init_scheme", default="default")
    a.add_argument("--sliding", type=int, default=0)
    a.add_argument("--headbias", type=int, default=0)
    a.add_argument("--headzero", type=int, default=0)
    a.add_argument("--act", default="relu")
    a.add_argument("--both", type=int, default=0)
    o = a.parse_args()
    tr = load("train", o.n)
    va = load("val")
    torch.manual_seed(o.seed)
    rng = np.random.default_rng(o.seed)
    norm = {"group": ("GROUP", {"num_groups": 8}), "instance": ("INSTANCE", {"affine": True}), "batch": "BATCH"}[o.norm]
    net = SegResNet(
        3,
        init_filters=o.init,
        in_channels=1,
        out_channels=3,
        blocks_down=o.blocks,
        blocks_up=(1, 1, 1),
        norm=norm,
        act=("RELU", {"inplace": True}) if o.act == "relu" else ("LEAKYRELU", {"negative_slope": 0.01, "inplace": True}),
    )
    if o.headbias:
        f = np.array([np.mean([(y == c).mean() for _, y in tr]) for c in range(3)])
        net.conv_final[2].conv.bias.data = torch.log(torch.tensor(f, dtype=torch.float32))
    if o.headzero:
        net.conv_final[2].conv.weight.data.mul_(0.1)
    if o.init_scheme == "kaiming":
        for m in net.modules():
            if isinstance(m, torch.nn.Conv3d):
                torch.nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
    net = net.to(memory_format=torch.channels_last_3d)
    opt = (
        torch.optim.AdamW(net.parameters(), o.lr, weight_decay=o.wd, betas=(0.9, o.beta2))
        if o.opt == "adamw"
        else torch.optim.SGD(net.parameters(), o.lr, momentum=0.99, nesterov=True, weight_decay=3e-5)
    )
    trd = []
    t0 = time.perf_counter()
    curve = []
    ls = []
    gn = []
    tc = 0
    for s in range(o.steps):
        c0 = time.process_time()
        lr = (
            o.lr
            * min(1, (s + 1) / max(1, o.warm))
            * (0.5 * (1 + math.cos(math.pi * max(0, s - o.warm) / (o.steps - o.warm))) if o.cos else 1)
        )
        for g in opt.param_groups:
            g["lr"] = lr
        xs, ys = [], []
        for _b in range(o.batch):
            i = rng.integers(len(tr))
            x, y = crop(rng, *tr[i], o.size, o.fg)
            x, y = augment(rng, torch.from_numpy(x.copy())[None, None], torch.from_numpy(y.copy())[None, None], o.aug)
            xs.append(x)
            ys.append(y)
        x = torch.cat(xs).to(memory_format=torch.channels_last_3d)
        y = torch.cat(ys)
        z = net(x)
        L = loss_fn(z, y, o)
        if (s + 1) % o.every >= o.every - 20 or (s + 1) % o.every == 0:
            q = z.detach().argmax(1)
            trd.append(
                [float(2 * ((q == c) & (y[:, 0] == c)).sum() / max(1, (q == c).sum() + (y[:, 0] == c).sum())) for c in (1, 2)]
            )
        opt.zero_grad()
        L.backward()
        g = torch.nn.utils.clip_grad_norm_(net.parameters(), o.clip if o.clip else 1e9)
        gn.append(float(g))
        opt.step()
        ls.append(L.item())
        tc += time.process_time() - c0
        if (s + 1) % o.every == 0 or s + 1 == o.steps:
            last = s + 1 == o.steps
            d = evaluate(net, va if last else va[: o.ncurve], o, sliding=bool(o.sliding) and last)
            curve.append(
                [
                    s + 1,
                    round(float(np.mean(ls[-o.every :])), 3),
                    round(float(np.mean(gn[-o.every :])), 2),
                    *[round(float(v), 3) for v in d],
                ]
            )
            extra = [round(float(v), 3) for v in np.mean(trd, 0)]
            trd = []
            if o.both:
                extra += ["sw", *[round(float(v), 3) for v in evaluate(net, va[:4], o, sliding=True)]]
            extra += ["dead", *dead(net, va[:4])]
            curve[-1] = [*curve[-1][:3], extra, *curve[-1][3:]]
            print(o.tag, o.seed, curve[-1], f"{time.perf_counter() - t0:.0f}s cpu/step {tc / (s + 1):.2f}", flush=True)
    rec = {
        **vars(o),
        "curve": curve,
        "dice": curve[-1][-2:],
        "mean": round(float(np.mean(curve[-1][-2:])), 3),
        "cpu_s_per_step": round(tc / o.steps, 3),
        "wall": round(time.perf_counter() - t0),
    }
    with open(Path(__file__).parent / "results" / "finetune_arms.jsonl", "a") as f:
        f.write(json.dumps(rec) + "\n")


if __name__ == "__main__":
    main()
