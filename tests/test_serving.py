"""A trained model behind transformers' own server, on loopback, and transformers' chat with it."""

import json
import socket
import time
import urllib.error
import urllib.request

import pytest
from processes import fork_script, forked

from fledge.encoding import encode_prompt
from fledge.generation.answers import answer_batch
from fledge.models import load_model
from fledge.sampling import Sampling

pytestmark = [pytest.mark.slow, pytest.mark.network]
TRANSFORMERS = "from transformers.cli.transformers import main; main()"


@pytest.fixture(scope="module")
def address(tiny):
    pytest.importorskip("openai", reason="transformers serve needs openai")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    serve = ("serve", tiny.model, "--host", "127.0.0.1", "--port", port)
    with forked("-c", TRANSFORMERS, *serve) as server:
        until = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, TimeoutError):
                if server.process.exitcode is not None:
                    pytest.fail((server.said / "stderr").read_text(encoding="utf-8"))
                assert time.monotonic() < until, "transformers serve does not answer"
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"


def greedy(folder, content: str) -> str:
    model, tokenizer = load_model(str(folder))
    ids = encode_prompt(tokenizer, [{"role": "user", "content": content}])
    return answer_batch(model, tokenizer, [ids], Sampling(temperature=0, max_new_tokens=30), 0)[0].text


def test_the_server_tells_the_same_story(address, tiny):
    content = "Write a story about: Lily took a ball.\nWith: sad ending"
    asked = {"model": str(tiny.model), "messages": [{"role": "user", "content": content}]}
    body = json.dumps(asked | {"max_tokens": 30, "temperature": 0}).encode()
    request = urllib.request.Request(f"{address}/chat/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        told = json.load(answer)["choices"][0]["message"]["content"]
    assert told.strip() == greedy(tiny.model, content)


def test_transformers_chat_talks_to_it(address, tiny, tmp_path):
    content = "Write a story about: Lily took a ball."
    chat = ("-c", TRANSFORMERS, "chat", tiny.model, address, "max_new_tokens=30", "do_sample=False")
    # Offline, huggingface_hub's client refuses loopback too.
    online = {"HF_HUB_OFFLINE": "0", "COLUMNS": "200"}
    done = fork_script(*chat, folder=tmp_path, typed=f"{content}\nn\n!exit\n", check=False, **online)
    assert " ".join(greedy(tiny.model, content).split()) in " ".join(done.stdout.split()), done.stderr
