"""What deploy/ says must be what the server understands: schemas, option names, metric names."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import numpy as np
import pytest
import yaml

from expertd_server.config import ENV_PREFIX, Config
from expertd_server.listener import LIVENESS_SERVICE
from expertd_server.metrics import LayerFacts, Metrics
from expertd_server.server_metrics import engine_hangs

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMTOOL = shutil.which("promtool")
KUBERNETES = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
# Of kinds that Kubernetes' own schemas do not hold.
SCHEMAS = {path.stem: json.loads(path.read_text()) for path in (Path(__file__).parent / "schemas").glob("*.json")}
OPTIONS = {ENV_PREFIX + field.name.upper() for field in dataclasses.fields(Config)}
# Read by the image's build and by the Compose file itself, not by the server.
COMPOSE_VARIABLES = {"EXPERTD_CUDA", "EXPERTD_SHARD_0", "EXPERTD_SHARD_1"}


def documents(path: Path) -> Iterator[dict[str, Any]]:
    yield from yaml.safe_load_all(path.read_text())


def validate(document: dict[str, Any]) -> None:
    """Raises the validator's error, naming the field."""
    schema = SCHEMAS.get(document["kind"])
    if schema is None:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    else:
        jsonschema.validate(document, schema, jsonschema.Draft202012Validator)


@pytest.mark.parametrize("path", KUBERNETES, ids=lambda path: path.name)
def test_kubernetes_manifest_matches_its_schema(path: Path) -> None:
    for document in documents(path):
        validate(document)


@pytest.mark.parametrize(
    ("name", "line", "typo"),
    [
        ("shard-0.yaml", "replicas: 2", "replica: 2"),
        ("servicemonitor.yaml", "selector:", "selectors:"),
        ("servicemonitor.yaml", "matchLabels:", "matchLabel:"),
        ("servicemonitor.yaml", "interval: 15s", "intervall: 15s"),
        ("servicemonitor.yaml", "interval: 15s", "interval: 15"),
        ("servicemonitor.yaml", "coreos.com/v1", "coreos.com/v2"),
        ("kustomization.yaml", "resources:", "resource:"),
        ("kustomization.yaml", "namespace:", "namespaces:"),
        ("kustomization.yaml", "v1beta1", "v1"),
    ],
)
def test_a_typo_does_not_match(name: str, line: str, typo: str) -> None:
    text = (DEPLOY / "kubernetes" / name).read_text()
    assert line in text
    wrong, *_ = yaml.safe_load_all(text.replace(line, typo, 1))
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        validate(wrong)


def test_kustomization_lists_every_manifest() -> None:
    (kustomization,) = documents(DEPLOY / "kubernetes" / "kustomization.yaml")
    assert set(kustomization["resources"]) == {path.name for path in KUBERNETES} - {"kustomization.yaml"}


def test_service_and_monitor_select_every_pod() -> None:
    (service,) = documents(DEPLOY / "kubernetes" / "service.yaml")
    (monitor,) = documents(DEPLOY / "kubernetes" / "servicemonitor.yaml")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert {e["port"] for e in monitor["spec"]["endpoints"]} <= {p["name"] for p in service["spec"]["ports"]}
    shards = [d for path in KUBERNETES for d in documents(path) if d["kind"] == "StatefulSet"]
    assert len(shards) >= 2
    for shard in shards:
        labels = shard["spec"]["template"]["metadata"]["labels"]
        assert service["spec"]["selector"].items() <= labels.items()
        assert shard["spec"]["selector"]["matchLabels"].items() <= labels.items()
        assert shard["spec"]["serviceName"] == service["metadata"]["name"]


def test_pods_are_asked_how_they_are_in_ways_that_the_server_answers() -> None:
    """Liveness by what a server that loads or drains still says, and a frozen one does not."""
    for shard in (d for path in KUBERNETES for d in documents(path) if d["kind"] == "StatefulSet"):
        (container,) = shard["spec"]["template"]["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert container["livenessProbe"]["grpc"] == {"port": ports["grpc"], "service": LIVENESS_SERVICE}
        # The default of one second is less than a busy host may need.
        assert container["livenessProbe"]["timeoutSeconds"] >= 5
        for probe in ("startupProbe", "readinessProbe"):
            assert container[probe]["grpc"] == {"port": ports["grpc"]}, "the whole server"


def test_pods_are_given_time_to_drain() -> None:
    grace_s = {f.name: f.default for f in dataclasses.fields(Config)}["shutdown_grace_s"]
    for shard in (d for path in KUBERNETES for d in documents(path) if d["kind"] == "StatefulSet"):
        pod = shard["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        pause_s = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
        assert pod["terminationGracePeriodSeconds"] > pause_s + grace_s
    compose = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())
    assert float(compose["services"]["shard-0-a"]["stop_grace_period"].rstrip("s")) > grace_s


@pytest.mark.parametrize(
    "path", [DEPLOY / "Dockerfile", *DEPLOY.glob("*.yml"), *KUBERNETES], ids=lambda path: path.name
)
def test_environment_names_are_options_of_the_server(path: Path) -> None:
    named = set(re.findall(r"\bEXPERTD_[A-Z0-9_]+", path.read_text()))
    # A comment of the StatefulSets quotes what Kubernetes would set, which is an option's name as well.
    assert named - COMPOSE_VARIABLES <= OPTIONS


@pytest.mark.parametrize(
    ("cuda", "wheel", "builds"),
    [
        ("on", "torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl", False),
        ("on", "torch-2.13.0-cp311-cp311-linux_x86_64.whl", True),
        ("on", None, True),
        ("off", "torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl", True),
    ],
)
def test_an_image_for_gpus_takes_no_torch_for_cpus(tmp_path: Path, cuda: str, wheel: str | None, builds: bool) -> None:
    """The step of the build that looks, run as the build does."""
    instructions = (DEPLOY / "Dockerfile").read_text().replace("\\\n", "").splitlines()
    (guard,) = (line.removeprefix("RUN ") for line in instructions if line.startswith("RUN ") and "+cpu" in line)
    (tmp_path / "wheels").mkdir()
    if wheel is not None:
        (tmp_path / "wheels" / wheel).touch()
    environment = {**os.environ, "EXPERTD_CUDA": cuda}
    done = subprocess.run(
        ["sh", "-c", guard], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode == 0) == builds, done.stderr
    assert builds or f"deploy/wheels holds {wheel}" in done.stderr


def exported_metric_names() -> set[str]:
    metrics = Metrics(count_expert_tokens=True)
    metrics.set_server(version="0", backend="cpu", device="test")
    facts = LayerFacts(
        layer="layer",
        weights_version=1,
        is_current=True,
        hidden_size=16,
        intermediate_size=16,
        experts="0-1",
        top_k=1,
        routing="default",
        activation="swiglu",
        nbytes=1,
    )
    metrics.watch_layers(lambda: [facts])
    metrics.count_experts("layer", 0, 2)
    metrics.observe_batch("layer", 1, 1, [np.zeros((1, 1), np.int32)])
    engine_hangs(metrics.registry)
    families = metrics.registry.collect()
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
    return {family.name + suffix for family in families for suffix in suffixes.get(family.type, [""])}


@pytest.mark.parametrize("path", [DEPLOY / "prometheus" / "alerts.yml", DEPLOY / "grafana/dashboards/expertd.json"])
def test_queries_name_metrics_that_the_server_exports(path: Path) -> None:
    queried = set(re.findall(r"\bexpertd_[a-z0-9_]+", path.read_text()))
    assert queried
    assert queried <= exported_metric_names()


@pytest.mark.skipif(PROMTOOL is None, reason="promtool, of Prometheus, is not installed")
def test_errors_alert_however_few_they_are() -> None:
    command = [str(PROMTOOL), "test", "rules", str(Path(__file__).parent / "alerts_test.yml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_dashboard_is_one_that_grafana_can_provision() -> None:
    dashboard = json.loads((DEPLOY / "grafana/dashboards/expertd.json").read_text())
    assert dashboard["uid"]
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    (source,) = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"] if "datasource" in panel} == {source["uid"]}
