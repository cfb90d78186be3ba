"""The rows: what each measures, against what, its goal, and how it is done."""

from dataclasses import dataclass
from typing import Literal

from bench.figures import Goal

Need = Literal["", "trl", "against"]
QUICK_S = 30
"""Most seconds of a row of ``--quick``, on two cores."""


def at_least(bound: float) -> Goal:
    return Goal("at least", bound)


def at_most(bound: float) -> Goal:
    return Goal("at most", bound)


@dataclass(frozen=True)
class Line:
    """One figure of a row."""

    measure: str
    against: str
    goal: Goal | None
    """None: the figure is only reported."""


@dataclass(frozen=True)
class Row:
    """What one process measures."""

    name: str
    lines: tuple[Line, ...]
    function: str
    """``module:function``; takes a `running.Place`, returns a figure for each line, in order."""
    seconds: int
    """About how long it takes on two cores, for the estimate and the time limit."""
    method: str
    gpu: str = ""
    """What it uses with --gpu; empty: no GPU, it is the same as without."""
    quick: bool = False
    """Whether it is one of --quick; it then takes at most `QUICK_S`."""
    needs: Need = ""
    """Option without which it is not run."""


TRL = "TRL 1.12.0's PPO"
TRL_METHOD = (
    "64 prompts of 16 tokens, 2 epochs of one mini-batch, LoRA r=16, fp32, one reward model, one "
    "critic of the model's size. Ours: a local run (vLLM, DeepSpeed, Ray), from one rollout phase "
    "to the next; TRL's: transformers' generate, from step to step. Two alternations, each the "
    "median of five iterations behind the first."
)

ROWS = (
    Row(
        "real-tokens",
        (
            Line("real / processed tokens of learning, skewed", "1", at_least(0.95)),
            Line("real / processed tokens of log-probs, skewed", "1", at_least(0.95)),
        ),
        "bench.learning:real_tokens",
        12,
        "A policy learner on batches of 64 responses, lengths geometric of mean 32 and at most "
        "256, behind prompts of 16 tokens; processed is what enters the model's embedding.",
        quick=True,
    ),
    Row(
        "learner",
        (
            Line("learner tokens/s, DeepSpeed", "bare PyTorch loop, same tokens", at_least(0.85)),
            Line("learner tokens/s, inline mode", "bare PyTorch loop, same tokens", at_least(0.85)),
        ),
        "bench.learning:learner",
        25,
        "2 epochs over 64 responses of equal length, so that neither side pads; the bare loop is "
        "the forward pass, the clipped loss of the response tokens, backward, clipping, AdamW. "
        "PyTorch's own engine, one process.",
        gpu="1 GPU, bf16, an 0.8B-parameter model",
        quick=True,
    ),
    Row(
        "trl-uniform",
        (Line("episodes/s, 64 tokens each, 2.9M parameters", TRL, at_least(1.15)),),
        "bench.against_trl:uniform",
        400,
        TRL_METHOD,
        gpu="1 GPU, an 0.8B-parameter model, 256 tokens each",
        needs="trl",
    ),
    Row(
        "trl-skewed",
        (Line("episodes/s, skewed lengths, 2.9M parameters", TRL, at_least(4)),),
        "bench.against_trl:skewed",
        500,
        f"{TRL_METHOD} Lengths are geometric, mean 32, at most 256: the end token has a "
        "probability of 1/32.",
        gpu="1 GPU, an 0.8B-parameter model",
        needs="trl",
    ),
    Row(
        "trl-uniform-20m",
        (Line("episodes/s, 64 tokens each, 20M parameters", TRL, at_least(1.15)),),
        "bench.against_trl:uniform_20m",
        700,
        TRL_METHOD,
        gpu="1 GPU, as trl-uniform",
        needs="trl",
    ),
    Row(
        "trl-skewed-20m",
        (Line("episodes/s, skewed lengths, 20M parameters", TRL, at_least(4)),),
        "bench.against_trl:skewed_20m",
        1000,
        f"{TRL_METHOD} Lengths as in trl-skewed.",
        gpu="1 GPU, as trl-skewed",
        needs="trl",
    ),
    Row(
        "driver",
        (
            Line("driver microseconds a sample, the worst", "-", at_most(50)),
            Line("the same at 16,384 samples", "at 1,024 samples", at_most(1.1)),
        ),
        "bench.driver:per_sample",
        28,
        "The PPO loop over roles that answer at once, 1 to 256 generators, 64 to 16,384 samples: "
        "seconds of an iteration beyond those of one with 64 samples, by samples beyond 64. What "
        "an iteration of 64 samples takes is in the JSON.",
        quick=True,
    ),
    Row(
        "driver-memory",
        (Line("driver MiB grown over 1,000 iterations", "-", at_most(1)),),
        "bench.driver:memory",
        25,
        "Resident memory after iteration 1,200 less that after iteration 200, the PPO loop over "
        "roles that answer at once, 64 samples, 4 generators.",
        quick=True,
    ),
    Row(
        "report",
        (
            Line("`report` of 10,000 iterations, seconds", "-", at_most(10)),
            Line("its size, MB", "-", at_most(5)),
        ),
        "bench.records:report",
        29,
        "A run's files, as the loop writes them, repeated to 10,000 iterations with the spans of "
        "one process for each role.",
        quick=True,
    ),
    Row(
        "shares",
        (
            Line("publish and prove, share of an iteration", "iteration", at_most(0.02)),
            Line("commit and save, share of an iteration", "iteration", at_most(0.02)),
        ),
        "bench.runs:shares",
        120,
        "The run of trl-uniform; phases from its trace. The save runs beside the next iteration "
        "and counts all the same.",
        gpu="1 GPU, an 0.8B-parameter model",
    ),
    Row(
        "rollout",
        (
            Line("rollout tokens/s, policy merged", "bare vLLM on the base", at_least(0.9)),
            Line("rollout tokens/s, policy as adapter", "bare vLLM on the base", at_least(0.9)),
        ),
        "bench.rollouts:served",
        150,
        "64 prompts of 16 tokens, 64 tokens each, in one call; two engines, each on all threads, "
        "asked in turn with the same sampling parameters.",
        gpu="1 GPU, shared by two engines at a time, an 0.8B-parameter model in bf16",
    ),
    Row(
        "start",
        (Line("`rlhf-ray run` to the first rollout", "the commit of --against", at_least(2)),),
        "bench.starts:first_rollout",
        400,
        "A PPO run of one iteration in processes of its own, until the first shard behind the "
        "proof is sampled (its trace says when). Two alternations after one run of each.",
        gpu="1 GPU",
        needs="against",
    ),
    Row(
        "quick-start",
        (Line("the quick start's run", "the commit of --against", at_least(1 / 0.55)),),
        "bench.starts:quick_start",
        1800,
        "`rlhf-ray run configs/quickstart.yaml` of each checkout; two alternations. Rewards and "
        "warnings of each are in the JSON.",
        needs="against",
    ),
    Row(
        "logprobs",
        (
            Line("memory of log-probs by chunks", "whole logits", None),
            Line("time of log-probs by chunks", "whole logits", None),
        ),
        "bench.logprobs:chunks",
        29,
        "Forward and backward of 500 tokens through a one-layer Llama of width 64 with a "
        "vocabulary of 50,000 (250,000 without --quick), fp32.",
        quick=True,
    ),
    Row(
        "logprobs-long",
        (Line("GiB that 8,000 tokens take, vocabulary 250,000", "-", at_most(1)),),
        "bench.logprobs:long",
        180,
        "One pass by chunks; the whole logits would take 8 GB, several times over.",
    ),
    Row(
        "prepare",
        (
            Line("posts/s of `prepare` with two processes", "with one", at_least(1.7)),
            Line("posts/s of `prepare` with two processes", "-", None),
            Line("peak memory of its driver, MB", "-", at_most(1000)),
        ),
        "bench.records:prepare",
        400,
        "A synthetic dump of 80,000 questions (400,000 posts), in a Ray session that has started.",
    ),
    Row(
        "overlap",
        (Line("iteration, k = 1, simulated durations", "its longest resource", at_most(1.15)),),
        "bench.asynchrony:overlap",
        12,
        "The PPO loop over 4 generators of 2 shards at a time and learners that all sleep for set "
        "times; lengths geometric, a batch is learnt in the time in which it is generated alone. "
        "The longest resource is the learners, or all shards spread evenly over the generators.",
        quick=True,
    ),
    Row(
        "staleness",
        (
            Line("samples/s, k = 1, equal durations", "k = 0", at_least(1.7)),
            Line("samples/s, k = 1, skewed lengths", "k = 0", at_least(1.5)),
        ),
        "bench.asynchrony:staleness",
        29,
        "The loop of overlap with k = 0 and k = 1 in turn.",
        quick=True,
    ),
)
