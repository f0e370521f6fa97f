"""Ports: a wrong or taken one is told before anything starts."""

from __future__ import annotations

import socket

import pytest

from lepton_ray.errors import UsageError
from lepton_ray.serving.ports import check_port, free_port


@pytest.mark.parametrize("shared", [False, True], ids=["plain", "SO_REUSEPORT"])
def test_a_port_in_use_is_named(shared: bool) -> None:
    """Also one whose owner would share it, as Ray Serve does: half of the requests would go astray."""
    with socket.socket() as owner:
        if shared:
            owner.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        owner.bind(("127.0.0.1", 0))
        owner.listen()
        port = owner.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} of 127.0.0.1 is in use"):
            check_port("127.0.0.1", port)
        with pytest.raises(UsageError, match=f"port {port} of 0.0.0.0 is in use"):
            check_port("0.0.0.0", port)  # noqa: S104 - looked at, not left listening
    check_port("127.0.0.1", port)


def test_a_free_port_is_free() -> None:
    port = free_port("127.0.0.1")
    assert 1024 <= port <= 65535
    check_port("127.0.0.1", port)
    check_port("127.0.0.1", 0)


@pytest.mark.parametrize(("host", "port"), [("203.0.113.7", 0), ("no.such.host.invalid", 80), ("127.0.0.1", 70_000)])
def test_an_address_of_nobody_is_refused(host: str, port: int) -> None:
    with pytest.raises(UsageError, match=r"host|port"):
        check_port(host, port)
