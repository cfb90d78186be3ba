from rlhf_ray.data import template


def test_bytes_of_the_template() -> None:
    assert template.prompt("Why?\n\nTell me.") == "Question: Why?\n\nTell me.\n\nAnswer: "
    assert template.full("Why?", "So.") == "Question: Why?\n\nAnswer: So."
