from pathlib import Path

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
        ("cluster.roles.policy.env={DB_PWD: s3cret}", r"roles\.\*\.env may not contain 'DB_PWD'"),
        ("cluster.env={AWS_SECRET_ACCESS_KEY: s3cret}", r"env .*'AWS_SECRET_ACCESS_KEY'"),
        ("cluster.env={HTTPS_PROXY: 'http://u:s3cret@h'}", r"env .*'HTTPS_PROXY password'"),
        ("trackers.mlflow={tracking_uri: 'http://s3cret@h'}", r"holds a login.*MLFLOW_TRACKING_U"),
        ("trackers.mlflow={tracking_uri: 'http://:s3cret@h'}", r"holds a login"),
        ("trackers.wandb={api_key: s3cret}", r"may not contain 'api_key'.*wandb login"),
        ("cluster.env={WANDB_KEY: s3cret}", r"env .*'WANDB_KEY'"),
        ("cluster.env={DB_PWD: s3cret}", r"env .*'DB_PWD'"),
        ("cluster.env={HF_TOKEN_2: s3cret}", r"env .*'HF_TOKEN_2'"),
        ("cluster.env={A: 'https://h/x?token=s3cret'}", r"env .*'A'"),
        (f"rewards=[{{{JUDGE}, request: {{extra_headers: {{X-Auth: s3cret}}}}}}]", r"'X-Auth'"),
        ("rewards=[{type: remote, url: 'https://h/x?api_key=s3cret'}]", r"url: holds a login or"),
        ("rewards=[{type: judge, model: m, url: 'http://h', api_key_env: s3cret-1}]", r"not the k"),
        ("model.path='https://u:s3cret@h/model'", r"model\.path: a login or key stands here"),
        ("prepare.posts='https://u:s3cret@h/Posts.xml'", r"prepare\.posts: a login or key"),
        ("data.sft.path='s3://k:s3cret@bucket/a.jsonl'", r"data\.sft\.path: a login or key"),
        (
            f"rewards=[{{{JUDGE}, request: {{properties: {{password: s3cret}}}}}}]",
            r"may not contain 'password'",
        ),
        (
            f"rewards=[{{{JUDGE}, request: {{headers: ['X-Api-Key: s3cret-1']}}}}]",
            r"may not contain 'headers'",
        ),
        ("data.sft.path='https://h/a.jsonl#token=s3cret'", r"data\.sft\.path: a login or key"),
        ("ppo.password=123456", r"ppo\.password: unknown key \(a int\)"),
        ("ppo.wandb_key=s3cret", r"ppo\.wandb_key: unknown key \(a str\)"),
        ("trackers.wandb=s3cret", r"trackers\.wandb: .*got a text of 6 characters"),
        ("trackers.wandb=hf_s3crets3crets3crets3cret", r"got a text of 27 characters"),
        ("ppo.password=!!binary czNjcmV0", r"ppo\.password: the value holds a bytes"),
        ('ppo={token: [a, "s3cret\\0"]}', r"holds the character NUL at token\.1"),
        ("cluster.env=HF_TOKEN=s3cret", r"cluster\.env: .*got a text of"),
        ("rewards=s3cret", r"rewards: .*got a text of"),
        ("nothing={x: [s3cret]}", r"nothing: unknown key \(a dict\)"),
        ("model.kwargs={hub: {auth: {user: a, pass: s3cret}}}", r"'pass'"),
        ("rollout.stop=https://u:s3cret@h", r"rollout\.stop: .*got a text of 18"),
        ("model.dtype='https://u:s3cret@h'", r"model\.dtype: .*got 'https://\.\.\.@h'"),
    ],
)
def test_secrets_are_refused_and_not_repeated(override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        load(None, [override])
    assert "s3cret" not in str(error.value)


@pytest.mark.parametrize("login", ["//u:s3cret@[a", "http://u:s3cret@[::1/x"])
def test_a_login_in_half_an_address_is_refused(login: str) -> None:
    with pytest.raises(ConfigError, match="'A password'") as error:
        load(None, [f"cluster.env={{A: '{login}'}}"])
    assert "s3cret" not in str(error.value)


@pytest.mark.parametrize("url", ["http://[a", "http://h:99999", "http://h:x", "http://"])
def test_an_impossible_address_says_how_one_looks(url: str) -> None:
    with pytest.raises(ConfigError, match=r"url: is no address with a host, such as http://local"):
        load(None, [f"rewards=[{{type: remote, url: '{url}'}}]"])


def test_the_tilde_of_every_path_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = load(
        None,
        [
            "run.dir=~/r",
            "model.path=~/m",
            "prepare.posts=~/p.xml",
            "data.sft=[{path: ~/a.jsonl, filter: {function: '~/f.py:f'}}]",
            "sft.path=~/s",
            "rewards=[{type: function, function: '~/g.py:g'}, {type: model, path: ~/w}]",
            "ppo.advantage=~/h.py:h",
            "ppo.policy_loss=~/l.py:l",
            "critic.path=~/c",
            "evaluate={instructions: ~/i.jsonl, models: [sft, ~/o]}",
            "trackers.mlflow={tracking_uri: ~/t}",
            "rollout.stop=['~/']",
        ],
    )
    dumped = str(config.model_dump())
    assert dumped.count("/home/me/") == 14
    assert dumped.count("~") == 1
    assert load(None, ["run.dir=a~/b"]).run.dir == "a~/b"


def test_a_secret_of_the_environment_is_not_interpolated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "s3cret")
    monkeypatch.setenv("MODEL", "m")
    judge = "{type: judge, model: '${MODEL}', url: 'http://h', request: {user: '${MY_API_KEY}'}}"
    with pytest.raises(ConfigError, match=r"\$\{MY_API_KEY\} is a secret by its name") as error:
        load(None, [f"rewards=[{judge}]"])
    assert "s3cret" not in str(error.value)


def test_neither_a_yaml_error_nor_a_bad_override_repeats_its_text(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: 1\ntoken: s3cret: x: [\n")
    for call in (lambda: load(tmp_path / "config.yaml"), lambda: load(None, ["token=[s3cret"])):
        with pytest.raises(ConfigError) as error:
            call()
        assert "s3cret" not in str(error.value)


def test_what_only_sounds_like_a_secret_is_taken() -> None:
    schema = (
        "{properties: {password: {type: string}, key: {type: string}}, required: [password], "
        "$defs: {secret: {type: string}}}"
    )
    request = (
        "{stop_token_ids: [1], skip_special_tokens: false, user: secret agent, "
        f"response_format: {{json_schema: {{schema: {schema}}}}}}}"
    )
    config = load(
        None,
        [
            f"rewards=[{{{JUDGE}, system: Basic questions and Bearer tokens, request: {request}}}]",
            "model.kwargs={token: true}",  # the login of this machine
            "rollout.engine_args={max_num_batched_tokens: 64}",
            "trackers.mlflow={tracking_uri: 'sqlite:///a@b.db'}",
            "data.sft={path: a.jsonl, columns: {key: answer, token: tok, password: pw}}",
            "cluster.env={HF_HUB_DISABLE_IMPLICIT_TOKEN: 'true', UCX_IB_PKEY: '0x7fff'}",
            "cluster.env={RULE: '//[a', LIST: 'a //[b]@c'}",
            "rollout.engine_args={assistant_token: 'ASSISTANT:'}",
            "prepare.posts=data/sk-wikipedia-2024-01-dump/Posts.xml",
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
