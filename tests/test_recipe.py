from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from medssl import build, recipe_checks
from medssl.errors import RecipeError, RequestError
from medssl.recipe import KINDS, Recipe, apply_overrides, read_yaml, recipe_folder, shipped, with_placeholders

GOOD: dict[str, Any] = {
    "kind": "pretrain",
    "data": {"index": "archive", "domain": "mri"},
    "views": {"size": [32, 32, 16], "mask": {"ratio": 0.75, "cell": 8}},
    "encoder": {"name": "vit3d", "image_size": [32, 32, 16], "patch_size": 8, "hidden_size": 48, "num_layers": 2, "num_heads": 4},
    "objective": {"name": "mae", "decoder_dim": 32, "decoder_heads": 4},
}


def faults(overrides: list[str], raw: dict[str, Any] = GOOD) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe_checks.check(Recipe.parse(apply_overrides(raw, overrides)))
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_short_form__stands_for_one_source_and_one_encoder() -> None:
    recipe = Recipe.parse(GOOD)
    recipe_checks.check(recipe)
    assert list(recipe.sources) == ["main"]
    assert recipe.sources["main"].views["size"] == [32, 32, 16]
    assert list(recipe.encoders) == ["encoder"]
    assert Recipe.parse(yaml.safe_load(Recipe.dump(recipe))) == recipe


def test_unknown_keys__are_named_with_near_matches() -> None:
    assert 'train.stepps: unknown key (did you mean "steps"?)' in faults(["train.stepps=3"])
    assert 'objective.decoder_dmi: unknown key (did you mean "decoder_dim"?)' in faults(["objective.decoder_dmi=3"])
    assert 'encoder.pach_size: unknown key (did you mean "patch_size"?)' in faults(["encoder.pach_size=3"])
    assert 'views.sise: unknown key (did you mean "size"?)' in faults(["views.sise=3"])
    assert 'unknown objective "may" (did you mean "mae"?)' in faults(["objective.name=may"])


def test_unknown_keys_without_a_near_match__come_with_what_is_accepted() -> None:
    text = faults(["encoder.blocks_down=[1, 1]"])
    assert "encoder.blocks_down: unknown key; accepted are in_channels, image_size, patch_size, hidden_size" in text
    assert "optim.zzz: unknown key; accepted are name, lr, weight_decay" in faults(["optim.zzz=1"])


def test_kind_of_another_command__is_said_before_the_keys(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("kind: finetune\ncohort: {path: FOLDER}\nnetwork: segresnet\n")
    with pytest.raises(
        RequestError, match="kind finetune; `medssl finetune` runs it; `medssl pretrain` needs one with kind: pretrain"
    ):
        recipe_checks.load_recipe(path, kind="pretrain")


def test_name_of_a_shipped_recipe__says_how_to_copy_it() -> None:
    for name in ("smoke/mae_vit3d_mri", "recipes/smoke/mae_vit3d_mri.yaml"):
        if not Path(name).exists():
            with pytest.raises(RecipeError, match=r"`medssl recipe show smoke/mae_vit3d_mri > mine.yaml`"):
                read_yaml(name)


def test_differences__are_named_key_by_key() -> None:
    before = Recipe.parse(GOOD)
    now = Recipe.parse(apply_overrides(GOOD, ["train.steps=20", "views.mask.ratio=0.5", "out=elsewhere"]))
    assert Recipe.differences(before, before) == []
    assert Recipe.differences(before, now) == [
        "sources.main.views.mask.ratio was 0.75 and is 0.5",
        "train.steps was 1000 and is 20",
    ]


def test_wrong_types__say_what_was_found() -> None:
    assert "train.steps: input should be a valid integer" in faults(["train.steps=many"])
    assert "found 'many'" in faults(["train.steps=many"])
    assert "optim.lr: input should be greater than 0; found -1" in faults(["optim.lr=-1"])


def test_all_faults__come_in_one_report() -> None:
    text = faults(["train.steps=many", "optim.lrr=1", "data.weight=-1"])
    assert len(text.splitlines()) == 3


def test_patch_that_does_not_divide_the_crop__is_a_fault() -> None:
    assert "patch (8, 8, 8) does not divide views.size (36, 32, 16)" in faults(["views.size=[36, 32, 16]", "views.mask.cell=4"])


def test_mask_cell__must_be_one_patch_for_mae() -> None:
    assert "cell=[8, 8, 8]" in faults(["views.mask.cell=16"])


def test_objective_and_encoder__must_fit() -> None:
    text = faults(["objective.name=mae_cnn", "objective.decoder_dim=null"], {**GOOD, "objective": {"name": "mae_cnn"}})
    assert "objective.decoder_dim: unknown key" in text
    text = faults([], {**GOOD, "objective": {"name": "mae_cnn"}})
    assert "mae_cnn cannot work on encoder vit3d (it needs has_decoder); encoders that fit: resenc3d, segresnet3d" in text
    text = faults([], {**GOOD, "encoder": {"name": "segresnet3d", "init_filters": 8}})
    assert "mae cannot work on encoder segresnet3d (it needs drops_tokens); encoders that fit: vit3d" in text
    assert "objective.image_size: unknown key" in faults(["objective.image_size=[32, 32, 16]"])
    assert 'objective.encoder: no encoder named "encodr" (did you mean "encoder"?)' in faults(["objective.encoder=encodr"])


def test_faults_of_short_forms__name_the_keys_of_the_file() -> None:
    text = faults(["data.wher=1", "encoder.name=3", "optim.lrr=1"])
    assert 'data.wher: unknown key (did you mean "where"?)' in text
    assert "encoder.name: input should be a valid string" in text
    assert "sources.main" not in text
    long = {key: value for key, value in GOOD.items() if key not in ("data", "views")}
    long["sources"] = {"main": {**GOOD["data"], "views": GOOD["views"], "wher": 1}}
    assert 'sources.main.wher: unknown key (did you mean "where"?)' in faults([], long)


def test_card_that_must_be_given__does_not_stop_a_check() -> None:
    raw = with_placeholders({**GOOD, "data": {"index": "???", "card": "???", "domain": "mri"}})
    recipe = Recipe.parse(raw)
    recipe_checks.check(recipe)
    assert recipe.sources["main"].cards == {}


def test_missing_mask__is_a_fault() -> None:
    raw = {
        **GOOD,
        "views": {"size": [32, 32, 16]},
        "objective": {"name": "mae_cnn"},
        "encoder": {"name": "segresnet3d", "init_filters": 8},
    }
    assert "views.mask: required by objective mae_cnn" in faults([], raw)


def test_marked_values__must_be_given() -> None:
    raw = {**GOOD, "data": {"index": "???", "domain": "mri"}}
    assert faults([], raw) == "data.index: required; give data.index=VALUE on the command line or in the recipe"


def test_overrides__parse_yaml_and_scientific_numbers() -> None:
    raw = apply_overrides(GOOD, ["optim.lr=1e-4", "views.size=[16, 16, 16]", "data.domain=ct", "train.compile=true"])
    assert raw["optim"]["lr"] == 1e-4
    assert raw["views"]["size"] == [16, 16, 16]
    assert raw["train"]["compile"] is True
    assert GOOD["views"]["size"] == [32, 32, 16]
    with pytest.raises(RecipeError, match="an override is written key=value"):
        apply_overrides(GOOD, ["train.steps"])


def test_missing_file_and_bad_yaml__are_request_errors(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="No such file or directory; `medssl recipe ls`"):
        Recipe.load(tmp_path / "none.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1, 2")
    with pytest.raises(RecipeError, match="not valid YAML"):
        Recipe.load(bad)
    bad.write_text("- 1")
    with pytest.raises(RecipeError, match="a recipe is a YAML mapping"):
        Recipe.load(bad)


def test_faults__of_keys_and_of_what_is_inside_components_are_named_together() -> None:
    raw = apply_overrides(
        GOOD, ["data.modalty=MR", "views.spacing_mmm=4", "encoder.nme=vit3d", "objective.name=may", "optim.lr=-1", "out=???"]
    )
    with pytest.raises(RecipeError) as caught:
        recipe_checks.parse(raw)
    paths = [sentence.partition(":")[0] for sentence in caught.value.faults]
    assert paths == ["out", "data.modalty", "optim.lr", "views.spacing_mmm", "encoder.nme", "objective.name"]
    with pytest.raises(RecipeError) as caught:  # what has no form at all is not guessed
        recipe_checks.parse({**raw, "encoder": 3})
    assert "views.spacing_mmm" not in str(caught.value) and "train" not in str(caught.value)


def test_short_form_beside_the_long_one__says_what_to_write() -> None:
    raw = read_yaml(shipped()["smoke/joint_slice_volume_mri"])
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(with_placeholders(apply_overrides(raw, ["data.index=archive", "views.size=3"])))
    first, second = caught.value.faults
    assert (
        first == "data: stands for the only entry of sources, and this recipe lists them; change sources.stacks or sources.slices"
    )
    assert second.endswith("change sources.stacks.views or sources.slices.views")
    with pytest.raises(RecipeError, match=r"encoder: stands for the only entry of encoders, .*; change encoders\.a or encoders\.b"):
        Recipe.parse({**GOOD, "encoders": {"a": {"name": "vit3d"}, "b": {"name": "vit3d"}}})


def test_hash__ignores_the_output_folder_and_nothing_else() -> None:
    base = Recipe.hash(Recipe.parse(GOOD))
    assert Recipe.hash(Recipe.parse(apply_overrides(GOOD, ["out=elsewhere"]))) == base
    assert Recipe.hash(Recipe.parse(apply_overrides(GOOD, ["train.seed=1"]))) != base


def test_every_shipped_recipe__is_valid_and_says_what_it_is() -> None:
    found = shipped()
    assert len(found) == len(list(recipe_folder().rglob("*.yaml"))) >= 10
    for name, path in found.items():
        assert path.read_text().startswith("# "), f"{name}: the first line says what the recipe is"
        raw = read_yaml(path)
        recipe = Recipe.parse(with_placeholders(raw))
        recipe_checks.check(recipe)
        assert recipe.kind in KINDS


@pytest.mark.parametrize("name", sorted(name for name, path in shipped().items() if read_yaml(path)["kind"] == "pretrain"))
def test_every_shipped_pretraining__builds_its_objective(name: str) -> None:
    recipe = Recipe.parse(with_placeholders(read_yaml(shipped()[name])))
    try:
        with torch.device("meta"):  # the random start of large networks takes seconds
            objective, _ = build.build_objective(recipe, items=1000)
    except RuntimeError as err:
        if "meta tensors" not in str(err):
            raise
        objective, _ = build.build_objective(recipe, items=1000)  # MONAI's ViT and Swin look at values while they are built
    assert any(parameter.requires_grad for parameter in objective.parameters())


def test_schema__names_every_section() -> None:
    schema = KINDS["pretrain"].model_json_schema()
    assert {"sources", "encoders", "objective", "optim", "train", "stages", "probes", "export"} <= set(schema["properties"])


def test_rate_that_ends_above_its_peak__is_a_fault() -> None:
    found = faults(["optim.lr=1.25e-5", "optim.schedule.final_lr=1e-4"])
    assert "optim.schedule.final_lr: 0.0001 is above optim.lr 1.25e-05, so the rate would rise to it" in found
    stages = "stages=[{steps: 2}, {steps: 2, optim: {lr: 1e-5, schedule: {final_lr: 1e-4}}}]"
    assert "stages.1.optim.schedule.final_lr: 0.0001 is above stages.1.optim.lr" in faults([stages])
    recipe_checks.check(Recipe.parse(apply_overrides(GOOD, ["optim.lr=1e-4", "optim.schedule.final_lr=1e-4"])))


def test_alice__needs_a_mask_and_an_encoder_that_takes_marks() -> None:
    objective = "objective={name: alice, prototypes: 16}"
    recipe_checks.check(Recipe.parse(apply_overrides(GOOD, [objective, "views.count=2"])))
    assert "views.mask: required by objective alice" in faults([objective, "views.count=2", "views.mask=null"])
    found = faults([objective, "encoder={name: image2d, model: resnet18}", "views.size=32"])
    assert (
        "alice cannot work on encoder image2d (it needs marks_hidden); encoders that fit: resenc3d, segresnet3d, swin3d, vit3d"
        in found
    )
    assert "encoder: patch (32, 32, 32) does not divide views.size" in faults([objective, "encoder={name: swin3d}"])


def test_alice__needs_pairs_of_crops() -> None:
    objective = "objective={name: alice, prototypes: 16}"
    wanted = (
        "sampler.pairs: objective alice learns from pairs: matched or same_volume or random; set views.kind: pair and sampler.pairs: "
        "matched, or views.count: 2 for two looks at one crop"
    )
    assert wanted in faults([objective]) and wanted in faults([objective, "views.count=3"])
    matched = "data.sampler={pairs: matched, matcher: {name: embedding, weights: runs/matcher, step_mm: 8}}"
    pair = [objective, "views.kind=pair", "views.spacing_mm=1.5"]
    recipe_checks.check(Recipe.parse(apply_overrides(GOOD, [*pair, matched])))  # no views.points
    recipe_checks.check(Recipe.parse(apply_overrides(GOOD, [*pair, "data.sampler={pairs: same_volume}"])))
