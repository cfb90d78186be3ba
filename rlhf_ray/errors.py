"""One family of errors. Each names the role or key, the numbers, and what to do.

Every class pickles with its message alone, because errors cross process boundaries. A message holds
no secret that this process knows, wherever it is shown: a server may echo a key.
"""

from rlhf_ray.secrecy import redacted


class RlhfError(Exception):
    """Base of every error that this package raises on purpose. Exit code 1."""

    exit_code = 1
    repeats = False
    """Whether a run that resumes from the same commit would end in the same way."""

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


class ConfigError(RlhfError):
    """A config key, value or combination is wrong. Exit code 2: the user can fix it."""

    exit_code = 2


class DataError(RlhfError):
    """Input data or a model folder is missing, malformed or unusable. Exit code 2."""

    exit_code = 2


class CheckpointError(RlhfError):
    """A commit cannot be written or read, or does not belong to this config. Exit code 2."""

    exit_code = 2


class PlacementError(RlhfError):
    """The cluster has no capacity for a request, or it was not available in time."""


class WeightSyncError(RlhfError):
    """A generator does not serve the adapter that it was sent."""


class ActorFailure(RlhfError):
    """A role's process died, or did not answer before its deadline."""


class MemoryFailure(ActorFailure):
    """A role's process lacked memory: what runs out of it twice in a row doesn't fit."""


class NodeLeaves(ActorFailure):
    """A role's process was ended because its node is to leave the cluster: no fault of its own."""


class NodeLost(ActorFailure):
    """A role's process died with its node, as others may have."""

    def __init__(self, message: str, node: str = "") -> None:
        """
        Args:
            message: of the error.
            node: Ray's id of the node.
        """
        super().__init__(message)
        self.node = node


class LostNodes:
    """Nodes whose loss has cost a restart: each costs one, whatever it takes along."""

    def __init__(self) -> None:
        self._nodes: set[str] = set()

    def has(self, error: Exception) -> bool:
        """Return whether a node was lost that has cost its restart."""
        return isinstance(error, NodeLost) and error.node in self._nodes

    def add(self, error: Exception) -> None:
        """Note that a restart is spent, where a node was lost."""
        if isinstance(error, NodeLost):
            self._nodes.add(error.node)


class DataLost(ActorFailure):
    """What a call works on is gone: another process could not do it either."""


class LedgerError(RlhfError):
    """A sample was lost, is there twice, or is of another version than it should be."""

    repeats = True


class DivergenceError(RlhfError):
    """Training left the numbers in which it means anything (non-finite loss, sampler gap)."""

    repeats = True
