"""The registry of metrics: every name that is logged, with its unit, reduction and meaning.

Names are TRL's where it has one, else verl's. ``docs/metrics.md`` is `markdown_table`'s output;
a unit test keeps the file up to date.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One logged number."""

    name: str
    """Key in metrics.jsonl, tag in TensorBoard."""
    unit: str
    """Unit of the value; `1` for a pure number."""
    reduction: str
    """What the logged value is taken over, and how."""
    meaning: str
    """What it tells, in a sentence."""


_SAMPLES = "mean over samples"
_TOKENS = "mean over response tokens"
_BATCHES = "mean over the iteration's mini-batches"
_LAST = "last value"
_SUM = "sum over the iteration"
_HELD_OUT = "mean over held-out prompts"

_ROWS: tuple[tuple[str, str, str, str], ...] = (
    (
        "objective/kl",
        "nats",
        _SAMPLES,
        "KL to the reference per response: the sum over its tokens of k1, log pi - log ref.",
    ),
    ("objective/kl_per_token", "nats per token", _TOKENS, "The same KL (k1), per token."),
    (
        "objective/entropy",
        "nats per token",
        _TOKENS,
        "Estimate of the sampling policy's entropy: minus the log-prob of the sampled tokens.",
    ),
    (
        "objective/scores",
        "1",
        _SAMPLES,
        "Raw score: the weighted sum over the reward sources, before baseline, scaling and clip.",
    ),
    ("objective/scores/<source>", "1", _SAMPLES, "Raw score of one reward source, by its name."),
    (
        "objective/missing/<source>",
        "1",
        _SUM,
        "Samples that the source has no score for: it does not apply, or its answer was unusable.",
    ),
    ("objective/scores_std", "1", "standard deviation over samples", "Spread of the raw scores."),
    (
        "objective/rlhf_reward",
        "1",
        _SAMPLES,
        "What PPO maximises: the score plus the KL part of the reward.",
    ),
    (
        "objective/non_score_reward",
        "1",
        _SAMPLES,
        "KL part of the reward: minus the coefficient times the KL, summed over tokens.",
    ),
    ("objective/kl_coef", "1 per nat", _LAST, "KL coefficient that this iteration's rewards used."),
    (
        "policy/approxkl_avg",
        "nats per token",
        _BATCHES,
        "KL (k2) between the policy before and after an update: how far one iteration moves it.",
    ),
    (
        "policy/clipfrac_avg",
        "share",
        _BATCHES,
        "Share of response tokens whose policy loss is the clipped one.",
    ),
    (
        "policy/entropy_avg",
        "nats per token",
        _BATCHES,
        "Entropy of the distribution that tokens are drawn from; near 0 it has stopped exploring.",
    ),
    ("loss/policy_avg", "1", _BATCHES, "Clipped policy loss."),
    (
        "loss/kl_avg",
        "nats",
        _BATCHES,
        "KL to the reference a token, as ppo.kl_estimator has it, where ppo.kl_in is loss.",
    ),
    ("loss/value_avg", "1", _BATCHES, "Clipped value loss: half the mean squared error."),
    (
        "val/clipfrac_avg",
        "share",
        _BATCHES,
        "Share of response tokens whose value loss is the clipped one.",
    ),
    (
        "val/ratio",
        "1",
        _BATCHES,
        "Mean of pi / pi_old over tokens; 1 in the first step of an iteration, near 1 after.",
    ),
    ("val/ratio_max", "1", "maximum over the iteration", "Largest pi / pi_old of any token."),
    (
        "val/explained_variance",
        "1",
        "over the iteration's response tokens",
        "1 - var(returns - values) / var(returns): 1: a perfect critic, 0: one that knows nothing.",
    ),
    (
        "val/ratio_minibatch_max",
        "1",
        "maximum over the iteration's mini-batches",
        "Largest mean of pi / pi_old over the tokens of a mini-batch, which guards.ratio bounds; "
        "infinite where it was NaN.",
    ),
    (
        "policy/ratio_exceeded",
        "1",
        _SUM,
        "Mini-batches over guards.ratio.max_mean; none of them moved the weights, unless "
        "guards.ratio.action is warn.",
    ),
    ("policy/grad_norm", "1", _BATCHES, "Policy's gradient norm before clipping."),
    ("val/grad_norm", "1", _BATCHES, "Critic's gradient norm before clipping."),
    ("response_length/mean", "tokens", _SAMPLES, "Response length."),
    ("response_length/max", "tokens", "maximum over samples", "Longest response."),
    (
        "response_length/eos_share",
        "share",
        "over samples",
        "Share of responses that ended by themselves, not at the token limit.",
    ),
    (
        "response/repeating_share",
        "share",
        "over samples",
        "Share of responses that repeat a token four times or more in a row; near 0 in a healthy "
        "run, near 1 where the reward is gamed.",
    ),
    (
        "response/distinct_bigrams",
        "share",
        _SAMPLES,
        "Distinct-2: share of distinct bigrams within a response; falls where texts repeat.",
    ),
    (
        "sampler/gap_mean",
        "nats per token",
        _TOKENS,
        "|rollout - old log-prob|: how far the engine's numbers are from the learner's.",
    ),
    ("sampler/gap_max", "nats", "maximum over response tokens", "Largest such gap of any token."),
    (
        "rollout/staleness",
        "versions",
        "maximum over samples",
        "How many versions the policy was ahead of the one that sampled; 0: on-policy.",
    ),
    ("timing_s/gen", "s", _SUM, "Wall time until the batch's last rollout was there."),
    ("timing_s/score", "s", _SUM, "Wall time of scoring that generation did not hide."),
    ("timing_s/learn", "s", _SUM, "Wall time of the policy's and the critic's updates."),
    ("timing_s/commit", "s", _SUM, "Wall time of collecting the state of the learners."),
    (
        "timing_s/save",
        "s",
        _SUM,
        "Wall time of writing the commit of the iteration before to the run's folder.",
    ),
    ("timing_s/sync", "s", _SUM, "Wall time of publishing and proving the adapter."),
    ("timing_s/iteration", "s", _SUM, "Wall time of the whole iteration."),
    ("throughput/episodes_per_s", "1/s", _LAST, "Rollouts learnt per second of the iteration."),
    (
        "throughput/tokens_per_s",
        "tokens/s",
        _LAST,
        "Response tokens learnt per second of the iteration.",
    ),
    ("generators/ready", "1", _LAST, "Generators that serve the newest adapter, and get prompts."),
    ("generators/target", "1", _LAST, "Generators that are wanted."),
    (
        "generators/queue_depth",
        "shards",
        "mean over the time of generation",
        "Shards that waited for a generator.",
    ),
    (
        "generators/idle_share",
        "share",
        "mean over generators and the time between two publications",
        "Share of the time in which a generator had nothing to sample, as others learnt.",
    ),
    ("generators/restarts", "1", "sum since the start", "Generators that were started anew."),
    (
        "generators/requeued",
        "1",
        "sum since the start",
        "Rollouts that a generator handed back, and others sampled.",
    ),
    (
        "cost/per_1000_samples",
        "price",
        _LAST,
        "What 1,000 rollouts cost: the iteration's hours times the GPUs that the run's actors hold "
        "times cluster.gpu_hour_price, where that is set.",
    ),
    ("policy/version", "1", _LAST, "Adapter version that this iteration committed."),
    ("episode", "1", "sum since the start", "Rollouts learnt so far."),
    (
        "episode_set_aside",
        "1",
        "sum since the start",
        "Rollouts whose learning guards.loss_spike rolled back so far.",
    ),
    ("eval/score", "1", _HELD_OUT, "Raw score (weighted sum) on held-out prompts."),
    ("eval/gold", "1", _HELD_OUT, "Gold score, where the data has one; never trained on."),
    ("eval/kl", "nats", _HELD_OUT, "KL to the reference per response, as objective/kl."),
    ("eval/length", "tokens", _HELD_OUT, "Response length on held-out prompts."),
    (
        "actors/busy/<actor>",
        "share",
        "over the time since the last iteration",
        "Share of the time in which an actor had something to do. Only in Ray's metrics.",
    ),
    (
        "commit/time",
        "s",
        _LAST,
        "When the run last committed, or began: Unix time. Only in Ray's metrics.",
    ),
    ("disk/free", "bytes", _LAST, "Free space where run.dir is. Only in Ray's metrics."),
    ("disk/free_share", "share", _LAST, "The same of the whole disk. Only in Ray's metrics."),
    ("data/skipped", "1", "sum since the start", "Prompts set aside as unusable."),
    ("loss", "nats", "mean since the last record", "Training loss of a supervised stage."),
    (
        "eval_loss",
        "nats",
        "mean over held-out rows, or their tokens",
        "Held-out loss of a supervised stage; of a language model, per token.",
    ),
    ("eval_perplexity", "1", "over held-out tokens", "exp(eval_loss) of a language model."),
    (
        "eval_accuracy",
        "share",
        "over held-out pairs",
        "Share of pairs whose better answer the reward model scores higher.",
    ),
    (
        "eval_auc",
        "share",
        "over held-out answers",
        "Share of pairs of a liked and a disliked answer of which the liked one scores higher.",
    ),
    (
        "eval_correlation",
        "1",
        "over held-out answers",
        "Pearson's correlation of the reward model's scores with the ratings.",
    ),
    ("learning_rate", "1", _LAST, "Learning rate of a supervised stage."),
    ("grad_norm", "1", _LAST, "Gradient norm of a supervised stage before clipping."),
    ("epoch", "1", _LAST, "Passes over a supervised stage's data so far."),
    (
        "win_rate/<model>",
        "share",
        _HELD_OUT,
        "Of the stage evaluate: how often a model's answer is better than sft's, ties half.",
    ),
    ("elo/<model>", "points", _HELD_OUT, "Elo rating among the compared models; sft has 1000."),
    ("reward_mean/<model>", "1", _HELD_OUT, "Raw score (weighted sum) of a model's answers."),
    ("gold_mean/<model>", "1", _HELD_OUT, "Gold score of a model's answers."),
    ("rouge_mean/<model>", "1", _HELD_OUT, "ROUGE-L of a model's answers, against given ones."),
    (
        "perplexity/<model>",
        "1",
        "over the tokens of given answers",
        "exp of a model's mean loss on the answers that the held-out rows bring along.",
    ),
    (
        "instruction_pass_rate/<model>",
        "share",
        "mean over instructions",
        "Share of a model's answers that do what the instruction says, by a program's check.",
    ),
)

METRICS: dict[str, Metric] = {row[0]: Metric(*row) for row in _ROWS}

_FAMILIES = {name.partition("<")[0]: name for name in METRICS if name.endswith(">")}
"""Metrics that there are once a source, a model or an actor, by what their names begin with."""


def registered_as(name: str) -> str | None:
    """The registry's name of a metric: its own, or such as ``objective/scores/<source>``."""
    if name in METRICS:
        return name
    return next((_FAMILIES[start] for start in _FAMILIES if name.startswith(start)), None)


def is_registered(name: str) -> bool:
    """Whether a metric is in the registry, by itself or as that of a source, model or actor."""
    return registered_as(name) is not None


def check(names: Iterable[str]) -> None:
    """Refuse names that are not registered, so that nothing is logged undocumented.

    Raises:
        KeyError: naming each unknown metric and the registered name nearest to it.
    """
    unknown = [name for name in names if not is_registered(name)]
    if not unknown:
        return
    described = []
    for name in unknown:
        near = difflib.get_close_matches(name, METRICS, n=1)
        described.append(f"{name} (nearest: {near[0]})" if near else name)
    raise KeyError(
        f"not registered: {', '.join(described)}. "
        "Add the metric to rlhf_ray.observability.metrics and regenerate docs/metrics.md."
    )


def markdown_table() -> str:
    """The whole of ``docs/metrics.md``."""
    lines = [
        "# Metrics",
        "",
        "Every number in `metrics.jsonl`, `eval.jsonl` and Ray's metrics, generated from",
        "`rlhf_ray/observability/metrics.py`. Unit `1` is a pure number; nats are natural-log",
        "units of information. [watching.md](watching.md) tells how Prometheus names them.",
        "",
        "| name | unit | taken as | meaning |",
        "|---|---|---|---|",
    ]
    for metric in METRICS.values():
        meaning = metric.meaning.replace("|", "\\|")
        lines.append(f"| `{metric.name}` | {metric.unit} | {metric.reduction} | {meaning} |")
    return "\n".join(lines) + "\n"
