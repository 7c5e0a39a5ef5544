"""Recipes: their numbers, what wins over them, and what is recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.pipeline.settings.recipes import LOSS_NAMES, RECIPE_SETTINGS, RECIPES
from teacher_cache.pipeline.settings.run_file import load_config
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.pipeline.train.losses import LOSSES
from teacher_cache.storage.errors import UsageError
from tests.commands import run_command
from tests.conftest import TINY_MODEL

NEEDED = {"cache": "c", "student": "s", "out": "o"}
NUMBERS: dict[str, tuple[dict[str, float], float, float, float, float, float]] = {
    "default": ({"cosine": 8.0, "relational": 1.0, "interactive": 0.3}, 1e-3, 0.1, 0.05, 0.0, 2.0),
    "guide": ({"feature": 1.0, "relational_mse": 0.1}, 5e-4, 1e-4, 0.0, 0.1, 2.0),
    "clip-kd": (
        {"contrastive": 1.0, "relational": 1.0, "interactive": 1.0, "feature": 2000.0},
        1e-3,
        0.1,
        0.025,
        0.0,
        2.0,
    ),
    "mobileclip": ({"contrastive": 0.25, "relational": 0.75}, 1e-3, 0.2, 0.005, 0.0, 2.0),
}


def numbers(config: TrainConfig) -> tuple[Any, ...]:
    return (
        config.losses,
        config.learning_rate,
        config.weight_decay,
        config.warmup_fraction,
        config.label_smoothing,
        config.temperature,
    )


def run_file(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text('cache = "c"\n[train]\nstudent = "s"\nout = "o"\n' + text)
    return path


def test_the_recipes_are_the_published_numbers() -> None:
    assert set(NUMBERS) == set(RECIPES)
    for name, wanted in NUMBERS.items():
        assert numbers(TrainConfig(**NEEDED, recipe=name)) == wanted, name
    assert numbers(TrainConfig(**NEEDED)) == NUMBERS["default"]


def test_names_agree() -> None:
    """Those of losses, which a config checks without torch, and those of the settings that a recipe fills."""
    assert set(LOSS_NAMES) == set(LOSSES)
    assert set(TrainConfig.model_fields) > RECIPE_SETTINGS
    for name in RECIPE_SETTINGS:
        assert TrainConfig.model_fields[name].default == getattr(RECIPES["default"], name), name


def test_a_setting_wins_over_the_recipe_and_a_flag_over_both(tmp_path: Path) -> None:
    path = run_file(tmp_path, 'recipe = "guide"\nlearning_rate = 0.002\n[train.losses]\nfeature = 3.0\n')
    config = load_config(TrainConfig, "train", path, {"recipe": None, "learning_rate": None})
    # losses are one setting: those of the run file stand alone
    assert (config.recipe, config.learning_rate, config.losses) == ("guide", 0.002, {"feature": 3.0})
    assert (config.weight_decay, config.label_smoothing, config.warmup_fraction) == (1e-4, 0.1, 0.0)
    config = load_config(TrainConfig, "train", path, {"recipe": "mobileclip", "learning_rate": 0.1})
    assert (config.learning_rate, config.losses, config.weight_decay) == (0.1, {"feature": 3.0}, 0.2)


def test_zero_is_given_and_none_is_not() -> None:
    config = TrainConfig(**NEEDED, recipe="mobileclip", weight_decay=0.0, learning_rate=None, losses=None)
    assert (config.weight_decay, config.learning_rate, config.losses) == (0.0, 1e-3, NUMBERS["mobileclip"][0])


def test_a_record_holds_numbers_and_reads_back_whatever_became_of_its_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    before = TrainConfig(**NEEDED, recipe="guide")
    text = before.model_dump_json()
    assert '"learning_rate":0.0005' in text
    monkeypatch.setitem(RECIPES, "guide", RECIPES["mobileclip"])
    assert TrainConfig.model_validate_json(text) == before


def test_changing_a_config_does_not_change_its_recipe() -> None:
    TrainConfig(**NEEDED, recipe="guide").losses["feature"] = 5.0
    TrainConfig(**NEEDED).losses["cosine"] = 5.0
    assert TrainConfig(**NEEDED, recipe="guide").losses["feature"] == 1.0
    assert TrainConfig(**NEEDED).losses["cosine"] == 8.0


@pytest.mark.parametrize("recipe", ['"gide"', '""', "3", '["guide"]'])
def test_an_unknown_recipe_is_refused_with_the_names(tmp_path: Path, recipe: str) -> None:
    with pytest.raises(UsageError) as refused:
        load_config(TrainConfig, "train", run_file(tmp_path, f"recipe = {recipe}\n"), {})
    assert "[train]: recipe: " in str(refused.value)
    if recipe == '"gide"':
        wanted = "recipe 'gide' is not known; there are default, guide, clip-kd, mobileclip"
        assert str(refused.value).endswith(wanted)


def test_the_queue_loss_needs_a_queue(tmp_path: Path) -> None:
    text = "[train.losses]\ncosine = 8.0\nqueue = 1.0\n"
    with pytest.raises(UsageError, match=r"\[train\]: queue_rows: .*the queue loss has a weight and no queue"):
        load_config(TrainConfig, "train", run_file(tmp_path, text), {})
    assert load_config(TrainConfig, "train", run_file(tmp_path, "queue_rows = 4096\n" + text), {}).queue_rows == 4096
    short = "batch_size = 64\nqueue_rows = 63\n"
    with pytest.raises(UsageError, match=r"\[train\]: .*queue_rows 63 cannot hold the 64 pairs of one batch"):
        load_config(TrainConfig, "train", run_file(tmp_path, short + text), {})
    assert load_config(TrainConfig, "train", run_file(tmp_path, short + text), {"batch_size": 63}).queue_rows == 63
    of_three = short.replace("64", "32") + "captions_per_image = 3\n"
    with pytest.raises(UsageError, match=r"\[train\]: .*queue_rows 63 cannot hold the 96 pairs of one batch"):
        load_config(TrainConfig, "train", run_file(tmp_path, of_three + text), {})
    assert TrainConfig(**NEEDED, losses={"cosine": 1.0, "queue": 0.0}).queue_rows == 0
    with pytest.raises(ValidationError, match="queue_rows"):
        TrainConfig(**NEEDED, queue_rows=-1)


def test_a_recipe_is_a_flag() -> None:
    done = run_command("train", "--cache", "c", "--student", "s", "--out", "o", "--recipe", "gide")
    assert done.returncode == 2
    assert "there are default, guide, clip-kd, mobileclip" in " ".join(done.stderr.split())


def test_every_recipe_trains_and_its_numbers_are_in_the_record(
    make_photos: Callable[..., Path], tiny_teacher: Path, tmp_path: Path
) -> None:
    """A student of another width than its teacher, by the default of each recipe."""
    from teacher_cache.pipeline.precompute.run import precompute
    from teacher_cache.pipeline.train.loop import train

    cache, student = str(tmp_path / "photos.cache"), tmp_path / "narrow.json"
    student.write_text(json.dumps({**TINY_MODEL, "embed_dim": 12}))
    precompute(
        PrecomputeConfig(
            dataset=f"flickr:{make_photos(20)}", teacher=f"local-dir:{tiny_teacher}", cache=cache, device="cpu"
        )
    )
    for name, recipe in RECIPES.items():
        out = tmp_path / name
        settings = {"epochs": 3, "batch_size": 8, "workers": 0, "device": "cpu"}
        record = train(TrainConfig(cache=cache, student=str(student), out=str(out), recipe=name, **settings)).record
        assert set(record.epochs[0].parts) == set(recipe.losses), name
        written = json.loads((out / "run.json").read_text())["config"]
        assert {setting: written[setting] for setting in RECIPE_SETTINGS} == {
            setting: getattr(recipe, setting) for setting in RECIPE_SETTINGS
        }
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        # six steps: the first is the whole of the warm-up where there is one, and cosine from 1 where there is none
        assert log[0]["learning_rate"] == pytest.approx(recipe.learning_rate, rel=1e-9), name
        total = sum(weight * log[0][part] for part, weight in recipe.losses.items())
        assert log[0]["loss"] == pytest.approx(total, rel=1e-5), name
