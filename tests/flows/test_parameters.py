"""Flow parameters, and ``prefect.yaml`` against both."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from prefect.exceptions import ParameterBindError
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.utilities.callables import get_call_parameters, parameter_schema

from teacher_cache.flows.deploy_student import deploy_student
from teacher_cache.flows.evaluate_student import evaluate_student
from teacher_cache.flows.parameters import ReportPage, in_parameters, parameters_of
from teacher_cache.flows.precompute_teacher import precompute_teacher
from teacher_cache.flows.retrain_student import retrain_student
from teacher_cache.flows.train_student import train_student
from teacher_cache.pipeline.settings.deploy import DeployConfig
from teacher_cache.pipeline.settings.evaluate import EvaluateConfig
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.pipeline.settings.promote import RetrainConfig
from teacher_cache.pipeline.settings.recipes import RECIPE_SETTINGS
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.storage.errors import UsageError

PROJECT = Path(__file__).resolve().parents[2]
STAGES = [
    (precompute_teacher, PrecomputeConfig),
    (train_student, TrainConfig),
    (evaluate_student, EvaluateConfig),
    (deploy_student, DeployConfig),
    (retrain_student, RetrainConfig),
]
OWN = {"evaluate_split", "evaluate_checkpoint", "report", "timeout_seconds"}
# the form in its order, as the page says it; all other settings are in advanced
EVERYDAY = {
    flow: re.findall(r"`(\w+)`", names)
    for flow, names in re.findall(r"\| `(\w+-\w+)` \| (.*) \|", (PROJECT / "docs/howto/prefect.md").read_text())
}
# what a flow asks of its user otherwise than the stage does: a folder is named by the flow run, a student is a must
STAND_INS = {
    ("train-student", "out"): "runs/STUDENT-ID",
    ("deploy-student", "out"): "runs/deployed/RUN-ID",
    ("evaluate-student", "run"): "whose student is measured",
}


def deployments():
    return yaml.safe_load((PROJECT / "prefect.yaml").read_text())["deployments"]


@pytest.mark.parametrize(("flow", "config"), STAGES)
def test_the_form_shows_every_setting_once_with_its_limits_default_and_description(flow, config):
    schema = parameter_schema(flow.fn).model_dump()
    form, experts = dict(schema["properties"]), schema["definitions"]["Advanced"]
    assert list(form) == [*EVERYDAY[flow.name], "advanced"]
    assert form.pop("advanced")["default"] == {}
    assert experts["additionalProperties"] is False
    assert not set(form) & set(experts["properties"])
    form |= experts["properties"]
    wanted = config.model_json_schema()
    assert set(form) - OWN == set(wanted["properties"])
    for name, field in wanted["properties"].items():
        if (flow.name, name) in STAND_INS:
            assert STAND_INS[flow.name, name] in form[name]["description"]
            continue
        limits = next((kind for kind in field.get("anyOf", ()) if kind != {"type": "null"}), field)
        for key in {*limits, "description"} - {"title", "default", "additionalProperties"}:
            assert form[name][key] == (field if key == "description" else limits)[key], name
        # the recipe's or the cache's, unless somebody gives it
        derived = config is TrainConfig and name in {*RECIPE_SETTINGS, "split"}
        default = None if derived else field.get("default")
        if default is None and "default" in field and name in EVERYDAY[flow.name]:
            default = ""  # the UI would send null for an empty field, and the server refuse it
        assert form[name].get("default") == default, name
    assert all(field["description"] for field in form.values())
    assert "null" not in str(schema)
    must = set(wanted.get("required", ())) - {"out"}
    assert set(schema["required"]) == ({"run"} if flow is evaluate_student else must)


def call(flow, **given):
    """Run a flow's function as Prefect does: all other parameters as the form has them, and none checked."""
    assert not flow.should_validate_parameters
    return flow.fn(**get_call_parameters(flow.fn, (), given))


def started_with(**given):
    """The config that a flow run makes of the parameters somebody gave, all others as the form has them."""
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("teacher_cache.flows.train_student.progress_artifact", lambda *_: contextlib.nullcontext())
        patch.setattr("teacher_cache.flows.train_student.device_slots", lambda *_: contextlib.nullcontext())
        patch.setattr(
            "teacher_cache.flows.train_student.train_run",
            SimpleNamespace(with_options=lambda **_: lambda config, _: made.append(config) or 1 / 0),
        )
        with pytest.raises(ZeroDivisionError):
            call(train_student, **{"cache": "c", "student": "s", "out": "o", **given})
    return made[0]


def test_a_flow_run_takes_from_the_recipe_what_nobody_gave():
    guide = started_with(recipe="guide")
    assert (guide.learning_rate, guide.weight_decay, guide.warmup_fraction) == (5e-4, 1e-4, 0)
    assert guide.losses == {"feature": 1.0, "relational_mse": 0.1}
    assert started_with() == TrainConfig(cache="c", student="s", out="o")
    # also a value that happens to be the recipe default's
    assert started_with(recipe="guide", advanced={"learning_rate": 1e-3}).learning_rate == 1e-3


def test_an_empty_field_of_the_form_is_a_setting_that_is_not_given():
    assert started_with(init="", select_split="", evaluate_split="") == started_with()
    out = started_with(out="", student="students/tiny.json").out
    assert out == "runs/tiny-None"  # no flow run, no ID


def test_the_deployment_trains_with_the_losses_it_names_until_advanced_is_replaced():
    given = next(d for d in deployments() if d["entrypoint"].endswith("train_student"))["parameters"]
    found = started_with(**given)
    assert found.losses == {"contrastive": 1.0, "relational": 1.0, "feature": 2000.0}
    assert (found.learning_rate, found.weight_decay, found.warmup_fraction) == (0.003, 0.05, 0.05)
    assert (found.epochs, found.batch_size, found.clip_grad_norm) == (32, 64, 5.0)
    other = started_with(**given | {"recipe": "clip-kd", "advanced": {}})
    assert other.losses["interactive"] == 1.0
    assert other == TrainConfig(
        cache="caches/scenes.cache", student="scenes-small", out="o", epochs=32, batch_size=64, recipe="clip-kd"
    )


CACHE = {"dataset": "a:b", "teacher": "t", "cache": "c"}
STUDENT = {"cache": "c", "student": "s", "out": "o"}
RETRAINED = {"dataset": "a:b", "teacher": "t", "home": "h", "student": "s"}
GPU = "device: device 'gpu' is not known; use auto, cpu, cuda or cuda:N"


@pytest.mark.parametrize(
    ("flow", "given", "reason"),
    [
        (precompute_teacher, {**CACHE, "device": "gpu"}, GPU),
        (train_student, {**STUDENT, "device": "gpu"}, GPU),
        (evaluate_student, {"run": "r", "device": "gpu"}, GPU),
        (retrain_student, {**RETRAINED, "device": "gpu"}, GPU),
        (deploy_student, {"run": "r", "out": "o", "int8": "ja"}, "int8: 'ja' is neither true nor false"),
        (precompute_teacher, {**CACHE, "report": "ja"}, "report: 'ja' is neither true nor false"),
        (train_student, {**STUDENT, "epochs": 0}, "epochs: must be greater than 0, not 0"),
        (precompute_teacher, {**CACHE, "advanced": {"chunk_rows": 0}}, "chunk_rows: must be greater than 0, not 0"),
        (
            precompute_teacher,
            {**CACHE, "advanced": {"chunkrows": 8}},
            "chunkrows is not a setting. Did you mean chunk_rows?",
        ),
    ],
)
def test_a_wrong_value_is_told_in_one_line(flow, given, reason):
    """A UsageError: a run that fails by one has the sentence in its log, and no traceback."""
    with pytest.raises(UsageError, match=f"^{re.escape(f'{flow.name}: {reason}')}$"):
        call(flow, **given)


@pytest.mark.parametrize(
    ("flow", "said", "instead"),
    [
        ("precompute", "leave them out: --max-problems 16", """leave them out: -p 'advanced={"max_problems": "16"}'"""),
        ("precompute", "--max-problems 10% caches them", """-p 'advanced={"max_problems": "10%"}' caches them"""),
        ("precompute", "use --device cpu. Leave --reuse out", "use -p device=cpu. Leave --reuse out"),
        ("precompute", "--views 3 copies all", "-p 'advanced={\"views\": 3}' copies all"),
        (
            "precompute",
            "as it is: teacher-cache precompute --dataset 'table:a b?x=1' --reuse OLD --cache NEW.",
            "as it is: prefect deployment run precompute-teacher/default -p dataset='table:a b?x=1' -p reuse=OLD "
            "-p cache=NEW.",
        ),
        (
            "train",
            "or --device cpu, or teacher-cache precompute --views 4 --reuse OLD --cache NEW.",
            "or -p device=cpu, or teacher-cache precompute --views 4 --reuse OLD --cache NEW.",
        ),
        ("train", "use --set captions_per_image=0.", "use -p 'advanced={\"captions_per_image\": 0}'."),
        ("evaluate", "--towers needs; take --checkpoint last", "--towers needs; take -p checkpoint=last"),
    ],
)
def test_the_way_out_of_an_error_is_written_as_parameters(flow, said, instead):
    where = next(stage.name for stage, _ in STAGES if stage.name.startswith(flow))
    error = UsageError(said)
    in_parameters(where, error)
    in_parameters(where, error)
    assert str(error) == instead


def test_parameters_that_a_flow_does_not_have_or_that_are_missing_are_refused():
    with pytest.raises(ParameterBindError, match="chunk_rows"):
        call(precompute_teacher, **CACHE, chunk_rows=8)
    with pytest.raises(ParameterBindError, match="teacher"):
        call(precompute_teacher, dataset="a:b", cache="c")


def test_settings_that_do_not_agree_are_told_in_one_line():
    with pytest.raises(UsageError, match=r"^train-student: select_split 'train' is the split to train on"):
        started_with(select_split="train")
    with pytest.raises(UsageError, match=r"^train-student: .*recipe 'gide' is not known; there are default, guide"):
        started_with(recipe="gide")


def test_values_from_a_command_line_take_the_type_of_the_setting():
    assert started_with(epochs="8", advanced={"workers": "2"}) == started_with(epochs=8, advanced={"workers": 2})

    @parameters_of(EvaluateConfig, ("report",))
    def made(*, report: ReportPage = True, **settings: object) -> object:
        return report, settings

    assert made(report="false", advanced={"run": "r"}) == (False, {"run": "r"})


class NamedRun:
    """A flow run that is named by its parameters."""

    id = "0123456789abcdef"

    def __init__(self, parameters):
        self.parameters = parameters


@pytest.mark.parametrize(
    ("flow", "given", "name"),
    [
        (
            precompute_teacher,
            {"dataset": "flickr:../shared/flickr8k", "teacher": "ViT-B-32", "cache": "s3://b/f8k.cache"},
            "flickr8k x ViT-B-32 -> f8k.cache",
        ),
        (
            precompute_teacher,
            {"dataset": "webdataset:/data/shards/{00000..00004}.tar", "teacher": "scenes", "cache": "p.cache"},
            "shards/{00000..00004}.tar x scenes -> p.cache",
        ),
        (
            train_student,
            {"student": "vit-ti-32", "cache": "caches/f8k.cache", "out": "runs/a"},
            "vit-ti-32 from f8k.cache -> runs/a",
        ),
        (
            train_student,
            {"student": "/work/students/tiny.json", "cache": "f8k.cache", "out": ""},
            "tiny from f8k.cache -> runs/tiny-01234567",
        ),
        (evaluate_student, {"run": "/data/runs/a/", "split": "dev"}, "runs/a on dev"),
        (evaluate_student, {"run": "/data/runs/a/", "split": ""}, "runs/a on default"),
        (deploy_student, {"run": "runs/a", "out": ""}, "runs/a -> deployed/a-01234567"),
        (
            retrain_student,
            {"student": "vit-s-32", "dataset": "table:/d/pairs.csv?image=path", "home": "runs/retraining"},
            "vit-s-32 on pairs.csv -> runs/retraining",
        ),
    ],
)
def test_a_flow_run_is_named_by_what_it_does(flow, given, name, monkeypatch):
    monkeypatch.setattr("teacher_cache.flows.parameters.flow_run", NamedRun({"advanced": {}, **given}))
    assert flow.flow_run_name() == name


@pytest.mark.parametrize("deployment", deployments(), ids=lambda deployment: deployment["entrypoint"])
def test_each_deployment_loads_and_its_parameters_are_good(deployment, monkeypatch):
    monkeypatch.chdir(PROJECT)
    flow = load_flow_from_entrypoint(deployment["entrypoint"])
    assert isinstance(flow, Flow)
    # measuring and shipping are of a run that somebody names
    named = {"run": "runs/x"} if flow.name in ("evaluate-student", "deploy-student") else {}
    get_call_parameters(flow.fn, (), {**deployment["parameters"], **named})
    assert deployment["work_pool"] == {"name": "local"}
    assert deployment["concurrency_limit"] == 1
    config = {flow.name: config for flow, config in STAGES}[flow.name]
    given = {**deployment["parameters"], **deployment["parameters"].get("advanced", {}), **named}
    settings = {name: value for name, value in given.items() if name not in {*OWN, "advanced"}}
    if "out" in config.model_fields:
        settings["out"] = "runs/x"
    config.model_validate(settings)


def test_the_list_of_deployments_says_what_each_does():
    """All are named default, so a tag and the first word of the description tell them apart."""
    assert [(each["tags"], each["description"].split()[0]) for each in deployments()] == [
        (["makes a cache"], "Run"),
        (["trains a student"], "Train"),
        (["measures a student"], "Measure"),
        (["ships a student"], "Ship"),
        (["retrains and promotes"], "Look"),
    ]


def test_each_flow_has_a_default_deployment_and_the_student_learns_from_the_cache_of_the_teacher():
    names = {deployment["entrypoint"].rpartition(":")[2]: deployment for deployment in deployments()}
    assert set(names) == {flow.fn.__name__ for flow, _ in STAGES}
    assert {deployment["name"] for deployment in names.values()} == {"default"}
    caches = {names[name]["parameters"]["cache"] for name in ("precompute_teacher", "train_student")}
    assert len(caches) == 1


def test_deploying_needs_no_torch():
    """``prefect deploy`` imports each flow; seconds of torch would be for nothing."""
    modules = ", ".join(deployment["entrypoint"].partition(".py")[0].replace("/", ".") for deployment in deployments())
    code = f"import sys, {modules}; print({{'torch', 'zarr', 'numpy'}} & set(sys.modules))"
    environment = {**os.environ, "DO_NOT_TRACK": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
