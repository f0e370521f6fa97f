"""A local Ray starts without what serves a cluster's operators; other Rays of the process are as they always are."""

from __future__ import annotations

import pytest
from ray._private import node, parameter, utils

from lepton_ray.cluster import _fewer_processes


@pytest.mark.parametrize("log_monitor", [True, False])
def test_local_ray_is_told_to_start_fewer_processes(log_monitor):
    """Within the block Ray's own parameters say so; they still exist in this version of Ray."""
    with _fewer_processes(log_monitor=log_monitor):
        parameters = parameter.RayParams(num_cpus=2, include_dashboard=False)
        assert (parameters.no_monitor, parameters.include_log_monitor) == (True, log_monitor)
        assert isinstance(utils.get_dashboard_dependency_error(), ImportError)


def test_ray_is_as_it_was_after_the_start():
    """Also where the start failed."""
    before = parameter.RayParams, node.Node.start_api_server, utils.get_dashboard_dependency_error
    with pytest.raises(OSError, match="no port"), _fewer_processes(log_monitor=False):
        raise OSError("no port")
    assert (parameter.RayParams, node.Node.start_api_server, utils.get_dashboard_dependency_error) == before
    assert not parameter.RayParams(num_cpus=2).no_monitor
