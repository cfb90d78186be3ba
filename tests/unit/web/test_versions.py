"""The page on which one question is answered by any version of a run."""

import json
import re
from typing import Any

import pytest
from playwright.sync_api import Browser, expect
from starlette.testclient import TestClient

from rlhf_ray.errors import DataError
from rlhf_ray.web.server import application, served
from rlhf_ray.web.versions import VersionPages


class Echo:
    """Versions 3 and 5, which answer with their name; others are gone."""

    models = ("ppo@3", "sft</script>")
    seed = 7

    def kept(self) -> list[int]:
        return [3, 5]

    def answer(self, model: str, question: str, seed: int) -> str:
        if model == "ppo@4":
            raise DataError("Version 4 is not kept in runs/x; the nearest is 3, of 3, 5")
        return f"{model} {question} {seed} \x1b[2J\u202e<script>"


@pytest.fixture
def client() -> TestClient:
    app = application(VersionPages("my <run>", Echo()).routes(), "token")
    return TestClient(app, base_url="http://127.0.0.1")


def ask(client: TestClient, **values: Any) -> tuple[int, dict[str, str]]:
    asked = {"model": "ppo@3", "question": "why?", "seed": 7} | values
    reply = client.post("/token/answer", content=json.dumps(asked))
    return reply.status_code, reply.json()


def test_the_page_has_a_slider_over_what_is_kept_and_a_place_for_each_model(
    client: TestClient,
) -> None:
    text = client.get("/token/").text
    assert 'type="range" min="0" max="1" value="1"' in text
    assert "const kept = [3, 5]" in text
    assert re.findall(r'data-model="(.*?)"', text) == ["ppo@3", "sft&lt;/script&gt;"]
    assert "my &lt;run&gt;" in text
    assert "Samples</a>" not in text, "the pages of view are not here"
    assert client.get("/").status_code == 404, "without the token there is nothing"


def test_a_version_answers_and_nothing_in_its_text_acts(client: TestClient) -> None:
    status, reply = ask(client)
    assert status == 200
    assert reply == {"answer": "ppo@3 why? 7 \\u001b[2J\\u202e<script>"}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"model": "ppo@4"}, "Version 4 is not kept in runs/x; the nearest is 3"),
        ({"model": "/etc/passwd"}, "is no model of the run"),
        ({"question": " \n"}, "The question is empty"),
        ({"question": "x" * 100_001}, "more than 100000 characters"),
        ({"seed": -1}, "is not between 0 and"),
        ({"seed": "1"}, "has a model, a question and a seed"),
    ],
)
def test_what_cannot_be_answered_is_one_message(
    client: TestClient, values: dict[str, Any], says: str
) -> None:
    status, reply = ask(client, **values)
    assert status == 400
    assert says in reply["error"]


def test_a_request_that_is_no_json_is_refused(client: TestClient) -> None:
    for content in (b"{", b"\xff\xfe", b"[]"):
        reply = client.post("/token/answer", content=content)
        assert reply.status_code == 400
        assert reply.json()["error"]


def test_the_slider_shows_every_versions_answer_and_asks_once_for_each(browser: Browser) -> None:
    echo = Echo()
    asked: list[str] = []
    real = echo.answer
    echo.answer = lambda model, *rest: asked.append(model) or real(model, *rest)  # type: ignore[method-assign]
    with served(VersionPages("run", echo).routes()) as address:
        page = browser.new_page()
        page.goto(address)
        page.fill("#question", "why?")
        page.keyboard.press("Enter")
        first, pinned = page.locator("section").nth(0), page.locator("section").nth(1)
        expect(first).to_contain_text("ppo@5 why? 7")
        expect(pinned).to_contain_text("ppo@3 why? 7")
        expect(first).to_contain_text("\\u202e<script>")  # a text, not markup
        page.focus("#version")
        page.keyboard.press("ArrowLeft")
        expect(first.locator("div")).to_contain_text("ppo@3 why? 7")
        page.keyboard.press("ArrowRight")
        expect(first.locator("div")).to_contain_text("ppo@5 why? 7")
        assert page.inner_text("#which") == "5"
        page.close()
    assert asked.count("ppo@3") == asked.count("ppo@5") == 1
