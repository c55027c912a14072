"""A page on which people try the model: a story that appears as it is written, a chat if the model has learned one.

python app.py                                  the models that settings.json names
MODEL=../model BASE=../base python app.py      folders of this machine instead
"""

import html
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, TextIteratorStreamer

SETTINGS = json.loads((Path(__file__).parent / "settings.json").read_text(encoding="utf-8"))
LONGEST_INPUT = 4000  # characters of one box; far more than such a model can read
SHORTEST_ANSWER = 16  # tokens of the context that a prompt must leave
TOO_LONG = "That is longer than the model can read; please shorten it."
SECONDS = 120  # after which an answer is broken off, so that one visitor cannot hold the machine
ANSWERS_AT_ONCE = 2
CSS = """
.gradio-container {max-width: 880px !important; margin: 0 auto !important;}
.answer textarea {font-family: Georgia, 'Times New Roman', serif; font-size: 1.08rem; line-height: 1.65;}
.status {opacity: 0.75; font-size: 0.9rem; min-height: 1.5rem;}
footer {display: none !important;}
"""
FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]  # nothing is fetched from elsewhere


class Stopped(StoppingCriteria):
    def __init__(self):
        self.event = threading.Event()

    def __call__(self, input_ids, scores, **_):
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


class Writer:
    """A model with the tokenizer whose template it was trained with; the base is asked by that template too."""

    def __init__(self, model: str, tokenizer):
        self.tokenizer = tokenizer
        trusted = SETTINGS["trust_remote_code"]  # for a model with code of its own, which lies beside its weights
        self.model = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=trusted)
        self.model.to(torch.accelerator.current_accelerator() or "cpu")
        self.model.eval()
        if len(tokenizer) > self.model.get_input_embeddings().num_embeddings:  # a base without the roles' tokens
            self.model.resize_token_embeddings(len(tokenizer))
        self.context = self.model.config.max_position_embeddings

    def prompt(self, messages: list[dict]) -> list[int] | None:
        """The ids that ask for an answer: without the oldest turns where they do not fit, None if the last does not.

        A control token that a visitor types stays text (`sanitize_control_tokens`), and cannot end or begin a turn.
        """
        system, turns = [m for m in messages if m["role"] == "system"], [m for m in messages if m["role"] != "system"]
        while turns:
            ids = self.tokenizer.apply_chat_template(
                system + turns, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
            )
            if len(ids) + SHORTEST_ANSWER <= self.context:
                return ids
            turns = turns[2:]
        return None

    def answer(self, ids: list[int], temperature: float, length: int) -> Iterator[tuple[str, str]]:
        """Yields the answer so far and how it stands."""
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=SECONDS)
        stopped, written = Stopped(), {}
        room = min(int(length), self.context - len(ids))

        def generate():
            sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
            input_ids = torch.tensor([ids], device=self.model.device)
            try:
                output = self.model.generate(
                    input_ids=input_ids, attention_mask=torch.ones_like(input_ids), max_new_tokens=room,
                    max_time=SECONDS, streamer=streamer, stopping_criteria=[stopped],
                    pad_token_id=self.tokenizer.pad_token_id or 0, **SETTINGS["decoding"], **sampling,
                )  # fmt: skip
                written["ids"] = output[0, len(ids) :].tolist()
            finally:
                streamer.end()

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        text = ""
        try:
            for part in streamer:
                text += part
                yield text.strip(), "Writing…"
            thread.join()
        finally:
            stopped.event.set()  # the visitor left or pressed Stop
        if "ids" not in written:
            yield text.strip(), "The model failed; try once more."
            return
        by_itself = self.tokenizer.eos_token_id in written["ids"]
        count = len(written["ids"])
        yield text.strip(), f"{count} tokens, " + ("ended by the model." if by_itself else "broken off at the limit.")


def story_page(writer: Writer, base: Writer | None) -> None:
    """Topic, ending, Generate: the story streams in, and the base's answer to the same prompt beside it if asked."""
    settings = SETTINGS["story"]

    def write(topic: str, ending: str | None, temperature: float, length: int, compare: bool = False):
        topic = topic or ""
        if len(topic) > LONGEST_INPUT:
            yield "", f"That is {len(topic):,} characters; please stay below {LONGEST_INPUT:,}.", ""
            return
        topic = " ".join(topic.split())
        if not topic:
            yield "", settings["empty"], ""
            return
        # replace, not format: a topic may hold braces. It comes last, so that nothing in it is replaced.
        instruction = settings["instruction"].replace("{ending}", ending or "").replace("{topic}", topic)
        ids = writer.prompt([*SETTINGS["system"], {"role": "user", "content": instruction}])
        if ids is None:
            yield "", TOO_LONG, ""
            return
        story, status = "", ""
        for story, status in writer.answer(ids, temperature, length):
            yield story, status, ""
        if compare and base:
            for told, _ in base.answer(ids, temperature, length):
                yield story, status, told

    topic = gr.Textbox(
        label=settings["label"], placeholder=settings["placeholder"], lines=1, max_lines=6, autofocus=True
    )
    ending = gr.Radio(
        settings["endings"],
        value=next(iter(settings["endings"]), None),
        label="Ending",
        visible=bool(settings["endings"]),
    )
    with gr.Row():
        generate, stop = gr.Button("Generate", variant="primary", scale=3), gr.Button("Stop", scale=1, min_width=90)
    with gr.Row():
        story = gr.Textbox(
            label="Story", lines=11, max_lines=30, interactive=False, elem_classes="answer", buttons=["copy"],
            min_width=300,
        )  # fmt: skip
        beside = gr.Textbox(
            label="The base model, same prompt", lines=11, max_lines=30, interactive=False, elem_classes="answer",
            visible=False, min_width=300,
        )  # fmt: skip
    status = status_line()
    more = sampling_controls(writer)
    inputs = [topic, ending, *more]
    if base:
        compare = gr.Checkbox(label="Show the base model's answer beside it")
        compare.change(lambda shown: gr.update(visible=shown), compare, beside, api_visibility="private")
        inputs.append(compare)
    running = [
        generate.click(write, inputs, [story, status, beside], api_name="write"),
        topic.submit(write, inputs, [story, status, beside], api_visibility="private"),
    ]
    stop.click(None, cancels=running, api_visibility="private")
    gr.Examples(settings["examples"], [topic, ending] if settings["endings"] else [topic], label="Try")


def chat_page(writer: Writer) -> None:
    settings = SETTINGS["chat"]

    def reply(message: str | None, history: list[dict], temperature: float, length: int):
        """Yields what stays in the box, the conversation, and how it stands."""
        message = message or ""
        if len(message) > LONGEST_INPUT:
            yield message, history, f"That is {len(message):,} characters; please stay below {LONGEST_INPUT:,}."
            return
        said = [{"role": turn["role"], "content": html.unescape(text_of(turn["content"]))} for turn in history]
        said.append({"role": "user", "content": message.strip()})
        if not said[-1]["content"]:
            yield message, history, settings["empty"]
            return
        ids = writer.prompt(SETTINGS["system"] + said)
        if ids is None:
            yield message, history, TOO_LONG
            return
        for text, status in writer.answer(ids, temperature, length):
            turns = [*said, {"role": "assistant", "content": text or "…"}]
            # Chatbot takes any text for HTML, even without Markdown; escaped, it shows what was typed.
            yield "", [turn | {"content": html.escape(turn["content"])} for turn in turns], status

    conversation = gr.Chatbot(
        show_label=False, height=380, render_markdown=False, sanitize_html=True, allow_tags=False, buttons=[],
        placeholder=settings["placeholder"],
    )  # fmt: skip
    message = gr.Textbox(show_label=False, placeholder="Say something", lines=1, max_lines=12)
    with gr.Row():
        send, stop = gr.Button("Send", variant="primary", scale=3), gr.Button("Stop", scale=1, min_width=90)
        clear = gr.Button("Start over", scale=1, min_width=120)
    status = status_line()
    inputs = [message, conversation, *sampling_controls(writer)]
    running = [
        send.click(reply, inputs, [message, conversation, status], api_name="chat"),
        message.submit(reply, inputs, [message, conversation, status], api_visibility="private"),
    ]
    stop.click(None, cancels=running, api_visibility="private")
    clear.click(lambda: ("", [], ""), None, [message, conversation, status], cancels=running, api_visibility="private")
    gr.Examples([[example] for example in settings["examples"]], [message], label="Try")


def text_of(content) -> str:
    """A chat message's text; Gradio keeps it as text or as a list of parts."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def status_line() -> gr.Textbox:
    return gr.Textbox(show_label=False, container=False, interactive=False, elem_classes="status", max_lines=1)


def sampling_controls(writer: Writer) -> tuple[gr.Slider, gr.Slider]:
    most = writer.context - SHORTEST_ANSWER
    with gr.Accordion("More", open=False):
        return (
            gr.Slider(0, 1.5, SETTINGS["temperature"], step=0.05, label="Temperature", info="0: the likeliest word"),
            gr.Slider(8, most, min(SETTINGS["length"], most), step=1, label="Length", info="tokens at most"),
        )


def build(model: str, base: str | None) -> gr.Blocks:
    tokenizer = AutoTokenizer.from_pretrained(model)
    writer = Writer(model, tokenizer)
    of_base = Writer(base, tokenizer) if base else None
    if of_base:  # the two are compared, so they draw alike
        of_base.model.generation_config = writer.model.generation_config
    pages = []
    if SETTINGS["story"]:
        pages.append((SETTINGS["story"]["tab"], lambda: story_page(writer, of_base)))
    if SETTINGS["chat"]:
        pages.append((SETTINGS["chat"]["tab"], lambda: chat_page(writer)))
    with gr.Blocks(title=SETTINGS["title"], analytics_enabled=False) as demo:
        gr.Markdown(f"# {SETTINGS['title']}\n{SETTINGS['description']}")
        if len(pages) == 1:
            pages[0][1]()
        else:
            for name, page in pages:
                with gr.Tab(name):
                    page()
        gr.Markdown(SETTINGS["notice"], elem_classes="status")
    return demo.queue(default_concurrency_limit=ANSWERS_AT_ONCE, max_size=40)


if __name__ == "__main__":
    theme = gr.themes.Soft(primary_hue="teal", neutral_hue="slate", font=FONT, font_mono=["monospace"])
    page = build(os.environ.get("MODEL", SETTINGS["model"]), os.environ.get("BASE", SETTINGS["base"]))
    page.launch(theme=theme, css=CSS, ssr_mode=False, run_history=False)
