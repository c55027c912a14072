import collections
import hashlib
import json
import os
import pickle
import zipfile

import pytest
import torch
from hand_written import build
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fledge.checkpoints.layouts import recognise
from fledge.checkpoints.loading import load_checkpoint
from fledge.cli import UserError

STATE = {"head.weight": torch.arange(6.0).view(2, 3), "head.bias": torch.ones(2)}


def saved(content, folder, name="model.pt", **keys) -> str:
    torch.save(content, folder / name, **keys)
    return str(folder / name)


def assert_state(tensors, expected=STATE):
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def assert_refused(path, match):
    with pytest.raises(UserError, match=match) as refused:
        load_checkpoint(str(path))
    assert "\n" not in str(refused.value)


def test_bare_state_dict_is_read(tmp_path):
    assert_state(load_checkpoint(saved(STATE, tmp_path)).tensors)


@pytest.mark.parametrize("wrapper", ["model", "model_state", "model_state_dict", "state_dict"])
@pytest.mark.parametrize("container", [dict, collections.OrderedDict])
def test_wrapper_is_taken_off_and_what_is_beside_it_is_listed(wrapper, container, tmp_path):
    content = {wrapper: container(STATE), "optimizer": {"state": {}}, "epoch": 3, "config": {"n_head": 2}}
    checkpoint = load_checkpoint(saved(content, tmp_path))
    assert_state(checkpoint.tensors)
    assert checkpoint.config == {"n_head": 2}
    assert checkpoint.left_out == {"optimizer": f"beside {wrapper}", "epoch": f"beside {wrapper}"}


@pytest.mark.parametrize("key", ["config", "model_args", "model_config", "args", "hparams"])
def test_config_is_found_under_every_usual_name(key, tmp_path):
    assert load_checkpoint(saved({"model": STATE, key: {"n_head": 2}}, tmp_path)).config == {"n_head": 2}


def test_resumed_nanogpt_believes_model_args_before_the_settings_of_the_run(tmp_path):
    content = {"model": STATE, "model_args": {"n_head": 3}, "config": {"n_head": 12, "learning_rate": 1e-3}}
    assert load_checkpoint(saved(content, tmp_path)).config["n_head"] == 3


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.model.", "model.model."]
)
def test_prefixes_are_taken_off(prefix, tmp_path):
    state = {prefix + name: tensor for name, tensor in STATE.items()}
    assert_state(load_checkpoint(saved({"model": state}, tmp_path)).tensors)


def test_prefix_that_only_some_names_have_stays(tmp_path):
    state = STATE | {"model.extra": torch.ones(1)}
    assert_state(load_checkpoint(saved(state, tmp_path)).tensors, state)


def test_buffers_and_counters_are_left_out_and_listed(tmp_path):
    mask = torch.ones(4, 4).tril()
    buffers = {
        "blocks.0.mha.heads.0.mask": mask,
        "blocks.0.sa.tril": mask,
        "h.0.attn.bias": mask.view(1, 1, 4, 4),
        "h.0.attn.masked_bias": torch.tensor(-1e4),
        "causal_mask": mask.bool(),
        "freqs_cis": torch.polar(mask, mask),
    }
    rest = {"steps": torch.tensor(7), "note": "a word"}
    weights = STATE | {"h.0.attn.c_attn.bias": torch.ones(3), "mask.weight": torch.ones(3), "unmask": torch.ones(3)}
    checkpoint = load_checkpoint(saved(weights | buffers | rest, tmp_path))
    assert_state(checkpoint.tensors, weights)
    assert checkpoint.left_out == {
        **dict.fromkeys(buffers, "a buffer"),
        "steps": "torch.int64 is not a weight",
        "note": "not a tensor",
    }


@pytest.mark.parametrize("variant", ["per_head", "book", "nanogpt"])
def test_masks_of_hand_written_models_are_all_left_out(variant, tmp_path):
    module, _ = build(variant)
    checkpoint = load_checkpoint(saved(module.state_dict(), tmp_path))
    assert checkpoint.left_out == {name: "a buffer" for name, _ in module.named_buffers()}
    assert checkpoint.tensors.keys() == module.state_dict().keys() - checkpoint.left_out.keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision_is_kept(dtype, tmp_path):
    state = {name: tensor.to(dtype) for name, tensor in STATE.items()}
    tensors = load_checkpoint(saved(state, tmp_path)).tensors
    assert_state(tensors, state)
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}


def test_file_from_before_the_zip_format_is_read(tmp_path):
    assert_state(load_checkpoint(saved(STATE, tmp_path, _use_new_zipfile_serialization=False)).tensors)


def test_safetensors_file_is_read(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    assert_state(load_checkpoint(str(tmp_path / "model.safetensors")).tensors)


def test_folder_of_a_hub_mixin_is_read_with_its_config(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 6}))
    checkpoint = load_checkpoint(str(tmp_path))
    assert_state(checkpoint.tensors)
    assert checkpoint.config == {"num_heads": 6}


def test_folder_may_hold_pytorch_model_bin_and_no_config(tmp_path):
    saved(STATE, tmp_path, "pytorch_model.bin")
    checkpoint = load_checkpoint(str(tmp_path))
    assert_state(checkpoint.tensors)
    assert checkpoint.config == {}


def test_source_names_the_bytes_that_were_read(tmp_path):
    saved(STATE, tmp_path)
    content = (tmp_path / "model.pt").read_bytes()
    assert load_checkpoint(str(tmp_path / "model.pt")).source == {
        "file": "model.pt",
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def test_missing_file_is_refused(tmp_path):
    assert_refused(tmp_path / "model.pt", "There is no checkpoint at .*model.pt")


def test_folder_without_a_checkpoint_is_refused(tmp_path):
    assert_refused(tmp_path, "neither model.safetensors nor pytorch_model.bin")


@pytest.mark.parametrize("name", ["model.pt", "model.bin", "model.safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"Once upon a time\n", b"each word\n", b"tell me\n", b"\x80\x02", b"{}", b"PK", bytes(100)]
)
def test_file_of_another_kind_is_refused(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert_refused(tmp_path / name, f"{name} is not a (readable|PyTorch) checkpoint")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("zipped", [True, False])
def test_cut_off_file_is_refused(share, zipped, tmp_path):
    file = tmp_path / "model.pt"
    saved({"head.weight": torch.ones(100, 100)}, tmp_path, _use_new_zipfile_serialization=zipped)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    assert_refused(file, "checkpoint")


def test_cut_off_safetensors_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(STATE, file)
    file.write_bytes(file.read_bytes()[:-4])
    assert_refused(file, "not a readable checkpoint")


def test_zip_of_other_things_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("story.txt", "Once upon a time")
    assert_refused(tmp_path / "model.pt", "not a readable checkpoint")


class Touch:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch '{self.file}'",)


def save_before_the_zip_format(content, file):
    torch.save(content, file, _use_new_zipfile_serialization=False)


def save_as_plain_pickle(content, file):
    file.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("save", [torch.save, save_before_the_zip_format, save_as_plain_pickle])
@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin"])
def test_code_in_a_pickle_is_named_and_never_run(save, name, tmp_path):
    marker, file = tmp_path / "was_run", tmp_path / name
    save({"config": Touch(marker), "model_state_dict": STATE}, file)
    assert_refused(file, rf"wants to run {os.system.__module__}\.system, and Fledge runs no code")
    assert not marker.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_of_any_protocol_is_refused_and_never_run(protocol, tmp_path):
    marker, file = tmp_path / "was_run", tmp_path / "model.pt"
    file.write_bytes(pickle.dumps(Touch(marker), protocol=protocol))
    assert_refused(file, "wants to run|is not a (readable|PyTorch) checkpoint")
    assert not marker.exists()
    pickle.loads(file.read_bytes())
    assert marker.exists()


def test_whole_module_is_refused_by_the_name_of_its_class(tmp_path):
    module, _ = build("nanogpt")
    assert_refused(saved(module, tmp_path), r"wants to run hand_written\.NanoGPT.*save model\.state_dict\(\)")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_are_refused(value, dtype, tmp_path):
    state = {"a": torch.ones(3, dtype=dtype), "b": torch.tensor([[1, value]], dtype=dtype)}
    assert_refused(saved(state, tmp_path), "not finite in b: ")


def test_values_that_are_not_finite_may_be_in_a_mask(tmp_path):
    mask = torch.full((4, 4), -float("inf")).triu(1)
    assert_state(load_checkpoint(saved(STATE | {"att.mask": mask}, tmp_path)).tensors)


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"model": {}}, {"model": {"mask": torch.ones(2, 2)}}, {1: 2}])
def test_checkpoint_without_tensors_is_refused(content, tmp_path):
    assert_refused(saved(content, tmp_path), "holds no tensors")


@pytest.mark.parametrize("content", [[STATE], torch.ones(2), "a word", 3, None, (1, 2)])
def test_content_that_is_no_state_dict_is_refused_by_its_type(content, tmp_path):
    assert_refused(saved(content, tmp_path), f"holds a {type(content).__name__}, not a state dict")


@pytest.mark.parametrize("content", [b"{", b"", b"[1]", b'"x"', b"\xff\xfe\xff"])
def test_damaged_config_of_a_folder_is_refused(content, tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(content)
    assert_refused(tmp_path, r"config\.json")


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(2, 3, device="meta"), torch.eye(3).to_sparse(), torch.ones(2, 3).to(torch.float8_e4m3fn)],
    ids=["meta", "sparse", "float8"],
)
def test_tensor_that_is_no_plain_weight_is_refused_by_name(tensor, tmp_path):
    assert_refused(saved(STATE | {"head.weight": tensor}, tmp_path), r"head\.weight")


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzzed") / "model.pt"


def assert_read_or_refused(file):
    refusal = ""
    try:
        recognise(load_checkpoint(str(file)))
    except UserError as error:
        refusal = str(error)
    assert "\n" not in refusal


FUZZ = settings(max_examples=150, deadline=None, derandomize=True)
OPENINGS = st.sampled_from([b"", b"\x80\x02", b"\x80\x02}", b"PK\x03\x04", b"\x80\x04\x95", b"\x80\x02ctorch\n"])


@FUZZ
@given(opening=OPENINGS, rest=st.binary(max_size=100))
def test_random_bytes_are_refused_in_one_sentence(fuzzed, opening, rest):
    fuzzed.write_bytes(opening + rest)
    assert_read_or_refused(fuzzed)


@FUZZ
@given(st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=4), st.booleans())
def test_damaged_checkpoint_is_read_or_refused_in_one_sentence(fuzzed, changes, zipped):
    torch.save({"model": STATE, "config": {"n_head": 2}}, fuzzed, _use_new_zipfile_serialization=zipped)
    content = bytearray(fuzzed.read_bytes())
    for place, value in changes:
        content[place % len(content)] = value
    fuzzed.write_bytes(content)
    assert_read_or_refused(fuzzed)


TENSORS = st.builds(
    torch.ones,
    st.lists(st.integers(0, 3), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64]),
)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | TENSORS
KEYS = (
    st.integers() | st.text(max_size=5) | st.sampled_from(["model", "config", "tok_emb.weight", "n_head", "module.x"])
)
CONTAINERS = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(KEYS, inner, max_size=5)
        | st.dictionaries(KEYS, inner, max_size=5).map(collections.OrderedDict)
    ),
    max_leaves=12,
)


@FUZZ
@given(CONTAINERS)
def test_random_containers_are_refused_in_one_sentence(fuzzed, content):
    torch.save(content, fuzzed)
    assert_read_or_refused(fuzzed)


NANOGPT, NANOGPT_CONFIG = build("nanogpt", layers=1)


@FUZZ
@given(st.sampled_from(sorted(NANOGPT.state_dict())), CONTAINERS, st.sampled_from(sorted(NANOGPT_CONFIG)), PLAIN)
def test_model_with_one_strange_tensor_and_setting_is_read_or_refused(fuzzed, name, value, setting, said):
    torch.save({"model": NANOGPT.state_dict() | {name: value}, "config": NANOGPT_CONFIG | {setting: said}}, fuzzed)
    assert_read_or_refused(fuzzed)
