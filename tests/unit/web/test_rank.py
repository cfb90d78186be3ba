"""The pages of `rlhf-ray rank`: no verdict is lost, no model is seen, no text acts."""

import json
import multiprocessing
import re
import shutil
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
import uvicorn
from playwright.sync_api import Browser, Page
from recorded_runs import HOSTILE
from starlette.testclient import TestClient

from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.people.pairs import Candidate, make_pair, read_pairs, write_pairs
from rlhf_ray.people.preferences import (
    Answer,
    preferences_path,
    read_preferences,
    training_rows,
)
from rlhf_ray.web.rank import RankPages, prepare_pairs, tunnels
from rlhf_ray.web.server import application, listen, served
from rlhf_ray.web.text import markdown

MODELS = "model-of-first", "model-of-second"


def make_run(folder: Path, num_pairs: int) -> Path:
    """A run's folder with pairs: the first answer is the good one."""
    folder.mkdir()
    (folder / "config.yaml").write_text("run: {name: ranked}\n")
    write_pairs(
        folder,
        [
            make_pair(
                f"Question {number}: how do I sort a list?",
                {"prompt": f"Question {number}"},
                Candidate(f"**Good {number}**: thank you for asking.", MODELS[0]),
                Candidate(f"Bad {number}.\n\n    sort()", MODELS[1]),
            )
            for number in range(num_pairs)
        ],
    )
    return folder


def client_of(run: Path) -> TestClient:
    return TestClient(
        application(RankPages(run).routes(), "token"), base_url="http://127.0.0.1", root_path=""
    )


def shown_pair(text: str) -> str:
    return re.findall(r'name="pair" value="(\w+)"', text)[0]


def answer(client: TestClient, person: str, verdict: str) -> str:
    """Answer the pair that a person sees; return its id."""
    pair = shown_pair(client.get("/token/", params={"person": person}).text)
    given = {"person": person, "pair": pair, "verdict": verdict}
    assert client.post("/token/answer", data=given).status_code == 200
    return pair


def standing(run: Path) -> list[Answer]:
    return read_preferences(preferences_path(run)).standing()


def prefer_good(page: Page) -> None:
    """Press the key of the good answer, and wait for the next page."""
    is_left = "Good" in page.locator(".answers section").first.inner_text()
    with page.expect_navigation():
        page.keyboard.press("ArrowLeft" if is_left else "ArrowRight")


def begin(page: Page, address: str, person: str) -> None:
    page.goto(address)
    page.get_by_label("Your name").fill(person)
    with page.expect_navigation():
        page.keyboard.press("Enter")


def serve_until_killed(run: Path, taken: socket.socket) -> None:
    app = application(RankPages(run).routes(), "token")
    config = uvicorn.Config(app, log_level="warning", lifespan="off")
    uvicorn.Server(config).run(sockets=[taken])


def test_fifty_verdicts_are_kept_by_servers_that_are_killed_after_each(tmp_path: Path) -> None:
    """Stands before the tests with a browser, whose threads a forked server would not have."""
    run = make_run(tmp_path / "run", 50)
    fork = multiprocessing.get_context("fork")
    for number in range(50):
        with listen(0) as taken:
            server = fork.Process(target=serve_until_killed, args=(run, taken))
            server.start()
            address = f"http://127.0.0.1:{taken.getsockname()[1]}"
            with httpx.Client(base_url=address, follow_redirects=False, timeout=20) as client:
                pair = shown_pair(client.get("/token/", params={"person": "Ada"}).text)
                given = {"person": "Ada", "pair": pair, "verdict": "left"}
                assert client.post("/token/answer", data=given).status_code == 303, number
                server.kill()
            server.join(10)
    assert len(standing(run)) == 50
    assert {each.pair.id for each in standing(run)} == {pair.id for pair in read_pairs(run)}


def test_in_a_browser_two_people_rank_twenty_pairs_by_keyboard(
    tmp_path: Path, browser: Browser
) -> None:
    run = make_run(tmp_path / "run", 20)
    with served(RankPages(run).routes()) as address:
        ada = browser.new_page()
        begin(ada, address, "Ada")
        for _ in range(7):
            prefer_good(ada)
        ada.reload()
        assert ada.locator("#done").inner_text() == "7 of 20"
        before = ada.locator(".prompt").inner_text()
        prefer_good(ada)
        with ada.expect_navigation():
            ada.keyboard.press("u")
        assert ada.locator("#done").inner_text() == "7 of 20"
        assert ada.locator(".prompt").inner_text() == before
        for _ in range(13):
            prefer_good(ada)
        assert "All pairs are ranked" in ada.content()
        bob = browser.new_page()
        begin(bob, address, "Bob")
        for key in ("ArrowDown", "b", "S"):
            with bob.expect_navigation():
                bob.keyboard.press(key)
        for _ in range(17):
            prefer_good(bob)
        # Two pairs are disputed: each sees them once more, with a note.
        assert bob.get_by_role("note").count() == 1
        ada.reload()
        assert ada.get_by_role("note").count() == 1
        assert "Cohen's kappa" in ada.locator(".foot").inner_text()
    answers = standing(run)
    assert len(answers) == 40
    by_ada = [each for each in answers if each.person == "Ada"]
    assert {each.preferred for each in by_ada} == {"first"}
    assert {each.left for each in by_ada} == {"first", "second"}
    by_bob = Counter(each.preferred for each in answers if each.person == "Bob")
    assert by_bob == {"tie": 1, "both_bad": 1, "skip": 1, "first": 17}
    rows = list(training_rows(preferences_path(run)))
    assert len(rows) == 20
    assert all("Good" in str(row["chosen"]) for row in rows)


def test_in_a_browser_hostile_text_stays_text(tmp_path: Path, browser: Browser) -> None:
    run = make_run(tmp_path / "run", 0)
    acting = f'{HOSTILE}\n\n<img src=x onerror="document.title=1">\n\n[a](javascript:alert(1))'
    pair = make_pair(acting, {}, Candidate(acting, "a"), Candidate(f"# {acting}", "b"))
    write_pairs(run, [pair])
    with served(RankPages(run).routes()) as address:
        page = browser.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        begin(page, address, "<b>Ada</b>")
        assert page.title() == "Rank run – rlhf-ray"
        answers = page.locator(".answers")
        assert answers.locator("script, img, a").count() == 0
        assert "<script>" in answers.inner_text()
        assert "U+202E" in answers.inner_text()
        assert "\u202e" not in page.content()
        assert "\x1b" not in page.content()
        assert "<b>Ada</b>" in page.locator("header").inner_text()
    assert all(url.startswith(address) for url in asked)


def test_the_command_serves_keeps_a_verdict_through_a_kill_and_names_a_taken_port(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path / "run", 3)
    command = [sys.executable, "-m", "rlhf_ray", "rank", str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        try:
            page = httpx.get(address, params={"person": "Ada"}).text
            assert not any(model in page for model in MODELS)
            given = {"person": "Ada", "pair": shown_pair(page), "verdict": "tie"}
            assert httpx.post(f"{address}answer", data=given).status_code == 303
            port = str(urlsplit(address).port)
            second = subprocess.run(
                [*command, "--port", port], capture_output=True, text=True, timeout=60, check=False
            )
        finally:
            server.kill()
    assert second.returncode == 2
    assert f"Port {port}" in second.stderr
    assert "Traceback" not in second.stderr
    assert [each.verdict for each in standing(run)] == ["tie"]


def test_reloading_shows_the_same_pair_in_the_same_order(tmp_path: Path) -> None:
    client = client_of(make_run(tmp_path / "run", 5))
    pages = {client.get("/token/?person=Ada").text.split("<script")[0] for _ in range(3)}
    assert len(pages) == 1
    shown = pages.pop()
    assert not any(model in shown for model in MODELS)


def test_a_verdict_leads_to_the_next_pair_by_a_page_that_may_be_reloaded(tmp_path: Path) -> None:
    client = client_of(make_run(tmp_path / "run", 2))
    pair = shown_pair(client.get("/token/?person=Ada%20B").text)
    given = {"person": "Ada B", "pair": pair, "verdict": "left"}
    response = client.post("/token/answer", data=given, follow_redirects=False)
    assert response.status_code == 303
    assert parse_qs(urlsplit(response.headers["location"]).query) == {"person": ["Ada B"]}
    assert shown_pair(client.get(response.headers["location"]).text) != pair


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"person": "Ada", "pair": "none", "verdict": "left"}, "no pair"),
        ({"person": "Ada", "verdict": "best"}, "no verdict"),
        ({"person": "", "verdict": "left"}, "A name has"),
        ({"person": "A" * 20_000}, "more than"),
    ],
)
def test_a_request_that_is_wrong_gets_one_message_and_records_nothing(
    tmp_path: Path, given: dict[str, str], message: str
) -> None:
    run = make_run(tmp_path / "run", 1)
    client = client_of(run)
    given = {"pair": read_pairs(run)[0].id, **given}
    response = client.post("/token/answer", data=given)
    assert response.status_code in (400, 410)
    assert message in response.text
    assert standing(run) == []


def test_a_run_that_is_deleted_is_not_made_again_by_a_verdict(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 1)
    client, pair = client_of(run), read_pairs(run)[0].id
    shutil.rmtree(run)
    given = {"person": "Ada", "pair": pair, "verdict": "left"}
    for response in (client.get("/token/?person=Ada"), client.post("/token/answer", data=given)):
        assert response.status_code == 400
        assert "was moved or deleted" in response.text
    assert not run.exists()


def test_a_torn_line_is_named_and_the_verdicts_before_and_after_it_count(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 3)
    answer(client_of(run), "Ada", "left")
    with preferences_path(run).open("a") as file:
        file.write('{"person": "Ada", "pai')
    assert "1 broken line" in RankPages(run).damage()
    answer(client_of(run), "Ada", "right")
    assert [each.verdict for each in standing(run)] == ["left", "right"]


def test_a_copied_run_has_its_pairs_made_of_the_evaluations_answers(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 0)
    shutil.rmtree(run / "rank")
    with pytest.raises(DataError, match="rlhf-ray evaluate"):
        prepare_pairs(run, "random", 10, 0)
    (run / "evaluate").mkdir()
    rows = [
        {
            "prompt": f"p{n}",
            "sft": {"text": "a", "reward": 0.0},
            "ppo": {"text": "b", "reward": float(5 - n)},
        }
        for n in range(5)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "evaluate" / "samples.jsonl").write_text(text)
    copy = shutil.copytree(run, tmp_path / "copy")
    prepare_pairs(copy, "uncertain", 2, 0)
    assert [pair.prompt for pair in read_pairs(copy)] == ["p4", "p3"]
    prepare_pairs(copy, "random", 5, 0)
    assert len(read_pairs(copy)) == 2, "pairs that people may have ranked are kept"
    with pytest.raises(ConfigError, match="no run's folder"):
        prepare_pairs(tmp_path / "nothing", "random", 5, 0)


def test_a_cluster_gets_the_commands_that_bring_its_page_here() -> None:
    text = tunnels(Path("/shared/a run"), "http://head.example:8265", 0, None, "it is away")
    assert "By ssh, to the address's host" in text
    assert "it is away" in text
    assert "ssh -t -L 8268:127.0.0.1:8268 head.example" in text
    assert "kubectl port-forward $POD 8268" in text
    assert "rlhf-ray rank '/shared/a run' --port 8268" in text
    assert " HEAD " in tunnels(Path("/shared/run"), "http://127.0.0.1:8265", 9000)
    text = tunnels(Path("/shared/run"), "http://127.0.0.1:8265", 9000, "10.0.0.7")
    assert (
        "By ssh, to the node of the run's driver:\n  ssh -t -L 9000:127.0.0.1:9000 10.0.0.7" in text
    )
    assert "kubectl get pod --field-selector status.podIP=10.0.0.7 " in text


def test_markdown_is_rendered_and_nothing_of_it_leads_elsewhere() -> None:
    text = markdown("# Sort\n\n`sorted(x)` **now**\n\n| a | b |\n|---|---|\n| 1 | 2 |\n")
    for part in ("<h1>Sort</h1>", "<code>sorted(x)</code>", "<strong>now</strong>", "<td>1</td>"):
        assert part in text
    acting = markdown(
        "[a](https://x.y) ![i](https://x.y/i.png) <https://x.y> <b>bold</b>\n\n"
        '[r]: https://x.y\n\n```\u202e" onclick=alert(1)\nx\n```\n'
    )
    assert "href" not in acting
    assert "src=" not in acting
    assert "<b>" not in acting
    assert "[r]: https://x.y" in acting
    assert "U+202E" in acting
