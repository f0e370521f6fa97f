"""Rendering the chart with real Helm, and looking at what came out: objects, pods, containers."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "lepton-ray"
LONGEST_RELEASE = "a" * 20 + "-" + "b" * 32
"""53 characters: the longest release name that Helm accepts."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "s3": ("s3", {}),
    "full": ("full", {}),
    "auth-off": ("s3", {"auth": {"enabled": False, "iUnderstandThisIsUnsafe": True}}),
    "open-network": ("s3", {"networkPolicy": {"enabled": False}}),
    "no-exporter": ("full", {"exporter": {"enabled": False}}),
    "nobody-may-call": ("s3", {"networkPolicy": {"serveFrom": [], "metricsFrom": [], "dashboardFrom": []}}),
    "autoscaled-s3": ("s3", {"cluster": {"autoscaling": {"enabled": True}}}),
}
"""Name -> (file in the chart's ci/ folder, values on top): what the rules of every render are checked on."""


@dataclass(frozen=True)
class Pod:
    """A pod template of the chart, wherever it stands."""

    owner: str
    """`Deployment/lepton-exporter`, `RayCluster/lepton head`, ..."""
    metadata: dict[str, Any]
    spec: dict[str, Any]

    @property
    def containers(self) -> list[dict[str, Any]]:
        """All containers, init containers included."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


@dataclass(frozen=True)
class Chart:
    """The objects of one render."""

    objects: list[dict[str, Any]]

    def kinds(self, kind: str) -> list[dict[str, Any]]:
        """All objects of a kind."""
        return [item for item in self.objects if item["kind"] == kind]

    def one(self, kind: str, suffix: str = "") -> dict[str, Any]:
        """The only object of a kind whose name ends with `suffix`."""
        (found,) = [item for item in self.kinds(kind) if item["metadata"]["name"].endswith(suffix)]
        return found

    @property
    def ray(self) -> dict[str, Any]:
        """The spec of the RayCluster."""
        spec: dict[str, Any] = self.one("RayCluster")["spec"]
        return spec

    def pods(self) -> Iterator[Pod]:
        """Every pod that results: of Deployments and of the RayCluster, the autoscaler as KubeRay adds it."""
        for deployment in self.kinds("Deployment"):
            template = deployment["spec"]["template"]
            yield Pod(f"Deployment/{deployment['metadata']['name']}", template["metadata"], template["spec"])
        head = json.loads(json.dumps(self.ray["headGroupSpec"]["template"]))
        if self.ray.get("enableInTreeAutoscaling"):
            options = {
                key: self.ray["autoscalerOptions"][key] for key in ("resources", "securityContext", "volumeMounts")
            }
            head["spec"]["containers"].append({"name": "autoscaler", "image": "same", **options})
        yield Pod("RayCluster head", head["metadata"], head["spec"])
        for group in self.ray["workerGroupSpecs"]:
            template = group["template"]
            yield Pod(f"RayCluster {group['groupName']}", template["metadata"], template["spec"])


def read_objects(text: str) -> Chart:
    """The objects of a manifest."""
    return Chart([item for item in yaml.safe_load_all(text) if item])


@dataclass(frozen=True)
class Helm:
    """The program, run on the chart."""

    program: Path
    scratch: Path
    rendered: dict[str, Chart] = field(default_factory=dict)
    """Renders that were asked for before; tests look at them and change nothing."""

    def run(self, *arguments: str, kubeconfig: str = "") -> subprocess.CompletedProcess[str]:
        """Run it with 60 s to answer, and no cluster but the one named."""
        return subprocess.run(
            [str(self.program), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={
                "HOME": str(self.scratch),
                "PATH": "/usr/bin:/bin",
                "KUBECONFIG": kubeconfig or str(self.scratch / "no"),
            },
        )

    def template(
        self, values: dict[str, Any] | None = None, *extra: str, base: str = "s3", release: str = "lepton"
    ) -> subprocess.CompletedProcess[str]:
        """`helm template` with a file of ci/ and values on top."""
        path = self.scratch / f"values-{abs(hash(json.dumps(values, sort_keys=True)))}.json"
        path.write_text(json.dumps(values or {}))
        return self.run(
            "template", release, str(CHART), "-f", str(CHART / "ci" / f"{base}-values.yaml"), "-f", str(path), *extra
        )

    def render(self, values: dict[str, Any] | None = None, base: str = "s3", release: str = "lepton") -> Chart:
        """The objects that `template` prints; rendered once for the same values."""
        asked = json.dumps([values, base, release], sort_keys=True)
        if asked not in self.rendered:
            done = self.template(values, base=base, release=release)
            assert done.returncode == 0, done.stderr
            self.rendered[asked] = read_objects(done.stdout)
        return self.rendered[asked]

    def refusal(self, values: dict[str, Any], *extra: str, base: str = "s3", release: str = "lepton") -> str:
        """The error of a render that must fail."""
        done = self.template(values, *extra, base=base, release=release)
        assert done.returncode != 0, f"rendered, although {values}"
        assert not done.stdout, "objects were printed in spite of the error"
        return done.stderr
