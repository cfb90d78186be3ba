import pytest

from rlhf_ray.data import text_statistics
from rlhf_ray.data.text_statistics import LENGTH_BOUNDS, RowStats, TextStats


def test_counts_of_texts() -> None:
    with TextStats() as texts:
        for text in ("One  text", "one text\n", "another", "x" * 31, "x" * 32, "y" * 40_000):
            texts.add(text)
        report = texts.report()
    assert (report["texts"], report["repeated"]) == (6, 1)
    lengths = dict(zip(report["length_bounds"], report["lengths"], strict=True))
    assert {bound: num for bound, num in lengths.items() if num} == {0: 4, 32: 1, 16384: 1}
    assert report["length_bounds"] == list(LENGTH_BOUNDS)


def test_languages_of_code_fences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_statistics, "MAX_LANGUAGES", 2)
    fence = "```{}\ncode\n```"
    names = ["py", "Py", "py", "", "", "rust"]
    with TextStats() as texts:
        texts.add("\n\n".join(fence.format(name) for name in names))
        texts.add("a `word` and\n```\nan open fence")
        assert texts.report()["languages"] == {"py": 3, "not named": 2, "other": 1}


def test_nothing_at_all() -> None:
    with TextStats() as texts:
        report = texts.report()
    assert (report["texts"], report["repeated"], report["languages"]) == (0, 0, {})


def test_repeated_texts_are_found_across_the_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_statistics, "_BUFFER", 7)
    with TextStats() as texts:
        for number in range(100):
            texts.add(f"text {number % 60}")
        assert texts.report()["repeated"] == 40


def test_texts_of_rows_by_kind() -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    with RowStats() as texts:
        texts.add({"prompt": "why", "chosen": "so", "rejected": "or so", "score": 2.4})
        texts.add({"prompt": "Why", "completion": "so", "score": 2, "other": "unread"})
        texts.add({"messages": turns, "prompt": None, "completion": "", "score": "good"})
        report = texts.report()
    assert list(report) == ["prompts", "answers", "scores"]
    assert (report["prompts"]["texts"], report["prompts"]["repeated"]) == (3, 1)
    assert (report["answers"]["texts"], report["answers"]["repeated"]) == (3, 1)
    assert report["scores"] == {"2": 2}
