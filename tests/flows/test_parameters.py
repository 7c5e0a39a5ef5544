"""Flow parameters, spans, and ``prefect.yaml`` against both."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from prefect.exceptions import ParameterTypeError
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema

from teacher_cache.flows.deploy_student import deploy_student
from teacher_cache.flows.evaluate_student import evaluate_student
from teacher_cache.flows.precompute_teacher import precompute_teacher, span_name
from teacher_cache.flows.retrain_student import retrain_student
from teacher_cache.flows.train_student import train_student
from teacher_cache.pipeline.precompute.plan import MOST_SPANS, chunk_spans
from teacher_cache.pipeline.settings.deploy import DeployConfig
from teacher_cache.pipeline.settings.evaluate import EvaluateConfig
from teacher_cache.pipeline.settings.precompute import PrecomputeConfig
from teacher_cache.pipeline.settings.promote import RetrainConfig
from teacher_cache.pipeline.settings.recipes import RECIPE_SETTINGS
from teacher_cache.pipeline.settings.train import TrainConfig
from teacher_cache.storage.format.commits import ChunkRef

PROJECT = Path(__file__).resolve().parents[2]
STAGES = [
    (precompute_teacher, PrecomputeConfig),
    (train_student, TrainConfig),
    (evaluate_student, EvaluateConfig),
    (deploy_student, DeployConfig),
    (retrain_student, RetrainConfig),
]
OWN = {"chunks_per_span", "evaluate_split", "evaluate_checkpoint", "report", "timeout_seconds"}
# what a flow asks of its user otherwise than the stage does: a folder is named by the flow run, a student is a must
STAND_INS = {
    ("train-student", "out"): "runs/NAME-OF-THIS-FLOW-RUN",
    ("deploy-student", "out"): "runs/deployed/NAME-OF-THIS-FLOW-RUN",
    ("evaluate-student", "run"): "whose student is measured",
}


def deployments():
    return yaml.safe_load((PROJECT / "prefect.yaml").read_text())["deployments"]


@pytest.mark.parametrize(("flow", "config"), STAGES)
def test_the_form_shows_every_setting_with_its_default_limits_and_description(flow, config):
    schema = parameter_schema(flow.fn).model_dump()
    wanted = config.model_json_schema()
    assert set(schema["properties"]) - OWN == set(wanted["properties"])
    for name, field in wanted["properties"].items():
        shown = schema["properties"][name]
        if (flow.name, name) in STAND_INS:
            assert STAND_INS[flow.name, name] in shown["description"]
            continue
        limits = shown
        if config is TrainConfig and name in RECIPE_SETTINGS:  # left to the recipe, so nothing until somebody gives it
            assert shown["default"] is None
            limits = {**shown["anyOf"][0], "description": shown["description"]}
            assert shown["anyOf"][1:] == [{"type": "null"}]
        else:
            assert shown.get("default") == field.get("default"), name
        for key in set(field) - {"title", "default", "additionalProperties"}:
            assert limits[key] == field[key], name
    assert all(shown["description"] for shown in schema["properties"].values())
    must = set(wanted.get("required", ())) - {"out"}
    assert set(schema["required"]) == ({"run"} if flow is evaluate_student else must)


def started_with(**given):
    """The config that a flow run makes of the parameters somebody gave, all others as the form has them."""
    required = {"cache": "c", "student": "s", "out": "o"}
    form = {
        name: parameter.default
        for name, parameter in inspect.signature(train_student.fn).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    parameters = train_student.validate_parameters({**form, **required, **given})
    return TrainConfig(**{name: value for name, value in parameters.items() if name not in OWN})


def test_a_flow_run_takes_from_the_recipe_what_nobody_gave():
    guide = started_with(recipe="guide")
    assert (guide.learning_rate, guide.weight_decay, guide.warmup_fraction) == (5e-4, 1e-4, 0)
    assert guide.losses == {"feature": 1.0, "relational_mse": 0.1}
    assert started_with() == TrainConfig(cache="c", student="s", out="o")
    # also a value that happens to be the recipe default's
    assert started_with(recipe="guide", learning_rate=1e-3).learning_rate == 1e-3


def test_the_deployment_trains_with_the_losses_it_names():
    parameters = next(d for d in deployments() if d["entrypoint"].endswith("train_student"))["parameters"]
    given = {name: value for name, value in parameters.items() if name not in OWN}
    found = started_with(**given)
    assert found.losses == {"contrastive": 1.0, "relational": 1.0, "feature": 2000.0}
    assert (found.learning_rate, found.weight_decay, found.warmup_fraction) == (0.003, 0.05, 0.05)
    assert started_with(**given | {"recipe": "clip-kd", "losses": None}).losses["interactive"] == 1.0


def test_the_flow_tells_a_setting_that_is_out_of_range():
    with pytest.raises(ParameterTypeError, match="chunk_rows"):
        precompute_teacher.validate_parameters({"dataset": "a:b", "teacher": "t", "cache": "c", "chunk_rows": 0})
    with pytest.raises(ParameterTypeError, match="learning_rate"):
        train_student.validate_parameters({"cache": "c", "student": "s", "learning_rate": -1.0})
    with pytest.raises(ParameterTypeError, match="teacher"):
        precompute_teacher.validate_parameters({"dataset": "a:b", "cache": "c"})


def test_values_from_a_command_line_take_the_type_of_the_setting():
    given = {"dataset": "a:b", "teacher": "t", "cache": "c", "chunk_rows": "8"}
    assert precompute_teacher.validate_parameters(given)["chunk_rows"] == 8


@pytest.mark.parametrize("deployment", deployments(), ids=lambda deployment: deployment["entrypoint"])
def test_each_deployment_loads_and_its_parameters_are_good(deployment, monkeypatch):
    monkeypatch.chdir(PROJECT)
    flow = load_flow_from_entrypoint(deployment["entrypoint"])
    assert isinstance(flow, Flow)
    # measuring and shipping are of a run that somebody names
    named = {"run": "runs/x"} if flow.name in ("evaluate-student", "deploy-student") else {}
    flow.validate_parameters({**deployment["parameters"], **named})
    assert deployment["work_pool"] == {"name": "local"}
    assert deployment["concurrency_limit"] == 1
    config = {flow.name: config for flow, config in STAGES}[flow.name]
    settings = {name: value for name, value in deployment["parameters"].items() if name not in OWN}
    if "out" in config.model_fields:
        settings["out"] = "runs/x"
    config.model_validate({**settings, **named})


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


def test_own_parameters_come_with_those_of_the_stage():
    names = list(inspect.signature(train_student.fn).parameters)
    assert names == [*TrainConfig.model_fields, "evaluate_split", "evaluate_checkpoint", "report", "timeout_seconds"]


refs = st.builds(
    lambda images, texts: [ChunkRef("image", 0, n) for n in sorted(images)] + [ChunkRef("text", 0, n) for n in texts],
    st.sets(st.integers(0, 300)),
    st.integers(0, 300).map(range),
)


@given(refs)
def test_spans_hold_every_pending_chunk_once_and_are_few(pending):
    """No more than 16, each within one tower and view, also when chunks in between are done."""
    spans = chunk_spans(pending)
    assert sorted(ref for span in spans for ref in span) == sorted(pending)
    of_rows = [{(ref.tower, ref.chunk) for ref in span} for span in spans]
    assert sum(map(len, of_rows)) == len(set.union(set(), *of_rows))  # the views of an image are in one span
    assert len(spans) <= MOST_SPANS
    for cut in (spans, chunk_spans(pending, 3)):
        assert all(len({ref.tower for ref in span}) == 1 for span in cut)
    assert all(len(span) <= 3 for span in chunk_spans(pending, 3))
    assert len({span_name(span) for span in spans}) == len(spans)


def test_span_names_are_the_names_of_their_ends():
    assert span_name([ChunkRef("image", *at) for at in ((0, 0), (1, 0), (0, 3))]) == "image-000000-000003"
    assert span_name([ChunkRef("text", 0, 12)]) == "text-000012-000012"
