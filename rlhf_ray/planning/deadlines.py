"""Calls of a run that may take longer than their deadline."""

import math

from rlhf_ray.planning.roles import Setting
from rlhf_ray.planning.throughput import Pace, longest_shard


def late_calls(setting: Setting, pace: Pace | None) -> str | None:
    """Which calls are late at the predicted worst, and what deadline would do; None: none is.

    Args:
        setting: the config, and GPUs of which kinds its roles are on.
        pace: of its run; None: how fast that would be is not known.
    """
    limit_s = setting.config.cluster.call_timeout_s
    if pace is None or not pace.phases or not setting.config.cluster.runs_on_ray:
        return None
    longest = {
        "a shard of a generator": longest_shard(setting),
        # Shards wait in a queue of their scorer: the last of those that come at once for all.
        "the last score of a batch": pace.phases["score"][1],
        "learn": pace.phases["learn"][1],
    }
    late = {call: seconds for call, seconds in longest.items() if seconds > limit_s}
    if not late:
        return None
    listed = ", ".join(f"{call} {math.ceil(seconds):,} s" for call, seconds in late.items())
    return (
        f"at the predicted worst calls miss their deadline: {listed}, and cluster.call_timeout_s "
        f"is {limit_s:g}. A generator is then started anew, any other role ends the run; set "
        f"cluster.call_timeout_s={math.ceil(max(late.values()))} or more"
    )
