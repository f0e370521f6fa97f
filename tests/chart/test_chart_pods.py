"""What every pod of every variant must be: restricted, bounded, without API rights, valid for Kubernetes."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
from rendering import Chart, Helm

from lepton_ray.cluster import RAY_ENVIRONMENT
from lepton_ray.serving.edge import IMPORT_PATH


def test_every_container_is_restricted(chart: Chart) -> None:
    """Containers meet the restricted Pod Security Standard and have a read-only root file system."""
    for pod in chart.pods():
        for container in pod.containers:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False, pod.owner
            assert context["readOnlyRootFilesystem"] is True, pod.owner
            assert context["runAsNonRoot"] is True, pod.owner
            assert context["capabilities"] == {"drop": ["ALL"]}, pod.owner
            assert set(context) <= {
                "allowPrivilegeEscalation",
                "readOnlyRootFilesystem",
                "runAsNonRoot",
                "capabilities",
            }


def test_every_pod_is_restricted(chart: Chart) -> None:
    """Pods run as a high uid under the default seccomp profile and share nothing with their node."""
    for pod in chart.pods():
        context = pod.spec["securityContext"]
        assert context["runAsNonRoot"] is True
        assert min(context["runAsUser"], context["runAsGroup"], context["fsGroup"]) >= 10_000, pod.owner
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC", "hostUsers"} & set(pod.spec), pod.owner
        assert all("hostPath" not in volume for volume in pod.spec["volumes"]), pod.owner
        assert all("hostPort" not in port for item in pod.containers for port in item.get("ports", [])), pod.owner


def test_every_pod_can_write_to_tmp_and_home(chart: Chart) -> None:
    """With a read-only root file system Ray needs both, and each is bounded."""
    for pod in chart.pods():
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        for container in pod.containers:
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            for path in ("/tmp", "/home/lepton"):  # noqa: S108  (a mount path in a pod)
                assert volumes[mounts[path]]["emptyDir"]["sizeLimit"], f"{pod.owner} {path}"
            assert set(mounts.values()) <= set(volumes), f"{pod.owner}: a mount without its volume"


def test_every_container_has_requests_and_limits(chart: Chart) -> None:
    """CPU and memory are requested and limited, and memory is not overcommitted."""
    for pod in chart.pods():
        for container in pod.containers:
            resources = container["resources"]
            assert {"cpu", "memory"} <= set(resources["requests"]), pod.owner
            assert resources["requests"] == resources["limits"], pod.owner


def test_no_pod_gets_the_service_account_token(chart: Chart) -> None:
    """Neither by the pod nor by the account; only the autoscaler's own container may mount one."""
    assert all(account["automountServiceAccountToken"] is False for account in chart.kinds("ServiceAccount"))
    for pod in chart.pods():
        assert pod.spec["automountServiceAccountToken"] is False, pod.owner
        assert pod.spec["serviceAccountName"] != "default", pod.owner
        tokens = {
            volume["name"]
            for volume in pod.spec["volumes"]
            if any("serviceAccountToken" in source for source in volume.get("projected", {}).get("sources", []))
        }
        for container in pod.containers:
            mounted = tokens & {mount["name"] for mount in container["volumeMounts"]}
            assert not mounted or container["name"] == "autoscaler", f"{pod.owner} {container['name']}"


def test_no_cluster_wide_or_namespaced_rights(chart: Chart) -> None:
    """No Role, ClusterRole or binding: nothing in this chart asks the API server for anything by itself."""
    assert not [item for item in chart.objects if "Role" in item["kind"]]


def test_gpus_reach_requests_and_limits(helm: Helm) -> None:
    """A GPU group asks the scheduler for its GPUs and tolerates their taint."""
    groups = {group["groupName"]: group for group in helm.render(base="full").ray["workerGroupSpecs"]}
    spec = groups["gpu"]["template"]["spec"]
    assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert spec["tolerations"][0]["key"] == "nvidia.com/gpu"
    assert spec["nodeSelector"] == {"accelerator": "nvidia"}
    assert "nvidia.com/gpu" not in groups["cpu"]["template"]["spec"]["containers"][0]["resources"]["limits"]


def test_ray_pods_have_the_settings_of_a_local_ray(helm: Helm) -> None:
    """What the package sets for a Ray that it starts, the chart sets for one that KubeRay starts."""
    for pod in helm.render().pods():
        if pod.owner.startswith("RayCluster"):
            environment = {item["name"]: item["value"] for item in pod.spec["containers"][0]["env"]}
            assert RAY_ENVIRONMENT.items() <= environment.items()
            assert environment["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] == IMPORT_PATH


def test_ray_drains_before_the_kubelet_kills(helm: Helm) -> None:
    """The drain timeout is 15 s below the grace period, whatever that is."""
    for pod in helm.render({"cluster": {"terminationGracePeriodSeconds": 300}}).pods():
        if pod.owner.startswith("RayCluster"):
            environment = {item["name"]: item["value"] for item in pod.spec["containers"][0]["env"]}
            assert pod.spec["terminationGracePeriodSeconds"] == 300
            assert environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == "285"


@pytest.mark.parametrize(("base", "version"), [("s3", "1.34"), ("full", "1.34"), ("full", "1.29")])
def test_objects_are_valid_for_kubernetes(helm: Helm, base: str, version: str) -> None:
    """Built-in kinds and the pods inside the RayCluster pass Kubernetes' own schemas, unknown fields refused.

    1.29 is the oldest that Chart.yaml allows.
    """
    chart = helm.render(base=base)
    for item in chart.objects:
        if item["apiVersion"] not in ("ray.io/v1", "monitoring.coreos.com/v1"):
            kubernetes_validate.validate(item, version, strict=True)
    for pod in chart.pods():
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", **pod.metadata}, "spec": pod.spec}
        kubernetes_validate.validate(whole, version, strict=True)


def test_raycluster_is_valid_for_kuberay(chart: Chart) -> None:
    """The RayCluster has only fields that KubeRay 1.7.0 knows, with values it accepts."""
    schema = json.loads((Path(__file__).parent / "raycluster-v1.schema.json").read_text())
    jsonschema.validate(chart.ray, schema)
    wrong = {**chart.ray, "authOptions": {"mode": "bogus"}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)


def test_schemas_refuse_what_they_should(helm: Helm) -> None:
    """The validator is not blind: a misspelt field of a pod is found."""
    pod = next(iter(helm.render().pods()))
    broken = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "x"},
        "spec": {**pod.spec, "securityContexts": {}},
    }
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, "1.34", strict=True)
