"""A chat template that loops or explodes is refused in seconds, with what it takes."""

import copy
import time
from typing import Any

import pytest

from rlhf_ray.config.data import TemplateConfig
from rlhf_ray.data.rendering import bounded
from rlhf_ray.data.rendering.render import Renderer
from rlhf_ray.errors import DataError

NUMBERS = "{% for i in range(90000) %}{% for j in range(90000) %}"
ENDS = "{% endfor %}{% endfor %}"
DOUBLING = "{% for i in range(64) %}{% set ns.s = ns.s + ns.s %}{% endfor %}"
DOUBLES = "{% set ns = namespace(s='x') %}" + DOUBLING
EXPLODES = {
    "loops": (f"{NUMBERS}{{% set x = 1 %}}{ENDS}", "does not end within 2 s"),
    "a power": ("{{ 9**(9**9) % 7 }}", "does not end within 2 s"),
    "a product": ("{{ 'a' * 10**11 }}", "takes more than"),
    "doubles": (DOUBLES, "takes more than"),
    "writes much": ("{{ 'a' * 20000000 }}", "takes more than"),
    "only in an answer": (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        + DOUBLES
        + "{% endif %}{% endfor %}",
        "takes more than",
    ),
}


@pytest.mark.parametrize("name", EXPLODES)
def test_a_template_that_does_not_end_is_refused(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(bounded, "LONGEST_S", 2.0)
    template, says = EXPLODES[name]
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    began = time.monotonic()
    with pytest.raises(DataError, match=f"The chat template of .* {says}"):
        Renderer(tokenizer, TemplateConfig(kind="chat")).prompt([{"role": "user", "content": "a"}])
    assert time.monotonic() - began < 10


def test_a_template_that_raises_or_ends_has_no_problem() -> None:
    def fails() -> str:
        raise ValueError("no system message here")

    assert bounded.problem_of(fails) is None
    assert bounded.problem_of(lambda: "text") is None
