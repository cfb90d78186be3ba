"""The registry of metrics: every name that is logged, with its unit, reduction and meaning.

Names are TRL's where it has one, else verl's. To add a metric, add a row here and run
``scripts/docs.sh``, which writes ``docs/metrics.md`` from this table.
"""

from typing import Literal

How = Literal["mean", "maximum", "sum", "count", "last value", "statistic"]
"""How several values become the logged one. `count`: every rank of a group counts for all ranks.
`statistic`: computed from all values at once, as a correlation is; parts cannot be merged, so
every rank that reports it computes it from the whole batch."""

Over = tuple[How, str]
"""How values are reduced, and what they belong to."""

_SAMPLES: Over = ("mean", "samples")
_TOKENS: Over = ("mean", "response tokens")
_BATCHES: Over = ("mean", "the iteration's mini-batches")
_LAST: Over = ("last value", "")
_SUM: Over = ("sum", "the iteration")
_TOTAL: Over = ("sum", "the run so far")
_MAX_TOKENS: Over = ("maximum", "the iteration's response tokens")
_MAX_SAMPLES: Over = ("maximum", "samples")
_HELD_OUT: Over = ("mean", "held-out prompts")
_HELD_OUT_ANSWERS: Over = ("statistic", "held-out answers")

# fmt: off
ROWS: tuple[tuple[str, str, Over, str], ...] = (
    ("objective/kl", "nats", _SAMPLES,
     "KL to the reference per response: the sum over its tokens of k1, log pi - log ref."),
    ("objective/kl_per_token", "nats per token", _TOKENS, "The same KL (k1), per token."),
    ("objective/entropy", "nats per token", _TOKENS,
     "Estimate of the sampling policy's entropy: minus the log-prob of the sampled tokens."),
    ("objective/scores", "1", _SAMPLES,
     "Raw score: the weighted sum over the reward sources, before baseline, scaling and clip."),
    ("objective/scores/<source>", "1", _SAMPLES, "Raw score of one reward source, by its name."),
    ("objective/missing/<source>", "1", _SUM,
     "Samples without a score from the source: it does not apply, or its answer was unusable."),
    ("objective/scores_std", "1", ("statistic", "samples"),
     "Standard deviation of the raw scores."),
    ("objective/rlhf_reward", "1", _SAMPLES,
     "What PPO maximises: the score plus the KL part of the reward."),
    ("objective/non_score_reward", "1", _SAMPLES,
     "KL part of the reward: minus the coefficient times the KL, summed over tokens."),
    ("objective/kl_coef", "1 per nat", _LAST, "KL coefficient of this iteration's rewards."),
    ("policy/approxkl_avg", "nats per token", _BATCHES,
     "KL (k2) between the policy before and after an update: how far one iteration moves it."),
    ("policy/clipfrac_avg", "share", _BATCHES,
     "Share of response tokens whose policy loss is clipped."),
    ("policy/entropy_avg", "nats per token", _BATCHES,
     "Entropy of the distribution that tokens are drawn from; near 0 it no longer explores."),
    ("loss/policy_avg", "1", _BATCHES, "Clipped policy loss."),
    ("loss/kl_avg", "nats per token", _BATCHES,
     "KL term of the loss, by ppo.kl_estimator; logged where ppo.kl_in is loss."),
    ("loss/value_avg", "1", _BATCHES, "Clipped value loss: half the mean squared error."),
    ("val/clipfrac_avg", "share", _BATCHES,
     "Share of response tokens whose value loss is clipped."),
    ("val/ratio", "1", _BATCHES,
     "Mean of pi / pi_old over tokens; 1 in the first step of an iteration, near 1 after."),
    ("val/ratio_max", "1", _MAX_TOKENS, "Largest pi / pi_old of any token."),
    ("val/explained_variance", "1", ("statistic", "response tokens"),
     "1 - var(returns - values) / var(returns): 1 for a perfect critic, 0 for one that "
     "predicts no better than the mean return."),
    ("val/ratio_minibatch_max", "1", ("maximum", "the iteration's mini-batches"),
     "Largest mean of pi / pi_old over the tokens of a mini-batch, which guards.ratio bounds; "
     "infinite where it is NaN."),
    ("policy/ratio_exceeded", "1", ("count", "the iteration's mini-batches"),
     "Mini-batches whose mean ratio exceeds guards.ratio.max_mean; they are skipped unless "
     "guards.ratio.action is warn."),
    ("policy/grad_norm", "1", _BATCHES, "Gradient norm of the policy before clipping."),
    ("val/grad_norm", "1", _BATCHES, "Gradient norm of the critic before clipping."),
    ("policy/steps_skipped", "1", ("count", "the iteration's mini-batches"),
     "Optimizer steps of the policy that were not taken, because gradients overflowed in float16; "
     "logged where there are any, and counted nowhere else."),
    ("val/steps_skipped", "1", ("count", "the iteration's mini-batches"),
     "The same of the critic."),
    ("policy/learning_rate", "1", _LAST,
     "Learning rate of the policy; logged with ppo.scheduler or ppo.warmup_iterations."),
    ("val/learning_rate", "1", _LAST, "The same of the critic."),
    ("policy/epochs", "1", _LAST,
     "Epochs that the policy took over the iteration's rollouts; logged with ppo.stop_kl."),
    ("response_length/mean", "tokens", _SAMPLES, "Response length."),
    ("response_length/max", "tokens", _MAX_SAMPLES, "Longest response."),
    ("response_length/eos_share", "share", _SAMPLES,
     "Share of responses that end with a stop token rather than at the token limit."),
    ("response/repeating_share", "share", _SAMPLES,
     "Share of responses that repeat a token four times or more in a row; near 0 in a healthy "
     "run, near 1 where the reward is gamed."),
    ("response/distinct_bigrams", "share", _SAMPLES,
     "Distinct-2: share of distinct bigrams within a response; falls where texts repeat."),
    ("sampler/gap_mean", "nats per token", _TOKENS,
     "Log-prob mismatch: |rollout log-prob (engine) - old log-prob (learner)|."),
    ("sampler/gap_max", "nats", _MAX_TOKENS, "Largest log-prob mismatch of any token."),
    ("sampler/weight_mean", "1", ("statistic", "response tokens"),
     "Mean importance weight, truncated, and 0 where a token is masked; logged with "
     "ppo.importance_cap or ppo.importance_mask, as are the next two."),
    ("sampler/masked_share", "share", ("statistic", "response tokens"),
     "Share of response tokens that ppo.importance_mask leaves out."),
    ("sampler/ess_share", "share", ("statistic", "response tokens"),
     "Effective sample size of the weights, (sum w)^2 / sum w^2, as a share of the tokens."),
    ("rollout/staleness", "versions", _MAX_SAMPLES,
     "Versions between the policy that sampled and the one that learns; 0 is on-policy."),
    ("filter/prompts", "1", _LAST,
     "Prompts drawn for the batch, those of its refills included; logged with "
     "ppo.filter_groups.max_refills, as are the next four."),
    ("filter/replaced", "1", ("count", "the batch's prompts"),
     "Prompts whose responses all scored the same, and that others have replaced."),
    ("filter/equal_share", "share", ("mean", "prompts drawn for the batch"),
     "Share of prompts whose responses all scored the same, also those that were not replaced."),
    ("filter/refills", "1", ("count", "the batch's refills"),
     "Times that prompts were replaced."),
    ("filter/scores", "1", ("mean", "samples of the batch and those filtered"),
     "Raw score (weighted sum) of all responses. objective/scores is of those that were learnt, "
     "which leaves out prompts that are always, or never, answered well."),
    ("timing_s/gen", "s", _SUM, "Wall time until the batch's last rollout arrived."),
    ("timing_s/score", "s", _SUM, "Wall time of scoring that did not overlap with generation."),
    ("timing_s/learn", "s", _SUM, "Wall time of the policy's and the critic's updates."),
    ("timing_s/commit", "s", _SUM,
     "Wall time of collecting the learners' state, and of waiting until the commit before it is "
     "in the run's folder."),
    ("timing_s/save", "s", _SUM,
     "Wall time of writing an earlier iteration's commit to the run's folder, beside this one."),
    ("timing_s/keep", "s", _SUM,
     "Wall time of keeping a batch for a replay, beside what follows its learning."),
    ("timing_s/eval", "s", _SUM, "Wall time of the held-out evaluation before this iteration."),
    ("timing_s/sync", "s", _SUM,
     "Wall time of publishing the adapter and proving that it is served."),
    ("timing_s/iteration", "s", _SUM, "Wall time of the whole iteration."),
    ("throughput/episodes_per_s", "1/s", _LAST, "Rollouts learnt per second."),
    ("throughput/tokens_per_s", "tokens/s", _LAST, "Response tokens learnt per second."),
    ("generators/ready", "1", _LAST,
     "Generators that serve the newest adapter and receive prompts."),
    ("generators/target", "1", _LAST, "Number of generators that the run aims for."),
    ("generators/queue_depth", "shards", ("mean", "the time of generation"),
     "Shards waiting for a free generator."),
    ("generators/idle_share", "share", ("mean", "generators and the time between two publications"),
     "Share of the time in which a generator had nothing to sample."),
    ("generators/restarts", "1", _TOTAL, "Restarts of generators."),
    ("generators/requeued", "1", _TOTAL,
     "Rollouts that a generator did not finish and that were sampled again."),
    ("generators/reissued", "1", _TOTAL,
     "Rollouts that a second generator sampled as well, because the first was slow."),
    ("cost/per_1000_samples", "price", _LAST,
     "Cost of 1,000 rollouts: the iteration's hours times the GPUs that the run holds times "
     "cluster.gpu_hour_price, where that is set."),
    ("policy/version", "1", _LAST, "Adapter version that this iteration committed."),
    ("episode", "1", _TOTAL, "Rollouts learnt so far."),
    ("episode_set_aside", "1", _TOTAL,
     "Rollouts discarded because guards.loss_spike rolled their update back."),
    ("eval/score", "1", _HELD_OUT, "Raw score (weighted sum) on held-out prompts."),
    ("eval/gold", "1", _HELD_OUT, "Gold score, where the data has one; no model is trained on it."),
    ("eval/kl", "nats", _HELD_OUT, "KL to the reference per response, as objective/kl."),
    ("eval/length", "tokens", _HELD_OUT, "Response length on held-out prompts."),
    ("actors/busy/<actor>", "share", ("mean", "the time since the last iteration"),
     "Share of the time in which an actor was busy. Only in Ray's metrics."),
    ("commit/time", "s", _LAST,
     "Unix time of the last commit, or of the start. Only in Ray's metrics."),
    ("commit/stalled", "1", _LAST,
     "1 while nothing has been committed for longer than guards.stall allows; the stacks of all "
     "processes are then in stacks/ of the run's folder. Only in Ray's metrics."),
    ("effective_time_ratio", "share", _TOTAL,
     "Useful over wall seconds, over all processes of the run. Useful is the time of iterations "
     "whose commit lasted; the rest is lost: iterations redone after a crash or rolled back, the "
     "time between a crash and the next process, its start, and waits for roles that are "
     "restarted, placement and disk space. The first start and pauses on request count as "
     "neither. Only in Ray's metrics and the summary."),
    ("lost_s/<cause>", "s", _TOTAL,
     "Lost seconds by role and cause; each second counts once. While other processes of a role "
     "continue, the restart of one costs none. Only in Ray's metrics and the summary."),
    ("restarts/<role>", "1", _TOTAL,
     "Restarts of a role's processes, or of a whole learner group. Only in Ray's metrics and the "
     "summary."),
    ("ledger/drawn", "1", _TOTAL,
     "Samples requested: those learnt, discarded, filtered and in flight. Only in Ray's metrics "
     "and the summary, as are the next four."),
    ("ledger/learnt", "1", _TOTAL, "Samples whose learning is in a commit."),
    ("ledger/discarded", "1", _TOTAL, "Samples discarded by rollbacks."),
    ("ledger/filtered", "1", _TOTAL,
     "Samples replaced by others, because all of their prompt's scored the same."),
    ("ledger/in_flight", "1", _LAST, "Samples requested and not settled yet."),
    ("disk/free", "bytes", _LAST, "Free space on the disk of run.dir. Only in Ray's metrics."),
    ("disk/free_share", "share", _LAST, "Free share of that disk. Only in Ray's metrics."),
    ("config/changes", "1", _TOTAL,
     "Resumes that changed a recorded key; logged from the first iteration under the changed "
     "values on. Which ones is in changes.jsonl."),
    ("data/skipped", "1", _TOTAL, "Prompts discarded as unusable."),
    ("loss", "nats", ("mean", "the steps since the last record"),
     "Training loss of a supervised stage."),
    ("eval_loss", "nats", ("mean", "held-out rows, or their tokens"),
     "Held-out loss of a supervised stage; per token for a language model."),
    ("eval_perplexity", "1", ("statistic", "held-out tokens"),
     "exp(eval_loss) of a language model."),
    ("eval_accuracy", "share", ("mean", "held-out pairs"),
     "Share of pairs in which the reward model scores the better answer higher."),
    ("eval_auc", "share", _HELD_OUT_ANSWERS,
     "Probability that a liked answer scores higher than a disliked one."),
    ("eval_correlation", "1", _HELD_OUT_ANSWERS,
     "Pearson correlation of the reward model's scores with the ratings."),
    ("learning_rate", "1", _LAST, "Learning rate of a supervised stage."),
    ("grad_norm", "1", _LAST, "Gradient norm of a supervised stage before clipping."),
    ("epoch", "1", _LAST, "Passes over a supervised stage's data so far."),
    ("win_rate/<model>", "share", _HELD_OUT,
     "How often the model's answer beats the SFT model's; ties count half."),
    ("elo/<model>", "points", ("statistic", "held-out prompts"),
     "Elo rating among the compared models; the SFT model has 1000."),
    ("reward_mean/<model>", "1", _HELD_OUT, "Raw score (weighted sum) of the model's answers."),
    ("gold_mean/<model>", "1", _HELD_OUT, "Gold score of the model's answers."),
    ("rouge_mean/<model>", "1", _HELD_OUT,
     "ROUGE-L of the model's answers against the reference answers."),
    ("perplexity/<model>", "1", ("statistic", "the tokens of the reference answers"),
     "exp of the model's mean loss per token on the reference answers."),
    ("instruction_pass_rate/<model>", "share", ("mean", "instructions"),
     "Share of the model's answers that follow the instruction, as checked by a program."),
)
# fmt: on
