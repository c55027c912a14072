import argparse
import collections
import dataclasses
import hashlib
import json
import os
import pickle
import re
import tarfile
import zipfile
from pathlib import Path

import hand_written
import pytest
import torch
from hand_written import build
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from fledge.checkpoints.loading import load_checkpoint
from fledge.errors import UserError

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
    assert checkpoint.left_out == {"optimizer": "optimizer state", "epoch": f"beside {wrapper}"}


@pytest.mark.parametrize("outer", ["model", "state_dict"])
@pytest.mark.parametrize("inner", ["model", "model_state_dict"])
def test_wrapper_in_a_wrapper_is_taken_off_with_what_is_beside_each(outer, inner, tmp_path):
    content = {outer: {inner: STATE, "version": 2, "config": {"n_head": 2}}, "epoch": 3, "args": {"seed": 1}}
    checkpoint = load_checkpoint(saved(content, tmp_path))
    assert_state(checkpoint.tensors)
    assert checkpoint.config == {"n_head": 2, "seed": 1}
    assert checkpoint.left_out == {"epoch": f"beside {outer}", "version": f"beside {inner}"}


def test_why_an_entry_was_left_out(tmp_path):
    why = {
        "optimizer_state_dict": "optimizer state",
        "optimizer_states": "optimizer state",
        "lr_scheduler": "scheduler state",
        "ema": "an EMA copy",
        "model_ema": "an EMA copy",
        "EMA_state_dict": "an EMA copy",
        "schema": "beside model",
        "scaler": "beside model",
        "rng_state": "beside model",
    }
    plain = {"ema_decay": 0.999, "optimizer_name": "adamw", "step": 7}
    content = {"model": STATE, **{key: dict(STATE) for key in why}, **plain}
    checkpoint = load_checkpoint(saved(content, tmp_path))
    assert_state(checkpoint.tensors)
    assert checkpoint.left_out == why | dict.fromkeys(plain, "beside model")


def test_lightning_checkpoint_is_read(tmp_path):
    content = {
        "epoch": 3,
        "global_step": 1200,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {f"model.{name}": tensor for name, tensor in STATE.items()},
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(1.5)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
        "lr_schedulers": [{"last_epoch": 3}],
        "hparams_name": "kwargs",
        "hyper_parameters": {"n_head": 2, "learning_rate": 3e-4},
    }
    checkpoint = load_checkpoint(saved(content, tmp_path, "epoch=3.ckpt"))
    assert_state(checkpoint.tensors)
    assert checkpoint.config == {"n_head": 2, "learning_rate": 3e-4}
    assert checkpoint.left_out == {
        **dict.fromkeys(
            ("epoch", "global_step", "pytorch-lightning_version", "loops", "callbacks", "hparams_name"),
            "beside state_dict",
        ),
        "optimizer_states": "optimizer state",
        "lr_schedulers": "scheduler state",
    }


def test_wrapper_that_holds_itself_is_refused(tmp_path):
    content = {"epoch": 3}
    content["model"] = content
    assert_refused(saved(content, tmp_path), "holds no tensors")


def test_weights_averaged_by_torch_lose_their_prefix_and_counter(tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2))
    checkpoint = load_checkpoint(saved(averaged.state_dict(), tmp_path))
    assert_state(checkpoint.tensors, averaged.module.state_dict())
    assert checkpoint.left_out == {"n_averaged": "torch.int64 is not a weight"}


def test_parameters_become_plain_tensors_and_tied_ones_keep_both_names(tmp_path):
    weight = nn.Parameter(torch.arange(6.0).view(3, 2))
    tensors = load_checkpoint(saved({"wte.weight": weight, "lm_head.weight": weight}, tmp_path)).tensors
    assert_state(tensors, {"wte.weight": weight.data, "lm_head.weight": weight.data})
    assert tensors["wte.weight"].data_ptr() == tensors["lm_head.weight"].data_ptr()
    assert not tensors["wte.weight"].requires_grad


CONFIG_KEYS = ["config", "hyper_parameters", "model_args", "model_config", "args", "hparams"]


@pytest.mark.parametrize("key", CONFIG_KEYS)
def test_config_is_found_under_every_usual_name(key, tmp_path):
    for content in ({"model": STATE, key: {"n_head": 2}}, STATE | {key: {"n_head": 2}}):
        checkpoint = load_checkpoint(saved(content, tmp_path))
        assert checkpoint.config == {"n_head": 2}
        assert checkpoint.left_out == {}


def test_config_that_is_no_mapping_is_listed(tmp_path):
    assert load_checkpoint(saved({"model": STATE, "config": "small"}, tmp_path)).left_out == {"config": "beside model"}
    assert load_checkpoint(saved(STATE | {"config": "small"}, tmp_path)).left_out == {"config": "not a tensor"}


def test_resumed_nanogpt_believes_model_args_before_the_run_settings(tmp_path):
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


BUFFERS = ["mask", "tril", "triu", "causal_mask", "attn_mask", "attention_mask", "masked_bias"]
BUFFERS += ["freqs_cis", "freqs_cos", "freqs_sin", "inv_freq", "cos", "sin", "cos_cached", "sin_cached", "cos_cache"]
BUFFERS += ["position_ids", "pos_ids"]


@pytest.mark.parametrize("prefix", ["", "blocks.0.mha.heads.0."])
def test_buffers_are_known_by_name(prefix, tmp_path):
    table = torch.randn(4, 3)
    buffers = {prefix + name: table for name in BUFFERS}
    weights = STATE | {"mask.weight": table, "unmask": table, "cosine": table, "pe": table, "pos_encoding": table}
    checkpoint = load_checkpoint(saved(weights | buffers, tmp_path))
    assert_state(checkpoint.tensors, weights)
    assert checkpoint.left_out == dict.fromkeys(buffers, "a buffer")


def test_what_is_no_weight_is_left_out_and_listed(tmp_path):
    square = torch.ones(4, 4).tril()
    why = {
        "h.0.attn.bias": "a buffer",  # nanoGPT's mask
        "h.0.attn.window": "torch.bool is not a weight",
        "h.0.rotary": "torch.complex64 is not a weight",
        "steps": "torch.int64 is not a weight",
        "codebook": "torch.int8 is not a weight",
        "class_weight": "torch.int64 is not a weight",
        "note": "not a tensor",
        "h.0.attn.causal": "a triangular mask",
    }
    left_out = {
        "h.0.attn.bias": square.view(1, 1, 4, 4),
        "h.0.attn.window": square.bool(),
        "h.0.rotary": torch.polar(square, square),
        "steps": torch.tensor(7),
        "codebook": torch.ones(4, 4, dtype=torch.int8),
        "class_weight": torch.tensor([1, 2]),
        "note": "a word",
        "h.0.attn.causal": square,
    }
    weights = STATE | {"h.0.attn.c_attn.bias": torch.ones(3), "attn.bias": torch.ones(3)}
    checkpoint = load_checkpoint(saved(weights | left_out, tmp_path))
    assert_state(checkpoint.tensors, weights)
    assert checkpoint.left_out == why


FUZZ = settings(max_examples=100, deadline=None, derandomize=True)
FILLS = st.sampled_from([(0, 1), (1, 0), (0, -float("inf")), (-1e9, 0), (0, -1e4), (1, -1)])
SHAPES = st.sampled_from([(), (1,), (1, 1)])
FLOATS = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzzed") / "model.pt"


@FUZZ
@given(st.integers(2, 9), FILLS, st.sampled_from([0, 1]), st.booleans(), SHAPES, FLOATS)
def test_triangular_mask_of_any_kind_is_left_out_under_any_name(fuzzed, size, fill, diagonal, upper, ones, dtype):
    first, second = torch.tensor(fill, dtype=torch.float32).clamp(min=-float("inf")).to(dtype)
    mask = torch.empty(size, size, dtype=dtype)
    for row in range(size):
        for column in range(size):
            mask[row, column] = first if row - column >= diagonal else second
    mask = (mask.T if upper else mask).reshape(*ones, size, size)
    checkpoint = load_checkpoint(saved(STATE | {"future": mask}, fuzzed.parent, fuzzed.name))
    assert_state(checkpoint.tensors)
    assert checkpoint.left_out == {"future": "a triangular mask"}


@FUZZ
@given(st.integers(3, 9), st.data(), SHAPES)
def test_triangle_with_one_other_number_is_a_weight(fuzzed, size, data, ones):
    mask = torch.ones(size, size).tril()
    mask[data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, size - 1))] = 0.5
    state = STATE | {"mixing": mask.reshape(*ones, size, size)}
    assert_state(load_checkpoint(saved(state, fuzzed.parent, fuzzed.name)).tensors, state)


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(3, 3),
        torch.ones(3, 3),
        torch.eye(3),
        torch.eye(2),
        torch.ones(1, 1),
        torch.ones(1, 1, 1),
        torch.ones(3, 4).tril(),
        torch.ones(2, 3, 3).tril(),
        torch.ones(3, 3, 1).tril(),
        torch.ones(3, 1, 3),
        torch.ones(1, 1, 1, 3, 3).tril(),
        torch.ones(3, 3).tril(1),
        torch.ones(3, 3).tril(-2),
        torch.ones(0, 0),
    ],
)
def test_weight_that_is_no_triangle_stays(weight, tmp_path):
    assert_state(load_checkpoint(saved(STATE | {"w": weight}, tmp_path)).tensors, STATE | {"w": weight})


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.qint8])
@pytest.mark.parametrize("name", ["head.weight", "head.qweight"])
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_weight_is_refused_by_name(name, dtype, tmp_path):
    weight = torch.ones(4, 4)
    weight = torch.quantize_per_tensor(weight, 0.1, 0, dtype) if dtype == torch.qint8 else weight.to(dtype)
    assert_refused(saved(STATE | {name: weight}, tmp_path), rf"holds '{name}' as {dtype}, and quantised .* save the")
    if dtype not in (torch.int8, torch.uint8):  # these two may as well be a counter or a code book
        assert_refused(saved(STATE | {"head.w": weight}, tmp_path), f"holds 'head.w' as {dtype}, and quantised")


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


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not say what is mapped")
@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_weights_stay_mapped_from_the_file(name, tmp_path):
    file = tmp_path / name
    (save_file if file.suffix == ".safetensors" else torch.save)(STATE, file)
    tensors = load_checkpoint(str(file)).tensors
    ranges = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
    bounds = [[int(end, 16) for end in found.split("-")] for found in ranges]
    for tensor in tensors.values():
        assert any(start <= tensor.data_ptr() < end for start, end in bounds)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_checkpoint_that_was_unpacked_and_packed_again_gives_its_weights(compression, tmp_path):
    state = STATE | {"zeros": torch.zeros(1000)}
    saved(state, tmp_path, "first.pt")
    with zipfile.ZipFile(tmp_path / "first.pt") as first, zipfile.ZipFile(tmp_path / "again.pt", "w") as again:
        for name in first.namelist():
            again.writestr(name, first.read(name), compression)
    assert_state(load_checkpoint(str(tmp_path / "again.pt")).tensors, state)


@pytest.mark.parametrize("name", ["model.pth", "model.ckpt", "model.tar", "model.pth.tar", "model.bin", "model"])
@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saved_is_read_whatever_its_name(name, zipped, tmp_path):
    assert_state(load_checkpoint(saved(STATE, tmp_path, name, _use_new_zipfile_serialization=zipped)).tensors)


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


@pytest.mark.parametrize("name", ["ckpt.pt", "best.pth", "model.bin", "epoch=3.ckpt", "model.pth.tar"])
def test_folder_may_hold_one_checkpoint_of_any_name_among_other_files(name, tmp_path):
    saved(STATE, tmp_path, name)
    (tmp_path / "config.json").write_text('{"n_head": 2}')
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"stoi": {"a": 0}}))
    (tmp_path / "train.bin").write_bytes(bytes(range(200)))
    (tmp_path / "tokenizer.bin").write_bytes(b"\x1b\0\0\0" + bytes(200))
    (tmp_path / "older.pt").mkdir()
    checkpoint = load_checkpoint(str(tmp_path))
    assert_state(checkpoint.tensors)
    assert checkpoint.config == {"n_head": 2}
    assert checkpoint.source["file"] == name


def test_folder_of_several_checkpoints_is_refused_naming_them(tmp_path):
    for name in ("step_2.pt", "step_1.pt", "last.safetensors"):
        save_file(STATE, tmp_path / name)
    (tmp_path / "notes.txt").write_text("a word")
    assert_refused(tmp_path, r"holds last\.safetensors, step_1\.pt, step_2\.pt; name the one to convert")


def test_safetensors_come_before_the_pickle_and_a_trainers_state_last(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    saved({"head.weight": torch.zeros(1)}, tmp_path, "pytorch_model.bin")
    saved({"state": {}}, tmp_path, "optimizer.pt")
    assert_state(load_checkpoint(str(tmp_path)).tensors)


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
    (tmp_path / "tokenizer.bin").write_bytes(bytes(100))
    assert_refused(tmp_path, r"holds no checkpoint \(\.safetensors, \.pt, .*\); name the file")


@pytest.mark.parametrize("name", ["model.pt", "model.bin", "model.safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"Once upon a time\n", b"each word\n", b"tell me\n", b"\x80\x02", b"{}", b"PK", bytes(100)]
)
def test_file_of_another_kind_is_refused(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert_refused(tmp_path / name, f"{name} is not a readable checkpoint")


def save_before_the_zip_format(content, file):
    torch.save(content, file, _use_new_zipfile_serialization=False)


WRITTEN = {}


@FUZZ
@given(st.sampled_from([torch.save, save_before_the_zip_format, save_file]), st.floats(0, 1, exclude_max=True))
def test_cut_off_file_is_refused(fuzzed, save, share):
    file = fuzzed.with_suffix(".safetensors" if save is save_file else ".pt")
    if save not in WRITTEN:
        save({"head.weight": torch.ones(10, 100)}, file)
        WRITTEN[save] = file.read_bytes()
    file.write_bytes(WRITTEN[save][: int(share * len(WRITTEN[save]))])
    # A pickle may be cut in the middle of a name, and that name is then unknown.
    assert_refused(file, "not a readable checkpoint|wants to run torch|wants to run coll")


def test_zip_of_other_things_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("story.txt", "Once upon a time")
    assert_refused(tmp_path / "model.pt", "not a readable checkpoint")


def test_tar_archive_is_refused_with_advice(tmp_path):
    saved(STATE, tmp_path)
    with tarfile.open(tmp_path / "model.tar", "w") as archive:
        archive.add(tmp_path / "model.pt")
    assert_refused(tmp_path / "model.tar", "is a tar archive: unpack it")


@pytest.mark.filterwarnings("ignore:.*jit:DeprecationWarning")
def test_torchscript_is_refused_with_advice(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "model.pt"))
    assert_refused(tmp_path / "model.pt", r"is a TorchScript program; .* save its state_dict\(\)")


def test_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    saved(STATE, tmp_path)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert_refused(tmp_path / "model.pt", r"model\.pt cannot be read: Permission denied")


class Touch:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch '{self.file}'",)


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
    assert_refused(file, "wants to run|is not a readable checkpoint")
    assert not marker.exists()
    pickle.loads(file.read_bytes())
    assert marker.exists()


class Beside:
    """An object of the author's beside the weights, with the vocabulary in it."""

    def __init__(self):
        self.stoi = {"a": 0, "b": 1}

    def __setstate__(self, state):
        raise AssertionError("code of the pickle ran")


@pytest.mark.parametrize("wrap", [lambda module: module, lambda module: {"model": module, "epoch": 3}])
@pytest.mark.parametrize("save", ["torch.save", "old torch.save", "pickle.dump"])
def test_whole_module_is_read_without_its_class(save, wrap, tmp_path, monkeypatch):
    module, _ = build("nanogpt")
    module.transformer.drop = torch.nn.Dropout(0.3)
    module.n_head = 7
    if save == "pickle.dump":
        (tmp_path / "model.pkl").write_bytes(pickle.dumps(wrap(module)))
    else:
        torch.save(wrap(module), tmp_path / "model.pkl", _use_new_zipfile_serialization=save == "torch.save")
    monkeypatch.delattr(hand_written, "NanoGPT")
    loaded = load_checkpoint(str(tmp_path / "model.pkl"))
    expected = {name: tensor for name, tensor in module.state_dict().items() if not name.endswith(".attn.bias")}
    assert loaded.tensors.keys() == expected.keys()
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in expected.items())
    assert loaded.source["class"] == "hand_written.NanoGPT"
    assert (loaded.config["n_head"], loaded.config["p"]) == (7, 0.3)


@pytest.mark.parametrize(
    ("first", "activation", "placement", "known"),
    [
        (True, "gelu", "pre", "gelu"),
        (False, "relu", "post", "relu"),
        (True, torch.nn.GELU("tanh"), "pre", None),  # torch counts it as GELU, and its module says tanh
        (True, torch.nn.functional.silu, "pre", None),
    ],
)
def test_layers_of_torch_that_were_pickled_say_what_they_compute(first, activation, placement, known, tmp_path):
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, activation=activation, norm_first=first)
    torch.save(torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer])}), tmp_path / "model.pt")
    config = load_checkpoint(str(tmp_path / "model.pt")).config
    assert (config["norm_placement"], config.get("activation")) == (placement, known)


def test_objects_beside_the_weights_are_read_without_their_class(tmp_path):
    torch.save({"model": STATE, "tokenizer": Beside(), "n_embd": 4, "epoch": 2}, tmp_path / "a.pt")
    loaded = load_checkpoint(str(tmp_path / "a.pt"))
    assert_state(loaded.tensors)
    assert loaded.vocabulary == {"a": 0, "b": 1}
    assert loaded.config == {"n_embd": 4}


def test_pickled_tensor_larger_than_its_storage_is_refused(tmp_path):
    class Larger(torch.nn.Module):
        def __reduce_ex__(self, protocol):
            arguments = (torch.ones(1).storage(), 0, (1 << 20, 1 << 10), (0, 0), False, collections.OrderedDict())
            return torch._utils._rebuild_tensor_v2, arguments

    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": {"a": Larger()}}))
    assert_refused(tmp_path / "a.pkl", "is not a readable checkpoint")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_are_refused(value, dtype, tmp_path):
    state = {"a": torch.ones(3, dtype=dtype), "b": torch.tensor([[1, value]], dtype=dtype)}
    assert_refused(saved(state, tmp_path), "not finite in 'b': ")


def test_values_that_are_not_finite_may_be_in_a_mask(tmp_path):
    mask = torch.full((4, 4), -float("inf")).triu(1)
    masks = {"att.mask": mask, "att.future": mask, "h.0.attn.bias": mask.view(1, 1, 4, 4)}
    assert_state(load_checkpoint(saved(STATE | masks, tmp_path)).tensors)


@pytest.mark.parametrize(
    ("value", "dtype"), [(6e4, torch.float16), (3e38, torch.float32), (3e38, torch.bfloat16), (1e308, torch.float64)]
)
def test_finite_weights_may_have_a_sum_that_is_not(value, dtype, tmp_path):
    state = {"w": torch.full((64, 3), value, dtype=dtype)}
    assert not state["w"].sum().isfinite()
    assert_state(load_checkpoint(saved(state, tmp_path)).tensors, state)


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"model": {}}, {"model": {"mask": torch.ones(2, 2)}}, {1: 2}])
def test_checkpoint_without_tensors_is_refused_with_what_it_holds(content, tmp_path):
    held = repr(str(next(iter(content), "nothing"))) if content else "nothing"
    assert_refused(saved(content, tmp_path), f"holds no tensors that are weights .*, only {held}")


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
    [torch.ones(2, 3, device="meta"), torch.eye(3).to_sparse()],
    ids=["meta", "sparse"],
)
def test_tensor_that_is_no_plain_weight_is_refused_by_name(tensor, tmp_path):
    assert_refused(saved(STATE | {"head.weight": tensor}, tmp_path), r"head\.weight")


STOI = {"a": 0, "b": 1, "\n": 2}
ITOS = {0: "a", 1: "b", 2: "\n"}
CHARS = ["a", "b", "\n"]


@pytest.mark.parametrize(
    "entries",
    [
        {"stoi": STOI},
        {"itos": ITOS},
        {"itos": CHARS},
        {"stoi": STOI, "itos": ITOS},
        {"chars": CHARS},
        {"chars": tuple(CHARS)},
        {"vocab": STOI},
        {"vocab": CHARS},
        {"vocabulary": ITOS},
        {"char_to_idx": STOI, "idx_to_char": ITOS},
        {"char2idx": STOI},
        {"idx2char": ITOS},
        {"char_to_ix": STOI},
        {"token_to_id": STOI, "id_to_token": ITOS},
        {"word2idx": STOI, "idx2word": ITOS},
        {"vocab_to_int": STOI, "int_to_vocab": ITOS},
        {"stoi": dict(reversed(STOI.items()))},
        {"stoi": STOI, "chars": ["a", "b"]},  # without the special token
        {"chars": ["a", "b"], "vocab": STOI},
    ],
)
def test_vocabulary_is_found_beside_or_among_the_weights_or_in_config(entries, tmp_path):
    for content in ({"model": STATE, **entries}, {"model": STATE, "config": {"n_head": 2, **entries}}, STATE | entries):
        assert load_checkpoint(saved(content, tmp_path)).vocabulary == STOI


def test_entries_the_vocabulary_was_taken_from_are_not_listed_as_left_out(tmp_path):
    for content in (
        {"model": STATE, "stoi": STOI, "itos": ITOS, "chars": CHARS},
        STATE | {"stoi": STOI, "chars": CHARS},
    ):
        assert list(load_checkpoint(saved(content, tmp_path)).left_out) == ["chars"]


def test_vocabulary_is_found_in_the_config_of_a_folder(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"stoi": STOI}))
    assert load_checkpoint(str(tmp_path)).vocabulary == STOI


@pytest.mark.parametrize(
    "entries",
    [
        {},
        {"stoi": {}},
        {"chars": []},
        {"stoi": {"a": 1, "b": 2}},
        {"stoi": {"a": 0, "b": 2}},
        {"stoi": {"a": 0, "b": 0}},
        {"stoi": {"a": False, "b": True}},
        {"stoi": {"a": 0.0, "b": 1.0}},
        {"itos": {0: "a", 1: "a"}},
        {"itos": {0: "a", 2: "b"}},
        {"chars": ["a", "a"]},
        {"chars": [0, 1]},
        {"chars": "ab"},
        {"vocab": "gpt2"},
        {"vocab": 50257},
        {"vocab_size": 3},
        {"notes": STOI},
        {"stoi": {"a": 0, "b": torch.ones(1)}},
        {"stoi": {"a": 1, "b": 2}, "chars": ["a", "b"]},
    ],
)
def test_what_is_no_vocabulary_is_not_taken_for_one(entries, tmp_path):
    checkpoint = load_checkpoint(saved({"model": STATE, **entries}, tmp_path))
    assert checkpoint.vocabulary is None
    assert checkpoint.left_out == dict.fromkeys(entries, "beside model")


@pytest.mark.parametrize("itos", [{0: "b", 1: "a", 2: "\n"}, {0: "a", 1: "b"}, {0: "a", 1: "b", 3: "\n"}])
def test_vocabularies_that_disagree_are_refused(itos, tmp_path):
    content = {"model": STATE, "stoi": STOI, "config": {"itos": itos, "chars": CHARS}}
    assert_refused(
        saved(content, tmp_path), r"'stoi' and 'itos', which disagree on the token '.*' \(\d and (\d|None)\)"
    )


def test_vocabulary_that_is_there_twice_must_be_the_same(tmp_path):
    content = {"model": STATE, "stoi": STOI, "config": {"stoi": STOI}}
    assert load_checkpoint(saved(content, tmp_path)).vocabulary == STOI
    content["config"]["stoi"] = {"b": 0, "a": 1, "\n": 2}
    assert_refused(saved(content, tmp_path), r"disagree on the token 'b' \(1 and 0\)")


@FUZZ
@given(st.lists(st.text(max_size=3), unique=True, min_size=1), st.randoms(use_true_random=False))
def test_any_vocabulary_is_the_same_from_either_direction(fuzzed, tokens, random):
    stoi = {token: number for number, token in enumerate(tokens)}
    shuffled = random.sample(list(stoi.items()), len(stoi))
    for entry in ({"stoi": dict(shuffled)}, {"itos": {number: token for token, number in shuffled}}, {"chars": tokens}):
        torch.save({"model": STATE, **entry}, fuzzed)
        assert load_checkpoint(str(fuzzed)).vocabulary == stoi


def assert_read_or_refused(file):
    refusal = ""
    try:
        checkpoint = load_checkpoint(str(file))
        assert checkpoint.tensors
        assert all(tensor.is_floating_point() and tensor.isfinite().all() for tensor in checkpoint.tensors.values())
    except UserError as error:
        refusal = str(error)
    assert "\n" not in refusal


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
    st.lists(st.integers(0, 3), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64]),
)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | TENSORS
NAMES = ["model", "state_dict", "config", "stoi", "itos", "chars", "tok_emb.weight", "n_head", "module.x", "optimizer"]
KEYS = st.integers() | st.text(max_size=5) | st.sampled_from(NAMES)
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


@dataclasses.dataclass
class GPTConfig:
    n_head: int = 4


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("config", [GPTConfig(), argparse.Namespace(n_head=4)], ids=["dataclass", "Namespace"])
def test_settings_pickled_as_an_object_are_read_as_plain_values(config, zipped, tmp_path):
    content = {"model": {"wte.weight": torch.ones(2, 3)}, "config": config, "step": 3, "val_loss": 1.0}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    loaded = load_checkpoint(str(tmp_path / "a.pt"))
    assert loaded.config == {"n_head": 4}
    assert set(loaded.left_out) == {"step", "val_loss"}


def write_npz(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("wte.npy", b"\x93NUMPY")


def write_keras(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model.weights.h5", b"")


@pytest.mark.parametrize(
    ("write", "kind"),
    [
        (write_npz, "a NumPy archive (.npz)"),
        (write_keras, "a Keras model"),
        (lambda file: file.write_bytes(b"\x93NUMPY\x01\x00"), "a NumPy array"),
        (lambda file: file.write_bytes(b"\x89HDF\r\n\x1a\n"), "an HDF5 file, as Keras saves weights"),
        (lambda file: file.write_bytes(b"GGUF\x03\x00\x00\x00"), "a GGUF file of llama.cpp"),
    ],
)
@pytest.mark.parametrize("name", ["model.pt", "weights.npz"])
def test_file_of_another_program_is_named_as_what_it_is(write, kind, name, tmp_path):
    write(tmp_path / name)
    assert_refused(tmp_path / name, re.escape(f"{name} is {kind}; load it in the program that wrote it"))


@pytest.mark.parametrize("key", ["net", "generator_weights", "params"])
def test_mapping_of_tensors_is_found_under_any_key(key, tmp_path):
    content = {
        "loss": torch.tensor(1.5),
        key: STATE,
        "optimizer": {"state": {}},
        "ema": dict(STATE),
        "config": {"n_head": 2},
    }
    torch.save(content, tmp_path / "model.pt")
    checkpoint = load_checkpoint(str(tmp_path / "model.pt"))
    assert checkpoint.tensors.keys() == STATE.keys()
    assert checkpoint.config == {"n_head": 2}
    assert checkpoint.left_out["ema"] == "an EMA copy"


def test_two_mappings_of_tensors_are_not_chosen_between(tmp_path):
    torch.save({"generator": STATE, "critic": STATE}, tmp_path / "model.pt")
    assert_refused(tmp_path / "model.pt", "holds no tensors that are weights .* only 'generator', 'critic'")


@pytest.mark.parametrize("shape", [(2**40, 2**10), (2**20, 2**20)])
def test_tensor_of_more_numbers_than_are_stored_is_refused_at_once(shape, tmp_path):
    torch.save(STATE | {"big.weight": torch.zeros(1).expand(shape)}, tmp_path / "model.pt")
    assert_refused(tmp_path / "model.pt", "'big.weight' has the shape .* and holds 4 bytes for it")
    small = torch.ones(1, 4).expand(3, 4)
    torch.save(STATE | {"small.weight": small}, tmp_path / "model.pt")
    assert torch.equal(load_checkpoint(str(tmp_path / "model.pt")).tensors["small.weight"], small)


def sharded(folder, **places) -> Path:
    """The folder of a model in two files, with an index; `places` replace those of the index."""
    parts = {"head.weight": "model-00001-of-00002.safetensors", "head.bias": "model-00002-of-00002.safetensors"}
    for name, file in parts.items():
        save_file({name: STATE[name]}, folder / file)
    index = {"metadata": {}, "weight_map": parts | places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("named", [".", "model.safetensors.index.json"])
def test_model_in_several_files_is_joined(named, tmp_path):
    checkpoint = load_checkpoint(str(sharded(tmp_path) / named))
    assert_state(checkpoint.tensors)
    assert checkpoint.source["file"] == "model.safetensors.index.json"


def test_part_of_a_model_is_refused(tmp_path):
    folder = sharded(tmp_path)
    assert_refused(folder / "model-00001-of-00002.safetensors", "holds only a part of the model; pass the folder")
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert_refused(folder, r"names model-00002-of-00002\.safetensors, and there is no such file beside it")


def test_only_part_is_the_whole_model(tmp_path):
    save_file(STATE, tmp_path / "model-00001-of-00001.safetensors")
    assert_state(load_checkpoint(str(tmp_path / "model-00001-of-00001.safetensors")).tensors)


@pytest.mark.parametrize("outside", ["../model.safetensors", "/etc/passwd"])
def test_index_names_only_files_beside_it(outside, tmp_path):
    assert_refused(sharded(tmp_path, other=outside), "there is no such file beside it")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert_refused(tmp_path, "has no weight_map")


def test_tensor_in_two_files_is_refused(tmp_path):
    folder = sharded(tmp_path)
    save_file(STATE, folder / "model-00002-of-00002.safetensors")
    assert_refused(folder, "which another file of the model holds too")
