"""Config files and overrides that cannot be meant."""

from pathlib import Path

import pytest
from command_line import Ends

FILES: dict[str, str | bytes] = {
    "tab": "run:\n\tname: x\n",
    "open_bracket": "ppo: {iterations: 3\n",
    "open_quote": "run: {name: 'x}\n",
    "nul": "run: {name: a\x00b}\n",
    "control": b"run: {name: \x07}\n",
    "binary": bytes(range(256)),
    "utf16": "run: {name: x}\n".encode("utf-16"),
    "latin1": "run: {name: Zürich}\n".encode("latin-1"),
    "recursive_list": "run: &a {stages: [*a]}\n",
    "recursive_list_alone": "data: &a [*a]\n",
    "recursive_mapping": "model: &m {tiny: *m}\n",
    "recursive_root": "&r\nrun: *r\n",
    "alias_bomb": "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)),
    "alias_bomb_in_a_key": "lora:\n  peft:\n    a0: &a0 {x: 1}\n"
    + "".join(
        f"    a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(9))}}}\n"
        for i in range(1, 10)
    ),
    "deep_list": "run: " + "[" * 3000 + "]" * 3000 + "\n",
    "deep_mapping": "run: " + "{a: " * 3000 + "1" + "}" * 3000 + "\n",
    "deep_indents": "\n".join(" " * i + "a:" for i in range(1500)) + " 1\n",
    "many_digits": f"ppo: {{iterations: {'9' * 5000}}}\n",
    "many_digits_hex": f"ppo: {{iterations: 0x{'f' * 5000}}}\n",
    "python_object": "run: !!python/object/apply:os.system ['true']\n",
    "python_name": "run: !!python/name:os.system\n",
    "unknown_tag": "run: !secret x\n",
    "bad_timestamp": "run: {name: 2026-13-45}\n",
    "bad_int_tag": "ppo: {iterations: !!int many}\n",
    "binary_tag": "run: {name: !!binary aGVsbG8=}\n",
    "set": "run: !!set {a, b}\n",
    "merge_key": "run: {<<: 3}\n",
    "undefined_alias": "run: *nothing\n",
    "duplicate_anchor_and_open": "run: &a [*b]\n",
    "two_documents": "run: {name: a}\n---\nrun: {name: b}\n",
    "scalar": "3\n",
    "text": "just words\n",
    "list": "- ppo\n",
    "integer_key": "1: 2\n",
    "null_key": "? \n: 2\n",
    "list_key": "? [a, b]\n: 2\n",
    "mapping_key": "? {a: b}\n: 2\n",
    "section_is_a_list": "ppo: [iterations]\n",
    "section_is_a_number": "ppo: 3\n",
    "section_is_text": "model: some/model\n",
    "nested_integer_key": "ppo: {1: 2}\n",
    "extends_number": "extends: 3\n",
    "extends_empty": "extends: ''\n",
    "extends_list": "extends: [a, b]\n",
    "extends_mapping": "extends: {a: b}\n",
    "extends_nul": 'extends: "a\\0b.yaml"\n',
    "extends_long": f"extends: {'a' * 5000}.yaml\n",
    "extends_folder": "extends: .\n",
    "extends_unknown": "extends: '@nothing'\n",
    "extends_escape": 'extends: "\\e[31mred.yaml"\n',
    "extends_itself": "extends: config.yaml\n",
    "unset_variable": "run: {name: '${NO_SUCH_VARIABLE}'}\n",
    "open_variable": "run: {name: '${HF_TOKEN'}\n",
    "secret_in_unknown_key": "wandb_api_key: ${WANDB_API_KEY}\n",
    "secret_in_wrong_place": "ppo: {iterations: '${WANDB_API_KEY}'}\n",
    "secret_in_unknown_section": "trackers: {password: planted-s3cret}\n",
}


@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_is_refused(ends: Ends, tmp_path: Path, name: str) -> None:
    path, content = tmp_path / "config.yaml", FILES[name]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    ends("run", path, f"run.dir={tmp_path}/run", "cluster.mode=inline")
    assert not (tmp_path / "run").exists()


NUMBERS = (
    "ppo.learning_rate",
    "ppo.kl_coef",
    "ppo.gamma",
    "ppo.iterations",
    "rollout.temperature",
    "rollout.max_tokens",
    "critic.learning_rate",
    "run.seed",
    "lora.r",
    "model.max_length",
    "sft.learning_rate",
    "cluster.call_timeout_s",
)
NOT_NUMBERS = {
    "infinite": ".inf",
    "negative_infinite": "-.inf",
    "nan": ".nan",
    "overflow": "1e999",
    "negative": "-1e9",
    "text": "many",
    "list": "[1]",
    "mapping": "{a: 1}",
    "null_text": "'null'",
    "escape": '"\\e[31m"',
    "digits": "9" * 5000,
}


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", NOT_NUMBERS)
def test_what_is_no_number_is_refused(
    ends: Ends, config_file: Path, tmp_path: Path, key: str, value: str
) -> None:
    override = f"{key}={NOT_NUMBERS[value]}"
    section = key.split(".")[0]
    ends("run", config_file, f"run.dir={tmp_path}/run", override, says=section)
    assert not (tmp_path / "run").exists()


OVERRIDES = {
    "no_value": ["ppo.iterations"],
    "no_key": ["=3"],
    "dots": ["...=3"],
    "empty_part": ["ppo..iterations=3"],
    "nul_key": ["ppo.\x00=3"],
    "escape_key": ["\x1b[31m.a=3"],
    "bad_yaml": ["ppo.iterations={"],
    "recursive": ["data.sft=&a [*a]"],
    "deep": ["run.stages=" + "[" * 3000],
    "deep_key": [".".join("a" * 3000) + "=1"],
    "tag": ["run.name=!!python/name:os.system"],
    "long_seed": ["run.seed=123456789012345678901234567"],
    "negative_seed": ["run.seed=-1"],
    "name_nul": ["run.name=a\x00b"],
    "name_escape": ["run.name=\x1b[31mred"],
    "name_escape_quoted": ['run.name="\\e]0;title\\a"'],
    "name_parent": ["run.name=.."],
    "name_dot": ["run.name=."],
    "name_slash": ["run.name=a/b"],
    "name_absolute": ["run.name=/etc"],
    "name_newline": ['run.name="a\\nb"'],
    "name_empty": ["run.name=''"],
    "name_long": ["run.name=" + "a" * 5000],
    "name_direction": ["run.name=a\u202eb"],
    "dir_nul": ["run.dir=a\x00b"],
    "dir_long": ["run.dir=/tmp/" + "a" * 5000],
    "dir_of_the_system": ["run.dir=/proc/nothing"],
    "stages_twice": ["run.stages=[sft, sft]"],
    "stages_text": ["run.stages=fly"],
    "stages_null": ["run.stages=[null]"],
    "posts_nul": ["prepare.posts=a\x00b"],
    "posts_long": ["prepare.posts=" + "a" * 5000],
    "model_nul": ["model.path=a\x00b", "run.stages=[pretrain]"],
    "model_long": ["model.path=/" + "a" * 5000, "run.stages=[pretrain]"],
    "model_with_login": ["model.path=https://me:planted-s3cret@host/model"],
    "url_without_host": ["rewards=[{type: http, url: 'http://'}]"],
    "url_without_scheme": ["rewards=[{type: http, url: 'host/path'}]"],
    "url_of_a_file": ["rewards=[{type: http, url: 'file:///etc/passwd'}]"],
    "url_port": ["rewards=[{type: http, url: 'http://host:99999/'}]"],
    "url_with_key": ["rewards=[{type: http, url: 'http://host/?api_key=planted-s3cret'}]"],
    "url_with_login": ["rewards=[{type: http, url: 'http://me:planted-s3cret@host/'}]"],
    "rewards_number": ["rewards=3"],
    "rewards_list_of_text": ["rewards=[gold]"],
    "rewards_no_type": ["rewards=[{path: a}]"],
    "reward_function_shape": ["rewards=[{type: function, function: nocolon}]"],
    "data_number": ["data.sft=3"],
    "data_without_path": ["data.sft={split: train}"],
    "data_path_nul": ['data.sft={path: "a\\0b"}'],
    "data_negative_weight": ["data.sft={path: a.jsonl, weight: -1}"],
    "data_infinite_weight": ["data.sft={path: a.jsonl, weight: .inf}"],
    "data_negative_limit": ["data.sft={path: a.jsonl, limit: -1}"],
    "data_columns_list": ["data.sft={path: a.jsonl, columns: [a]}"],
    "env_secret": ["cluster.env={DB_PASSWORD: planted-s3cret}"],
    "env_token": ["cluster.env={HF_TOKEN_2: planted-s3cret}"],
    "env_short": ["cluster.env={DB_PWD: planted-s3cret}"],
    "headers_secret": [
        "rewards=[{type: http, url: 'http://host/', headers: {X-Auth: planted-s3cret}}]"
    ],
    "trainer_owned": ["sft.trainer={output_dir: /tmp}"],
    "trainer_unknown": ["sft.trainer={fly: 1}"],
    "engine_args_owned": ["rollout.engine_args={model: a}"],
    "lora_modules_number": ["lora.target_modules=3"],
    "lora_modules_empty": ["lora.target_modules=[]"],
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_an_odd_override_is_refused(
    ends: Ends, config_file: Path, tmp_path: Path, name: str
) -> None:
    overrides = OVERRIDES[name]
    where = [] if "run.dir" in overrides[0] else [f"run.dir={tmp_path}/run"]
    ends("run", config_file, *where, *overrides)
    assert not (tmp_path / "run" / "prepare").exists(), "refused before the first stage"
