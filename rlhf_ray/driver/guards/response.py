"""Looks at every iteration before it is committed: warns, stops the run, or asks to go back."""

from collections.abc import Mapping

from rlhf_ray.config.guards import GuardsConfig
from rlhf_ray.driver.guards.detectors import Alarm, Losses, alarms, prompt_reuse
from rlhf_ray.driver.guards.mismatch import refuse_non_finite
from rlhf_ray.driver.recorder import Recorder
from rlhf_ray.errors import DivergenceError
from rlhf_ray.observability.progress import Progress


class Watch:
    """The guards of a run."""

    def __init__(self, guards: GuardsConfig, recorder: Recorder) -> None:
        self._guards = guards
        self._recorder = recorder
        self._last_told: dict[str, int] = {}

    def check_prompts(self, num_drawn: int, num_prompts: int) -> None:
        """Warn once of a run that passes over its prompts more than once.

        Args:
            num_drawn: prompts that the whole run draws.
            num_prompts: prompts that there are.
        """
        alarm = prompt_reuse(num_drawn, num_prompts)
        known = any(record["guard"] == "prompt_reuse" for record in self._recorder.warnings())
        if alarm is not None and not known:
            self._warn(0, alarm)

    def asks_to_go_back(
        self, iteration: int, metrics: Mapping[str, float], losses: Losses, num_rollbacks: int
    ) -> bool:
        """Whether an iteration that was learnt must not be committed.

        Args:
            iteration: its number.
            metrics: what it came to.
            losses: what its losses are compared with.
            num_rollbacks: iterations right before it that were not committed.

        Raises:
            DivergenceError: a guard stops the run.
        """
        spike = self._guards.loss_spike
        if spike.action != "rollback":
            refuse_non_finite(metrics, iteration)
        found = alarms(self._guards, metrics, losses)
        for alarm in found:
            self._warn(iteration, alarm)
            if alarm.action == "stop":
                raise DivergenceError(
                    f"Iteration {iteration}: {alarm.text}. It was not committed; to go on from "
                    f"the last commit whatever comes, set guards.{alarm.guard}.action=warn"
                )
        spikes = [alarm for alarm in found if alarm.action == "rollback"]
        if spikes and num_rollbacks >= spike.max_in_a_row:
            raise DivergenceError(
                f"Iteration {iteration}: {spikes[0].text}. It is the iteration after "
                f"{num_rollbacks} that were rolled back already (guards.loss_spike.max_in_a_row): "
                "other prompts do not help"
            )
        return bool(spikes)

    def _warn(self, iteration: int, alarm: Alarm) -> None:
        self._recorder.warning(
            {
                "iteration": iteration,
                "guard": alarm.guard,
                "action": alarm.action,
                "numbers": alarm.numbers,
                "text": alarm.text,
            }
        )
        last = self._last_told.get(alarm.guard)
        if last is None or iteration - last >= self._guards.remind_every:
            self._last_told[alarm.guard] = iteration
            where = f"ppo, iteration {iteration}" if iteration else "ppo"
            # A Progress made now prints above a bar that is being shown.
            Progress().say(f"Warning: {where}, {alarm.guard}: {alarm.text}")
