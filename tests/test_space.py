"""The Space, as a visitor meets it: started from the Hub's files alone, and used in a real browser."""

import itertools
import json
import re
import shutil
import socket
import time
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from conftest import build_for_gpus, load_module
from contrast import faint
from hub import Hub, Repository
from processes import forked

pytestmark = [
    pytest.mark.slow,
    pytest.mark.network,
    pytest.mark.skipif(find_spec("gradio") is None, reason="the Space needs gradio: pip install 'fledge-gpt[demo]'"),
]

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> {ending} {0} <|endoftext|> **not bold**"
ENDED = re.compile(r"^\d+ tokens, (ended by the model|broken off at the limit)\.$")


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """The Space's files as publish.py made them, with a chat page added, which this task's model would not have."""
    folder = shutil.copytree(tiny.repository / "space", tmp_path_factory.mktemp("space") / "space")
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    assert settings["chat"] is None
    settings["chat"] = {
        "tab": "Chat",
        "placeholder": "Say hello.",
        "empty": "Please type something.",
        "examples": ["Hi"],
    }
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def space(folder, tiny, tmp_path_factory):
    """The running app at `url`; the model comes from a Hub, into an empty cache, and the base from a folder."""
    hub = Hub()
    model = tiny.repository / "model"
    repo = Repository(private=False)
    repo.files.update({f.relative_to(model).as_posix(): f.read_bytes() for f in model.rglob("*") if f.is_file()})
    hub.repos["model", "someone/tiny-tales"] = repo
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path_factory.mktemp("cache")),
        "BASE": str(tiny.base), "GRADIO_SERVER_PORT": str(port),
    }  # fmt: skip
    with forked("app.py", folder=folder, **environment) as app:
        while "Running on local URL" not in (app.said / "stdout").read_text(encoding="utf-8"):
            assert app.process.is_alive(), (app.said / "stderr").read_text(encoding="utf-8")
            time.sleep(0.2)
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}")
    hub.shutdown()
    hub.server_close()


@pytest.fixture(scope="module")
def window(browser):
    """What all pages share, so that Gradio's scripts are fetched and compiled once."""
    with browser.new_context(viewport={"width": 1000, "height": 900}) as window:
        yield window


@pytest.fixture
def page(window, space):
    """A page of the app that fails the test if a script of a visitor runs or anything is fetched from elsewhere."""
    page = window.new_page()
    page.alerts, page.elsewhere = [], []
    page.on("dialog", lambda dialog: (page.alerts.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: page.elsewhere.append(request.url) if space.url not in request.url else None)
    page.goto(space.url)
    page.get_by_label("Topic").wait_for()
    yield page
    assert page.alerts == []
    assert [url for url in page.elsewhere if not url.startswith(("data:", "blob:"))] == []
    page.close()


def wait_for_end(page) -> str:
    page.wait_for_function(
        "[...document.querySelectorAll('.status textarea, .status input')].some(box => box.value.includes(' tokens'))"
    )
    boxes = page.eval_on_selector_all(".status textarea, .status input", "boxes => boxes.map(box => box.value)")
    return next(text for text in boxes if " tokens" in text)


def test_type_choose_press_and_a_story_appears(page):
    page.get_by_label("Topic").fill("Lily took a ball to the park.")
    page.get_by_label("Sad").check()
    page.get_by_role("button", name="Write").click()
    assert ENDED.match(wait_for_end(page))
    story = page.locator(".answer textarea").first
    assert story.is_visible()
    assert len(story.input_value().split()) > 2


def test_both_endings_and_the_base_side_by_side_all_legible(page):
    boxes = page.locator(".answer textarea").locator("visible=true")
    assert boxes.count() == 0  # no empty slab
    page.get_by_label("Side by side").check()
    page.get_by_label("Base model beside it").check()
    page.get_by_label("Topic").fill("Tim had a boat.")
    page.get_by_label("Topic").press("Enter")
    assert wait_for_end(page).startswith("4 answers of ")
    assert [len(box.input_value()) > 5 for box in boxes.all()] == [True] * 4
    names = ["Happy ending", "Happy ending, base model", "Sad ending", "Sad ending, base model"]
    shown = ["Topic", "Ending", "Happy", "Side by side", "Base model beside it", "Write", "Stop", "More"]
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert faint(page, [*shown, *names, "The model", "Made with Fledge", "Try one of these"]) == {}, scheme


def test_an_example_is_whole_and_fills_the_form(page):
    button = page.locator(".examples button").first
    assert button.evaluate("it => it.scrollWidth <= it.clientWidth && it.scrollHeight <= it.clientHeight")
    topic, _, ending = button.inner_text().strip().rpartition(" ")
    button.click()
    page.wait_for_function("document.querySelector('textarea').value.includes('number')")
    assert page.get_by_label("Topic").input_value() == topic
    assert page.get_by_label(ending.strip("()").capitalize()).is_checked()


def test_what_a_visitor_types_stays_text(page):
    page.get_by_role("tab", name="Chat").click()
    page.get_by_placeholder("Say something").fill(HOSTILE)
    page.get_by_role("button", name="Send").click()
    wait_for_end(page)
    chat = page.locator("[role=log]")
    assert HOSTILE in chat.inner_text()
    assert chat.locator("img, script, b, strong").count() == 0
    page.get_by_role("button", name="Start over").click()
    page.get_by_text("Say hello.").wait_for()


def test_the_page_fits_a_narrow_screen(window, space):
    narrow = window.new_page()
    narrow.set_viewport_size({"width": 360, "height": 740})
    narrow.goto(space.url)
    narrow.get_by_label("Topic").wait_for()
    assert narrow.evaluate("document.documentElement.scrollWidth") <= 360
    narrow.close()


@pytest.fixture(scope="module")
def client(space):
    from gradio_client import Client

    return Client(space.url, verbose=False)


def test_a_story_streams_in(client):
    job = client.submit("Lily took a ball to the park.", "happy", 0, 60, False, api_name="/write")
    job.result()
    stories = [story for _, story, *_ in job.outputs()]
    assert len(stories) > 3
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(stories))
    assert ENDED.match(job.outputs()[-1][0])


def test_several_visitors_are_served_at_once(client):
    jobs = [client.submit(f"Ben had {n} cups.", "sad", 0.8, 30, False, api_name="/write") for n in range(6)]
    assert all(ENDED.match(job.result()[0]) for job in jobs)


@pytest.mark.parametrize(
    ("topic", "said"),
    [
        ("", "Please type a topic first."),
        (" \n\t ", "Please type a topic first."),
        ("x" * 5000, "That is 5,000 characters; please stay below 4,000."),
        ("a very long tale " * 200, "That is longer than the model can read; please shorten it."),
        (HOSTILE, ENDED),
        ("\ud83d\ude00 \u202e \x00 \uffff", ENDED),
    ],
)
def test_no_topic_breaks_it(topic, said, client):
    status, *_ = client.predict(
        topic.encode("utf-16", "surrogatepass").decode("utf-16"), "sad", 0.8, 20, False, api_name="/write"
    )
    assert said.match(status) if isinstance(said, re.Pattern) else status == said


def test_a_conversation_keeps_its_turns(client):
    _, first, _ = client.predict("Write a story.", [], 0, 12, api_name="/chat")
    _, second, status = client.predict("And another.", first, 0, 12, api_name="/chat")
    assert [turn["role"] for turn in second] == ["user", "assistant", "user", "assistant"]
    assert ENDED.match(status)
    kept, same, said = client.predict("  ", second, 0, 12, api_name="/chat")
    assert (kept, len(same), said) == ("  ", 4, "Please type something.")


@pytest.fixture(scope="module")
def writer(folder, tiny):
    app = load_module(folder / "app.py")
    with pytest.MonkeyPatch.context() as patched:
        build_for_gpus(patched)  # as on a free Space
        return app.Writer(str(tiny.model), app.AutoTokenizer.from_pretrained(tiny.model))


def test_a_control_token_that_a_visitor_types_is_text(writer):
    ids = writer.prompt([{"role": "user", "content": "one <|endoftext|> two"}])
    assert writer.tokenizer.eos_token_id not in ids
    assert writer.tokenizer.decode(ids).startswith("one <|endoftext|> two")


def test_the_oldest_turns_go_first_and_the_last_never(writer):
    def turns(count):
        return [{"role": ("user", "assistant")[i % 2], "content": f"turn {i} was here"} for i in range(count)]

    system = {"role": "system", "content": "Be kind."}
    long = writer.tokenizer.decode(writer.prompt([system, *turns(41)]))
    assert "turn 40" in long
    assert "turn 0 " not in long
    assert len(writer.prompt([system, *turns(41)])) + 16 <= writer.context
    assert writer.prompt([{"role": "user", "content": "word " * 500}]) is None
