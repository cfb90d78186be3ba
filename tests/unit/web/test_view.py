import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from recorded_runs import HOSTILE, record_run
from starlette.testclient import TestClient

from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.observability.samples.index import prompt_key
from rlhf_ray.observability.samples.writing import SampleWriter
from rlhf_ray.web import curves
from rlhf_ray.web.curves import Curve, Curves
from rlhf_ray.web.server import application, listen, served
from rlhf_ray.web.tokens import coloured
from rlhf_ray.web.view import Viewer

PROMPT = "Question: how do I sort list number 1?\n\nAnswer: "


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return record_run(tmp_path / "recorded", iterations=12)


def client_of(run: Path) -> TestClient:
    app = application(Viewer(run).routes(), "token")
    return TestClient(app, base_url="http://127.0.0.1", root_path="")


@pytest.fixture
def client(run: Path) -> TestClient:
    return client_of(run)


def listed(text: str) -> list[tuple[int, int]]:
    """Iteration and position of each sample that a page links to."""
    return [(int(a), int(b)) for a, b in re.findall(r'href="/[^/]+/sample/(\d+)/(\d+)"', text)]


def test_the_list_is_filtered_sorted_and_paged(client: TestClient) -> None:
    whole = client.get("/token/").text
    assert "96 samples" in whole
    assert listed(whole)[:2] == [(12, 7), (12, 6)]
    assert len(listed(whole)) == 50
    assert "page 1 of 2" in whole
    assert len(listed(client.get("/token/?page=1").text)) == 46
    second = client.get("/token/?iteration_min=3&iteration_max=3&order=up").text
    assert listed(second) == [(3, position) for position in range(8)]
    assert len(listed(client.get("/token/?tokens=1").text)) == 24
    assert listed(client.get("/token/?text=GNITIRW&iteration_max=1").text) == [(1, 3)]
    by_score = client.get("/token/?sort=score&source=length").text
    assert '<option value="length" selected>' in by_score


def test_a_page_keeps_the_filters_of_the_one_before(client: TestClient) -> None:
    text = client.get("/token/?sort=kl&kl_min=0").text
    following = html.unescape(re.findall(r'href="([^"]*)" rel="next"', text)[0])
    assert following == "?sort=kl&kl_min=0&page=1"
    assert client.get(f"/token/{following}").status_code == 200


def test_a_samples_tokens_are_coloured_by_what_is_asked(run: Path, client: TestClient) -> None:
    line = (run / "ppo" / "completions.jsonl").read_text().splitlines()[0]
    values = json.loads(line)["tokens"]
    for kind in ("advantage", "kl", "mismatch"):
        text = client.get(f"/token/sample/1/0?by={kind}").text
        shares = re.findall(r'class="t (up|down)" style="--s:([\d.]+)"', text)
        largest = max(map(abs, values[kind]))
        assert [float(share) for _, share in shares] == pytest.approx(
            [abs(value) / largest for value in values[kind]], abs=1e-3
        )
        assert [way == "up" for way, _ in shares] == [value >= 0 for value in values[kind]]
    assert "run.record.tokens" in client.get("/token/sample/1/5").text


def test_a_prompt_is_shown_across_versions(client: TestClient) -> None:
    text = client.get(f"/token/prompt/{prompt_key(PROMPT)}").text
    assert listed(text) == [(i, position) for i in range(1, 13) for position in (2, 3)]
    assert "Use sorted(), take 12." in text
    assert f"/token/prompt/{prompt_key(PROMPT)}" in client.get("/token/fixed").text


def test_warnings_come_with_the_samples_that_caused_them(run: Path, client: TestClient) -> None:
    text = client.get("/token/warnings").text
    causes = listed(text)
    assert [iteration for iteration, _ in causes] == [12] * 3 + [2] * 3
    rows = [json.loads(line) for line in (run / "ppo/completions.jsonl").read_text().splitlines()]
    rows.sort(key=lambda row: (-row["iteration"], row["distinct_bigrams"]))
    assert causes[:3] == [(12, row["position"]) for row in rows[:3]]
    assert "repeat a token" in client.get("/token/sample/2/0").text


def test_hostile_text_is_shown_and_does_nothing(client: TestClient) -> None:
    for path in ("?text=gnitirw", "sample/1/3", f"prompt/{prompt_key(PROMPT)}"):
        text = client.get(f"/token/{path}").text
        assert "<script>document" not in text
        assert "&lt;script&gt;document" in text
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert "U+202E" in text


def test_only_who_has_the_token_may_ask_and_from_this_host_alone(client: TestClient) -> None:
    answer = client.get("/token/")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert client.get("/").status_code == client.get("/other/").status_code == 404
    assert client.get("/token/", headers={"host": "evil.example"}).status_code == 400


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        ("?score_min=high", 400, "score_min='high' is no number"),
        ("?page=-1", 400, "is no number of a page"),
        ("?sort=colour", 400, "no order of samples"),
        ("?source=other", 410, "no reward source"),
        ("?sort=kl&page=999", 410, "narrow the filters"),
        ("sample/7/99", 410, "not recorded"),
        ("prompt/1", 410, "No recorded sample"),
    ],
)
def test_bad_input_is_one_message(client: TestClient, path: str, status: int, says: str) -> None:
    answer = client.get(f"/token/{path}")
    assert answer.status_code == status
    assert says in html.unescape(answer.text)


def test_a_damaged_line_leaves_the_others(run: Path) -> None:
    texts = run / "ppo" / "completions.jsonl"
    lines = texts.read_bytes().splitlines(keepends=True)
    lines[-2] = b"x" * (len(lines[-2]) - 1) + b"\n"
    texts.write_bytes(b"".join(lines)[:-5])  # and the last is torn
    client = client_of(run)
    text = client.get("/token/").text
    assert "is damaged" in text
    assert listed(text)[0] == (12, 5)
    assert client.get("/token/sample/12/6").status_code == 410


def test_a_run_that_is_deleted_is_one_message(run: Path, client: TestClient) -> None:
    shutil.rmtree(run)
    for path in ("", "sample/1/0", "warnings", "fixed"):
        answer = client.get(f"/token/{path}")
        assert answer.status_code == 410
        assert "is no run&#39;s folder: it was moved or deleted" in answer.text
    with pytest.raises(DataError, match="no run's folder"):
        Viewer(run)


def test_a_port_that_is_taken_is_one_message() -> None:
    with listen(0) as taken, pytest.raises(ConfigError, match="--port"):
        listen(taken.getsockname()[1])


def test_curves_follow_the_file_with_bounded_points(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curves, "MOST_POINTS", 8)
    curve = Curve()
    for iteration in range(1, 101):
        curve.add(iteration, float(iteration))
    assert len(curve.points) < 8
    assert curve.points[0] == (curve.stride, (1 + curve.stride) / 2)  # the mean of those before
    monkeypatch.setattr(curves, "MOST_POINTS", 400)
    drawn, metrics = Curves(run / "ppo"), run / "ppo" / "metrics.jsonl"
    assert drawn.look()[0]["to"] == 11
    with metrics.open("a") as file:
        file.write('{"iteration": 12, "objective/scores": 1.0}\n{"iteration": 13, "objec')
    assert drawn.look()[0]["to"] == 12
    metrics.write_text("".join(line + "\n" for line in metrics.read_text().splitlines()[:4]))
    assert drawn.look()[0]["to"] == 4  # cut back by a resume


def test_damaged_token_values_are_missing_ones() -> None:
    tokens = coloured({"ids": [1], "texts": ["a", "b"], "kl": [None, "x"], "advantage": 3}, "kl")
    assert tokens is not None
    assert [token["kl"] for token in tokens["all"]] == [None, None]
    assert (tokens["top"], tokens["known"]) == ([], False)
    assert coloured("none", "kl") is None


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Debian's chromium")
def test_in_a_browser_a_page_follows_the_run_and_hostile_text_stays_text(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    render, num_asked = Viewer._list, 0

    def with_a_new_iteration(viewer: Viewer, request: object) -> object:
        nonlocal num_asked
        answer, num_asked = render(viewer, request), num_asked + 1  # type: ignore[arg-type]
        if num_asked == 1:
            writer = SampleWriter(run / "ppo", ["model", "length"], 12)
            writer.append([{"iteration": 13, "position": 0, "prompt": "new", "response": HOSTILE}])
            writer.close()
        return answer

    monkeypatch.setattr(Viewer, "_list", with_a_new_iteration)
    with served(Viewer(run).routes()) as address:
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        command += [f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=7000"]
        found = subprocess.run([*command, address], capture_output=True, text=True, timeout=60)
    assert listed(found.stdout)[0] == (13, 0)
    assert "<title>recorded" in found.stdout
    assert "&lt;script&gt;document" in found.stdout
