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
WRITING = "Writing…"
BOTH = "side by side"  # all endings at once
BOXES = 4  # for two endings, and the base beside each
CSS = """
.gradio-container {max-width: 960px !important; margin: 0 auto !important; padding-top: 1.2rem !important;}
.title h1 {font-size: clamp(1.75rem, 5vw, 2.4rem); letter-spacing: -.02em; margin-bottom: .2rem;}
.title p {color: var(--body-text-color-subdued); margin: .3rem 0;}
.title a {display: inline-block; margin-right: 1.2rem; text-underline-offset: .2em;}
.choices .block + .block {display: flex; flex-direction: column; justify-content: end; padding-bottom: 1.15rem;}
.answer textarea {font-family: Georgia, 'Times New Roman', serif; font-size: 1.08rem; line-height: 1.65;
  background: none !important; border: 0 !important; box-shadow: none !important; padding: 0 !important;}
.status, .status input {color: var(--body-text-color-subdued) !important; font-size: 0.92rem;
  background: none !important; border: 0 !important; box-shadow: none !important;}
.status input {padding-left: 0 !important;}
.heading p {font-weight: 600;}
.examples button {font-weight: 400; text-align: left; justify-content: start; white-space: normal; line-height: 1.4;}
footer {display: none !important;}
"""
FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]  # nothing is fetched from elsewhere
# Each in light and in dark, with a contrast of at least 4.5 wherever there is text on it.
PAPER, CARD, LINE, EDGE = ("#f7f5f0", "#151716"), ("#fffefb", "#1d201f"), ("#dfdacf", "#343836"), ("#8d877a", "#777c79")
INK, SOFT, ACCENT = ("#1f1e1b", "#eae8e2"), ("#625e55", "#a8a59c"), ("#1d5f57", "#7fcabd")
WASH, DEEP, ON_ACCENT = ("#e2efec", "#213330"), ("#174c46", "#95d6ca"), ("#ffffff", "#0d2420")
COLOURS = {
    "body_background_fill": PAPER, "body_text_color": INK, "body_text_color_subdued": SOFT, "link_text_color": ACCENT,
    "link_text_color_hover": ACCENT, "link_text_color_visited": ACCENT, "background_fill_primary": CARD,
    "block_background_fill": CARD, "block_border_color": LINE, "block_title_text_color": INK,
    "block_label_text_color": INK, "block_label_background_fill": CARD, "block_info_text_color": SOFT,
    "input_background_fill": PAPER, "input_border_color": EDGE, "input_placeholder_color": SOFT,
    "button_primary_background_fill": ACCENT, "button_primary_background_fill_hover": DEEP,
    "button_primary_border_color": ACCENT, "button_primary_border_color_hover": DEEP,
    "button_primary_text_color": ON_ACCENT, "button_secondary_background_fill": CARD,
    "button_secondary_background_fill_hover": WASH, "button_secondary_border_color": EDGE,
    "button_secondary_text_color": INK, "checkbox_background_color_selected": ACCENT,
    "checkbox_border_color": EDGE, "checkbox_label_background_fill": PAPER, "checkbox_label_text_color": INK,
    "checkbox_label_background_fill_selected": WASH, "checkbox_label_text_color_selected": ACCENT,
    "slider_color": ACCENT, "input_border_color_focus": ACCENT, "checkbox_border_color_selected": ACCENT,
    "checkbox_border_color_focus": ACCENT, "checkbox_background_color": CARD,
}  # fmt: skip


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
        self.model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
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
                yield text.strip(), WRITING
            thread.join()
        finally:
            stopped.event.set()  # the visitor left or pressed Stop
        if "ids" not in written:
            yield text.strip(), "The model failed; try once more."
            return
        by_itself = self.tokenizer.eos_token_id in written["ids"]
        count = len(written["ids"])
        yield text.strip(), f"{count} tokens, " + ("ended by the model." if by_itself else "broken off at the limit.")


def together(answers: list[Iterator[tuple[str, str]]]) -> Iterator[tuple[list[str], str]]:
    """Yields the texts of answers that are written at the same time, and how they stand."""
    latest = [("", WRITING)] * len(answers)
    running = dict(enumerate(answers))
    try:
        while running:
            for place, answer in list(running.items()):
                if (found := next(answer, None)) is None:
                    del running[place]
                else:
                    latest[place] = found
            texts, states = zip(*latest, strict=True)
            counts = ", ".join(state.split()[0] for state in states)
            done = states[0] if len(states) == 1 else f"{len(states)} answers of {counts} tokens."
            yield list(texts), WRITING if WRITING in states else done
    finally:
        for answer in answers:
            answer.close()


def boxes_shown(ending: str | None, compare: bool = False) -> list:
    """The boxes that an answer needs, what they are called, and the rows that hold them."""
    several = SETTINGS["story"]["endings"] if ending == BOTH else [ending]
    titles = [f"{one.capitalize()} ending" if one else "Story" for one in several]
    names = [title + of for title in titles for of in ("", ", base model")] + [""] * BOXES
    visible = [place < 2 * len(titles) and (place % 2 == 0 or compare) for place in range(BOXES)]
    made = [gr.update(visible=visible[place], label=names[place]) for place in range(BOXES)]
    return [*made, *(gr.update(visible=any(visible[place : place + 2])) for place in range(0, BOXES, 2))]


def answer_boxes() -> tuple[list[gr.Textbox], list[gr.Row]]:
    """Empty boxes for answers, and the rows that hold two each; `boxes_shown` says which are seen."""
    boxes, rows = [], []
    for _ in range(BOXES // 2):
        with gr.Row(equal_height=True, visible=False) as row:
            rows.append(row)
            boxes += [
                gr.Textbox(
                    lines=4, max_lines=30, interactive=False, elem_classes="answer", buttons=["copy"], visible=False,
                    min_width=300,
                )
                for _ in range(2)
            ]  # fmt: skip
    return boxes, rows


def story_page(writer: Writer, base: Writer | None) -> None:
    """Topic, ending, Write: the story streams in; both endings side by side, and the base beside them, if asked."""
    settings = SETTINGS["story"]
    endings = settings["endings"]

    def write(topic: str, ending: str | None, temperature: float, length: int, compare: bool = False):
        """Yields how it stands and the texts: the model's, the base's, and both again for the second ending."""
        nothing = [""] * BOXES
        topic = topic or ""
        if len(topic) > LONGEST_INPUT:
            yield f"That is {len(topic):,} characters; please stay below {LONGEST_INPUT:,}.", *nothing
            return
        topic = " ".join(topic.split())
        if not topic:
            yield settings["empty"], *nothing
            return
        asked = {}
        for place, one in enumerate(endings if ending == BOTH else [ending]):
            # replace, not format: a topic may hold braces. It comes last, so that nothing in it is replaced.
            instruction = settings["instruction"].replace("{ending}", one or "").replace("{topic}", topic)
            ids = writer.prompt([*SETTINGS["system"], {"role": "user", "content": instruction}])
            if ids is None:
                yield TOO_LONG, *nothing
                return
            asked[2 * place] = writer.answer(ids, temperature, length)
            if compare and base:
                asked[2 * place + 1] = base.answer(ids, temperature, length)
        for found, status in together(list(asked.values())):
            texts = dict(zip(asked, found, strict=True))
            yield status, *(texts.get(place, "") for place in range(BOXES))

    topic = gr.Textbox(
        label=settings["label"], placeholder=settings["placeholder"], lines=1, max_lines=6, autofocus=True
    )
    with gr.Row(elem_classes="choices"):
        ending = gr.Radio(
            [*((one.capitalize(), one) for one in endings), (BOTH.capitalize(), BOTH)] if endings else [],
            value=next(iter(endings), None),
            label="Ending",
            visible=bool(endings),
            scale=0 if base else 1,
            min_width=380,
        )
        compare = gr.Checkbox(label="Base model beside it", visible=base is not None, min_width=200)
    with gr.Row():
        generate, stop = gr.Button("Write", variant="primary", scale=3), gr.Button("Stop", scale=1, min_width=90)
    status = status_line()
    boxes, rows = answer_boxes()
    examples(settings["examples"], [topic, ending] if endings else [topic])
    inputs = [topic, ending, *sampling_controls(writer)]
    if base:
        inputs.append(compare)
    running = []
    for started, name in ((generate.click, "public"), (topic.submit, "private")):
        made = started(boxes_shown, [ending, *([compare] if base else [])], [*boxes, *rows], api_visibility="private")
        running.append(made.then(write, inputs, [status, *boxes], api_name="write", api_visibility=name))
    stop.click(None, cancels=running, api_visibility="private")


def examples(rows: list[list[str]], fields: list) -> None:
    """A button for each example that fills the `fields`. It shows the example whole, which gr.Examples cuts off."""
    gr.Markdown("Try one of these", elem_classes="heading")
    with gr.Row(elem_classes="examples"):
        for row in rows:
            button = gr.Button(" ".join([row[0], *(f"({ending})" for ending in row[1:])]), min_width=300)
            button.click(lambda row=row: row if len(row) > 1 else row[0], None, fields, api_visibility="private")


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
        show_label=False, height=None, min_height=140, max_height=520, render_markdown=False, sanitize_html=True,
        allow_tags=False, buttons=[], placeholder=settings["placeholder"],
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
    examples([[example] for example in settings["examples"]], [message])


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
        links = " ".join(f"[{link['label']}]({link['url']})" for link in SETTINGS["links"])
        gr.Markdown(f"# {SETTINGS['title']}\n{SETTINGS['description']}\n\n{links}", elem_classes="title")
        if len(pages) == 1:
            pages[0][1]()
        else:
            for name, page in pages:
                with gr.Tab(name):
                    page()
        gr.Markdown(SETTINGS["notice"], elem_classes="status")
    return demo.queue(default_concurrency_limit=ANSWERS_AT_ONCE, max_size=40)


if __name__ == "__main__":
    theme = gr.themes.Default(font=FONT, font_mono=["monospace"], radius_size="lg").set(
        block_title_text_weight="600",
        button_border_width="1px",
        button_border_width_dark="1px",
        **{name: light for name, (light, _) in COLOURS.items()},
        **{f"{name}_dark": dark for name, (_, dark) in COLOURS.items()},
    )
    page = build(os.environ.get("MODEL", SETTINGS["model"]), os.environ.get("BASE", SETTINGS["base"]))
    page.launch(theme=theme, css=CSS, ssr_mode=False, run_history=False)
