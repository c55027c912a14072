"""Files written as llama2.c's export.py and llm.c's train_gpt2.py write them, read back."""

import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge.checkpoints.loading import load_checkpoint
from fledge.checkpoints.loading.binary import is_binary, read_binary
from fledge.errors import UserError

FUZZ = settings(max_examples=150, deadline=None, derandomize=True)
LLAMA = {
    "dim": 8,
    "hidden_dim": 12,
    "n_layers": 3,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 7,
    "max_seq_len": 5,
}
GPT2 = {"block_size": 5, "vocab_size": 7, "n_layer": 3, "n_head": 2, "n_embd": 4}
MATRICES = ("attention.wq", "attention.wk", "attention.wv", "attention.wo")
MATRICES += ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
GPT2_KINDS = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")


def llama_state(config=LLAMA, tied=True) -> dict:
    """The state dict of llama2.c's Transformer, whose head is a name of its own only when untied."""
    dim, hidden, vocab = config["dim"], config["hidden_dim"], config["vocab_size"]
    kv_dim = dim // config["n_heads"] * config["n_kv_heads"]
    shapes = dict(zip(MATRICES, [(dim, dim), (kv_dim, dim), (kv_dim, dim), (dim, dim)], strict=False))
    shapes |= {"feed_forward.w1": (hidden, dim), "feed_forward.w2": (dim, hidden), "feed_forward.w3": (hidden, dim)}
    shapes |= {"attention_norm": (dim,), "ffn_norm": (dim,)}
    generator = torch.Generator().manual_seed(0)
    state = {"tok_embeddings.weight": torch.randn(vocab, dim, generator=generator)}
    for n in range(config["n_layers"]):
        for kind, shape in shapes.items():
            state[f"layers.{n}.{kind}.weight"] = torch.randn(shape, generator=generator)
    state["norm.weight"] = torch.randn(dim, generator=generator)
    return state if tied else state | {"output.weight": torch.randn(vocab, dim, generator=generator)}


def numbers(tensors, dtype=torch.float32) -> bytes:
    return b"".join(tensor.to(dtype).contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors)


def every_layer(state, *kinds):
    layers = range(sum(name.endswith("attention_norm.weight") for name in state))
    return [state[f"layers.{n}.{kind}.weight"] for kind in kinds for n in layers]


def write_llama2_c(file: Path, version: int, tied=True, config=LLAMA) -> dict:
    state, header = llama_state(config, tied), list(config.values())
    embedding, norm = state["tok_embeddings.weight"], state["norm.weight"]
    output = [] if tied else [state["output.weight"]]
    if version == 0:
        header[5] = header[5] if tied else -header[5]
        rotary = torch.rand(2 * config["max_seq_len"], config["dim"] // config["n_heads"] // 2)
        start = struct.pack("<7i", *header)
        order = [embedding, *every_layer(state, "attention_norm", *MATRICES[:4], "ffn_norm", *MATRICES[4:])]
        order += [norm, rotary, *output]
    else:
        start = struct.pack("<Ii7iB", 0x616B3432, version, *header, tied).ljust(256, b"\0")
        order = [*every_layer(state, "attention_norm", "ffn_norm"), norm, embedding, *every_layer(state, *MATRICES)]
        order += output
    file.write_bytes(start + numbers(order))
    return state


def write_llm_c(file: Path, version: int, padded=0, config=GPT2, dtype=torch.float32) -> dict:
    """`padded` rows of the embedding, 0 for a file from before there were any; the rows added are all sevens."""
    width, vocab, layers = config["n_embd"], config["vocab_size"], range(config["n_layer"])
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    outs = dict(zip(GPT2_KINDS, (1, 3, 1, 1, 4, 1), strict=True))
    state = {"transformer.wte.weight": random(vocab, width)}
    state["transformer.wpe.weight"] = random(config["block_size"], width)
    for kind, out in outs.items():
        for n in layers:
            shape = (out * width,) if "ln" in kind else (out * width, 4 * width if kind == "mlp.c_proj" else width)
            state[f"transformer.h.{n}.{kind}.weight"] = random(*shape)
            state[f"transformer.h.{n}.{kind}.bias"] = random(out * width)
    state["transformer.ln_f.weight"], state["transformer.ln_f.bias"] = random(width), random(width)
    sevens = torch.full((max(padded - vocab, 0), width), 7.0)
    order = [state["transformer.wte.weight"], sevens, state["transformer.wpe.weight"]]
    for kind in GPT2_KINDS:
        order += [state[f"transformer.h.{n}.{kind}.{part}"] for part in ("weight", "bias") for n in layers]
    order += [state["transformer.ln_f.weight"], state["transformer.ln_f.bias"]]
    header = [20240326, version, *config.values(), padded]
    file.write_bytes(struct.pack("<256i", *header, *[0] * (256 - len(header))) + numbers(order, dtype))
    return state | {"lm_head.weight": state["transformer.wte.weight"]}


def assert_state(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor), name


def assert_refused(file, match):
    with pytest.raises(UserError, match=match) as refused:
        load_checkpoint(str(file))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("version", [0, 1])
def test_llama2_c_export_is_read_under_the_names_of_its_model(version, tied, tmp_path):
    state = write_llama2_c(tmp_path / "stories.bin", version, tied)
    checkpoint = load_checkpoint(str(tmp_path / "stories.bin"))
    assert_state(checkpoint.tensors, state)
    assert ("output.weight" in checkpoint.tensors) is not tied
    assert checkpoint.config == LLAMA
    assert checkpoint.left_out == ({"freqs_cos": "a buffer", "freqs_sin": "a buffer"} if version == 0 else {})


def test_first_llama2_c_format_lies_where_its_c_reader_looks(tmp_path):
    # One layer, one head, dim 2, hidden_dim 1, vocabulary 3, context 1.
    header = struct.pack("<7i", 2, 1, 1, 1, 1, 3, 1)
    (tmp_path / "a.bin").write_bytes(header + numbers([torch.arange(36.0)]))
    tensors, _, _ = read_binary(tmp_path / "a.bin")
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "tok_embeddings.weight": [[0, 1], [2, 3], [4, 5]],
        "layers.0.attention_norm.weight": [6, 7],
        "layers.0.attention.wq.weight": [[8, 9], [10, 11]],
        "layers.0.attention.wk.weight": [[12, 13], [14, 15]],
        "layers.0.attention.wv.weight": [[16, 17], [18, 19]],
        "layers.0.attention.wo.weight": [[20, 21], [22, 23]],
        "layers.0.ffn_norm.weight": [24, 25],
        "layers.0.feed_forward.w1.weight": [[26, 27]],
        "layers.0.feed_forward.w2.weight": [[28], [29]],
        "layers.0.feed_forward.w3.weight": [[30, 31]],
        "norm.weight": [32, 33],
        "freqs_cos": [[34]],
        "freqs_sin": [[35]],
    }


@pytest.mark.parametrize(
    ("version", "padded", "dtype"),
    [
        (1, 0, torch.float32),
        (2, 0, torch.bfloat16),
        (3, 16, torch.float32),
        (3, 7, torch.float32),
        (5, 16, torch.bfloat16),
    ],
)
def test_llm_c_checkpoint_is_read_under_nanogpts_names_without_its_padding(version, padded, dtype, tmp_path):
    state = write_llm_c(tmp_path / "gpt2.bin", version, padded, dtype=dtype)
    checkpoint = load_checkpoint(str(tmp_path / "gpt2.bin"))
    assert_state(checkpoint.tensors, state)
    assert checkpoint.config == GPT2 | {"activation": "gelu_tanh"}
    assert checkpoint.left_out == ({"transformer.wte.weight[7:]": "9 rows of padding"} if padded == 16 else {})
    embedding, head = checkpoint.tensors["transformer.wte.weight"], checkpoint.tensors["lm_head.weight"]
    assert embedding.data_ptr() == head.data_ptr()


@pytest.mark.parametrize("write", [write_llama2_c, write_llm_c])
def test_weights_are_mapped_and_writing_to_them_leaves_the_file_alone(write, tmp_path):
    file = tmp_path / "a.bin"
    write(file, 1)
    content = file.read_bytes()
    tensors, _, _ = read_binary(file)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) == 1
    for tensor in tensors.values():
        tensor.zero_()
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        bytes(1000),
        # llama2.c's tokenizer.bin: the longest token, then score, length and text of each.
        struct.pack("<ifi5sfi6s", 27, 0, 5, b"<unk>", 0, 6, b"\n<s>\n\n") * 9,
        struct.pack("<256i", 20240327, 2, *range(254)),
        struct.pack("<256i", 20240328, 2, 50257, 50256, *range(252)),
        b"PK\3\4" + bytes(100),
    ],
)
def test_other_files_are_not_taken_for_one(content, tmp_path):
    (tmp_path / "a.bin").write_bytes(content)
    assert not is_binary(tmp_path / "a.bin")


def test_first_llama2_c_format_is_known_by_its_exact_size_only(tmp_path):
    file = tmp_path / "a.bin"
    write_llama2_c(file, 0)
    content = file.read_bytes()
    assert is_binary(file)
    for other in (content[:-4], content + bytes(4), content[:-1]):
        file.write_bytes(other)
        assert not is_binary(file)


def test_int8_export_is_refused_with_the_reason(tmp_path):
    (tmp_path / "a.bin").write_bytes(struct.pack("<Ii7i", 0x616B3432, 2, *LLAMA.values()).ljust(2000, b"\1"))
    assert_refused(tmp_path / "a.bin", "version 2, whose weights are rounded to int8; convert the checkpoint that")


@pytest.mark.parametrize("version", [0, 4, 6, -1])
def test_unknown_version_of_llm_c_is_refused(version, tmp_path):
    write_llm_c(tmp_path / "a.bin", version)
    assert_refused(tmp_path / "a.bin", rf"llm\.c checkpoint of version {version}; Fledge reads versions 1, 2, 3, 5")


@pytest.mark.parametrize(("version", "dtype"), [(2, torch.float32), (3, torch.bfloat16), (5, torch.float32)])
def test_llm_c_of_another_precision_than_its_version_says_is_refused(version, dtype, tmp_path):
    write_llm_c(tmp_path / "a.bin", version, 16, dtype=dtype)
    assert_refused(tmp_path / "a.bin", "bytes and its header asks for .* of a version that Fledge does not know")


@pytest.mark.parametrize(
    ("field", "value"),
    [("dim", 0), ("dim", 4), ("dim", 6), ("n_heads", 3), ("n_kv_heads", 3), ("vocab_size", -7), ("n_layers", -1)],
)
def test_llama2_c_header_that_makes_no_sense_is_refused(field, value, tmp_path):
    header = (LLAMA | {field: value}).values()
    (tmp_path / "a.bin").write_bytes(struct.pack("<Ii7iB", 0x616B3432, 1, *header, 1).ljust(3000, b"\0"))
    assert_refused(tmp_path / "a.bin", "makes no sense")


@pytest.mark.parametrize(("field", "value"), [("n_embd", 5), ("n_head", 0), ("n_layer", -3), ("vocab_size", 17)])
def test_llm_c_header_that_makes_no_sense_is_refused(field, value, tmp_path):
    header = (20240326, 3, *(GPT2 | {field: value}).values(), 16)
    (tmp_path / "a.bin").write_bytes(struct.pack("<8i", *header).ljust(4000, b"\0"))
    assert_refused(tmp_path / "a.bin", r"llm\.c checkpoint that makes no sense")


def test_values_that_are_not_finite_are_refused(tmp_path):
    write_llm_c(tmp_path / "a.bin", 3, 16)
    content = bytearray((tmp_path / "a.bin").read_bytes())
    content[-4:] = struct.pack("<f", float("nan"))
    (tmp_path / "a.bin").write_bytes(content)
    assert_refused(tmp_path / "a.bin", r"not finite in 'transformer\.ln_f\.bias'")


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzzed") / "model.bin"


WRITTEN = {
    "llama2.c 0": (write_llama2_c, (0, False)),
    "llama2.c 1": (write_llama2_c, (1,)),
    "llm.c 3": (write_llm_c, (3, 16)),
    "llm.c 1": (write_llm_c, (1,)),
}


@FUZZ
@given(st.sampled_from(sorted(WRITTEN)), st.floats(0, 1, exclude_max=True))
def test_cut_off_file_is_refused(fuzzed, kind, share):
    write, how = WRITTEN[kind]
    write(fuzzed, *how)
    content = fuzzed.read_bytes()
    fuzzed.write_bytes(content[: int(share * len(content))])
    assert_refused(fuzzed, "cut off")


INT32 = st.integers(-(2**31), 2**31 - 1) | st.integers(-3, 9)
STARTS = st.sampled_from([(), (0x616B3432, 1), (0x616B3432, 2), (20240326, 3), (20240326, 5), (20240326,)])


@FUZZ
@given(STARTS, st.lists(INT32, max_size=12), st.binary(max_size=300))
def test_random_headers_are_refused_in_one_sentence(fuzzed, start, header, rest):
    fuzzed.write_bytes(struct.pack(f"<{len(start) + len(header)}i", *start, *header) + rest)
    assert_refused(fuzzed, str(fuzzed))


SIZES = st.integers(1, 4)


@FUZZ
@given(st.sampled_from([0, 1]), st.booleans(), SIZES, SIZES, SIZES, SIZES, SIZES, SIZES, SIZES)
def test_llama2_c_export_of_any_size_is_read(
    fuzzed, version, tied, half_head, hidden, layers, group, kv, vocab, length
):
    dim, heads = 2 * half_head * group * kv, group * kv
    config = dict(zip(LLAMA, (dim, hidden, layers, heads, kv, vocab, length), strict=True))
    state = write_llama2_c(fuzzed, version, tied, config)
    tensors, found, _ = read_binary(fuzzed)
    assert_state({name: tensor for name, tensor in tensors.items() if "freqs" not in name}, state)
    assert found == config
