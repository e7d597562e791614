"""The training loop: visible, one path for one process, DDP and FSDP.

The loop knows protocols only (`types.Objective`, `types.Source`). What happens in a step, in order:

1. views of all micro-steps are made, so that denominators can be summed over micro-steps and ranks before the first forward;
2. for each micro-step: the global generator is reseeded by (seed, step, micro-step, rank), forward, backward;
3. gradients are clipped, the optimiser steps, teachers move, `objective.after_step` runs;
4. metrics, monitors and probes, checkpoint, signals.

Everything a step needs is a pure function of (seed, step), so a resumed run needs no generator state.
"""

from __future__ import annotations

import json
import logging
import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from medssl.errors import CheckpointError, MedsslError, RequestError, TrainingStopped
from medssl.seeding import derive_seed
from medssl.training import checkpoint, distributed
from medssl.training.distributed import World
from medssl.training.ema import update_ema
from medssl.training.engine import Engine, PartKeeper, frozen_names
from medssl.training.monitors import check_finite
from medssl.training.optim import carry_moments, set_lr
from medssl.training.prefetch import Prefetcher
from medssl.training.run_folder import RunFolder
from medssl.training.schedules import schedule_value
from medssl.training.settings import LoopSettings, Stage
from medssl.types import ProbeCallback, Source, StepContext, Views
from medssl.weights import write_atomic

logger = logging.getLogger(__name__)
StepCallback = Callable[[int, int, Mapping[str, float]], None]
Embedder = Callable[[Mapping[str, nn.Module], str], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Callback:
    """Something that looks at frozen parts every so many steps, for instance a live probe.

    Args:
        every: Steps between calls; it also runs after the last step.
        call: (step, {part: module in eval mode}) -> metrics. Runs on rank 0. May raise TrainingStopped.
        best_by: One of its metrics, higher is better, that decides which weights are kept as `weights/best`; None decides nothing.
        labels: Labelled items that this metric has seen, recorded with `weights/best`: a table row may only use those weights
            when its label budget holds these labels.
    """

    every: int
    call: ProbeCallback
    best_by: str | None = None
    labels: int = 0


@contextmanager
def stop_signals(state: dict[str, bool]) -> Any:
    """Set state["stop"] on SIGTERM, SIGUSR1 or Ctrl-C (state["keyboard"] too), and put the old handlers back afterwards.

    A second Ctrl-C does not wait for the step.
    """
    previous: dict[int, Any] = {}

    def handler(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if state.get("keyboard"):
                raise KeyboardInterrupt
            state["keyboard"] = True
            logger.warning("stopping after this step, with everything saved; press Ctrl-C again to stop at once")
        state["stop"] = True

    for caught in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        try:
            previous[caught] = signal.signal(caught, handler)
        except ValueError:  # not in the main thread: nothing to catch
            continue
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def train(
    objective: Any,
    sources: Mapping[str, Source],
    *,
    stages: Sequence[Stage],
    settings: LoopSettings,
    run: RunFolder,
    world: World,
    encoders: Sequence[Any],
    callbacks: Sequence[Callback] = (),
    manifest: Mapping[str, Any] | None = None,
    items_hash: str = "",
    resume: bool = False,
    on_step: StepCallback | None = None,
    embedder: Embedder | None = None,
) -> str:
    """Train an objective; see the module's docstring.

    Args:
        objective: Bare module, already on `world.device`.
        sources: Name -> source.
        stages: At least one.
        settings: See `LoopSettings`.
        run: Where everything is written; already created.
        world: This process.
        encoders: Encoders inside the objective.
        callbacks: Monitors and probes.
        manifest: Facts that every weight manifest carries (spacing, intensity, licence, hashes).
        items_hash: Hash of items.parquet; a checkpoint of another table is refused.
        resume: Continue from the newest checkpoint.
        embedder: ({part: module}, source name) -> (ids, features) in id order with evaluation views, for an `objective.on_epoch` that
            calls its `embed`; without one, `on_epoch` is called all the same.
        on_step: Called on rank 0 after each logged step with (steps done, steps in all, metrics).

    Returns:
        `finished` or `interrupted` (a signal came, everything is saved).

    Raises:
        KeyboardInterrupt: Ctrl-C; everything is saved before.
        TrainingStopped: A monitor stopped the run.
        CheckpointError: The checkpoint belongs to another items table or seed, or is cut short.
        StoreError: The disk is full.
    """
    total = sum(stage.steps for stage in stages)
    start, newest = _resume_point(run, settings, items_hash, world) if resume else (0, None)
    if newest is not None and world.is_main:
        _note_processes(run, objective, start, checkpoint.read_meta(newest)["world_size"], world.size)
    keeper = PartKeeper(objective)
    frozen = frozen_names(objective)
    prefetcher = Prefetcher(sources, settings, world, total)
    job = _Job(sources, settings, run, world, keeper, prefetcher, callbacks, manifest or {}, items_hash, total, on_step, embedder)
    flags = {"stop": False}
    engine: Engine | None = None
    first = 0
    _state(run, world, "running")
    try:
        with stop_signals(flags):
            for index, stage in enumerate(stages):
                last = first + stage.steps
                if start < last or (index == len(stages) - 1):
                    old = engine.optimiser if engine else None
                    engine = Engine(
                        objective,
                        stage,
                        settings,
                        world,
                        find_unused=len(sources) > 1,
                        encoders=encoders,
                        frozen=frozen,
                        first=engine is None,
                    )
                    if old is not None:
                        carry_moments(old, engine.optimiser)
                    if newest is not None and start < last:
                        checkpoint.load(newest, engine.model, engine.optimiser, world)
                        newest = None
                    steps = _Steps(engine, job)
                    if steps.run(max(start, first), first, last, index, flags):
                        _state(run, world, "interrupted")
                        status = "interrupted"
                        break
                first = last
            else:
                status = "finished"
                _state(run, world, status)
    except KeyboardInterrupt:  # the second one, in the middle of a step
        _state(run, world, "interrupted")
        raise
    except MedsslError as err:
        _state(run, world, "failed", str(err))
        raise
    finally:
        prefetcher.close()
    if distributed.any_rank(flags.get("keyboard", False), world):  # whoever pressed it wants all to stop, a loop over runs too
        raise KeyboardInterrupt
    return status


def _state(run: RunFolder, world: World, status: str, message: str = "") -> None:
    if world.is_main:
        try:
            run.update(status=status, message=message)
        except MedsslError:  # the disk may be full: the error that led here matters more
            if status != "failed":
                raise


def _resume_point(run: RunFolder, settings: LoopSettings, items_hash: str, world: World) -> tuple[int, Any]:
    """Find the newest checkpoint and check that it belongs to this run."""
    folders = checkpoint.step_folders(run.checkpoints)
    if not folders:
        if world.is_main:
            run.truncate_metrics(-1)
        return 0, None
    meta = checkpoint.read_meta(folders[-1])
    if meta["items_hash"] != items_hash:
        raise CheckpointError(
            f"{folders[-1]} was made with another items table (hash {meta['items_hash'][:8]}, now {items_hash[:8]}): ids would mean other "
            "images; restore the archive, or start a new run and give it these weights"
        )
    for name in ("seed", "batch"):
        if meta[name] != getattr(settings, name):
            raise CheckpointError(
                f"{folders[-1]} was made with train.{name}={meta[name]}, now {getattr(settings, name)}; resume with the recipe of the run"
            )
    if world.is_main:
        run.truncate_metrics(meta["step"])
    return int(meta["step"]), folders[-1]


def _note_processes(run: RunFolder, objective: nn.Module, step: int, before: int, now: int) -> None:
    """Say, in the log and in run.json, when a resumed run with dropout goes on with another number of processes."""
    if before == now or not distributed.drops_at_random(objective):
        return
    note = (
        f"step {step}: resumed on {now} process(es) after {before}; dropout and drop path draw per process, so from here on the numbers are "
        f"not those of a run on {before}; the order of the data is the same"
    )
    logger.warning(note)
    run.update(notes=[*run.read().get("notes", []), note])


@dataclass(frozen=True)
class _Job:
    """What stays the same over all stages of a run; the names are those of `train`."""

    sources: Mapping[str, Source]
    settings: LoopSettings
    run: RunFolder
    world: World
    keeper: PartKeeper
    prefetcher: Prefetcher
    callbacks: Sequence[Callback]
    manifest: Mapping[str, Any]
    items_hash: str
    total: int
    on_step: StepCallback | None
    embedder: Embedder | None


class _Steps:
    """The steps of one stage; split from `train` so that each piece can be read on its own."""

    def __init__(self, engine: Engine, job: _Job) -> None:
        self.engine = engine
        self.job = job
        self.items = sum(len(source) for source in job.sources.values())
        self.saved_at = -1

    def run(self, start: int, first: int, last: int, stage_index: int, flags: Mapping[str, bool]) -> bool:
        """Run steps start..last-1; True when a signal stopped them (everything is saved then)."""
        waited = worked = 0.0
        timed = 0
        for step in range(start, last):
            begin = time.perf_counter()
            self.epoch(step, stage_index)
            source, fetched = self.job.prefetcher.get(step)
            waited += time.perf_counter() - begin
            metrics = self.step(step, first, stage_index, source, fetched)
            done = step + 1
            stop = distributed.any_rank(flags["stop"], self.job.world)
            due = done % self.job.settings.checkpoint_every == 0 or done == last or stop
            logged = done % self.job.settings.log_every == 0 or due or step == 0
            reduced = self.reduce(metrics) if logged else {}  # waits for the device: before the clock is read
            worked += time.perf_counter() - begin
            timed += 1
            if logged:
                check_finite(reduced["loss"], reduced["grad_norm"], step)
                reduced["data_wait"] = waited / max(worked, 1e-9)
                reduced["seconds_per_step"] = worked / timed
                waited, worked, timed = 0.0, 0.0, 0
                self.log(done, reduced)
            self.callback(done, done == self.job.total)
            if due:
                self.save(done, stage_index)
            if stop and done < self.job.total:
                return True
        return False

    def step(self, step: int, first: int, stage_index: int, source: Source, fetched: Sequence[Any]) -> dict[str, Tensor | float]:
        """One optimiser step; returns metrics that still live on the device."""
        engine, settings, world = self.engine, self.job.settings, self.job.world
        optim = engine.stage.optim
        lr = schedule_value(
            optim.schedule, step - first, engine.stage.steps, optim.lr, optim.final_lr, optim.warmup_steps, optim.anneal_steps
        )
        set_lr(engine.optimiser, lr)
        views = [source.views(item, world.device) for item in fetched]
        micro_steps = len(views)
        ctx = StepContext(
            step=step,
            epoch=step * settings.batch // max(self.items, 1),
            stage=stage_index,
            seed=settings.seed,
            rank=world.rank,
            world_size=world.size,
            micro_steps=micro_steps,
            schedules={"lr": lr, **self.schedules(step)},
            totals=self.totals(views),
            loss_weights=engine.stage.loss_weights,
        )
        engine.model.train()
        sums: dict[str, Tensor] = {}
        for micro, batch in enumerate(views):
            torch.manual_seed(derive_seed(settings.seed, step, micro, world.rank))
            with distributed.gradient_sync(engine.model, engine.strategy, micro == micro_steps - 1), self.autocast():
                parts = engine.model(batch, ctx)
                (parts["loss"] / micro_steps).backward()
            for name, value in parts.items():
                sums[name] = sums.get(name, torch.zeros((), device=world.device)) + value.detach().float() / micro_steps
        engine.note_gradients(source, self.job.sources)
        limit = optim.clip_grad if optim.clip_grad is not None else float("inf")
        grad_norm = distributed.full(nn.utils.clip_grad_norm_(engine.parameters(), limit))
        engine.optimiser.step()
        engine.optimiser.zero_grad(set_to_none=True)
        self.after(ctx)
        return {**sums, "grad_norm": grad_norm.detach(), "lr": lr}

    def epoch(self, step: int, stage_index: int) -> None:
        """Tell the objective that an epoch begins; it may cluster what it remembers, or ask for the features of all items."""
        objective: Any = self.engine.objective
        epoch, into = divmod(step * self.job.settings.batch, max(self.items, 1))
        if into >= self.job.settings.batch or not hasattr(objective, "on_epoch"):
            return
        ctx = StepContext(
            step=step,
            epoch=epoch,
            stage=stage_index,
            seed=self.job.settings.seed,
            rank=self.job.world.rank,
            world_size=self.job.world.size,
        )
        objective.on_epoch(ctx, self.embed)

    def embed(self, source: str) -> tuple[Tensor, Tensor]:
        """Return (ids, features) of all items of a source, by frozen copies of the parts; all ranks must call.

        Raises:
            RequestError: The run was started without an embedder.
        """
        if self.job.embedder is None:
            raise RequestError(
                f"the objective asks for the features of source {source}, and this run has nobody to make them; "
                "give `train` an embedder (`medssl pretrain` does)"
            )
        return self.job.embedder(self.copies(), source)

    def copies(self) -> dict[str, nn.Module]:
        """Return frozen copies of the parts; all ranks must call."""
        distributed.average_running_statistics(self.engine.model, self.job.world)
        return self.job.keeper.gather(self.engine.model)

    def schedules(self, step: int) -> dict[str, float]:
        """Values of the objective's own schedules (teacher momentum and the like) at a step of the run."""
        named = getattr(self.engine.objective, "schedules", None)
        return named(step, self.job.total) if named else {}

    def totals(self, views: Sequence[Views]) -> dict[str, float]:
        """Sum the objective's denominators over micro-steps and ranks."""
        if not hasattr(self.engine.objective, "denominators"):
            return {}
        with torch.no_grad():
            counts = [self.engine.objective.denominators(batch) for batch in views]  # type: ignore[operator]
        return distributed.sum_over_ranks({name: sum(c[name].double() for c in counts) for name in counts[0]}, self.job.world)

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast to bfloat16, or nothing."""
        if self.job.settings.precision == "bf16":
            return torch.autocast(self.job.world.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def after(self, ctx: StepContext) -> None:
        """Move teachers, then let the objective do its bookkeeping."""
        objective: Any = self.engine.objective
        if hasattr(objective, "ema_pairs"):
            for student, teacher, schedule in objective.ema_pairs():
                update_ema(student, teacher, ctx.schedules[schedule])
        if hasattr(objective, "after_step"):
            objective.after_step(ctx)

    def reduce(self, metrics: Mapping[str, Tensor | float]) -> dict[str, float]:
        """Average losses over ranks; gradient norm and rate are equal on all."""
        summed = distributed.sum_over_ranks(metrics, self.job.world)
        return {name: value / self.job.world.size for name, value in summed.items()}

    def log(self, done: int, metrics: Mapping[str, float]) -> None:
        """Write one line of metrics and tell the caller."""
        if self.job.world.is_main:
            self.job.run.log({"step": done, **metrics})
            if self.job.on_step:
                self.job.on_step(done, self.job.total, metrics)

    def callback(self, done: int, at_end: bool) -> None:
        """Run the monitors and probes that are due, on rank 0, on frozen copies."""
        due = [callback for callback in self.job.callbacks if done % callback.every == 0 or at_end]
        if not due:
            return
        copies = self.copies()
        metrics: dict[str, float] = {}
        problem: str | None = None
        if self.job.world.is_main:
            try:
                for callback in due:
                    metrics.update(callback.call(done, copies))
            except TrainingStopped as err:
                problem = str(err)
        problem = distributed.broadcast(problem, self.job.world)
        self.log(done, metrics)
        chooser = next((callback for callback in due if callback.best_by in metrics), None)
        if self.job.world.is_main and chooser and copies:
            self.keep_best(done, copies, chooser, metrics[str(chooser.best_by)])
        if problem:
            self.save(done, -1)
            raise TrainingStopped(problem)

    def save(self, done: int, stage_index: int) -> None:
        """Write a checkpoint and the weights."""
        if self.saved_at == done:
            return
        meta = {
            "stage": stage_index,
            "stage_name": self.engine.stage.name,
            "items_hash": self.job.items_hash,
            "seed": self.job.settings.seed,
            "batch": self.job.settings.batch,
            "world_size": self.job.world.size,
        }
        copies = self.copies()
        checkpoint.save(
            self.job.run.checkpoints,
            done,
            self.engine.model,
            self.engine.optimiser,
            meta,
            self.job.settings.keep_checkpoints,
            self.job.world,
        )
        if self.job.world.is_main and copies:
            self.write_weights("last", done, copies)
        self.saved_at = done
        distributed.barrier(self.job.world)

    def keep_best(self, done: int, copies: Mapping[str, nn.Module], chooser: Callback, value: float) -> None:
        """Write `weights/best` when a probe scored higher than what is there; the file itself remembers, so a resumed run does too."""
        known = self.job.run.weights / "best" / f"{next(iter(copies))}.json"
        before = json.loads(known.read_text())["chosen_by"]["value"] if known.is_file() else -math.inf
        if value > before:  # false for NaN
            chosen = {"metric": chooser.best_by, "value": value, "labels": chooser.labels}
            self.write_weights("best", done, copies, chosen_by=chosen)

    def write_weights(self, tag: str, done: int, copies: Mapping[str, nn.Module], **facts: Any) -> None:
        """Write all parts under `weights/<tag>` and name the default part."""
        shared = {**self.job.manifest, "step": done, "items_hash": self.job.items_hash, "seed": self.job.settings.seed}
        self.job.keeper.write(copies, self.job.run.weights / tag, {**shared, **facts})
        index = {"default": next(iter(copies)), "parts": sorted(copies)}
        write_atomic(self.job.run.weights / "index.json", json.dumps(index).encode())
