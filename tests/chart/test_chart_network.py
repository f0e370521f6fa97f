"""Who may talk to whom: nothing is public, everything is denied first, and each opening has its reason."""

from __future__ import annotations

from typing import Any

import pytest
from rendering import VARIANTS, Chart, Helm

CONTROL_PORTS = {6379, 8265, 10001, 52365}
"""GCS, dashboard, Ray client, dashboard agent: whoever reaches one of these may run code (token or not)."""


def ports_of(rule: dict[str, Any]) -> set[int] | None:
    """Ports of a policy rule; None is every port."""
    return {entry["port"] for entry in rule["ports"]} if "ports" in rule else None


def test_nothing_is_public(chart: Chart) -> None:
    """No Ingress, route, LoadBalancer or NodePort in any variant."""
    assert not [item for item in chart.objects if item["kind"] in ("Ingress", "HTTPRoute", "Gateway", "Route")]
    for service in chart.kinds("Service"):
        assert service["spec"]["type"] == "ClusterIP"
        assert not {"externalIPs", "externalName", "loadBalancerIP"} & set(service["spec"])
    assert chart.ray["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert "enableIngress" not in chart.ray["headGroupSpec"]


def test_services_leave_control_ports_alone(chart: Chart) -> None:
    """The chart's own Services expose endpoints and metrics only."""
    for service in chart.kinds("Service"):
        assert not CONTROL_PORTS & {port["port"] for port in service["spec"]["ports"]}


@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - {"open-network"}))
def test_everything_is_denied_first(helm: Helm, variant: str) -> None:
    """Each pod is under a policy that denies both directions."""
    base, values = VARIANTS[variant]
    chart = helm.render(values, base=base)
    deny = chart.one("NetworkPolicy", "-default-deny")["spec"]
    assert set(deny["policyTypes"]) == {"Ingress", "Egress"}
    assert not {"ingress", "egress"} & set(deny)
    for pod in chart.pods():
        assert deny["podSelector"]["matchLabels"].items() <= pod.metadata["labels"].items(), pod.owner


def test_policies_are_there_by_default(helm: Helm) -> None:
    """Default values give the deny-all policy and one opening each for Ray and the exporter."""
    names = {item["metadata"]["name"] for item in helm.render().kinds("NetworkPolicy")}
    assert names == {"lepton-default-deny", "lepton-ray", "lepton-exporter"}


def test_control_ports_open_to_the_cluster_only(helm: Helm) -> None:
    """Dashboard, GCS and client ports are reachable from the Ray pods of the same cluster and from nobody else."""
    for rule in helm.render().one("NetworkPolicy", "lepton-ray")["spec"]["ingress"]:
        ports = ports_of(rule)
        if ports is None or CONTROL_PORTS & ports:
            assert rule["from"] == [{"podSelector": {"matchLabels": {"ray.io/cluster": "lepton"}}}]


def test_dashboard_opens_to_named_peers(helm: Helm) -> None:
    """`dashboardFrom` opens the dashboard port and nothing more."""
    peer = {"podSelector": {"matchLabels": {"app": "notebook"}}}
    rules = helm.render(base="full").one("NetworkPolicy", "lepton-ray")["spec"]["ingress"]
    assert [ports_of(rule) for rule in rules if rule["from"] == [peer]] == [{8265}]


def test_metrics_open_to_prometheus_only(helm: Helm) -> None:
    """The metrics ports are open to the monitoring namespace by default."""
    chart = helm.render()
    monitoring = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
    for policy, port in (("lepton-ray", 8080), ("lepton-exporter", 9464)):
        rules = chart.one("NetworkPolicy", policy)["spec"]["ingress"]
        assert [rule["from"] for rule in rules if ports_of(rule) == {port}] == [monitoring]


def test_serve_port_is_the_same_everywhere(helm: Helm) -> None:
    """Another Serve port reaches the container, the Service and the policy."""
    chart = helm.render({"serve": {"port": 8123}})
    (port,) = chart.one("Service", "-serve")["spec"]["ports"]
    assert (port["port"], port["targetPort"]) == (8123, 8123)
    head = chart.ray["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert 8123 in {item["containerPort"] for item in head["ports"]}
    rules = chart.one("NetworkPolicy", "lepton-ray")["spec"]["ingress"]
    assert {8123} in [ports_of(rule) for rule in rules]
    assert {8000} not in [ports_of(rule) for rule in rules]


@pytest.mark.parametrize(
    ("endpoint", "ports", "expected"),
    [
        ("", [], {443}),
        ("https://s3.example.com", [], {443}),
        ("http://s3.example.com/", [], {80}),
        ("http://s3.example.com:8333", [], {8333}),
        ("http://s3.example.com:8333", [9000, 9001], {9000, 9001}),
    ],
)
def test_storage_egress_follows_the_endpoint(helm: Helm, endpoint: str, ports: list[int], expected: set[int]) -> None:
    """Egress to the store is open at the endpoint's port, and never to the nodes' metadata service."""
    values = {"storage": {"endpoint": endpoint}, "networkPolicy": {"storage": {"ports": ports}}}
    for name in ("lepton-ray", "lepton-exporter"):
        egress = helm.render(values).one("NetworkPolicy", name)["spec"]["egress"]
        outside = [rule for rule in egress if any("ipBlock" in peer for peer in rule["to"])]
        assert [ports_of(rule) for rule in outside] == [expected]
        assert all("169.254.0.0/16" in peer["ipBlock"]["except"] for rule in outside for peer in rule["to"])


def test_shared_volume_needs_no_way_out(helm: Helm) -> None:
    """With a file:// store nothing outside the cluster can be reached; the autoscaler alone may call the API server."""
    chart = helm.render({"networkPolicy": {"extraEgress": []}}, base="full")
    for name in ("lepton-ray", "lepton-exporter"):
        egress = chart.one("NetworkPolicy", name)["spec"]["egress"]
        assert not [peer for rule in egress for peer in rule["to"] if "ipBlock" in peer]
    allowed = [{"to": [{"ipBlock": {"cidr": "192.0.2.0/24"}}], "ports": [{"port": 5432, "protocol": "TCP"}]}]
    more = helm.render({"networkPolicy": {"extraEgress": allowed}}, base="full")
    assert more.one("NetworkPolicy", "lepton-ray")["spec"]["egress"][-1:] == allowed
    assert allowed[0] not in more.one("NetworkPolicy", "lepton-exporter")["spec"]["egress"]
    autoscaler = chart.one("NetworkPolicy", "-autoscaler")["spec"]
    assert autoscaler["podSelector"]["matchLabels"]["ray.io/node-type"] == "head"
    assert [ports_of(rule) for rule in autoscaler["egress"]] == [{443, 6443}]
