"""Whether a Ray cluster answers, found in seconds: `ray.init` waits for a quarter of an hour."""

import os
import socket
from contextlib import closing

import grpc
from ray._private.services import canonicalize_bootstrap_address

from rlhf_ray.errors import PlacementError

VARIABLE = "RAY_ADDRESS"
TIMEOUT_S = 10.0
_REMEDY = (
    "Set it to the address of a living head (HEAD:6379), start the head (ray start --head), or "
    "check that this machine reaches it; for a run on this machine alone unset it and set "
    "cluster.mode=local"
)


def require_cluster() -> None:
    """Fail soon where the cluster that ``ray.init(address="auto")`` would join does not answer.

    Raises:
        PlacementError: naming where the address came from, and what to do.
    """
    given = os.environ.get(VARIABLE)
    state = f"{VARIABLE} is {given}" if given else f"{VARIABLE} is not set"
    if given and given.lower().startswith(("http:", "https:")):
        raise PlacementError(
            f"{state}, the address of a dashboard, which takes jobs (rlhf-ray submit); a run joins "
            f"a cluster by the address of its head. {_REMEDY}"
        )
    try:
        address = canonicalize_bootstrap_address("auto")
    except (OSError, ValueError) as error:
        reason = str(error).partition(" Please specify")[0].rstrip(".")
        raise PlacementError(f"No Ray cluster is found: {reason}; {state}. {_REMEDY}") from error
    if address is None:
        raise PlacementError(f"{state}, which names no cluster. {_REMEDY}")
    if problem := head_problem(address):
        where = "" if given else ", where Ray left the address of a cluster on this machine"
        raise PlacementError(
            f"No head of a Ray cluster answers at {address}{where} ({state}): {problem}. {_REMEDY}"
        )


def head_problem(address: str) -> str | None:
    """Return why no head of a cluster answers at ``host:port``; None if one does."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        return str(error)
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return None  # the certificates are Ray's to check
    # Another service, or a head that hangs, takes the connection and stays silent.
    with closing(grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)])) as channel:
        try:
            grpc.channel_ready_future(channel).result(TIMEOUT_S)
        except grpc.FutureTimeoutError:
            return f"what listens there does not speak Ray's protocol within {TIMEOUT_S:g} s"
    return None
