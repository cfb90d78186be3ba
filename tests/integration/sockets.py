"""Sockets that other machines could connect to."""

import ipaddress
from collections.abc import Iterable, Iterator
from contextlib import suppress

import psutil


def reachable(processes: Iterable[psutil.Process]) -> Iterator[str]:
    """Name the sockets of these processes that listen on more than loopback."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            for connection in process.net_connections("inet"):
                address = ipaddress.ip_address(connection.laddr.ip)
                mapped = getattr(address, "ipv4_mapped", None) or address
                if connection.status == psutil.CONN_LISTEN and not mapped.is_loopback:
                    yield f"{process.name()} {connection.laddr}"
