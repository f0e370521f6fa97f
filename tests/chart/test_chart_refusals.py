"""Values that must not render, each with one line that names the key."""

from __future__ import annotations

from typing import Any

import pytest
from rendering import Helm

GROUP = {"name": "a", "replicas": 1, "minReplicas": 1, "maxReplicas": 1, "resources": {"cpu": 1, "memory": "1Gi"}}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"replicas": 2}, "'replicas' not allowed"),
        ({"storage": {"accessKey": "x"}}, "'accessKey' not allowed"),
        ({"cluster": {"head": {"image": "x"}}}, "'image' not allowed"),
        ({"cluster": {"env": [{"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}]}}, "'env' not allowed"),
        ({"auth": {"token": "x"}}, "'token' not allowed"),
        ({"exporter": {"token": "x"}}, "'token' not allowed"),
        ({"cluster": {"workerGroups": [{**GROUP, "replicas": "two"}]}}, "/cluster/workerGroups/0/replicas"),
        ({"cluster": {"workerGroups": [{**GROUP, "hostNetwork": True}]}}, "'hostNetwork' not allowed"),
        ({"cluster": {"workerGroups": []}}, "/cluster/workerGroups"),
        ({"cluster": {"workerGroups": None}}, "workerGroups"),
        ({"cluster": {"head": None}}, "missing property 'head'"),
        ({"cluster": {"head": {"resources": {"cpu": 0}}}}, "/cluster/head/resources/cpu"),
        ({"cluster": {"head": {"resources": {"cpu": None}}}}, "missing property 'cpu'"),
        ({"cluster": {"head": {"resources": {"memory": "4"}}}}, "/cluster/head/resources/memory"),
        ({"cluster": {"mode": "static"}}, "/cluster/mode"),
        ({"cluster": {"terminationGracePeriodSeconds": 10}}, "/cluster/terminationGracePeriodSeconds"),
        ({"image": {"tag": ""}}, "/image/tag"),
        ({"image": {"tag": "latest"}}, "image.tag"),
        ({"image": {"digest": "sha256:abc"}}, "/image/digest"),
        ({"serve": {"port": 80}}, "/serve/port"),
        ({"storage": {"uri": "s3://key:secret@bucket/x"}}, "/storage/uri"),
        ({"storage": {"uri": "gs://bucket/x"}}, "/storage/uri"),
        ({"storage": {"uri": "file:///tmp/x", "existingClaim": "c"}}, "/storage/uri"),
        ({"storage": {"endpoint": "https://key:secret@host"}}, "/storage/endpoint"),
        ({"networkPolicy": {"serveFrom": [{}]}}, "/networkPolicy/serveFrom/0"),
        ({"networkPolicy": {"serveFrom": [{"podselector": {}}]}}, "'podselector' not allowed"),
        ({"metrics": {"serviceMonitor": {"sampleLimit": 0}}}, "sampleLimit"),
    ],
)
def test_schema_refuses(helm: Helm, values: dict[str, Any], named: str) -> None:
    """Unknown keys, wrong types, inline secrets and open-ended values do not render."""
    assert named in helm.refusal(values)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"storage": {"uri": ""}}, "storage.uri: empty"),
        ({"storage": {"uri": "file:///mnt/x"}}, "storage.uri: "),
        ({"storage": {"existingClaim": "c"}}, "storage.existingClaim: "),
        ({"cluster": {"workerGroups": [GROUP, GROUP]}}, 'name "a" twice'),
        ({"cluster": {"workerGroups": [{**GROUP, "minReplicas": 2}]}}, "minReplicas <= replicas"),
        ({"cluster": {"workerGroups": [{**GROUP, "replicas": 2}]}}, "minReplicas <= replicas"),
    ],
)
def test_template_refuses(helm: Helm, values: dict[str, Any], named: str) -> None:
    """What a schema cannot say: values that do not go together."""
    message = helm.refusal(values)
    assert named in message
    assert "expected" in message


@pytest.mark.parametrize(
    "values",
    [
        {"image": {"tag": ""}},
        {"image": {"tag": "latest"}},
        {"cluster": {"mode": "static"}},
        {"storage": {"uri": "s3://key:secret@bucket/x"}},
        {"storage": {"uri": "gs://bucket/x"}},
    ],
)
def test_vital_rules_hold_without_the_schema(helm: Helm, values: dict[str, Any]) -> None:
    """`--skip-schema-validation` does not open them, and no credential is repeated in the message."""
    assert "secret@" not in helm.refusal(values, "--skip-schema-validation")
