"""Names: short enough for what KubeRay derives from them, and never shared by two releases."""

from __future__ import annotations

import re

import pytest
from rendering import LONGEST_RELEASE, Chart, Helm

DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")


def identities(chart: Chart) -> set[tuple[str, str]]:
    """(kind, name) of every object, the head's Service that KubeRay makes included."""
    found = {(item["kind"], item["metadata"]["name"]) for item in chart.objects}
    assert len(found) == len(chart.objects), "two objects of one name"
    return found | {("Service", f"{chart.one('RayCluster')['metadata']['name']}-head-svc")}


@pytest.mark.parametrize("release", ["l", "lepton", "lepton-ray", LONGEST_RELEASE])
def test_names_and_labels_stay_valid(helm: Helm, release: str) -> None:
    """Every name is a DNS label and every label value fits, for the longest release name as well."""
    chart = helm.render(base="full", release=release)
    for kind, name in identities(chart):
        assert DNS_LABEL.fullmatch(name), f"{kind} {name}"
    for item in chart.objects:
        assert all(len(str(value)) <= 63 for value in item["metadata"]["labels"].values())
    # KubeRay refuses clusters over 53 characters, and cuts the accounts' names it binds at 50
    assert len(chart.one("RayCluster")["metadata"]["name"]) <= 53
    assert all(len(account["metadata"]["name"]) <= 50 for account in chart.kinds("ServiceAccount"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("lepton", "lepton-ray"),
        ("team", "team-head"),
        ("team", "team-exporter"),
        ("team", "team-serve"),
        (LONGEST_RELEASE, LONGEST_RELEASE[:-1] + "c"),
        (LONGEST_RELEASE, LONGEST_RELEASE[:40]),
    ],
)
def test_two_releases_share_no_object(helm: Helm, one: str, other: str) -> None:
    """Two releases can live in one namespace."""
    shared = identities(helm.render(base="full", release=one)) & identities(helm.render(base="full", release=other))
    assert not shared


def test_two_releases_select_different_pods(helm: Helm) -> None:
    """No Service or policy of one release selects the pods of another."""
    first, second = helm.render(release="lepton"), helm.render(release="lepton-b")
    for item in [*first.kinds("Service"), *first.kinds("NetworkPolicy")]:
        selector = item["spec"].get("selector") or item["spec"]["podSelector"]["matchLabels"]
        for pod in second.pods():
            labels = {**pod.metadata["labels"], "ray.io/cluster": "lepton-b"}
            assert not selector.items() <= labels.items(), f"{item['kind']} {item['metadata']['name']} -> {pod.owner}"


@pytest.mark.parametrize("release", ["1up", "team.one", "Lepton"])
def test_unfit_release_name_is_refused(helm: Helm, release: str) -> None:
    """A RayCluster takes the release's name, which Helm allows more for than Kubernetes."""
    assert "release name" in helm.refusal({}, release=release)


def test_every_label_says_whose_it_is(chart: Chart) -> None:
    """The recommended labels stand on every object."""
    for item in chart.objects:
        labels = item["metadata"]["labels"]
        assert labels["app.kubernetes.io/part-of"] == "lepton-ray"
        assert labels["app.kubernetes.io/managed-by"] == "Helm"
        assert labels["helm.sh/chart"].startswith("lepton-ray-")
