"""The files in cluster/: the image, the local cluster, and the values of what the chart stands on."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rendering import CHART, ROOT

CLUSTER = ROOT / "cluster"


@pytest.fixture(scope="module")
def hadolint() -> str:
    """The linter that a development dependency brings."""
    folder = str(Path(sys.executable).parent)
    found = shutil.which("hadolint", path=os.pathsep.join([folder, os.environ["PATH"]]))
    assert found, "hadolint is missing: install the development requirements"
    return found


def lint(hadolint: str, path: Path) -> subprocess.CompletedProcess[str]:
    """Run hadolint on a Dockerfile."""
    return subprocess.run([hadolint, str(path)], capture_output=True, text=True, timeout=60, check=False)


def test_dockerfile_passes_hadolint(hadolint: str) -> None:
    """No finding of any level."""
    done = lint(hadolint, CLUSTER / "Dockerfile")
    assert (done.returncode, done.stdout) == (0, "")


def test_hadolint_finds_a_planted_fault(hadolint: str, tmp_path: Path) -> None:
    """The linter is not blind."""
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM python:latest\nRUN cd /tmp && sudo pip install x\n")
    assert "DL3007" in lint(hadolint, bad).stdout


def test_image_is_not_root_and_has_no_build_tools() -> None:
    """The last stage sets the uid of the chart and installs nothing."""
    stages = (CLUSTER / "Dockerfile").read_text().split("\nFROM ")
    assert len(stages) == 3
    last = stages[-1]
    (user,) = re.findall(r"^USER (\d+):\d+$", last, re.MULTILINE)
    assert f"runAsUser: {user}\n" in (CHART / "templates" / "_pods.tpl").read_text()
    assert f"--uid {user} " in last
    assert not re.search(r"\b(apt-get|pip|uv|gcc|curl)\b", last)
    assert "--require-hashes" in stages[1]


def test_build_context_holds_only_what_is_copied() -> None:
    """`.dockerignore` starts from nothing and lets in exactly the sources of COPY."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    assert {source.split("/")[0] for copy in copies for source in copy.split()} == allowed


def test_operator_version_is_one() -> None:
    """The operator's values, its image and the chart's message name the same KubeRay."""
    text = (CLUSTER / "kuberay-operator-values.yaml").read_text()
    version = yaml.safe_load(text)["image"]["tag"].removeprefix("v")
    assert f"--version {version}" in text
    assert f"--version {version} " in (CHART / "templates" / "_checks.tpl").read_text()


def test_prometheus_values_limit_every_scrape() -> None:
    """Annotated pods are scraped under limits, in the namespace that the chart's policies let in."""
    text = (CLUSTER / "prometheus-values.yaml").read_text()
    job = yaml.safe_load(text)["scrapeConfigs"]["kubernetes-pods"]
    assert {"sample_limit", "label_limit", "label_value_length_limit", "body_size_limit"} == set(job)
    peers = yaml.safe_load((CHART / "values.yaml").read_text())["networkPolicy"]["metricsFrom"]
    (namespace,) = [peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"] for peer in peers]
    assert f"--namespace {namespace} " in text


def test_kind_nodes_run_one_pinned_version() -> None:
    """Every node of the local cluster has the same fixed image."""
    nodes = yaml.safe_load((CLUSTER / "kind.yaml").read_text())["nodes"]
    (image,) = {node["image"] for node in nodes}
    assert re.fullmatch(r"kindest/node:v\d+\.\d+\.\d+", image)
