"""The modeling file against the canonical reference, which shares no line with it, and against itself."""

import pytest
import torch
from any_gpts import CONTEXT, VOCAB, any_gpts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fledge.checkpoints.canonical import CanonicalGPT, canonical_logits
from fledge.checkpoints.custom import to_custom
from fledge.custom import FILES, FledgeGPTConfig, check_custom_code, open_as_strangers_do
from fledge.custom.modeling_fledge_gpt import FledgeGPTForCausalLM
from fledge.errors import UserError
from fledge.exporting.gguf_file import write_gguf
from fledge.exporting.onnx_graph import write_onnx
from fledge.generation.answers import answer_each
from fledge.sampling import Sampling

pytestmark = pytest.mark.slow  # architectures are drawn at random

TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IDS = torch.randint(VOCAB, (3, CONTEXT), generator=torch.Generator().manual_seed(1))
TOLERANCE = 1e-9
many = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
some = settings(many, max_examples=20)


def filled(gpt: CanonicalGPT, dtype: torch.dtype = torch.float64) -> FledgeGPTForCausalLM:
    config, weights = to_custom(gpt, TOKEN_IDS)
    model = FledgeGPTForCausalLM(config).to(dtype)
    missing, unexpected = model.load_state_dict({name: x.to(dtype) for name, x in weights.items()}, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] if gpt.tied else [], [])
    model.tie_weights()
    return model.eval()


def error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return ((logits - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


@many
@given(any_gpts())
def test_each_architecture_computes_what_the_reference_does(gpt):
    expected = canonical_logits(gpt, IDS)
    with torch.no_grad():
        assert error(filled(gpt)(IDS, use_cache=False).logits, expected) < TOLERANCE


@some
@given(any_gpts(), st.integers(1, CONTEXT - 2), st.integers(1, 5))
def test_the_cache_changes_nothing_whatever_the_pieces_are(gpt, first, piece):
    model, cache, logits = filled(gpt), None, []
    with torch.no_grad():
        whole = model(IDS, use_cache=False).logits
        for begin, end in [(0, first), *((i, min(i + piece, CONTEXT)) for i in range(first, CONTEXT, piece))]:
            output = model(IDS[:, begin:end], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
    assert error(torch.cat(logits, dim=1), whole) < TOLERANCE


@some
@given(any_gpts(), st.integers(1, CONTEXT - 1), st.sampled_from(("left", "right")))
def test_padding_on_either_side_changes_no_text(gpt, length, side):
    model = filled(gpt)
    ids, mask = IDS[:2].clone(), torch.ones(2, CONTEXT, dtype=torch.long)
    text = slice(CONTEXT - length, None) if side == "left" else slice(length)
    mask[1] = 0
    mask[1, text] = 1
    ids[1, mask[1] == 0] = 0
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, use_cache=False).logits
        alone = model(ids[1:, text], use_cache=False).logits
    assert error(padded[1:, text], alone) < TOLERANCE
    assert padded.isfinite().all()


@some
@given(any_gpts(), st.integers(1, CONTEXT - 1))
def test_texts_packed_into_a_row_do_not_see_each_other(gpt, cut):
    model = filled(gpt)
    positions = torch.cat([torch.arange(cut), torch.arange(CONTEXT - cut)])[None]
    with torch.no_grad():
        packed = model(IDS[:1], position_ids=positions, use_cache=False).logits
        apart = [model(IDS[:1, part], use_cache=False).logits for part in (slice(cut), slice(cut, None))]
    assert error(packed, torch.cat(apart, dim=1)) < TOLERANCE


@some
@given(any_gpts())
def test_generate_in_a_batch_padded_on_the_left_equals_one_by_one(gpt):
    model, settings = filled(gpt), {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0}
    prompts = [IDS[0, :3], IDS[1, :7]]
    ids = torch.stack([torch.cat([torch.zeros(7 - len(p), dtype=torch.long), p]) for p in prompts])
    mask = torch.tensor([[0] * (7 - len(p)) + [1] * len(p) for p in prompts])
    together = model.generate(ids, attention_mask=mask, **settings)[:, 7:]
    for prompt, answer in zip(prompts, together, strict=True):
        alone = model.generate(prompt[None], attention_mask=torch.ones(1, len(prompt)).long(), **settings)
        assert alone[0, len(prompt) :].tolist() == answer.tolist()


class NoText:
    eos_token_id = None

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


@some
@given(any_gpts())
def test_fledges_own_answer_loop_agrees_with_generate(gpt):
    model = filled(gpt)
    prompts = [IDS[i, : 2 + 3 * i].tolist() for i in range(3)]
    sampling = Sampling(temperature=0.0, max_new_tokens=4)
    answers = dict(answer_each(model, NoText(), prompts, sampling, batch_size=2))
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        settings = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :]
        assert answers[i].text == " ".join(map(str, expected.tolist()))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@some
@given(any_gpts())
def test_gradients_reach_every_parameter_and_agree_when_checkpointed(gpt):
    gradients = []
    for checkpointing in (False, True):
        model = filled(gpt).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(IDS, labels=IDS).loss.backward()
        named = dict(model.named_parameters())
        idle = {name for name, parameter in named.items() if parameter.grad is None}
        assert all(".experts." in name for name in idle), idle  # an expert that no token chose
        gradients.append({name: p.grad for name, p in named.items() if name not in idle})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-12), name


@settings(some, max_examples=5)
@given(any_gpts())
def test_a_saved_folder_reads_back_by_the_file_beside_it(tmp_path_factory, gpt):
    folder = tmp_path_factory.mktemp("model")
    model = filled(gpt, torch.float32)
    model.save_pretrained(folder)
    assert all((folder / file.name).read_bytes() == file.read_bytes() for file in FILES)
    assert check_custom_code(folder)
    strangers = open_as_strangers_do(folder)
    assert type(strangers).__module__ != FledgeGPTForCausalLM.__module__
    with torch.no_grad():
        expected = model(IDS).logits  # bit for bit on most CPUs, but some products depend on where a tensor lies
        assert (strangers(IDS).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@settings(some, max_examples=5)
@given(any_gpts())
def test_new_tokens_get_rows_and_change_no_other_logit(gpt):
    model = filled(gpt, torch.float32)
    with torch.no_grad():
        before = model(IDS).logits
        model.resize_token_embeddings(VOCAB + 4)
        assert model.config.vocab_size == VOCAB + 4
        assert torch.allclose(model(IDS).logits[..., :VOCAB], before, atol=1e-5)


def test_no_export_writes_it(tmp_path):
    model = FledgeGPTForCausalLM(FledgeGPTConfig(parameters=["block.mlp_in.weight"]))
    with pytest.raises(UserError, match=r"transformers\.js has no fledge_gpt"):
        write_onnx(model, None, tmp_path, [])
    with pytest.raises(UserError, match="this model is a fledge_gpt"):
        write_gguf(model, None, tmp_path / "model.gguf", None)
    assert not [*tmp_path.iterdir()]
