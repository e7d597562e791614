"""The objective of one stage, wrapped for one process, DDP or FSDP, with its optimiser; and plain copies of the parts it exports."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from medssl.errors import RequestError, TrainingStopped
from medssl.training import checkpoint, distributed
from medssl.training.distributed import World
from medssl.training.optim import OptimSettings, build_optimiser, layer_scales, parameter_groups
from medssl.training.settings import LoopSettings, Stage
from medssl.types import Part, Source
from medssl.weights import save_part


class Engine:
    """One stage's objective, wrapped, with its optimiser.

    Args:
        objective: The bare objective.
        stage: The stage.
        settings: The loop's settings.
        world: This process.
        find_unused: True exactly when there are several sources.
        encoders: The encoders inside the objective, whose `blocks` are sharded, compiled and checkpointed.
        frozen: Names of parameters that no stage may thaw.
        first: False in later stages: blocks are compiled already, and an FSDP-sharded objective cannot be unwrapped and is used again.
    """

    def __init__(
        self,
        objective: nn.Module,
        stage: Stage,
        settings: LoopSettings,
        world: World,
        *,
        find_unused: bool,
        encoders: Sequence[Any],
        frozen: set[str],
        first: bool,
    ) -> None:
        self.objective = objective
        self.stage = stage
        self.strategy = distributed.choose_strategy(settings.strategy, world)
        blocks = [block for encoder in encoders for block in encoder.blocks]
        set_trainable(objective, stage.train, frozen)
        if first:
            for encoder in encoders:
                encoder.checkpoint_blocks = settings.checkpoint_blocks
            if settings.compile:
                for block in blocks:
                    block.compile()
        if self.strategy == "fsdp" and not first:
            self.model: nn.Module = objective
        else:
            self.model = distributed.wrap(objective, self.strategy, world, blocks=blocks, find_unused=find_unused)
        scales = self._layer_scales(encoders, stage.optim)
        groups = parameter_groups(objective.named_parameters(), stage.optim, scales)
        if not groups:
            raise RequestError(f"stage {stage.name}: train patterns {list(stage.train)} match no trainable parameter")
        self.optimiser = build_optimiser(groups, stage.optim)
        self.seen_sources: set[str] = set()
        self.without_gradient = {n for n, p in objective.named_parameters() if p.requires_grad}

    def _layer_scales(self, encoders: Sequence[Any], optim: OptimSettings) -> dict[str, float] | None:
        if optim.layer_decay is None:
            return None
        modules = {id(module): name for name, module in self.objective.named_modules()}
        scales: dict[str, float] = {}
        for encoder in encoders:
            prefixes = {modules[id(block)] + ".": i + 1 for i, block in enumerate(encoder.blocks)}
            root = modules[id(encoder)] + "."
            names = [n for n, _ in self.objective.named_parameters() if n.startswith(root)]
            depth = len(prefixes) + 1
            stem = {n: 0 for n in names if not n.startswith(tuple(prefixes)) and ".norm." not in n[len(root) - 1 :]}
            scales.update(layer_scales(names, {**prefixes, **stem}, depth, optim.layer_decay))
        return scales

    def parameters(self) -> list[nn.Parameter]:
        """Parameters in the optimiser."""
        return [p for group in self.optimiser.param_groups for p in group["params"]]

    def note_gradients(self, source: Source, sources: Mapping[str, Source]) -> None:
        """Remember which parameters received a gradient; once all sources were seen, one without stops the run by name."""
        if not self.without_gradient:
            return
        grads = {n for n, p in self.objective.named_parameters() if p.grad is not None}
        self.without_gradient -= grads
        self.seen_sources.add(source.name)
        if self.without_gradient and self.seen_sources == set(sources):
            names = sorted(self.without_gradient)
            raise TrainingStopped(
                f"stage {self.stage.name}: {len(names)} trainable parameter(s) got no gradient from any source, first {names[0]}; "
                "set requires_grad False where no path uses a parameter, or leave it out of the stage's train patterns"
            )


def frozen_names(objective: nn.Module) -> set[str]:
    """Names of parameters that are frozen by construction (teachers, parameters no path uses); no stage thaws them."""
    return {name for name, parameter in objective.named_parameters() if not parameter.requires_grad}


def set_trainable(objective: nn.Module, patterns: Sequence[str], frozen: set[str]) -> None:
    """Set requires_grad by name patterns."""
    for name, parameter in objective.named_parameters():
        wanted = name not in frozen and any(fnmatchcase(name, pattern) for pattern in patterns)
        parameter.requires_grad_(wanted)


class PartKeeper:
    """Makes full, unwrapped copies of the exported parts, for probes and for `weights/`.

    Must be built before wrapping: the copies keep the plain modules.
    """

    def __init__(self, objective: Any) -> None:
        self.parts: dict[str, Part] = objective.exported() if hasattr(objective, "exported") else {}
        names = {id(module): name for name, module in objective.named_modules()}
        self.prefixes = {name: names[id(part.module)] + "." for name, part in self.parts.items()}
        self.copies: dict[str, nn.Module] = {}
        made: dict[int, nn.Module] = {}
        for name, part in self.parts.items():
            if id(part.module) not in made:
                made[id(part.module)] = copy.deepcopy(part.module).eval().requires_grad_(False)
            self.copies[name] = made[id(part.module)]

    def gather(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the parts as plain modules in eval mode with the current weights. All ranks must call."""
        state = checkpoint.gathered_state(model)
        for name, module in self.copies.items():
            prefix = self.prefixes[name]
            module.load_state_dict({k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)})
            module.eval()
        return self.copies

    def write(self, copies: Mapping[str, nn.Module], folder: Any, facts: Mapping[str, Any]) -> None:
        """Write every part as safetensors with its manifest."""
        for name, part in self.parts.items():
            state = {
                key[len(part.prefix) :]: value
                for key, value in copies[name].state_dict().items()
                if key.startswith(part.prefix) and (part.keys is None or key[len(part.prefix) :].startswith(part.keys))
            }
            save_part(folder, name, state, {**part.manifest, **facts})
