"""Ports: whether one can be listened on, told before anything is started."""

from __future__ import annotations

import errno
import os
import socket

from lepton_ray.errors import UsageError, shown


def check_port(host: str, port: int) -> None:
    """Raise UsageError where this machine cannot listen on `host:port`; port 0 stands for a free one.

    Ray Serve listens with SO_REUSEPORT: a second one on the same port would get half of the first one's requests
    without any error. This check does not share.
    """
    _bind(host, port).close()


def free_port(host: str) -> int:
    """A port of `host` that nobody listens on now. Raises UsageError where `host` is not of this machine."""
    with _bind(host, 0) as listening:
        port: int = listening.getsockname()[1]
        return port


def _bind(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:  # the system would take it modulo 65536
        raise UsageError(f"port {shown(port)}: expected 1 to 65535, or 0 for a free one")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise UsageError(f"host {shown(host)}, port {shown(port)}: no such address ({error}); give an IP") from error
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just given up is free
        listening.bind(address)
        listening.listen(1)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise UsageError(f"port {port} of {host} is in use; give another one, or 0 for a free one") from error
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UsageError(f"port {port} of {host} cannot be listened on: {reason}; give another one") from error
    return listening
