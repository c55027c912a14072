import json
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from conftest import ROOT
from gguf import GGUFReader
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast, StableLmConfig

from fledge.cli import UserError
from fledge.encoding import encode_prompt
from fledge.exporting import GGUF_TOLERANCE, gguf_ids, gguf_logits, largest_error, served_template, write_gguf
from fledge.generation.answers import answer_batch
from fledge.models import load_model
from fledge.sampling import Sampling
from fledge.scripts import export
from fledge.templates import load_template
from fledge.tokenizers import load_tokenizer

pytestmark = pytest.mark.slow

TEXT = "Once upon a time, there was a dog. It's 12 o'clock — naïve café! They  ran.\n\nThe end."
V = 300
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
needs_llama = pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=V - 5,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    end = "<|endoftext|>"
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end)
    made.chat_template = load_template("story")
    return made


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
    write_gguf(model, tokenizer, file, "tales")
    reader = GGUFReader(file)
    fields = {name: value(field) for name, field in reader.fields.items()}
    kept = sum(int(tensor.n_elements) for tensor in reader.tensors)
    # A tied head is stored once for GPT-2 and LLaMA; StableLM's is always stored apart.
    assert kept == model.num_parameters()
    architecture = fields["general.architecture"]
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
    write_gguf(model, byte_level(), file, "tales")
    found = next(tensor.data for tensor in GGUFReader(file).tensors if tensor.name == "blk.1.attn_q.weight")
    source = model.model.layers[1].self_attn.q_proj.weight.detach().numpy()
    # Heads of 8: 0 4 1 5 2 6 3 7, then the next head.
    order = [8 * head + i for head in range(4) for pair in range(4) for i in (pair, pair + 4)]
    np.testing.assert_array_equal(found, source[order])


@needs_llama
@pytest.mark.parametrize("kind", CONFIGS)
def test_llama_cpp_computes_the_same(kind, tmp_path):
    model, tokenizer, file = random_model(CONFIGS[kind]), byte_level(), tmp_path / "m.gguf"
    write_gguf(model, tokenizer, file, "tales")
    prompts = [tokenizer(TEXT)["input_ids"][:60], [5]]
    limit = GGUF_TOLERANCE if "gpt2" in kind else 1e-5
    assert largest_error(model, prompts, gguf_logits(file, prompts)) < limit
    asked = [tokenizer.apply_chat_template([{"role": "user", "content": TEXT}], tokenize=False), "a<|endoftext|>b"]
    assert gguf_ids(file, asked) == [tokenizer(text)["input_ids"] for text in asked]


@needs_llama
def test_a_trained_model_tells_the_same_story_in_llama_cpp(tiny, tmp_path, monkeypatch, capsys):
    from llama_cpp import Llama

    file = tmp_path / "sub" / "tales.gguf"
    monkeypatch.setattr(sys, "argv", ["export.py", "--model", str(tiny.model), "--to", "gguf", "--output", str(file)])
    export.main()
    assert "Proven by llama.cpp" in capsys.readouterr().out
    assert [path.name for path in file.parent.iterdir()] == ["tales.gguf"]
    messages = [{"role": "user", "content": "Write a story about: Lily took a ball.\nWith: sad ending"}]
    model, tokenizer = load_model(str(tiny.model))
    greedy = Sampling(temperature=0, max_new_tokens=60)
    (expected,) = answer_batch(model, tokenizer, [encode_prompt(tokenizer, messages)], greedy, 0)
    llama = Llama(str(file), n_ctx=128, verbose=False)
    told = llama.create_chat_completion(messages, temperature=0, max_tokens=60)["choices"][0]
    llama.close()
    assert told["message"]["content"].strip() == expected.text
    assert (told["finish_reason"] == "stop") == expected.stopped
    with pytest.raises(UserError, match="already there"):
        export.main()


def test_a_gguf_of_others_and_the_model_itself_are_never_replaced(tmp_path, monkeypatch):
    file, folder, model = tmp_path / "theirs.gguf", tmp_path / "theirs", tmp_path / "model"
    file.write_bytes(b"GGUF from elsewhere")
    for place in (folder, model):
        place.mkdir()
        (place / "onnx").write_text("mine")
    for output, to, message in [
        (file, "gguf", "was not written by export.py and will not be replaced"),
        (folder, "onnx", "holds onnx and no mark of export.py"),
        (model, "onnx", "--output .* is --model"),
        (model / "deeper", "onnx", "--output .* lies in --model"),
        (model / "tales.gguf", "gguf", "--output .* lies in --model"),
    ]:
        arguments = ["--model", model, "--to", to, "--output", output, "--overwrite"]
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
        with pytest.raises(UserError, match=message):
            export.main()
    assert file.read_bytes() == b"GGUF from elsewhere"
    assert {path.name for path in tmp_path.rglob("*")} == {"theirs.gguf", "theirs", "model", "onnx"}


def test_a_gguf_says_that_fledge_wrote_it(tmp_path):
    pytest.importorskip("gguf")
    write_gguf(random_model(CONFIGS["llama"]), byte_level(), tmp_path / "m.gguf", "name")
    assert export.is_ours(tmp_path / "m.gguf")


@needs_llama
def test_sentencepiece_splits_alike_in_llama_cpp(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 20), model_prefix=str(tmp_path / "s"), vocab_size=320, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    tokenizer = load_tokenizer(str(tmp_path / "s.model"), 64)
    config = LlamaConfig(**SHAPE | {"vocab_size": len(tokenizer)})
    (difference,) = write_gguf(random_model(config), tokenizer, tmp_path / "m.gguf", "tales")
    assert "keeps runs of spaces" in difference
    texts = [TEXT.replace("  ", " "), "Zoë ran 😀", "", "the the<s>", "1\n2"]
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert gguf_ids(tmp_path / "m.gguf", texts) == expected


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
        write_gguf(random_model(config), byte_level(), tmp_path / "m.gguf", "tales")
    assert list(tmp_path.iterdir()) == []


def test_a_vocabulary_of_characters_is_refused(tmp_path):
    vocabulary = tmp_path / "v.json"
    vocabulary.write_text(json.dumps({c: i for i, c in enumerate(sorted(set(TEXT)))}), encoding="utf-8")
    with pytest.raises(UserError, match="byte-level BPE"):
        write_gguf(random_model(CONFIGS["gpt2"]), load_tokenizer(str(vocabulary), 64), tmp_path / "m.gguf", "tales")


@pytest.mark.parametrize("name", sorted(file.stem for file in (ROOT / "fledge" / "templates").glob("*.jinja")))
def test_a_template_reads_the_same_without_the_training_marks(name):
    tokenizer = byte_level()
    tokenizer.chat_template = load_template(name)
    turns = [("user", " a \n"), ("assistant", "\n b "), ("user", "c{{ d }}"), ("assistant", "e")]
    messages = [{"role": role, "content": content} for role, content in turns]
    served = served_template(tokenizer)
    assert "endgeneration" not in served
    for shown, asks in ((messages, False), (messages[:3], True), (messages[:1], True)):
        expected = tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=asks)
        assert expected == tokenizer.apply_chat_template(
            shown, tokenize=False, add_generation_prompt=asks, chat_template=served
        )


@pytest.fixture(scope="module")
def onnx_folder(tiny, tmp_path_factory):
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("onnx") / "tales"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["export.py", "--model", str(tiny.model), "--to", "onnx", "--output", str(folder)])
        export.main()
    return folder


def test_onnx_is_proven_and_whole(onnx_folder):
    files = {str(path.relative_to(onnx_folder)) for path in onnx_folder.rglob("*") if path.is_file()}
    assert files >= {"onnx/model.onnx", "config.json", "tokenizer.json", "tokenizer_config.json"}
    from onnxruntime import InferenceSession

    session = InferenceSession(onnx_folder / "onnx" / "model.onnx")
    assert [entry.name for entry in session.get_inputs()][:4] == [
        "input_ids", "attention_mask", "position_ids", "past_key_values.0.key",
    ]  # fmt: skip
    assert [entry.name for entry in session.get_outputs()][-1] == "present.1.value"


STORY = """
const { pipeline, env } = require("@huggingface/transformers");
(async () => {
  env.allowRemoteModels = false;
  env.localModelPath = process.argv[1];
  const tell = await pipeline("text-generation", process.argv[2], { dtype: "fp32", device: "cpu" });
  const messages = [{ role: "user", content: process.argv[3] }];
  const told = await tell(messages, { max_new_tokens: 60, do_sample: false });
  console.log(JSON.stringify(told[0].generated_text.at(-1).content));
})();
"""


def test_transformers_js_tells_the_same_story(onnx_folder, tiny, run_node):
    messages = [{"role": "user", "content": "Write a story about: Lily took a ball.\nWith: sad ending"}]
    told = run_node(STORY, str(onnx_folder.parent), onnx_folder.name, messages[0]["content"])
    model, tokenizer = load_model(str(tiny.model))
    greedy = Sampling(temperature=0, max_new_tokens=60)
    (expected,) = answer_batch(model, tokenizer, [encode_prompt(tokenizer, messages)], greedy, 0)
    assert told.strip() == expected.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "tflite", "--output", "x"], "--to tflite is unknown"),
        (["--to", "gguf", "--output", str(ROOT)], "already there"),
    ],
)
def test_bad_keys(monkeypatch, arguments, message):
    monkeypatch.setattr(sys, "argv", ["export.py", "--model", "nowhere", *arguments])
    with pytest.raises(UserError, match=message):
        export.main()


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(export, "find_spec", lambda package: None)
    monkeypatch.setattr(sys, "argv", ["export.py", "--model", "m", "--to", "onnx", "--output", str(tmp_path / "x")])
    with pytest.raises(UserError, match=r"needs onnx, onnxscript, onnxruntime; `pip install 'fledge-gpt\[export\]'`"):
        export.main()


def test_other_logits_are_not_written(tiny, monkeypatch, tmp_path):
    if find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed")
    monkeypatch.setattr("fledge.exporting.largest_error", lambda *_: 0.5)
    file = tmp_path / "m.gguf"
    monkeypatch.setattr(sys, "argv", ["export.py", "--model", str(tiny.model), "--to", "gguf", "--output", str(file)])
    with pytest.raises(UserError, match="other logits"):
        export.main()
    assert list(tmp_path.iterdir()) == []
