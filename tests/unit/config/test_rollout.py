"""Settings of how responses are sampled and end."""

import pytest

from rlhf_ray.config.load import load
from rlhf_ray.errors import ConfigError

SAMPLER = "rollout.length_sampler={min: 32, max: 128}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["generators.min_ready=2"], r"min_ready 2 exceeds generators\.num 1; lower the first"),
        (["generators.min_ready=0"], r"generators\.min_ready"),
        (["generators.straggler_factor=1"], r"generators\.straggler_factor"),
        (
            ["rollout.autoscale={minimum: 3, maximum: 2}"],
            r"autoscale\.minimum 3 exceeds rollout\.autoscale\.maximum 2",
        ),
        (
            ["rollout.autoscale={minimum: 2, maximum: 4}"],
            r"generators\.num 1 is not between rollout\.autoscale\.minimum 2 and .*maximum 4",
        ),
        (
            ["rollout.autoscale={}", "cluster.mode=inline", "rollout.engine=transformers"],
            r"inline has one generator; leave out rollout\.autoscale",
        ),
        (["rollout.min_tokens=65"], r"rollout\.min_tokens 65 exceeds rollout\.max_tokens 64"),
        ([SAMPLER], r"rollout\.length_sampler\.max 128 exceeds rollout\.max_tokens 64"),
        (
            ["rollout.max_tokens=128", SAMPLER, "rollout.min_tokens=33"],
            r"rollout\.min_tokens 33 exceeds rollout\.length_sampler\.min 32",
        ),
        (["rollout.length_sampler={min: 9, max: 9}"], r"min 9 must be less than its max 9"),
        (["rollout.length_sampler={min: 0, max: 9}"], r"rollout\.length_sampler\.min"),
        (["rollout.length_sampler={min: 9}"], r"rollout\.length_sampler\.max: Field required"),
        (['rollout.stop=["\\n", ""]'], r"rollout\.stop: contains an empty string"),
        (
            ["rollout.ignore_eos=true", "rollout.min_tokens=4"],
            r"min_tokens 4 prevents .*ignore_eos they have no effect; set only one",
        ),
        (
            ["rollout.ignore_eos=true", "ppo.missing_eos_penalty=1.0"],
            r"missing_eos_penalty 1 would apply to every response",
        ),
        (["ppo.missing_eos_penalty=-1.0"], r"ppo\.missing_eos_penalty"),
        (
            ["ppo.overlong.buffer=64"],
            r"ppo\.overlong\.buffer 64 must be below rollout\.max_tokens 64",
        ),
        (["ppo.overlong.buffer=0"], r"ppo\.overlong\.buffer"),
        (["ppo.overlong.truncated=drop"], r"ppo\.overlong\.truncated"),
        (
            ["rollout.ignore_eos=true", "ppo.overlong.truncated=mask"],
            r"ppo\.overlong\.truncated mask would apply to every response",
        ),
        (
            ["ppo.overlong.truncated=bootstrap", "ppo.missing_eos_penalty=1.0"],
            r"missing_eos_penalty 1 has no effect .* set only one",
        ),
        (
            ["ppo.overlong.truncated=bootstrap", "ppo.score_position=first_pad"],
            r"needs ppo\.score_position last_token",
        ),
        (
            ["ppo.overlong.truncated=bootstrap", "ppo.advantage=reinforce"],
            r"overlong\.truncated bootstrap needs a critic",
        ),
        (["ppo.filter_groups.max_refills=-1"], r"ppo\.filter_groups\.max_refills"),
        (
            ["ppo.filter_groups.max_refills=2", "ppo.samples_per_prompt=4"],
            r"max_refills 2 replaces prompts .*ppo\.advantage gae .* set it to 0, or .* to rloo",
        ),
        (
            [
                "ppo.filter_groups.max_refills=2",
                "ppo.advantage=reinforce",
                "ppo.samples_per_prompt=4",
            ],
            r"max_refills 2 replaces prompts .*ppo\.advantage reinforce",
        ),
        (
            ["ppo.filter_groups.max_refills=2", "ppo.advantage=mine.py:f"],
            r"max_refills 2 compares responses .*samples_per_prompt is 1; set it to 2 or more",
        ),
        (
            [
                "ppo.filter_groups.max_refills=2",
                "ppo.advantage=grpo",
                "ppo.samples_per_prompt=8",
            ],
            r"a shard of rollout\.shard_size 16 holds .* set rollout\.shard_size=8, which is ppo",
        ),
        (
            ["rollout.repetition_penalty=1.1"],
            r"rollout\.repetition_penalty 1\.1 is not supported.* leave it out",
        ),
        (["rollout.min_p=0.1"], r"rollout\.min_p 0\.1 is not supported"),
        (["rollout.logit_bias={7: -100}"], r"rollout\.logit_bias \{7: -100\} is not supported"),
        (
            ["rollout.engine_args.override_generation_config={repetition_penalty: 1.1}"],
            r"override_generation_config \{'repetition_penalty': 1\.1\} is not supported",
        ),
        (
            ["rollout.engine_args.logits_processors=[mine:Processor]"],
            r"engine_args\.logits_processors \['mine:Processor'\] is not supported",
        ),
        (
            ["rollout.engine_args.generation_config=auto"],
            r"may not contain 'generation_config' \(set by the sampling keys of rollout",
        ),
        (
            ["rollout.engine_args.skip_tokenizer_init=true"],
            r"may not contain 'skip_tokenizer_init' \(set by rollout\.stop",
        ),
    ],
)
def test_what_cannot_be_or_would_bias_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(None, overrides)


def test_what_is_corrected_or_distorts_nothing_is_taken() -> None:
    overrides = ["rollout.max_tokens=128", SAMPLER, "rollout.min_tokens=32"]
    rollout = load(None, [*overrides, 'rollout.stop=["\\nQuestion:"]']).rollout
    assert rollout.length_sampler is not None
    assert (rollout.length_sampler.min, rollout.length_sampler.max) == (32, 128)
    assert rollout.stop == ["\nQuestion:"]
    stackllama = load(None, ["rollout.max_tokens=128", SAMPLER, "rollout.ignore_eos=true"])
    assert stackllama.rollout.ignore_eos
    load(None, ["rollout.min_tokens=64"])
    load(None, ["rollout.ignore_eos=true", "rollout.stop=[x]", "ppo.missing_eos_penalty=1.0"])
