"""Fixtures of the chart tests: Helm as the project fetches it, and a Kubernetes API that answers discovery."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rendering import ROOT, VARIANTS, Chart, Helm


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """The Helm that `scripts/helm.py` finds or fetches."""
    script = [sys.executable, str(ROOT / "scripts" / "helm.py"), "--path"]
    found = subprocess.run(script, capture_output=True, text=True, timeout=400, check=True)
    return Helm(Path(found.stdout.strip()), tmp_path_factory.mktemp("helm"))


@pytest.fixture(params=sorted(VARIANTS))
def chart(request: pytest.FixtureRequest, helm: Helm) -> Chart:
    """Every variant in turn."""
    base, values = VARIANTS[request.param]
    return helm.render(values, base=base)


class KubernetesApi(ThreadingHTTPServer):
    """Just enough of an API server for a dry run: discovery, and GET of the Secrets it is given.

    A real one is used where behaviour of Kubernetes is tested; this one is for what the chart does with the answers.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.secrets: dict[str, dict[str, Any]] = {}
        self.kinds = {
            "v1": ["Pod", "Secret", "Service", "ServiceAccount", "ConfigMap", "Namespace"],
            "apps/v1": ["Deployment"],
            "policy/v1": ["PodDisruptionBudget"],
            "networking.k8s.io/v1": ["NetworkPolicy"],
            "ray.io/v1": ["RayCluster"],
        }
        self.kubeconfig = folder / "kubeconfig"
        self.kubeconfig.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{self.server_port}"}}],
                    "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
                    "users": [{"name": "u", "user": {}}],
                    "current-context": "c",
                }
            )
        )

    def answer(self, path: str) -> dict[str, Any] | None:
        """The document at a path, or None for 404."""
        groups = [group for group in self.kinds if "/" in group]
        if path == "/version":
            return {"major": "1", "minor": "34", "gitVersion": "v1.34.0"}
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            entries = [{"groupVersion": group, "version": group.split("/")[1]} for group in groups]
            named = [{"name": entry["groupVersion"].split("/")[0], "versions": [entry]} for entry in entries]
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": named}
        for group, kinds in self.kinds.items():
            if path == ("/api/v1" if group == "v1" else f"/apis/{group}"):
                common = {"namespaced": True, "verbs": ["get", "list", "create"]}
                resources = [{"name": f"{kind.lower()}s", "kind": kind, **common} for kind in kinds]
                return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group, "resources": resources}
        return self.secrets.get(path.rsplit("/", 1)[1]) if "/secrets/" in path else None


class _Answer(BaseHTTPRequestHandler):
    server: KubernetesApi

    def do_GET(self) -> None:
        found = self.server.answer(self.path.split("?")[0])
        missing = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
        body = json.dumps(missing if found is None else found).encode()
        self.send_response(404 if found is None else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@pytest.fixture
def kubernetes_api(tmp_path: Path) -> Iterator[KubernetesApi]:
    """A running KubernetesApi on a free loopback port."""
    server = KubernetesApi(tmp_path)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(timeout=10)
