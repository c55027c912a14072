"""The static Space, as a visitor meets it: the model runs in a real browser, from files alone."""

import functools
import http.server
import itertools
import re
import shutil
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, call_script
from contrast import faint

from fledge.encoding import encode_prompt
from fledge.errors import UserError
from fledge.exporting import verdict
from fledge.exporting.onnx_graph import write_onnx
from fledge.exporting.programs import OnnxRuntime
from fledge.models import load_model
from fledge.publishing import static_space
from fledge.publishing.spaces import About
from fledge.publishing.static_space import BASE_FILES, build_static_space, write_browser_model

pytestmark = [pytest.mark.slow, pytest.mark.network]

CDN = re.compile(r"https://cdn\.jsdelivr\.net/npm/((?:@\w+/)?[\w-]+)@([^/]+)/(.*)")
WORKER = ROOT / "model_card" / "static_space" / "worker.js"
TOPIC = "Lily took a ball to the park."
HOSTILE = "<img src=x onerror=alert(1)> {ending} $& <|endoftext|>"
SECONDS = 120_000  # milliseconds that a busy machine may take


@pytest.fixture(scope="module")
def npm() -> Path:
    """The node_modules that hold the version of transformers.js that the page pins."""
    wanted = re.search(r"@huggingface/transformers@([\d.]+)", WORKER.read_text(encoding="utf-8"))[1]
    find = "console.log(require.resolve('@huggingface/transformers'))"
    try:
        found = subprocess.run(["node", "-e", find], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(f"Node finds no transformers.js; npm install @huggingface/transformers@{wanted} and set NODE_PATH")
    package = Path(found.stdout.strip()).parents[1]
    if f'"version": "{wanted}"' not in (package / "package.json").read_text(encoding="utf-8"):
        pytest.skip(f"the page pins transformers.js {wanted}, and another version is installed")
    return package.parents[1]


@pytest.fixture(scope="module")
def graph(tmp_path_factory) -> Path:
    """Where `folder` leaves the model as ONNX; exporting it again for the tests of int8 would take seconds."""
    return tmp_path_factory.mktemp("graph") / "model"


@pytest.fixture(scope="module")
def folder(tiny, graph, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("static") / "out"

    def keep(model, tokenizer, work, system):
        write_onnx(model, tokenizer, work, system)
        if not graph.exists():  # the base comes after the model
            shutil.copytree(work, graph)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(static_space, "write_onnx", keep)
        call_script(
            "publish.py", "--model", tiny.model, "--base", tiny.base, "--evaluation", tiny.evaluation,
            "--space", "static", "--space_repo_id", "someone/tiny-tales", "--dry_run", "--output_dir", out,
        )  # fmt: skip
    return out / "space"


@pytest.fixture(scope="module")
def exported(folder, graph):
    """The model is not exported again."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(static_space, "write_onnx", lambda *given: shutil.copytree(graph, given[2], dirs_exist_ok=True))
        yield


@pytest.fixture(scope="module")
def rounded(tiny, folder, exported) -> Path:
    """The same page with weights of 8 bits, beside the other, and without the base."""
    about = About("tiny-tales", None, None, None, None, "en")
    build_static_space(folder / "int8", tiny.model, None, tiny.evaluation, about, "int8")
    return folder / "int8"


@pytest.fixture(scope="module")
def server(folder):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{serving.server_port}/"
    serving.shutdown()
    serving.server_close()


@pytest.fixture(scope="module")
def visit(browser, server, npm):
    """Opens the page; the CDN's files come from npm's copy, and whatever else is asked for is noted in `elsewhere`."""
    context = browser.new_context(viewport={"width": 1000, "height": 900})
    seen = SimpleNamespace(elsewhere=[], errors=[], alerts=[], cdn=0)

    def from_npm(route):
        if not (asked := CDN.fullmatch(route.request.url)):
            seen.elsewhere.append(route.request.url)
            return route.abort()
        seen.cdn += 1
        kind = "application/wasm" if asked[3].endswith(".wasm") else "text/javascript"
        headers = {"content-type": kind, "access-control-allow-origin": "*"}
        return route.fulfill(body=(npm / asked[1] / asked[3]).read_bytes(), headers=headers)

    context.route(lambda url: not url.startswith(server), from_npm)

    def visit(link: str = "", ready: str = "Ready."):
        page = context.new_page()
        page.set_default_timeout(SECONDS)
        page.on("console", lambda said: seen.errors.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: seen.errors.append(str(error)))
        page.on("dialog", lambda dialog: (seen.alerts.append(dialog.message), dialog.dismiss()))
        page.goto(server + link)
        page.locator("#status", has_text=ready).wait_for()
        return page

    yield SimpleNamespace(page=visit, context=context, seen=seen)
    context.close()


@pytest.fixture
def page(visit):
    """A page of its own for each test, which fails the test if anything went wrong on it unseen."""
    page = visit.page()
    yield page
    page.close()
    assert (visit.seen.errors, visit.seen.alerts, visit.seen.elsewhere) == ([], [], [])


def write(page, topic: str = TOPIC, **settings: object) -> list[str]:
    """Types the topic, sets the settings and returns the stories when all have ended."""
    page.get_by_text("Settings").click()
    for name, value in settings.items():
        page.locator(f"#{name}").fill(str(value))
    page.locator("#topic").fill(topic)
    page.get_by_role("button", name="Write").click()
    return stories(page)


def stories(page) -> list[str]:
    page.locator("#status", has_text="Done").wait_for()
    return page.locator(".text").all_inner_texts()


def test_the_greedy_stories_are_those_of_generate_py(page, tiny):
    page.get_by_label("Side by side").check()
    told = write(page, temperature=0, length=60)
    asked = ["--model", tiny.model, "--topic", TOPIC, "--max_new_tokens", 60, "--temperature", 0]
    for ending, story in zip(("happy", "sad"), told, strict=True):
        assert story == call_script("generate.py", *asked, "--ending", ending).stdout.strip()
    assert page.get_by_text("complete").count() == 2


def test_int8_weights_tell_what_onnxruntime_tells(rounded, visit, tiny):
    page = visit.page("int8/")
    told = write(page, temperature=0, length=24)
    assert (visit.seen.errors, visit.seen.elsewhere) == ([], [])
    page.close()
    card = (rounded / "README.md").read_text(encoding="utf-8")
    assert "stored as int8" in card
    assert "bits per byte" in card
    tokenizer = load_model(tiny.model)[1]
    new = encode_prompt(tokenizer, [{"role": "user", "content": f"Write a story about: {TOPIC}\nWith: happy ending"}])
    program, ids = OnnxRuntime(rounded / "model" / "onnx" / "model_int8.onnx"), []
    while len(ids) < 24 and tokenizer.eos_token_id not in ids:
        new = [int(program.read(new)[-1].argmax())]
        ids += new
    # Rounding is the same in both, so they part at a near-tie at most.
    assert told[0][:20] == tokenizer.decode(ids, skip_special_tokens=True).strip()[:20]


def test_int8_weights_that_lose_too_much_are_not_offered(exported, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(verdict, "MOST_LOST_BITS", -1)
    monkeypatch.setattr(verdict, "TEXTS", 2)
    model, tokenizer = load_model(tiny.model)
    with pytest.raises(UserError, match=r"--quantize int8 loses too much .*leave it out"):
        write_browser_model(model, tokenizer, tmp_path / "model", BASE_FILES, "int8", [])
    assert list(tmp_path.iterdir()) == []


def test_a_link_tells_the_same_story_again(page, visit):
    told = write(page, temperature=1.2, length=40)
    page.get_by_role("button", name="Copy link").click()
    again = visit.page(page.url.removeprefix(page.url.partition("#")[0]), ready="Done")
    assert stories(again) == told
    again.get_by_role("button", name="Try again").click()
    again.locator("#status", has_text="Writing").wait_for(state="detached")
    assert stories(again) != told  # another seed
    again.close()


def test_the_base_answers_beside_the_model_and_both_stop_when_told(page):
    page.get_by_label("Base model beside it").check()
    page.locator("#topic").fill(TOPIC)
    page.get_by_role("button", name="Write").click()
    assert len(stories(page)) == 2
    assert page.locator(".tag").filter(has_text=re.compile("^(instruct|base)$")).count() == 2
    page.evaluate("() => { const button = document.getElementById('write'); button.click(); button.click(); }")
    page.get_by_text("stopped").nth(1).wait_for()


def test_what_a_visitor_types_stays_text(page, visit):
    write(page, HOSTILE, length=8)
    assert page.locator("#answers img").count() == 0
    again = visit.page(page.url.removeprefix(page.url.partition("#")[0]), ready="Done")
    assert again.locator("#topic").input_value() == HOSTILE
    again.close()
    page.locator("#topic").fill("a very long tale " * 200)
    page.get_by_role("button", name="Write").click()
    page.get_by_text("That is longer than the model can read").wait_for()
    page.locator("#topic").fill(" ")
    page.locator("#topic").press("Enter")
    page.get_by_text("Please type a topic first.").wait_for()


def test_no_script_and_no_address_of_others_is_let_in(page, visit):
    refused = page.evaluate("""async () => {
        const refused = [];
        document.addEventListener("securitypolicyviolation", (event) => refused.push(event.effectiveDirective));
        const script = document.createElement("script");
        script.textContent = "alert(1)";
        document.body.append(script);
        const worker = new Worker(URL.createObjectURL(new Blob([
            "fetch('https://example.com').catch(() => postMessage('refused'))"])));
        const [answer] = await Promise.all([
            new Promise((resolve) => worker.onmessage = ({ data }) => resolve(data)),
            fetch("https://example.com").catch(() => refused.push("fetch")),
        ]);
        return [...refused, answer];
    }""")
    assert {"script-src-elem", "connect-src", "fetch", "refused"} == set(refused)
    assert len(visit.seen.errors) >= 3
    visit.seen.errors.clear()  # what the browser said of those


def test_the_page_fits_and_is_legible(page):
    page.set_viewport_size({"width": 360, "height": 800})
    page.get_by_label("Base model beside it").check()
    write(page, length=8)
    texts = ["Topic", "Ending", "Happy", "Sad", "Base model beside it", "Write", "Try again", "instruct", "base"]
    texts += ["Made with Fledge", "Settings", "Copy", "Try one of these"]
    for width, scheme in itertools.product((360, 768), ("light", "dark")):
        page.set_viewport_size({"width": width, "height": 800})
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width
        assert faint(page, texts) == {}, (width, scheme)


def test_after_one_visit_it_works_without_a_network(page, visit):
    told, fetched = write(page, temperature=0, length=20), visit.seen.cdn
    visit.context.set_offline(True)
    page.reload()
    page.locator("#status", has_text="Done").wait_for()
    assert stories(page) == told
    assert visit.seen.cdn == fetched
    visit.context.set_offline(False)


def test_a_library_that_was_changed_on_its_way_is_not_run(browser, server, npm):
    context = browser.new_context()
    context.route(CDN, lambda route: route.fulfill(
        body="console.error('run')", headers={"content-type": "text/javascript", "access-control-allow-origin": "*"}
    ))  # fmt: skip
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.goto(server)
    page.get_by_text("is not the file that it should be").wait_for()
    assert said == []
    context.close()
