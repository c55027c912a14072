import pytest
import torch
import torch.nn.functional as F
from hand_written import CONTEXT_LENGTH, HEADS, VARIANTS, VOCAB_SIZE, WIDTH, build, own_logits, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from fledge.checkpoints.canonical import ACTIVATIONS, CanonicalGPT, reference_logits
from fledge.checkpoints.gpt2 import fold_head_bias, to_gpt2
from fledge.checkpoints.layouts import recognise
from fledge.checkpoints.loading import Checkpoint, load_checkpoint

TOKEN_IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
IDS = torch.randint(VOCAB_SIZE, (3, CONTEXT_LENGTH), generator=torch.Generator().manual_seed(1))
UNTIED = ("per_head", "book", "book_qkv_bias")


def as_gpt2(gpt: CanonicalGPT) -> tuple[GPT2LMHeadModel, list[str]]:
    config, weights, folds = to_gpt2(gpt, TOKEN_IDS)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    model.load_state_dict(weights, assign=True, strict=True)
    model.tie_weights()
    return model.eval(), folds


@torch.no_grad()
def logits_of(model: GPT2LMHeadModel, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits


def save_bare(module, config, file):
    torch.save(module.state_dict(), file)


def save_as_its_author_does(module, config, file):
    state, optimizer = module.state_dict(), {"state": {}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.95)}]}
    if "block_size" in config:
        training = {"dataset": "stories", "learning_rate": 1e-3, "compile": True}
        content = {"model": state, "optimizer": optimizer, "model_args": config, "iter_num": 7, "best_val_loss": 1.5}
        content["config"] = training | {name: config[name] for name in ("n_layer", "n_head", "n_embd", "bias")}
    elif "qkv_bias" in config:
        content = {"model_state_dict": state, "optimizer_state_dict": optimizer}
    else:
        content = {"model_state_dict": state, "epoch": 3, "config": config}
    torch.save(content, file)


def save_compiled(module, config, file):
    state = {f"_orig_mod.{name}": tensor for name, tensor in module.state_dict().items()}
    torch.save({"model_state_dict": state, "config": config}, file)


def save_in_half_precision(module, config, file):
    torch.save({"model_state_dict": module.half().state_dict(), "config": config}, file)


@pytest.mark.parametrize("save", [save_bare, save_as_its_author_does, save_compiled, save_in_half_precision])
@pytest.mark.parametrize("variant", VARIANTS)
def test_converted_model_computes_what_the_hand_written_one_does(variant, save, tmp_path):
    module, config = build(variant)
    save(module, config, tmp_path / "model.pt")
    expected = own_logits(module, IDS)

    checkpoint = load_checkpoint(str(tmp_path / "model.pt"))
    gpt, _ = recognise(checkpoint, n_head=HEADS)
    model, _ = as_gpt2(gpt)
    assert model.config.tie_word_embeddings is (variant not in UNTIED)
    assert (reference_logits(gpt, IDS) - expected).abs().max() <= 1e-9
    assert (logits_of(model, IDS) - expected).abs().max() <= 1e-9

    model.float().save_pretrained(tmp_path / "base")
    saved = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval(), IDS)
    assert saved.dtype == torch.float32
    assert (saved - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(saved.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize(("width", "heads", "layers", "positions"), [(384, 6, 6, 512), (768, 12, 12, 128)])
def test_topic_ending_models_convert_at_their_real_sizes(width, heads, layers, positions):
    module, config = build("per_head", 50257, 512, width, heads, layers)
    generator = torch.Generator().manual_seed(2)
    nn.init.normal_(module.output_layer.bias, std=2, generator=generator)
    gpt, _ = recognise(Checkpoint(weights_of(module), config, left_out={}, source={}))
    model, folds = as_gpt2(gpt)
    assert len(folds) == 1
    assert "head's bias" in folds[0]

    ids = torch.randint(50257, (1, positions), generator=generator)
    expected, found = own_logits(module, ids), logits_of(model.float(), ids)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@st.composite
def canonical_gpts(draw) -> CanonicalGPT:
    n_head, head_width, n_layer = draw(st.integers(1, 4)), draw(st.integers(1, 8)), draw(st.integers(1, 3))
    width, vocab_size, mlp_width = n_head * head_width, draw(st.integers(1, 40)), draw(st.integers(1, 48))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * shape[-1] ** -0.5

    roles = {"norm_1": (width,), "norm_2": (width,), "mlp_in": (mlp_width, width), "mlp_out": (width, mlp_width)}
    roles |= dict.fromkeys(("query", "key", "value", "output"), (width, width))
    if draw(st.booleans()):
        del roles["output"]
    biased = {role for role in (*roles, "final_norm") if draw(st.booleans())}
    shapes = {f"blocks.{n}.{role}": shape for n in range(n_layer) for role, shape in roles.items()}
    tensors = {"token_embedding.weight": random(vocab_size, width)}
    tensors["position_embedding.weight"] = random(draw(st.integers(1, 12)), width)
    for name, shape in (shapes | {"final_norm": (width,)}).items():
        tensors[f"{name}.weight"] = random(*shape) + (len(shape) == 1)
        if name.rsplit(".", 1)[-1] in biased:
            tensors[f"{name}.bias"] = random(shape[0])
    tied = draw(st.booleans())
    tensors["head.weight"] = tensors["token_embedding.weight"] if tied else random(vocab_size, width)
    if draw(st.booleans()):
        tensors["head.bias"] = random(vocab_size)
    return CanonicalGPT(
        tensors=tensors,
        n_layer=n_layer,
        n_head=n_head,
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        attention_scale=draw(st.sampled_from([head_width**-0.5, width**-0.5, 1.0, 0.3])),
        norm_eps=1e-5,
        tied=tied,
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(canonical_gpts(), st.integers(0, 2**32))
def test_gpt2_holds_every_canonical_gpt_exactly(gpt, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(gpt.vocab_size, (2, gpt.context_length), generator=generator)
    model, _ = as_gpt2(gpt)
    assert model.config.tie_word_embeddings is (gpt.tied and "head.bias" not in gpt.tensors)
    assert (logits_of(model, ids) - reference_logits(gpt, ids)).abs().max() <= 1e-9


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 50), st.integers(1, 64), st.sampled_from([0.0, 0.2, 0.9, 1.0]), st.integers(0, 2**32))
def test_folded_head_bias_changes_no_logit(vocab_size, width, share_of_zero_gains, seed):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    head, head_bias, shift, x = random(vocab_size, width), 2 * random(vocab_size), random(width), random(32, width)
    gain = random(width) * (torch.rand(width, generator=generator) >= share_of_zero_gains)
    expected = F.linear(F.layer_norm(x, (width,), gain, shift), head, head_bias)
    new_head, new_gain, new_shift = fold_head_bias(head, head_bias, gain, shift)
    found = F.layer_norm(x, (width,), new_gain, new_shift) @ new_head.T
    assert (found - expected).abs().max() <= 1e-10
    assert new_gain.count_nonzero() == width - 1
    assert new_shift.count_nonzero() == 1


def test_head_bias_goes_where_the_subtraction_loses_least():
    head, gain = torch.ones(5, 4), torch.tensor([1.0, -0.1, 0.5, 3.0])
    head[:, 2] = 0.01
    _, new_gain, new_shift = fold_head_bias(head, torch.ones(5), gain, torch.zeros(4))
    assert new_gain.tolist() == [1, 1, 0, 1]
    assert new_shift.tolist() == [0, 0, 1, 0]


def test_folding_leaves_its_inputs_alone():
    tensors = [torch.randn(shape) for shape in ((5, 4), (5,), (4,), (4,))]
    before = [tensor.clone() for tensor in tensors]
    fold_head_bias(*tensors)
    assert all(torch.equal(*pair) for pair in zip(tensors, before, strict=True))


def test_missing_output_projection_and_other_attention_scale_are_folded():
    module, config = build("per_head")
    for block in module.blocks:
        block.mha.out_proj = nn.Identity()
        for head in block.mha.heads:
            head.scale = WIDTH**-0.5
    gpt, facts = recognise(Checkpoint(weights_of(module), config, left_out={}, source={}), attention_scale=WIDTH**-0.5)
    model, folds = as_gpt2(gpt)
    assert (logits_of(model, IDS) - own_logits(module, IDS)).abs().max() <= 1e-9
    assert {fact.name: fact.source for fact in facts}["attention_scale"] == "--attention_scale"
    assert any("output projection" in fold for fold in folds)
    assert any("attention scale" in fold for fold in folds)


@pytest.mark.parametrize(("variant", "said"), [("scratch", True), ("book", True), ("nanogpt", False)])
def test_absent_biases_are_named(variant, said):
    module, _ = build(variant)
    gpt, _ = recognise(Checkpoint(weights_of(module), {}, left_out={}, source={}), n_head=HEADS)
    assert any("zeros" in fold for fold in to_gpt2(gpt, TOKEN_IDS)[2]) is said


@pytest.mark.parametrize(("mlp_width", "n_inner"), [(4 * WIDTH, None), (WIDTH, WIDTH)])
def test_config_holds_what_the_checkpoint_shows(mlp_width, n_inner):
    module, _ = build("nanogpt")
    for block in module.transformer.h:
        block.mlp.c_fc, block.mlp.c_proj = nn.Linear(WIDTH, mlp_width), nn.Linear(mlp_width, WIDTH)
    gpt, _ = recognise(Checkpoint(weights_of(module), {}, left_out={}, source={}), n_head=HEADS)
    config = to_gpt2(gpt, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3})[0]
    assert (config.vocab_size, config.n_positions, config.n_embd) == (VOCAB_SIZE, CONTEXT_LENGTH, WIDTH)
    assert (config.n_head, config.n_layer, config.n_inner) == (HEADS, 2, n_inner)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 3)
    assert config.activation_function == "gelu"
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0, 0, 0)
