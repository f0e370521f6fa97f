"""The token: on by default, made once, kept over upgrades, a file that only Ray's uid reads, never an environment."""

from __future__ import annotations

import base64
from typing import Any

from conftest import KubernetesApi
from rendering import CHART, Chart, Helm, read_objects


def environment(container: dict[str, Any]) -> dict[str, str]:
    """Name -> literal value of a container's variables."""
    assert all("valueFrom" not in item for item in container["env"])
    return {item["name"]: item["value"] for item in container["env"]}


def secret_token(chart: Chart) -> str:
    """The token in the rendered Secret."""
    return base64.b64decode(chart.one("Secret")["data"]["auth_token"]).decode()


def test_token_mode_is_set_on_every_ray_pod(helm: Helm) -> None:
    """Ray's own default is no authentication; cluster, head and workers all say token."""
    chart = helm.render()
    assert chart.ray["authOptions"] == {"mode": "token", "secretName": "lepton-token"}
    ray_pods = [pod for pod in chart.pods() if pod.owner.startswith("RayCluster")]
    assert len(ray_pods) == 2
    for pod in ray_pods:
        assert environment(pod.spec["containers"][0])["RAY_AUTH_MODE"] == "token"


def test_token_is_a_file_and_not_in_the_environment(helm: Helm) -> None:
    """Jobs inherit the environment: the variable KubeRay would fill is empty, the path points to the mount."""
    for pod in helm.render().pods():
        if pod.owner.startswith("Deployment"):
            continue
        container = pod.spec["containers"][0]
        variables = environment(container)
        assert variables["RAY_AUTH_TOKEN"] == ""
        (mount,) = [item for item in container["volumeMounts"] if item["name"] == "ray-token"]
        assert variables["RAY_AUTH_TOKEN_PATH"] == f"{mount['mountPath']}/auth_token"
        assert mount["readOnly"] is True
        (volume,) = [item for item in pod.spec["volumes"] if item["name"] == "ray-token"]
        assert volume["secret"]["defaultMode"] == 0o400
        assert volume["secret"]["secretName"] == "lepton-token"


def test_exporter_has_no_cluster_token(helm: Helm) -> None:
    """The exporter reads the store; the token is not mounted there."""
    (pod,) = [pod for pod in helm.render().pods() if pod.owner.startswith("Deployment")]
    assert not [volume for volume in pod.spec["volumes"] if "secret" in volume]


def test_new_tokens_are_long_and_different(helm: Helm) -> None:
    """Two installs never share a token, and each has 256 bits at least (48 letters and digits have 285)."""
    first, second = (secret_token(read_objects(helm.template().stdout)) for _ in range(2))
    assert first != second
    assert len(first) >= 43
    assert first.isalnum()


def test_upgrade_keeps_the_token(helm: Helm, kubernetes_api: KubernetesApi) -> None:
    """A Secret of this release that exists is found and its token rendered again."""
    kubernetes_api.secrets["lepton-token"] = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": "lepton-token",
            "namespace": "default",
            "labels": {"app.kubernetes.io/managed-by": "Helm"},
            "annotations": {"meta.helm.sh/release-name": "lepton", "meta.helm.sh/release-namespace": "default"},
        },
        "data": {"auth_token": base64.b64encode(b"made-at-the-first-install").decode()},
    }
    done = helm.run(
        *("install", "lepton", str(CHART), "-f", str(CHART / "ci" / "s3-values.yaml")),
        *("--dry-run=server", "--disable-openapi-validation"),
        kubeconfig=str(kubernetes_api.kubeconfig),
    )
    assert done.returncode == 0, done.stderr
    manifest = done.stdout.split("MANIFEST:")[1].split("NOTES:")[0]
    assert secret_token(read_objects(manifest)) == "made-at-the-first-install"


def test_own_secret_is_used_and_none_made(helm: Helm) -> None:
    """`auth.existingSecret` reaches the cluster and the mounts."""
    chart = helm.render(base="full")
    assert not chart.kinds("Secret")
    assert chart.ray["authOptions"]["secretName"] == "my-token"
    head = chart.ray["headGroupSpec"]["template"]["spec"]
    assert "my-token" in [volume.get("secret", {}).get("secretName") for volume in head["volumes"]]


def test_authentication_is_off_only_when_said_twice(helm: Helm) -> None:
    """Switching it off alone is refused, with the schema skipped as well; saying it twice is rendered and warned of."""
    for extra in ((), ("--skip-schema-validation",)):
        assert "auth.enabled: false" in helm.refusal({"auth": {"enabled": False}}, *extra)
    chart = helm.render({"auth": {"enabled": False, "iUnderstandThisIsUnsafe": True}})
    assert chart.ray["authOptions"] == {"mode": "disabled"}
    assert not chart.kinds("Secret")
    for pod in chart.pods():
        if pod.owner.startswith("RayCluster"):
            assert environment(pod.spec["containers"][0])["RAY_AUTH_MODE"] == "disabled"


def test_metrics_token_reaches_exporter_and_scraper(helm: Helm) -> None:
    """With `exporter.tokenSecret` the exporter asks for the token and the ServiceMonitor brings it."""
    chart = helm.render(base="full")
    (pod,) = [pod for pod in chart.pods() if pod.owner.startswith("Deployment")]
    container = pod.spec["containers"][0]
    (mount,) = [item for item in container["volumeMounts"] if item["name"] == "metrics-token"]
    assert f"--token-file={mount['mountPath']}/token" in container["args"]
    (endpoint,) = chart.one("ServiceMonitor")["spec"]["endpoints"]
    assert endpoint["authorization"]["credentials"] == {"name": "metrics-token", "key": "token"}
