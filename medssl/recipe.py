"""Recipes: YAML in, validated models out. This module knows names and types; `build` knows the classes behind them.

A fault is one sentence that starts with the dotted path of the key, and all faults of a recipe are reported together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from medssl.errors import RecipeError, RequestError, near
from medssl.yaml_models import Node, fault, marked, parse_yaml, read_mapping, shipped_folder


class Component(BaseModel):
    """A registered name and the arguments of its constructor, side by side in the YAML."""

    model_config = ConfigDict(extra="allow")
    name: str

    @property
    def args(self) -> dict[str, Any]:
        """The arguments without the name."""
        return dict(self.model_extra or {})


def _component(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


ComponentField = Annotated[Component, BeforeValidator(_component)]


def _card(value: Any) -> Any:
    table = isinstance(value, dict) and value and all(isinstance(part, str) for pair in value.items() for part in pair)
    if value is None or (isinstance(value, str) and value) or table:
        return value
    raise ValueError(
        "give one card (a name that comes with medssl, or a YAML file); an index that holds several sets takes a table "
        "{CARD: SQL condition}, for instance {msd: \"site = 'msd'\", mine.yaml: \"site = 'ours'\"}"
    )


class SourceSection(Node):
    """One source: an index query, how to read it, how to draw from it, and what views to make."""

    index: str = Field(description="Archive folder made by `medssl index`")
    card: Annotated[str | dict[str, str] | None, BeforeValidator(_card)] = Field(
        None, description="Data card of the index: a name or a YAML file; or card -> SQL condition, where it holds several sets"
    )
    where: str = Field(
        "split not in ('val', 'test')", description="SQL condition on the index; rows it cannot decide are counted and left out"
    )
    domain: ComponentField = Field(description="mri or ct")
    sampler: ComponentField = Field(
        default_factory=lambda: Component(name="crops"),
        description="crops; pairs where views.kind is pair, planes where it is image or stack, clips where it is clip",
    )
    views: dict[str, Any] = Field(
        description="kind (volume, pair, image, stack or clip) and arguments of the views: size, normalize, flip, ..."
    )
    store: str | None = Field(None, description="Store folder; default ARCHIVE/store")
    weight: float = Field(1.0, gt=0, description="Relative frequency of steps that use this source")

    @property
    def cards(self) -> dict[str, str | None]:
        """Data cards and the SQL condition of each; None is every series of the index."""
        return {} if self.card is None else {self.card: None} if isinstance(self.card, str) else dict(self.card)

    @model_validator(mode="before")
    @classmethod
    def _sampler_of_views(cls, raw: Any) -> Any:
        """A sampler without a name is the one that goes with the views."""
        if not isinstance(raw, Mapping) or not isinstance(raw.get("views"), Mapping):
            return raw
        sampler = raw.get("sampler") or {}
        if isinstance(sampler, Mapping) and "name" not in sampler:
            name = {"volume": "crops", "pair": "pairs", "clip": "clips"}.get(str(raw["views"].get("kind", "volume")), "planes")
            return {**raw, "sampler": {"name": name, **sampler}}
        return raw


class ScheduleSection(Node):
    """Learning rate over the steps of a stage."""

    name: Literal["cosine", "constant_anneal"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    final_lr: float = Field(0.0, ge=0)
    anneal_steps: int = Field(0, ge=0, description="constant_anneal: the last steps, from lr to final_lr by a half cosine")


class OptimSection(Node):
    """AdamW or SGD; norms, biases, position tables and mask tokens are never decayed."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(3e-4, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    momentum: float = Field(0.9, ge=0, lt=1)
    layer_decay: float | None = Field(None, gt=0, le=1, description="Learning-rate factor per layer below the last one")
    lr_scales: dict[str, float] = Field(default_factory=dict, description="Name pattern -> factor; 0 freezes, gradients still flow")
    clip_grad: float | None = Field(1.0, gt=0)
    schedule: ScheduleSection = ScheduleSection()


class StageSection(Node):
    """A run is a list of stages; each has its own optimiser."""

    name: str = "main"
    steps: int = Field(gt=0)
    loss_weights: dict[str, float] = Field(default_factory=dict)
    train: list[str] = Field(default_factory=lambda: ["*"], description="Patterns of parameter names that are trained")
    optim: OptimSection | None = None


class TrainSection(Node):
    """How the loop runs. `batch` is over all processes, so one recipe means one training whatever the machine."""

    steps: int = Field(1000, gt=0)
    batch: int = Field(4, gt=0, description="Items per optimiser step, over all processes and micro-steps")
    micro_batch: int | None = Field(None, gt=0, description="Items per forward pass and process; default batch / processes")
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    workers: int = Field(2, ge=0, description="Threads that read ahead")
    compile: bool = False
    checkpoint_blocks: bool = False
    checkpoint_every: int = Field(500, gt=0)
    keep_checkpoints: int = Field(2, ge=1)
    log_every: int = Field(10, gt=0)
    monitor_every: int = Field(200, gt=0)
    tensorboard: bool = Field(True, description="Event files in RUN/tensorboard")
    monitor_items: int = Field(32, ge=0, description="Items embedded for the monitors; 0 turns them off")


class ProbeSection(Node):
    """A live probe: kNN and ridge on frozen features of `val` patients."""

    every: int = Field(500, gt=0)
    table: str = Field(description="CSV with a column that names the image file and one with the target")
    file_column: str = "file"
    target: str = Field(description="Column with the target")
    task: Literal["regression", "classification"] = "regression"
    where: str = "split = 'val'"
    max_items: int = Field(200, gt=3)
    k: int = Field(5, gt=0)


class ExportSection(Node):
    """What is written into the manifest of the weights."""

    licence: str = "unknown"


class PretrainRecipe(Node):
    """A pretraining run. `data`, `views` and `encoder` are short for one source named `main` and one encoder named `encoder`."""

    kind: Literal["pretrain"] = "pretrain"
    sources: dict[str, SourceSection]
    encoders: dict[str, ComponentField]
    objective: ComponentField
    optim: OptimSection = OptimSection()
    train: TrainSection = TrainSection()
    stages: list[StageSection] = Field(default_factory=list)
    probes: dict[str, ProbeSection] = Field(default_factory=dict)
    export: ExportSection = ExportSection()
    out: str = Field("runs/pretrain", description="Run folder")

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping):
            return raw
        raw = dict(raw)
        if "data" in raw and "sources" not in raw:
            source = dict(raw.pop("data") or {})
            if "views" in raw:
                source["views"] = raw.pop("views")
            raw["sources"] = {"main": source}
        if "encoder" in raw and "encoders" not in raw:
            raw["encoders"] = {"encoder": raw.pop("encoder")}
        return raw

    def resolved_stages(self) -> list[StageSection]:
        """Return the stages, one made of `train.steps` when none is listed, each with an optimiser."""
        stages = self.stages or [StageSection(steps=self.train.steps)]
        return [stage.model_copy(update={"optim": stage.optim or self.optim}) for stage in stages]


SHORT_FORMS = {"views": "sources.main.views", "data": "sources.main", "encoder": "encoders.encoder"}
"""Short form of a pretraining recipe -> what it stands for; the narrower path first."""


class CohortSection(Node):
    """A labelled cohort: a folder with images/ labels/ split.csv, a Decathlon JSON, an nnU-Net raw folder, a CSV, or the query of an index."""

    path: str
    card: str | None = Field(None, min_length=1, description="Data card of the cohort: a name or a YAML file")
    domain: ComponentField = Field(default_factory=lambda: Component(name="mri"))


Folds = Annotated[
    int | None,
    Field(
        ge=3,
        description="Deal all labelled patients into so many folds, each tested once, instead of the given splits; every seed deals anew",
    ),
]


class FinetuneRecipe(Node):
    """Fine-tuning of a MONAI segmentation network, with its matched scratch twin."""

    kind: Literal["finetune"] = "finetune"
    task: Literal["segmentation"] = "segmentation"
    cohort: CohortSection
    network: Literal["unetr", "segresnet", "swin_unetr", "resenc_unet", "pyramid", "flexible_unet"]
    encoder: dict[str, Any] = Field(
        default_factory=dict, description="Encoder arguments for a scratch run; weights bring their own"
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="Fields of FinetuneSettings")
    folds: Folds = None
    labels: int | None = Field(None, gt=0, description="Use only the first n training cases in few-label order")
    force: bool = Field(False, description="Fine-tune on other views than the weights were pretrained with; the result says so")
    out: str = "runs/finetune"


def quoted(names: Any) -> Any:
    """Refuse class names that YAML has turned into true and false."""
    if isinstance(names, list) and any(isinstance(name, bool) for name in names):
        raise ValueError('YAML reads yes, no, on and off as true and false; put class names in quotes: ["no", "yes"]')
    return names


ClassNames = Annotated[
    list[str | int | float],
    BeforeValidator(quoted),
    Field(
        description="Names of the classes in their order, as in the column, when results may tell them; else class_1, class_2, ..."
    ),
]


class FinetuneTargetsRecipe(Node):
    """Fine-tuning of an encoder for one label per case, a class or a number, with its matched scratch twin."""

    kind: Literal["finetune"] = "finetune"
    task: Literal["classification", "regression"]
    source: SourceSection = Field(
        description="Labelled series of all splits; views may be {}: size, spacing and normalisation then come from the weights"
    )
    table: str = Field(description="CSV of labels")
    file_column: str = "file"
    target: str = Field(description="Column of the label")
    classes: ClassNames = Field(default_factory=list)
    encoder: dict[str, Any] = Field(
        default_factory=dict, description="Encoder arguments for a scratch run; weights bring their own"
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="Fields of TargetSettings")
    folds: Folds = None
    labels: int | None = Field(None, gt=0, description="Use only the first n training cases in few-label order")
    force: bool = Field(False, description="Fine-tune on other views than the weights were pretrained with; the result says so")
    out: str = "runs/finetune"


class BagsSection(Node):
    """Features of the tiles of slides, made before."""

    folder: str = Field(
        description="Holds one .h5 per slide, as medssl, TRIDENT and CLAM write them; named like the slide in the table"
    )
    tokens: int = Field(1024, gt=0, description="Most tiles of a slide in a training step; all are shown when it is scored")
    split_column: str = Field("split", description="Column of the table with train, val or test")
    patient_column: str = Field("patient", description="Column that tells patients apart; without it intervals are by slide")


class FinetuneBagsRecipe(Node):
    """A head on bags of tile features, for one label per slide, a class or a number."""

    kind: Literal["finetune"] = "finetune"
    task: Literal["classification", "regression"]
    bags: BagsSection
    table: str = Field(description="CSV of slides: file, label, split, patient")
    file_column: str = "file"
    target: str = Field(description="Column of the label")
    classes: ClassNames = Field(default_factory=list)
    settings: dict[str, Any] = Field(default_factory=dict, description="Fields of TargetSettings")
    folds: Folds = None
    labels: int | None = Field(None, gt=0, description="Use only the first n training slides in few-label order")
    out: str = "runs/finetune"


class BoxesSection(Node):
    """Boxes of pictures."""

    path: str = Field(description="COCO .json, folder of Pascal VOC .xml, or .csv (image, class, xmin, ymin, xmax, ymax)")
    classes: list[str] | None = Field(None, description="Names of the classes; those that the file has, sorted, when left out")
    drop_empty: bool = Field(False, description="Leave boxes without an area out and count them, instead of refusing the file")


class FinetuneBoxesRecipe(Node):
    """Fine-tuning of an encoder to find boxes, with its matched scratch twin: pictures of an index, or volumes of a labelled cohort."""

    kind: Literal["finetune"] = "finetune"
    task: Literal["detection"]
    source: SourceSection | None = Field(
        None, description="Pictures of all splits; views: {kind: image, size: [H, W], normalize: ...}"
    )
    boxes: BoxesSection | None = Field(None, description="Boxes of the pictures of `source`")
    cohort: CohortSection | None = Field(None, description="Volumes with label maps, of which boxes are made")
    views: dict[str, Any] = Field(default_factory=dict, description="Of a cohort: size (crop and window), normalize, spacing_mm")
    encoder: dict[str, Any] = Field(
        default_factory=dict, description="Encoder arguments for a scratch run; weights bring their own"
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="Fields of BoxSettings")
    folds: Folds = None
    labels: int | None = Field(None, gt=0, description="Use only the first n training cases in few-label order")
    force: bool = Field(False, description="Fine-tune on other views than the weights were pretrained with; the result says so")
    out: str = "runs/finetune"

    @model_validator(mode="after")
    def _one_road(self) -> FinetuneBoxesRecipe:
        pictures, volumes = self.source is not None and self.boxes is not None, self.cohort is not None
        if pictures == volumes or (volumes and (self.source or self.boxes)) or (pictures and self.views):
            raise ValueError(
                "task detection takes source and boxes (pictures of an index), or cohort and views (volumes with label maps)"
            )
        return self


class EvaluateBase(Node):
    """What every evaluation of weights says."""

    kind: Literal["evaluate"] = "evaluate"
    source: SourceSection = Field(description="views may be {}: size, spacing and normalisation then come from the weights")
    table: str = Field(description="CSV of labels")
    file_column: str = "file"
    seed: int = 0
    batch: int = Field(4, gt=0)
    force: bool = Field(False, description="Evaluate on other views than the weights were pretrained with; the result says so")
    out: str = "runs/evaluate"


class EvaluateRecipe(EvaluateBase):
    """Frozen probes of weights on a labelled table, beside their controls."""

    target: str
    task: Literal["regression", "classification"] = "regression"
    k: list[int] = Field(default_factory=lambda: [1, 5, 20])
    readout: Literal["pooled", "motion"] = Field("pooled", description="motion: of clips, how their tokens change over time")


class EvaluatePhaseRecipe(EvaluateBase):
    """End diastole and end systole, found in frozen features of the steps of a clip."""

    task: Literal["phase"]
    ed: str = Field("ed_frames", description="Column with the frames of end diastole, separated by spaces")
    es: str = Field("es_frames", description="Column with those of end systole")
    unit: Literal["frames", "ms"] = Field("frames", description="Frames count from 0; ms from the first frame")
    folds: int = Field(5, ge=2, description="Folds of patients")


class EvaluateSegmentationRecipe(EvaluateBase):
    """Structures of single frames, drawn by a head on frozen tokens."""

    task: Literal["segmentation"]
    target: str = Field("label", description="Column that names the label file of a clip, or its folder of pictures")
    labels: str = Field(description="Folder of the label files")
    structures: dict[str, int] = Field(min_length=1, description="Name -> value in the label files; other values are background")
    labelled: Literal["all", "drawn"] = Field("all", description="drawn: only frames on which something is drawn count as labelled")
    frames: int = Field(4, gt=0, description="Labelled frames that are used of each clip, spread over it")
    head: dict[str, Any] = Field(default_factory=dict, description="Fields of HeadSettings")


class EvaluateAnomalyRecipe(EvaluateBase):
    """How far clips are from normal ones, in frozen features."""

    task: Literal["anomaly"]
    target: str = Field(description="Column that says what is normal")
    normal: list[str | int] = Field(min_length=1, description="Values of that column that are normal; all others are not")
    k: list[int] = Field(default_factory=lambda: [5], min_length=1, description="Neighbours")


class SuiteTask(Node):
    """One column of the table of labels; of survival two."""

    column: str = Field(description="Column of the label; of survival, of the time to the event or to the last that was heard")
    task: Literal["regression", "classification", "survival"] = "classification"
    event: str | None = Field(None, description="survival: column with 1 for an event at that time, 0 for none until then")
    classes: list[str | int | float] = Field(
        default_factory=list, description="All classes, where their names may be published; else they are called class_1 ..."
    )

    @model_validator(mode="after")
    def _event_of_survival(self) -> SuiteTask:
        if (self.event is not None) != (self.task == "survival"):
            raise ValueError("task survival takes event, the column with 1 for an event and 0 for none; other tasks have no event")
        return self


class CurveSection(Node):
    """Fine-tuning at several label budgets, beside the scratch twin."""

    recipe: str | None = Field(None, description="Fine-tuning recipe (YAML); default: source and table of the suite")
    overrides: list[str] = Field(default_factory=list, description="key=value changes of that recipe")
    fractions: list[float] = Field(
        default_factory=lambda: [0.01, 0.1, 1.0], min_length=1, description="Of the labelled training cases"
    )
    counts: list[int] = Field(default_factory=list, description="Numbers of labelled training cases instead of fractions")
    seeds: list[int] = Field(default_factory=lambda: [0, 1, 2], min_length=1)
    settings: dict[str, Any] = Field(default_factory=dict, description="Fields of TargetSettings, where no recipe is named")


class SegmentationSection(CurveSection):
    """Fine-tuning of a segmentation network, and of its decoder alone."""

    frozen: bool = Field(True, description="Also the weights with the encoder frozen throughout, so that the decoder alone learns")
    self_configuring: bool = Field(
        False,
        description="Also a network from scratch that plans itself from its training cases; one more cell per number of labels, seed and fold",
    )


class CorruptionSection(Node):
    """What is done to test images."""

    kinds: list[str] = Field(default_factory=lambda: ["noise", "blur", "contrast", "motion", "anisotropy", "stain"])
    levels: list[int] = Field(default_factory=lambda: [1, 2, 3, 4, 5])


class SuiteRecipe(Node):
    """The nine-tier protocol on one labelled set, as far as it allows: frozen probes, fine-tuning, retrieval, robustness, subgroups, leakage."""

    kind: Literal["suite"] = "suite"
    source: SourceSection = Field(
        description="Labelled series of all splits; views may be {}: size, spacing and normalisation then come from the weights"
    )
    table: str = Field(description="CSV of labels")
    file_column: str = "file"
    tasks: dict[str, SuiteTask] = Field(description="Public name of a task -> its column", min_length=1)
    tiers: list[str] = Field(
        default_factory=lambda: [
            *("smoke", "frozen", "classification", "segmentation", "detection", "retrieval", "regression", "ood", "fairness")
        ],
        description="Tiers to run, in any order",
    )
    k: list[int] = Field(default_factory=lambda: [1, 5, 10, 20, 50], description="Neighbours")
    shots: list[int] = Field(default_factory=lambda: [1, 5, 10, 25], description="Training cases per class of the few-label probe")
    shot_seeds: int = Field(10, gt=0)
    classification: CurveSection | None = None
    segmentation: SegmentationSection | None = None
    detection: CurveSection | None = None
    regression: CurveSection | None = None
    corruptions: CorruptionSection = CorruptionSection()
    left_out: list[str] = Field(
        default_factory=lambda: ["site", "vendor"], description="Columns of which each value is held out in turn"
    )
    subgroups: list[str] = Field(default_factory=lambda: ["sex", "age_band", "vendor", "site"])
    leakage: list[str] = Field(default_factory=lambda: ["site", "sex", "vendor", "scanner_id"])
    groups: dict[str, list[str]] = Field(
        default_factory=dict, description="Column -> values that may be published; others are called group_1 ..."
    )
    draws: int = Field(2000, ge=10, description="Bootstrap draws")
    seed: int = 0
    batch: int = Field(4, gt=0)
    force: bool = Field(False, description="Evaluate on other views than the weights were pretrained with; the result says so")
    out: str = "runs/suite"


Recipe_ = (
    PretrainRecipe | FinetuneRecipe | FinetuneTargetsRecipe | FinetuneBagsRecipe | FinetuneBoxesRecipe | EvaluateBase | SuiteRecipe
)
TARGET_TASKS = ("classification", "regression")
KINDS: dict[str, type[Node]] = {
    "pretrain": PretrainRecipe,
    "finetune": FinetuneRecipe,
    "evaluate": EvaluateRecipe,
    "suite": SuiteRecipe,
}
BY_TASK: dict[str, dict[str, type[Node]]] = {
    "finetune": {**dict.fromkeys(TARGET_TASKS, FinetuneTargetsRecipe), "detection": FinetuneBoxesRecipe},
    "evaluate": {
        "phase": EvaluatePhaseRecipe,
        "segmentation": EvaluateSegmentationRecipe,
        "anomaly": EvaluateAnomalyRecipe,
    },
}
"""Kind -> task -> the recipe of that task, where it is another than that of the kind."""


class Recipe:
    """Loading, overriding, hashing and dumping of recipes of any kind."""

    @staticmethod
    def load(path: Path | str, overrides: Sequence[str] = ()) -> Any:
        """Read a YAML recipe, apply `key=value` overrides, validate.

        Args:
            path: YAML file.
            overrides: Dotted assignments such as `train.steps=100`; values are YAML.

        Returns:
            A recipe of `KINDS`, or of `BY_TASK` where the task has its own.

        Raises:
            RecipeError: With every fault found.
        """
        return Recipe.parse(apply_overrides(read_yaml(path), overrides))

    @staticmethod
    def parse(raw: Mapping[str, Any]) -> Any:
        """Validate a dictionary; see `load`."""
        kind = raw.get("kind", "pretrain")
        if kind not in KINDS:
            raise RecipeError([f'kind: "{kind}" is unknown{near(str(kind), KINDS)}; accepted: {", ".join(KINDS)}'])
        node = BY_TASK.get(kind, {}).get(str(raw.get("task")), KINDS[kind])
        if node is FinetuneTargetsRecipe and "bags" in raw:
            node = FinetuneBagsRecipe
        faults = [f"{path}: required; give {path}=VALUE on the command line or in the recipe" for path in marked(raw)]
        try:
            recipe = node.model_validate(raw)
        except ValidationError as err:
            short = tuple(SHORT_FORMS) if kind == "pretrain" else ()
            found = [fault(node, error, short_keys=short) for error in err.errors()]
            if node is EvaluateRecipe:
                found = [_with_tasks(sentence) for sentence in found]
            if kind == "pretrain":
                found = [_beside_the_long_form(sentence, raw) for sentence in found]
            raise RecipeError(faults + [as_written(sentence, raw) for sentence in found]) from None
        if faults:
            raise RecipeError(faults)
        return recipe

    @staticmethod
    def dump(recipe: Node) -> str:
        """Return the resolved recipe as YAML."""
        return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=120)

    @staticmethod
    def differences(before: Node, now: Node) -> list[str]:
        """Return the dotted paths, `out` aside, at which two recipes differ, as sentences: `train.steps was 5 and is 20`."""
        old, new = (_flat(recipe.model_dump(mode="json", exclude={"out"})) for recipe in (before, now))
        return [
            f"{key} was {old.get(key, 'absent')} and is {new.get(key, 'absent')}"
            for key in dict.fromkeys([*old, *new])
            if old.get(key, "absent") != new.get(key, "absent")
        ]

    @staticmethod
    def hash(recipe: Node) -> str:
        """Return a digest of everything but the output folder."""
        content = {key: value for key, value in recipe.model_dump(mode="json").items() if key != "out"}
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by their dotted paths."""
    if not isinstance(value, Mapping) or not value:
        return {path: value}
    return {
        key: leaf for name, child in value.items() for key, leaf in _flat(child, f"{path}.{name}" if path else str(name)).items()
    }


def _with_tasks(sentence: str) -> str:
    """Name the tasks that have recipes of their own where a task is unknown."""
    return f"{sentence}; further tasks: {', '.join(BY_TASK['evaluate'])}" if sentence.startswith("task:") else sentence


def read_yaml(path: Path | str) -> dict[str, Any]:
    """Read a YAML mapping; RecipeError says what is wrong with the file."""
    name = str(path).removesuffix(".yaml").removeprefix("recipes/")
    absent = "`medssl recipe ls` lists those that come with medssl"
    if not Path(path).exists() and shipped_folder("recipes") is not None and name in shipped():
        absent = f"medssl comes with a recipe of this name: copy it with `medssl recipe show {name} > mine.yaml` and give mine.yaml"
    return read_mapping(path, RecipeError, what="a recipe", absent=absent)


def with_placeholders(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe that can be checked before its `???` are given: a card is left out, anything else is a word."""
    return apply_overrides(raw, [f"{key}={'null' if key.endswith('.card') else 'placeholder'}" for key in marked(raw)])


def _beside_the_long_form(sentence: str, raw: Mapping[str, Any]) -> str:
    """Say of a short form in a recipe that has the long one what to write instead."""
    short, _, rest = sentence.partition(":")
    path = SHORT_FORMS.get(short, "")
    long, _, key = path.replace("main", "*").replace("encoders.encoder", "encoders.*").partition(".")
    entries = raw.get(long)
    if not rest.startswith(" unknown key") or not isinstance(entries, Mapping):
        return sentence
    named = " or ".join(f"{long}.{key.replace('*', str(name))}" for name in entries)
    return f"{short}: stands for the only entry of {long}, and this recipe lists them; change {named}"


def as_written(sentence: str, raw: Mapping[str, Any]) -> str:
    """Return a fault with the path of the short form where the recipe is written in it: `data.where` for `sources.main.where`."""
    for short, path in SHORT_FORMS.items():
        if short in raw and sentence.startswith((f"{path}.", f"{path}:")):
            return short + sentence[len(path) :]
    return sentence


def source_path(recipe: PretrainRecipe, name: str) -> str:
    """Return the dotted path under which a source is written: `data` for the only one."""
    return "data" if list(recipe.sources) == ["main"] else f"sources.{name}"


def apply_overrides(raw: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return a copy of `raw` with dotted `key=value` assignments applied; values are parsed as YAML."""
    result: dict[str, Any] = json.loads(json.dumps(raw))
    faults = []
    for item in overrides:
        path, sign, text = item.partition("=")
        if not sign or not path:
            faults.append(f'"{item}": an override is written key=value, for instance train.steps=100')
            continue
        node = result
        *parents, last = path.split(".")
        for name in parents:
            child = node.setdefault(name, {})
            if not isinstance(child, dict):
                child = node[name] = {"name": child} if isinstance(child, str) else {}
            node = child
        node[last] = parse_yaml(text)
    if faults:
        raise RecipeError(faults)
    return result


def recipe_folder() -> Path:
    """Return the folder of the recipes that come with medssl."""
    folder = shipped_folder("recipes")
    if folder is None:
        raise RequestError("the recipes that come with medssl are not installed; give the path of a recipe file")
    return folder


def shipped() -> dict[str, Path]:
    """Return the shipped recipes by name, for instance pretrain/mae_vit3d_mri."""
    root = recipe_folder()
    return {str(path.relative_to(root).with_suffix("")): path for path in sorted(root.rglob("*.yaml"))}
