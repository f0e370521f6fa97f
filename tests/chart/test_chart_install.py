"""What somebody sees who installs the chart: a missing operator, the next commands, where the store is."""

from __future__ import annotations

import subprocess

import pytest
import yaml
from conftest import KubernetesApi
from rendering import CHART, Chart, Helm


def install(helm: Helm, api: KubernetesApi, *extra: str, base: str = "s3") -> subprocess.CompletedProcess[str]:
    """`helm install --dry-run=server` against the answering API."""
    return helm.run(
        *("install", "lepton", str(CHART), "-n", "ml", "-f", str(CHART / "ci" / f"{base}-values.yaml")),
        *("--dry-run=server", "--disable-openapi-validation", *extra),
        kubeconfig=str(api.kubeconfig),
    )


def test_missing_operator_is_named_with_its_command(helm: Helm, kubernetes_api: KubernetesApi) -> None:
    """A cluster without RayCluster gets one line with the command that installs KubeRay."""
    del kubernetes_api.kinds["ray.io/v1"]
    done = install(helm, kubernetes_api)
    assert done.returncode != 0
    assert "helm install kuberay-operator kuberay/kuberay-operator --version 1.7.0" in done.stderr


def test_rendering_needs_no_cluster(helm: Helm) -> None:
    """`helm template` and `helm lint` work where no API server answers."""
    assert helm.render().kinds("RayCluster")


@pytest.mark.parametrize("base", ["s3", "full"])
def test_notes_give_the_next_three_commands(helm: Helm, kubernetes_api: KubernetesApi, base: str) -> None:
    """Open the dashboard, submit with the token, read the metrics: each for the objects that are really made."""
    kubernetes_api.kinds["monitoring.coreos.com/v1"] = ["ServiceMonitor", "PodMonitor", "PrometheusRule"]
    done = install(helm, kubernetes_api, base=base)
    assert done.returncode == 0, done.stderr
    notes = done.stdout.split("NOTES:")[1]
    assert "kubectl -n ml port-forward service/lepton-head-svc 8265" in notes
    token = {"s3": "lepton-token", "full": "my-token"}[base]
    assert f"kubectl -n ml get secret {token} -o jsonpath='{{.data.auth_token}}'" in notes
    assert "ray job submit --address http://127.0.0.1:8265 --working-dir . -- python jobs/train.py" in notes
    assert "port-forward service/lepton-exporter 9464" in notes
    assert ("Authorization: Bearer" in notes) == (base == "full")
    assert "WARNING" not in notes


def test_notes_warn_of_what_was_switched_off(helm: Helm, kubernetes_api: KubernetesApi) -> None:
    """No authentication and no policies are said in the notes."""
    off = "auth.enabled=false,auth.iUnderstandThisIsUnsafe=true,networkPolicy.enabled=false,exporter.enabled=false"
    notes = install(helm, kubernetes_api, "--set", off).stdout.split("NOTES:")[1]
    assert notes.count("WARNING") == 2
    assert "RAY_AUTH_TOKEN" not in notes
    assert "9464" not in notes


def test_lint_is_clean(helm: Helm) -> None:
    """`helm lint --strict` finds nothing, with the defaults and with each file of ci/."""
    for values in (None, "s3", "full"):
        extra = ("-f", str(CHART / "ci" / f"{values}-values.yaml")) if values else ()
        done = helm.run("lint", "--strict", str(CHART), *extra)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "WARNING" not in done.stdout


def test_lint_fails_on_a_wrong_value(helm: Helm) -> None:
    """The lint above is not blind."""
    assert helm.run("lint", "--strict", str(CHART), "--set", "bogus=1").returncode != 0


def test_store_reaches_every_pod(chart: Chart) -> None:
    """Ray pods and the exporter take LEPTON_STORE from the settings, and credentials from the user's Secret only."""
    settings = chart.one("ConfigMap", "-settings")
    uri = settings["data"]["LEPTON_STORE"]
    for pod in chart.pods():
        container = pod.spec["containers"][0]
        sources = container["envFrom"]
        assert {"configMapRef": {"name": settings["metadata"]["name"]}} in sources
        if uri.startswith("s3://"):
            assert {"secretRef": {"name": "lepton-storage"}} in sources
        else:
            (mount,) = [item for item in container["volumeMounts"] if item["name"] == "store"]
            assert mount["mountPath"] == uri.removeprefix("file://")
            assert mount.get("readOnly", False) == pod.owner.startswith("Deployment")


def test_endpoint_and_region_are_settings(helm: Helm) -> None:
    """The S3 client's standard variables, only where given."""
    data = helm.render({"storage": {"endpoint": "http://s3:8333", "region": "eu-1"}}).one("ConfigMap")["data"]
    assert data["AWS_ENDPOINT_URL"] == "http://s3:8333"
    assert data["AWS_REGION"] == "eu-1"
    assert set(helm.render({"storage": {"endpoint": ""}}).one("ConfigMap")["data"]) == {"LEPTON_STORE"}


def test_exporter_restarts_when_the_store_changes(helm: Helm) -> None:
    """Its pod template changes with the storage settings and with nothing else."""

    def checksum(uri: str, port: int) -> str:
        deployment = helm.render({"storage": {"uri": uri}, "serve": {"port": port}}).one("Deployment")
        return str(deployment["spec"]["template"]["metadata"]["annotations"]["checksum/settings"])

    assert checksum("s3://one/x", 8000) == checksum("s3://one/x", 8001)
    assert checksum("s3://one/x", 8000) != checksum("s3://two/x", 8000)


def test_pods_are_scraped_one_way_or_the_other(helm: Helm) -> None:
    """Annotations by default, monitors with limits for the Prometheus operator."""
    for pod in helm.render().pods():
        annotations = pod.metadata["annotations"]
        ports = {port["containerPort"] for port in pod.spec["containers"][0]["ports"] if port["name"] == "metrics"}
        assert annotations["prometheus.io/scrape"] == "true"
        assert {int(annotations["prometheus.io/port"])} == ports
    full = helm.render(base="full")
    assert all("prometheus.io/scrape" not in pod.metadata.get("annotations", {}) for pod in full.pods())
    for kind in ("ServiceMonitor", "PodMonitor"):
        spec = full.one(kind)["spec"]
        assert {"sampleLimit", "labelLimit", "labelValueLengthLimit", "bodySizeLimit"} <= set(spec)
        assert full.one(kind)["metadata"]["labels"]["release"] == "prometheus"


def test_rules_are_given_to_the_prometheus_operator_on_request(helm: Helm) -> None:
    """All alerts and recorded figures, with the labels that a Prometheus selects rules by; none by default."""
    assert not helm.render().kinds("PrometheusRule")
    made = helm.render(base="full").one("PrometheusRule")
    assert made["metadata"]["labels"]["release"] == "prometheus"
    assert made["spec"] == yaml.safe_load((CHART / "files" / "rules.yaml").read_text(encoding="utf-8"))
    assert {rule["labels"]["severity"] for group in made["spec"]["groups"][1:] for rule in group["rules"]} == {
        "critical", "warning", "info"
    }  # fmt: skip


def test_dashboards_are_given_to_grafana_on_request(helm: Helm) -> None:
    """Each file of the chart, word for word, with the label that Grafana's sidecar looks for; none by default."""
    assert not [item for item in helm.render().kinds("ConfigMap") if item["metadata"]["name"].endswith("-dashboards")]
    made = helm.render(base="full").one("ConfigMap", "-dashboards")
    assert made["metadata"]["labels"]["grafana_dashboard"] == "1"
    files = sorted((CHART / "files" / "dashboards").iterdir())
    assert made["data"] == {path.name: path.read_text(encoding="utf-8") for path in files}
    assert len(files) == 4


def test_head_is_guarded_against_eviction(helm: Helm) -> None:
    """The head has a disruption budget, which can be switched off."""
    budget = helm.render().one("PodDisruptionBudget")["spec"]
    assert budget["selector"]["matchLabels"] == {"ray.io/cluster": "lepton", "ray.io/node-type": "head"}
    assert not helm.render({"cluster": {"head": {"podDisruptionBudget": False}}}).kinds("PodDisruptionBudget")


def test_autoscaling_moves_groups_between_their_bounds(helm: Helm) -> None:
    """The autoscaler is asked for, and each group keeps its own bounds."""
    ray = helm.render(base="full").ray
    assert ray["enableInTreeAutoscaling"] is True
    assert [(group["minReplicas"], group["maxReplicas"]) for group in ray["workerGroupSpecs"]] == [(0, 4), (2, 8)]
    assert "enableInTreeAutoscaling" not in helm.render().ray
