import json
import shutil
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from conftest import ROOT
from gguf import GGUFReader, dequantize
from small import BYTE_LEVEL_SIZE as V
from small import TEXT, byte_level
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, StableLmConfig

from fledge.encoding import encode_prompt
from fledge.errors import UserError
from fledge.exporting.gguf_file import TYPES, Description, write_gguf
from fledge.exporting.programs import GGUF_TOLERANCE, ONNX_TOLERANCE, LlamaCpp, largest_error, logits_of
from fledge.exporting.templates import go_template, served_template
from fledge.generation.answers import answer_batch
from fledge.models import load_model
from fledge.sampling import Sampling
from fledge.scripts import export
from fledge.templates import load_template
from fledge.tokenizers import load_tokenizer

pytestmark = pytest.mark.slow

SIZES = {"vocab_size": V, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
SHAPE = SIZES | {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=V, n_positions=64, n_embd=32, n_layer=2, n_head=4, n_ctx=64),
    "gpt2 untied": GPT2Config(vocab_size=V, n_positions=64, n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=False),
    "llama": LlamaConfig(**SHAPE),
    "llama tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "stablelm": StableLmConfig(**SHAPE | {"num_key_value_heads": 4}),
    "stablelm, all of a head turned": StableLmConfig(**SHAPE, partial_rotary_factor=1.0),
}
ABOUT = Description("tales", "mit", [{"role": "system", "content": 'Say "hi".\n{{ name }}'}])
NAMES = sorted(file.stem for file in (ROOT / "fledge" / "templates").glob("*.jinja"))
needs_llama = pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")


def random_model(config):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))  # biases and norms that do something
    return model


def value(field):
    return field.contents()


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_gguf_file_holds_every_weight_and_the_tokenizer(kind, tmp_path):
    model, tokenizer, file = random_model(CONFIGS[kind]), byte_level(), tmp_path / "m.gguf"
    write_gguf(model, tokenizer, file, ABOUT)
    reader = GGUFReader(file)
    fields = {name: value(field) for name, field in reader.fields.items()}
    kept = sum(int(tensor.n_elements) for tensor in reader.tensors)
    # A tied head is stored once for GPT-2 and LLaMA; StableLM's is always stored apart.
    assert kept == model.num_parameters()
    architecture = fields["general.architecture"]
    assert (fields["general.name"], fields["general.license"]) == ("tales", "mit")
    assert fields[f"{architecture}.context_length"] == 64
    assert fields[f"{architecture}.block_count"] == 2
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert len(fields["tokenizer.ggml.tokens"]) == V
    assert fields["tokenizer.ggml.tokens"][: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert fields["tokenizer.ggml.token_type"][tokenizer.eos_token_id] == 3
    assert fields["tokenizer.ggml.token_type"][-1] == 5
    assert "generation" not in fields["tokenizer.chat_template"].replace("add_generation_prompt", "")
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    embeddings = model.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(tensors["token_embd.weight"], embeddings)


def test_queries_are_reordered_from_halves_to_neighbours(tmp_path):
    model, file = random_model(CONFIGS["llama"]), tmp_path / "m.gguf"
    write_gguf(model, byte_level(), file, ABOUT)
    found = next(tensor.data for tensor in GGUFReader(file).tensors if tensor.name == "blk.1.attn_q.weight")
    source = model.model.layers[1].self_attn.q_proj.weight.detach().numpy()
    # Heads of 8: 0 4 1 5 2 6 3 7, then the next head.
    order = [8 * head + i for head in range(4) for pair in range(4) for i in (pair, pair + 4)]
    np.testing.assert_array_equal(found, source[order])


@needs_llama
@pytest.mark.parametrize("kind", CONFIGS)
def test_llama_cpp_computes_the_same(kind, tmp_path):
    model, tokenizer, file = random_model(CONFIGS[kind]), byte_level(), tmp_path / "m.gguf"
    write_gguf(model, tokenizer, file, ABOUT)
    prompts = [tokenizer(TEXT)["input_ids"][:60], [5]]
    limit = GGUF_TOLERANCE if "gpt2" in kind else 1e-5
    program = LlamaCpp(file, 64)
    assert largest_error(model, prompts, logits_of(program, prompts)) < limit
    asked = [tokenizer.apply_chat_template([{"role": "user", "content": TEXT}], tokenize=False), "a<|endoftext|>b"]
    assert [program.ids(text) for text in asked] == [tokenizer(text)["input_ids"] for text in asked]


@pytest.mark.parametrize("kind", TYPES)
def test_matrices_are_stored_in_the_type_asked_for(kind, tmp_path):
    model = random_model(GPT2Config(vocab_size=V, n_positions=64, n_embd=32, n_layer=1, n_head=4, n_inner=40))
    write_gguf(model, byte_level(), tmp_path / "m.gguf", ABOUT, kind)
    found = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    types = {name: tensor.tensor_type.name for name, tensor in found.items()}
    assert types["blk.0.attn_qkv.weight"] == kind.upper()
    assert types["token_embd.weight"] == {"q4_0": "Q8_0"}.get(kind, kind.upper())
    # Rows of 40 numbers do not fill blocks of 32; vectors and positions are never rounded.
    assert types["blk.0.ffn_down.weight"] == ("F32" if kind == "f32" else "F16")
    assert {types["position_embd.weight"], types["blk.0.attn_qkv.bias"], types["output_norm.weight"]} == {"F32"}
    stored = dequantize(found["blk.0.ffn_up.weight"].data, found["blk.0.ffn_up.weight"].tensor_type)
    weight = model.transformer.h[0].mlp.c_fc.weight.detach().numpy().T
    step = {"f32": 0, "f16": 2**-11, "q8_0": 1 / 254, "q4_0": 1 / 8}[kind]  # of the largest number in a block
    assert np.abs(stored - weight).max() <= step * np.abs(weight).max() * 1.01


def exported(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    return export.main()


@needs_llama
def test_a_trained_model_tells_the_same_story_in_llama_cpp(tiny, tmp_path, monkeypatch, capsys):
    from llama_cpp import Llama

    folder = tmp_path / "sub" / "tales"
    asked = ["--model", tiny.model, "--to", "gguf", "--name", "Fox tales", "--output_dir", folder]
    exported(monkeypatch, *asked)
    assert "Proven by llama.cpp" in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {
        "Fox-tales-f32.gguf", "Modelfile", "export.json", ".fledge.json",
    }  # fmt: skip
    messages = [{"role": "user", "content": "Write a story about: Lily took a ball.\nWith: sad ending"}]
    model, tokenizer = load_model(str(tiny.model))
    greedy = Sampling(temperature=0, max_new_tokens=60)
    (expected,) = answer_batch(model, tokenizer, [encode_prompt(tokenizer, messages)], greedy, 0)
    llama = Llama(str(folder / "Fox-tales-f32.gguf"), n_ctx=128, verbose=False)
    told = llama.create_chat_completion(messages, temperature=0, max_tokens=60)["choices"][0]
    llama.close()
    assert told["message"]["content"].strip() == expected.text
    assert (told["finish_reason"] == "stop") == expected.stopped
    with pytest.raises(UserError, match="already has content"):
        exported(monkeypatch, *asked)


@needs_llama
def test_a_quantised_gguf_has_its_measured_loss(tiny, tmp_path, monkeypatch, capsys):
    asked = ["--model", tiny.model, "--to", "gguf", "--quantize", "q8_0", "--dataset", tiny.data]
    exported(monkeypatch, *asked, "--num_prompts", 6, "--output_dir", tmp_path / "q8")
    said = capsys.readouterr().out
    assert "Measured at q8_0: logits within" in said
    record = json.loads((tmp_path / "q8" / "export.json").read_text(encoding="utf-8"))
    loss = record["loss"]
    assert record["file"].endswith("-q8_0.gguf")
    assert loss["same_greedy_answers"]["n"] == loss["instruction_following"]["difference"]["n"] == 6
    bits = loss["bits_per_byte"]
    assert bits["lost"]["value"] == pytest.approx(bits["quantised"] - bits["original"])
    assert bits["lost"]["low"] <= bits["lost"]["value"] <= bits["lost"]["high"]
    # Beyond a limit nothing is written, unless the user says so.
    monkeypatch.setattr("fledge.exporting.verdict.MOST_LOST_BITS", -1.0)
    asked += ["--num_prompts", 2, "--output_dir", tmp_path / "lost"]
    with pytest.raises(UserError, match=r"loses too much: it loses .* of the bits per byte .* --accept_loss"):
        exported(monkeypatch, *asked)
    assert not (tmp_path / "lost").exists()
    exported(monkeypatch, *asked, "--accept_loss")
    assert (tmp_path / "lost" / record["file"]).exists()


def test_an_output_of_others_and_the_model_itself_are_never_replaced(tmp_path, monkeypatch):
    folder, model = tmp_path / "theirs", tmp_path / "model"
    for place in (folder, model):
        place.mkdir()
        (place / "onnx").write_text("mine")
    for output, to, message in [
        (folder, "gguf", "holds onnx and no mark of export.py"),
        (folder, "onnx", "holds onnx and no mark of export.py"),
        (model, "onnx", "--output_dir .* is --model"),
        (model / "deeper", "gguf", "--output_dir .* lies in --model"),
    ]:
        with pytest.raises(UserError, match=message):
            exported(monkeypatch, "--model", model, "--to", to, "--output_dir", output, "--overwrite")
    assert {path.name for path in tmp_path.rglob("*")} == {"theirs", "model", "onnx"}


@needs_llama
def test_sentencepiece_splits_alike_in_llama_cpp(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 20), model_prefix=str(tmp_path / "s"), vocab_size=320, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    tokenizer = load_tokenizer(str(tmp_path / "s.model"), 64)
    config = LlamaConfig(**SHAPE | {"vocab_size": len(tokenizer)})
    (difference,) = write_gguf(random_model(config), tokenizer, tmp_path / "m.gguf", ABOUT)
    assert "keeps runs of spaces" in difference
    texts = [TEXT.replace("  ", " "), "Zoë ran 😀", "", "the the<s>", "1\n2"]
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    program = LlamaCpp(tmp_path / "m.gguf", 64)
    assert [program.ids(text) for text in texts] == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2Config(vocab_size=V, n_embd=8, n_layer=1, n_head=1, activation_function="relu"), "activation relu"),
        (GPT2Config(vocab_size=V, n_embd=8, n_layer=1, n_head=1, scale_attn_weights=False), "without its scale"),
        (LlamaConfig(**SHAPE, hidden_act="gelu"), "activation gelu"),
        (LlamaConfig(**SHAPE, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}), "linear"),
        (StableLmConfig(**SHAPE, use_parallel_residual=True), "parallel"),
    ],
)
def test_what_llama_cpp_lacks_is_refused(config, message, tmp_path):
    with pytest.raises(UserError, match=message):
        write_gguf(random_model(config), byte_level(), tmp_path / "m.gguf", ABOUT)
    assert list(tmp_path.iterdir()) == []


def test_a_vocabulary_of_characters_is_refused(tmp_path):
    vocabulary = tmp_path / "v.json"
    vocabulary.write_text(json.dumps({c: i for i, c in enumerate(sorted(set(TEXT)))}), encoding="utf-8")
    with pytest.raises(UserError, match="byte-level BPE"):
        write_gguf(random_model(CONFIGS["gpt2"]), load_tokenizer(str(vocabulary), 64), tmp_path / "m.gguf", ABOUT)


@pytest.mark.parametrize("name", NAMES)
def test_a_template_reads_the_same_without_the_training_marks(name):
    tokenizer = byte_level()
    tokenizer.chat_template = load_template(name)
    turns = [("user", " a \n"), ("assistant", "\n b "), ("user", "c{{ d }}"), ("assistant", "e")]
    messages = [{"role": role, "content": content} for role, content in turns]
    served = served_template(tokenizer, [])
    assert "endgeneration" not in served
    for shown, asks in ((messages, False), (messages[:3], True), (messages[:1], True)):
        expected = tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=asks)
        assert expected == tokenizer.apply_chat_template(
            shown, tokenize=False, add_generation_prompt=asks, chat_template=served
        )
    # The system message of the training stands in the template; a conversation may bring one of its own.
    system = [{"role": "system", "content": 'Say "hi".\n{{ name }} \U0001f98a'}]
    served = served_template(tokenizer, system)
    own = [{"role": "system", "content": "mine"}]
    for shown, whole in ((messages[:1], system + messages[:1]), (own + messages[:1], own + messages[:1])):
        assert tokenizer.apply_chat_template(shown, tokenize=False, chat_template=served) == (
            tokenizer.apply_chat_template(whole, tokenize=False)
        )


GO = """
package main
import ("encoding/json"; "os"; "text/template")
type Message struct { Role, Content string }
func main() {
    var messages []Message
    json.Unmarshal([]byte(os.Args[2]), &messages)
    made := template.Must(template.New("").Parse(os.Args[1]))
    if err := made.Execute(os.Stdout, map[string]any{"Messages": messages}); err != nil { panic(err) }
}
"""


@pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed")
def test_ollama_s_templates_write_what_ours_do(tmp_path):
    (tmp_path / "render.go").write_text(GO)
    subprocess.run(["go", "build", "-o", "render", "render.go"], cwd=tmp_path, check=True)
    tokenizer = byte_level()
    turns = [
        ("system", "s {{ . }}"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d"),
        ("user", "e"),
    ]
    whole = [{"role": role, "content": content} for role, content in turns]
    for name in NAMES:
        tokenizer.chat_template = load_template(name)
        for messages in (whole, whole[1:], whole[:2], whole[1:2]):
            expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            command = [tmp_path / "render", go_template(tokenizer), json.dumps(messages)]
            assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == expected


@pytest.fixture(scope="module")
def onnx_folders(tiny, tmp_path_factory):
    """The model by --quantize, none of it first, each as transformers.js finds it."""
    pytest.importorskip("onnxruntime")
    work = tmp_path_factory.mktemp("onnx")
    asked = ["--model", tiny.model, "--to", "onnx", "--output_dir"]
    with pytest.MonkeyPatch.context() as patched:
        exported(patched, *asked, work / "fp32")
        # The graph is the same before it is quantised, and tracing it again takes seconds.
        records = shutil.ignore_patterns(".fledge.json", "export.json")
        patched.setattr(
            "fledge.exporting.onnx_graph.write_onnx",
            lambda *given: shutil.copytree(work / "fp32", given[2], ignore=records, dirs_exist_ok=True),
        )
        for kind in ("fp16", "int8"):
            exported(patched, *asked, work / kind, "--quantize", kind, "--accept_loss")
    return work


def test_onnx_is_proven_and_whole(onnx_folders):
    files = {str(path.relative_to(onnx_folders / "fp32")) for path in (onnx_folders / "fp32").rglob("*")}
    assert files >= {"onnx/model.onnx", "config.json", "tokenizer.json", "tokenizer_config.json"}
    from onnxruntime import InferenceSession

    sizes = []
    for kind, name in (("fp32", "model"), ("fp16", "model_fp16"), ("int8", "model_int8")):
        (file,) = (onnx_folders / kind / "onnx").iterdir()
        assert file.name == f"{name}.onnx"
        sizes.append(file.stat().st_size)
        session = InferenceSession(file)
        assert [entry.name for entry in session.get_inputs()][:4] == [
            "input_ids", "attention_mask", "position_ids", "past_key_values.0.key",
        ]  # fmt: skip
        assert {entry.type for entry in session.get_outputs()} == {"tensor(float)"}
        assert [entry.name for entry in session.get_outputs()][-1] == "present.1.value"
        record = json.loads((onnx_folders / kind / "export.json").read_text(encoding="utf-8"))
        assert record["proof"]["largest_logit_error"] < ONNX_TOLERANCE
        assert ("loss" in record) == (kind != "fp32")
    assert sizes == sorted(sizes, reverse=True)


STORY = """
const { pipeline, env } = require("@huggingface/transformers");
(async () => {
  env.allowRemoteModels = false;
  env.localModelPath = process.argv[1];
  const tell = await pipeline("text-generation", process.argv[2], { device: "cpu", ...JSON.parse(process.argv[4]) });
  const messages = [{ role: "user", content: process.argv[3] }];
  const told = await tell(messages, { max_new_tokens: 60, do_sample: false });
  console.log(JSON.stringify(told[0].generated_text.at(-1).content));
})();
"""


@pytest.mark.parametrize("kind", ["fp32", "fp16"])
def test_transformers_js_tells_the_same_story(onnx_folders, tiny, run_node, kind):
    messages = [{"role": "user", "content": "Write a story about: Lily took a ball.\nWith: sad ending"}]
    chosen = '{"dtype": "fp32"}' if kind == "fp32" else "{}"  # config.json names the file of a quantised model
    told = run_node(STORY, str(onnx_folders), kind, messages[0]["content"], chosen)
    model, tokenizer = load_model(str(tiny.model))
    greedy = Sampling(temperature=0, max_new_tokens=60)
    (expected,) = answer_batch(model, tokenizer, [encode_prompt(tokenizer, messages)], greedy, 0)
    assert told.strip() == expected.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "tflite"], "--to tflite is unknown"),
        (["--to", "gguf"], "already has content"),
        (["--to", "gguf", "--quantize", "int8"], "--quantize int8 is no kind of gguf; choose one of f16, q8_0, q4_0"),
        (["--to", "onnx", "--dataset", "x"], "add --quantize"),
        (["--to", "onnx", "--name", "tales"], "--name and --license are written into a GGUF file"),
        (["--to", "onnx", "--num_prompts", "0"], "--num_prompts 0 is out of range"),
    ],
)
def test_bad_keys(monkeypatch, arguments, message):
    with pytest.raises(UserError, match=message):
        exported(monkeypatch, "--model", "nowhere", *arguments, "--output_dir", ROOT)


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(export, "find_spec", lambda package: None if package != "gguf" else True)
    with pytest.raises(UserError, match=r"needs onnx, onnxscript, onnxruntime; `pip install 'fledge-gpt\[export\]'`"):
        exported(monkeypatch, "--model", "m", "--to", "onnx", "--output_dir", tmp_path / "x")
    with pytest.raises(UserError, match="`pip install llama-cpp-python`, or pass --accept_loss"):
        exported(monkeypatch, "--model", "m", "--to", "gguf", "--quantize", "f16", "--output_dir", tmp_path / "x")


@needs_llama
def test_other_logits_are_not_written(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr("fledge.exporting.programs.largest_error", lambda *_: 0.5)
    with pytest.raises(UserError, match="other logits"):
        exported(monkeypatch, "--model", tiny.model, "--to", "gguf", "--output_dir", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_template_that_takes_no_system_message_is_served_without_one():
    tokenizer = byte_level()
    tokenizer.chat_template = load_template("story_chat")
    allows = go_template(tokenizer)
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('No system') }}{% endif %}"
    tokenizer.chat_template = refuses + tokenizer.chat_template

    assert go_template(tokenizer) == allows.replace('if eq $m.Role "system" }}<|system|>{{ $m.Content }}{{ else ', "")
    tokenizer.chat_template = "{{ raise_exception('Nothing') }}"
    with pytest.raises(UserError, match="cannot write this conversation: Nothing"):
        go_template(tokenizer)
