"""The dashboard of docker/ asks for what the code counts, and its files lie where they are looked for."""

from __future__ import annotations

import json
import re

import yaml

from teacher_cache.storage.observe.telemetry import Metrics
from tests.container_files import DOCKER, PROJECT, services

DASHBOARD = DOCKER / "grafana" / "dashboards" / "teacher-cache.json"


def known() -> dict[str, set[str]]:
    """Labels by name of each sample that a scrape can bring."""
    counting = Metrics()
    for message, fields in {
        "input queued": {},
        "input prepared": {"tower": "image", "seconds": 0.0},
        "batch encoded": {"tower": "image", "num_rows": 1, "decode_wait_seconds": 0.0, "teacher_seconds": 0.0},
        "chunks in flight": {"chunks": 1},
        "chunk committed": {"chunk": "image/v0/000000", "write_seconds": 0.0},
        "row quarantined": {"reason": "undecodable-image"},
        "rows planned": {"tower": "image", "num_rows": 1},
        "rows done": {"tower": "image", "num_rows": 1},
        "step finished": {"num_samples": 1, "loss": 0.0, "data_wait_seconds": 0.0, "seconds": 0.0},
    }.items():
        counting(message, fields)
    found: dict[str, set[str]] = {}
    for family in counting.registry.collect():
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    # nothing is told of GPUs where there are none
    found["teacher_cache_gpu_memory_bytes"] = {"device", "kind"}
    found["teacher_cache_gpu_utilization_ratio"] = {"device"}
    assert {family.name for family in counting.registry.collect()} >= {
        "teacher_cache_gpu_memory_bytes",
        "teacher_cache_gpu_utilization_ratio",
    }
    return found


def expressions() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def test_every_metric_and_label_of_the_dashboard_is_counted() -> None:
    metrics = known()
    asked = expressions()
    assert len(asked) > 10
    for expression in asked:
        names = re.findall(r"\b((?:teacher_cache|process)_\w+)\{", expression)
        assert names, expression
        for name in names:
            assert name in metrics, f"{name} of {expression}"
        for label in re.findall(r"by \(([\w, ]+)\)", expression):
            wanted = {part.strip() for part in label.split(",")}
            assert wanted <= set.intersection(*(metrics[name] for name in names)), expression


def test_every_metric_is_shown_and_described() -> None:
    text = (PROJECT / "docs" / "howto" / "observe.md").read_text()
    described = set(re.findall(r"`teacher_cache_(\w+)`", text))
    shown = {name for each in expressions() for name in re.findall(r"teacher_cache_(\w+)\{", each)}
    for name in known():
        if name.startswith("teacher_cache_") and not name.endswith("_created"):
            base = re.sub(r"_(bucket|sum|count)$", "", name.removeprefix("teacher_cache_"))
            assert base in described, f"{base} is not in docs/howto/observe.md"
            assert any(each.startswith(base) for each in shown), f"{base} is in no panel"


def test_panels_do_not_overlap_and_have_a_data_source() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    covered: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        columns = range(place["x"], place["x"] + place["w"])
        cells = {(x, y) for x in columns for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & covered, panel["title"]
        assert place["x"] + place["w"] <= 24
        covered |= cells
        assert panel["type"] == "row" or panel["datasource"]["uid"] == "${datasource}"
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_prometheus_asks_the_worker_where_it_answers() -> None:
    config = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
    ((target,),) = [each["targets"] for job in config["scrape_configs"] for each in job["static_configs"]]
    host, port = target.split(":")
    assert services()[host]["environment"]["TEACHER_CACHE_METRICS_PORT"] == port
    assert services()[host]["environment"]["TEACHER_CACHE_METRICS_HOST"] == "0.0.0.0"
    assert "ports" not in services()[host], "whoever reaches the port can read it"


def test_grafana_finds_its_source_and_its_dashboard() -> None:
    mounts = dict(each.split(":")[:2] for each in services()["grafana"]["volumes"])
    folder = DOCKER / "grafana" / "provisioning"
    assert mounts["./grafana/provisioning"] == "/etc/grafana/provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert source["uid"] == json.loads(DASHBOARD.read_text())["templating"]["list"][0]["current"]["value"]
    (provider,) = yaml.safe_load((folder / "dashboards" / "teacher-cache.yaml").read_text())["providers"]
    assert provider["options"]["path"] == mounts["./grafana/dashboards"]
    home = services()["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/{DASHBOARD.name}"


def test_monitoring_starts_only_when_it_is_asked_for() -> None:
    profiles = {name: service.get("profiles") for name, service in services().items()}
    assert {name for name, wanted in profiles.items() if wanted} == {"prometheus", "grafana"}
    assert profiles["prometheus"] == profiles["grafana"] == ["monitoring"]
