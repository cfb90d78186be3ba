"""A card shows names of data and models as they are: no HTML, no broken table or code block."""

import re

from rlhf_ray.runs.lineage import Lineage, Retuned, Source, Step
from rlhf_ray.serving.model_card import Exported, model_card

EVIL = "a|b\n<img src=x onerror=alert(1)> ``` [x](http://h) `"


def test_names_break_neither_tables_nor_code_and_bring_no_html() -> None:
    steps = (
        Step("sft", "runs/x/sft", False, (Source(EVIL, EVIL),), {EVIL: EVIL, "loss": 0.5}),
        Step("reward", EVIL, True, (), {}),
    )
    history = Lineage(Source(EVIL, EVIL), steps, {"sft": {"system": EVIL}})
    card = model_card(Exported(EVIL, EVIL, "CAUSAL_LM", EVIL, None, "float32"), history)
    front, body = card.split("---\n", 2)[1:]
    assert front.startswith("library_name: peft\n")
    outside, fence = [], ""
    for line in body.splitlines():
        marks = line[: len(line) - len(line.lstrip("`"))]
        if len(marks) >= 3 and (not fence or line == fence):
            fence = "" if fence else marks
        elif not fence:
            outside.append(line)
    assert not fence
    rows = [line for line in outside if line.startswith("|")]
    assert len(rows) == 2 + 2 + 2 + 2
    cells = [row.replace("\\|", "").count("|") for row in rows]
    assert cells == [5] * 4 + [4] * 4
    text = "\n".join(line.replace("<br>", "").replace("<!-- Written", "") for line in outside)
    assert "<img" not in re.sub(r"(?<!\\)(`+)(?!`).*?(?<!`)\1(?!`)", "", text)


def test_changes_on_resume_are_listed() -> None:
    change = Retuned("rewards", [{"clip": "`|"}], 0.5, {"ppo": 12})
    history = Lineage(Source("b", "mit"), (), {}, (change,))
    card = model_card(Exported("t", "f", "CAUSAL_LM", None, None, "float32"), history)
    assert "\n## Changes on resume\n" in card
    row = next(line for line in card.splitlines() if line.startswith("| `rewards`"))
    assert row.endswith("| `0.5` | iteration 12 of ppo |")
    assert row.replace("\\|", "").count("|") == 5
