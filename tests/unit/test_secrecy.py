"""Which names and texts are secrets, and what messages and terminals show of them."""

import pickle
import time

import pytest

from rlhf_ray.errors import ConfigError, RlhfError
from rlhf_ray.secrecy import holds_secret, is_secret, printable, redacted

KEY = "sk-abc123DEF456ghi789jkl"


@pytest.mark.parametrize(
    "name",
    [
        "WANDB_KEY",
        "DB_PWD",
        "HF_TOKEN_2",
        "X-Auth",
        "X-Api-Key",
        "api_key",
        "apiKey",
        "PGPASSWORD",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "accessToken",
        "GITHUB_PAT",
        "SMTP_PASS",
        "HF_TOKEN_PROD",
        "SECRET_KEY_BASE",
        "Authorization",
        "Proxy-Authorization",
        "client_secret",
        "hub_token",
        "passphrase",
        "private_key",
        "OPENAI_API_KEYS",
        "auth",
        "key",
        "credentials",
        "Cookie",
        "SENTRY_DSN",
        "SLACK_WEBHOOK",
        "X-Amz-Signature",
        "X-Auth-Headers",
        "AZURE_STORAGE_CONNECTION_STRING",
        "USER_TOKEN",
    ],
)
def test_a_name_says_that_its_text_is_a_secret(name: str) -> None:
    assert is_secret(name, "x")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 5),
        ("MAX_TOKENS", "5"),
        ("pad_token", "<pad>"),
        ("pad_token_id", 5),
        ("RAY_AUTH_MODE", "token"),
        ("SSH_AUTH_SOCK", "/x"),
        ("api_key_env", "K"),
        ("token", True),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("skip_special_tokens", "x"),
        ("HF_TOKEN_PATH", "/x"),
        ("prompt_cache_key", "a"),
        ("stop_token_ids", [1]),
        ("tokenizer", "x"),
        ("author", "me"),
        ("monkey", "x"),
        ("kl_target_per_token", "x"),
        ("password", None),
        ("signature", "trl"),
        ("user_token", "<|user|>"),
        ("mask_tokens_key", "[MASK]"),
        ("assistant_token", "ASSISTANT:"),
        ("system_token", "System:"),
        ("image_placeholder_token", "IMG"),
        ("fim_prefix_token", "PRE"),
        ("end_of_turn_token", "x"),
        ("token_ids", "x"),
        ("token_level", "sum"),
        ("reward_fn_key", "data_source"),
        ("response_key", "x"),
        ("dataset_key", "x"),
        ("public_key", "x"),
        ("forward_pass", "x"),
        ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "YES"),
        ("UCX_IB_PKEY", "0x7fff"),
        ("SSH_ASKPASS", "/usr/bin/ksshaskpass"),
        ("SECRET_NAME", "rlhf-ray-secrets"),
        ("use_auth_token", "false"),
    ],
)
def test_what_only_sounds_like_a_secret_is_none(name: str, value: object) -> None:
    assert not is_secret(name, value)


def test_digits_are_a_password_but_no_token() -> None:
    assert is_secret("DB_PWD", 123456)
    assert not is_secret("HF_TOKEN", 5)


@pytest.mark.parametrize(
    "text",
    [
        KEY,
        "hf_abcdefghijklmnopqrstuv",
        "ghp_abcdefghijklmnopqrst1",
        "AKIAABCDEFGHIJKLMNOP",
        "Bearer abcdefgh",
        "https://u:p@h/x",
        "https://t@h",
        "https://h/x?api_key=abc&a=1",
        "https://h/x?next=https%3A%2F%2Fg%2F%3Fapi_key%3Dabc%26a%3D1",
        "https://h/x#access_token=abc",
        "https://h/x?a=1#token=abc",
        "https://hooks.slack.com/services/T000/B000/abc",
        "abfs://user:password@account/a",
        "authorization: bearer abcdefgh",
        "curl -H 'Authorization: Basic dXNlcjpwYXNz'",
        "{'Authorization': 'Bearer abcdefgh'}",
        "send Basic dXNlcjpwYXNzd29yZA== with it",
        "sk-proj-abcdefghijklmnopqrst",
        "sk-ant-api03-abc-def_ghi",
        "gsk_abcdefghijklmnopqr1",
        "X-Api-Key: abcd1234",
        "AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI/K7MDENG",
        "s3://key:x@bucket/a",
        "-----BEGIN RSA PRIVATE KEY-----\nabc",
    ],
)
def test_keys_and_logins_are_known_by_their_shape(text: str) -> None:
    assert holds_secret(text)
    assert redacted(text) != text


@pytest.mark.parametrize(
    "text",
    [
        "hf://datasets/a@main/b",
        "sqlite:///a@b.db",
        "https://h/x?page=2",
        "a@b",
        "task-abc-123456789",
        "sk-learn-tutorial-datasets",
        "/data/sk-wikipedia-2024-01-dump",
        "Basic questions about JavaScript are rated lower than Basic knowledge",
        "Bearer authentication and Bearer tokens are explained",
        "password: {password}",
        "rewards/token_f1.py:token_f1_score2",
        "token_f1.py:token_f1_score2",
        "abfss://data@account.dfs.core.windows.net/a",
        "a1" * 32,
        "image@sha256:" + "a1" * 32,
        "https://h/x?revision=0123456789abcdef&max_tokens=5",
        "a message with https://u:p@h in it",
    ],
)
def test_other_texts_hold_no_secret(text: str) -> None:
    assert not holds_secret(text)


@pytest.mark.parametrize(
    "secret", ['pläin "sec\\ret', "line one of it\nline two of it", "p%ssw/rd?"]
)
def test_a_secret_of_the_environment_reaches_no_message(
    secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", secret)
    for shown in (secret, repr(secret), repr({"a": secret}), f"b'{secret}'", *secret.splitlines()):
        message = str(ConfigError(f"the server said {shown}"))
        assert secret not in message
        assert not [line for line in secret.splitlines() if line in message]
    error = pickle.loads(pickle.dumps(RlhfError(f"x {secret}")))
    assert str(error) == "x ..."


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("{'api_key': 'abcdefg1', 'n': 2}", "{'api_key': '...', 'n': 2}"),
        ('{"password": "hunter2hunter"}', '{"password": "..."}'),
        (
            "[line 2]: aws_secret_access_key = abcdefg1/x\nmore",
            "[line 2]: aws_secret_access_key = ...\nmore",
        ),
        ("data.key: unknown key, got 12345678", "data.key: unknown key, got 12345678"),
        ("stop_token: '<|end_1234|>'", "stop_token: '<|end_1234|>'"),
        ("{'key': 'question_0001'}", "{'key': 'question_0001'}"),
    ],
)
def test_texts_of_libraries_are_shown_without_what_they_quote(text: str, shown: str) -> None:
    assert redacted(text) == shown


@pytest.mark.parametrize(
    "part", ["a=", "sk-", "?a", "Bearer ", "a.", "key: ", "A1", "://a:", "sk-1-"]
)
def test_a_long_text_is_looked_through_in_a_moment(part: str) -> None:
    start = time.monotonic()
    redacted(part * (50_000 // len(part)))
    assert time.monotonic() - start < 5


def test_the_working_folder_is_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWD", "/home/me/experiments")
    monkeypatch.setenv("OLDPWD", "/home/me/elsewhere")
    message = "see /home/me/experiments/runs and /home/me/elsewhere"
    assert redacted(message) == message


@pytest.mark.parametrize("secret", ["hunter2", "a-b9", "p@ss", "Zx9!"])
def test_short_secrets_are_hidden_where_they_stand_alone(
    secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DB_PASSWORD", secret)
    assert redacted(f"login with '{secret}' was refused") == "login with '...' was refused"
    assert redacted(f"user:{secret}") == "user:..."
    assert redacted(f"x{secret}x") == f"x{secret}x"


def test_short_words_in_the_environment_stay_in_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    assert redacted("the answer is EMPTY") == "the answer is EMPTY"


def test_a_terminal_gets_no_control_characters() -> None:
    text = "\x1b]52;c;ZXZpbA==\x07\x1b[2J\x9b31m\x7f\u202egnp\ud800\0a\tb\r\nc\rd ä 好 🙂"
    shown = printable(text)
    assert shown == (
        "\\u001b]52;c;ZXZpbA==\\u0007\\u001b[2J\\u009b31m\\u007f\\u202egnp\\ud800\\u0000a\tb\nc"
        "\\u000dd ä 好 🙂"
    )
    assert printable(shown) == shown
