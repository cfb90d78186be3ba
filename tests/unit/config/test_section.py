import pytest

from rlhf_ray.config import load
from rlhf_ray.config.section import masked
from rlhf_ray.errors import ConfigError

JUDGE = "type: judge, model: m, url: 'http://h/v1'"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("rewards=[{type: judge, model: m, url: 'http://u:s3cret@h/v1'}]", r"url: .*api_key_env"),
        ("rewards=[{type: remote, url: 'https://s3cret@h'}]", r"url: holds a login.*api_key_env"),
        ("reward.judge={model: m, url: 'http://u:s3cret@h/v1'}", r"url: holds a login"),
        (f"rewards=[{{{JUDGE}, request: {{api_key: s3cret}}}}]", r"'api_key'.*in api_key_env"),
        (
            f"rewards=[{{{JUDGE}, request: {{extra: [{{Authorization: s3cret}}]}}}}]",
            r"request may not contain 'Authorization', because the config is written to run\.dir",
        ),
        ("model.kwargs={token: s3cret}", r"model\.kwargs may not contain 'token'.*export HF_TOKEN"),
        ("rollout.engine_args={hf_token: s3cret}", r"engine_args .*'hf_token'.*export HF_TOKEN"),
        (
            "sft.trainer={hub_token: s3cret}",
            r"trainer may not .*'hub_token'.*export HF_TOKEN",
        ),
        ("cluster.env={HF_TOKEN: s3cret}", r"cluster\.env may not contain 'HF_TOKEN'.*export it"),
        ("cluster.env={AWS_SECRET_ACCESS_KEY: s3cret}", r"env .*'AWS_SECRET_ACCESS_KEY'"),
        ("cluster.env={HTTPS_PROXY: 'http://u:s3cret@h'}", r"env .*'HTTPS_PROXY password'"),
        ("trackers.mlflow={tracking_uri: 'http://s3cret@h'}", r"holds a login.*MLFLOW_TRACKING_U"),
        ("trackers.mlflow={tracking_uri: 'http://:s3cret@h'}", r"holds a login"),
    ],
)
def test_secrets_are_refused_and_not_repeated(override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        load(None, [override])
    assert "s3cret" not in str(error.value)


def test_what_only_sounds_like_a_secret_is_taken() -> None:
    request = "{stop_token_ids: [1], skip_special_tokens: false, user: secret agent}"
    config = load(
        None,
        [
            f"rewards=[{{{JUDGE}, request: {request}}}]",
            "model.kwargs={token: true}",  # the login of this machine
            "rollout.engine_args={max_num_batched_tokens: 64}",
            "trackers.mlflow={tracking_uri: 'sqlite:///a@b.db'}",
        ],
    )
    assert config.model.kwargs == {"token": True}


def test_masked() -> None:
    values = {
        "env": {"HF_TOKEN": "x", "A": "y"},
        "hub_token": "x",
        "token": True,
        "headers": [{"X-Api-Key": "x"}],
        "url": "http://u:p@ss@host:80/v1/a@b",
        "paths": ["s3://key:x@bucket/a", "hf://datasets/a@main/b", "a@b"],
        "max_tokens": 5,
    }
    assert masked(values) == {
        "env": {"HF_TOKEN": "...", "A": "..."},
        "hub_token": "...",
        "token": True,
        "headers": [{"X-Api-Key": "..."}],
        "url": "http://...@host:80/v1/a@b",
        "paths": ["s3://...@bucket/a", "hf://datasets/a@main/b", "a@b"],
        "max_tokens": 5,
    }
