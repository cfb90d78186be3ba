"""Connect to the job server of a cluster, and fail soon with one clear message where it is away."""

import logging
import os
import re
import socket
from typing import Any
from urllib.parse import urlsplit

from rlhf_ray.cluster.connection import head_problem
from rlhf_ray.errors import ActorFailure, ConfigError, PlacementError
from rlhf_ray.jobs.job_server import JobServer

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")

CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 60.0
"""Longest silence of the job server within a request; Ray's client itself would wait forever."""

QUICK_ANSWER_S = 10.0
"""The same where there is another answer."""


def connect(address: str | None, answer_timeout_s: float | None = None) -> JobServer:
    """Connect to the job server at an address, else where Ray's variables say, else on localhost.

    Args:
        address: of the dashboard.
        answer_timeout_s: longest silence within a request; None: the usual one.

    Raises:
        PlacementError: nothing answers there, or it refuses this user.
    """
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for module in ("dashboard_sdk", "job.sdk"):  # they set their own level at import
        logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)

    class Client(JobSubmissionClient):
        def _do_request(self, *args: Any, **kwargs: Any) -> Any:
            return super()._do_request(
                *args, timeout=answer_timeout_s or ANSWER_TIMEOUT_S, **kwargs
            )

    if address is not None:
        # Ray prefers this variable to the address that its client is given.
        os.environ[ADDRESS_VARIABLES[0]] = address
    url = configured_address() or DEFAULT_ADDRESS
    _require_reachable(url)
    try:
        return JobServer(Client(url))
    except AuthenticationError as error:
        raise PlacementError(
            f"The job server at {url} refuses this user: {str(error).splitlines()[0]}. Set "
            "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the cluster's token"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise PlacementError(
            f"Cannot use the job server at {url}: {error}. Check that this is the address of the "
            "cluster's dashboard and that the cluster runs this version of Ray"
        ) from error


def driver_host(run: str, address: str) -> tuple[str | None, str]:
    """Return the address of the node of a run's driver; None, and why, where it is not known.

    Args:
        run: its name, folder or submission id.
        address: of the cluster's dashboard.

    Raises:
        ConfigError: the address is malformed.
    """
    try:
        server = connect(address, QUICK_ANSWER_S)
    except PlacementError as error:
        return None, str(error)
    try:
        job = server.find(run)
    except (ActorFailure, ConfigError) as error:
        return None, str(error)
    return job.host, "" if job.host else f"the driver of {job.id} has not started"


def configured_address() -> str | None:
    """Return the address in Ray's variables; None where none is set."""
    return next((os.environ[name] for name in ADDRESS_VARIABLES if os.environ.get(name)), None)


def _require_reachable(address: str) -> None:
    """Fail within seconds where nothing listens: Ray's client would wait for minutes."""
    try:
        url, port = urlsplit(address), urlsplit(address).port
    except ValueError as error:
        raise ConfigError(f"{address} is no address of a cluster: {error}") from None
    if re.fullmatch(r"[^/@\s]+:\d+", address):  # a head's, which Ray turns into its dashboard's
        if problem := head_problem(address):
            raise PlacementError(
                f"No head of a Ray cluster answers at {address}: {problem}. Give the dashboard's "
                f"address with --address or in {ADDRESS_VARIABLES[0]}, for example "
                f"http://head-node:8265, or unset {ADDRESS_VARIABLES[1]}; for a run on this "
                "machine give its folder"
            )
        return
    if url.scheme not in ("http", "https") or url.hostname is None:
        return  # another form of Ray's
    port = port or (443 if url.scheme == "https" else 80)
    try:
        socket.create_connection((url.hostname, port), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise PlacementError(
            f"Nothing answers at {address}: {error}. Give the dashboard's address with --address "
            f"or in {ADDRESS_VARIABLES[0]}, for example http://head-node:8265; for a run on this "
            "machine give its folder"
        ) from error
