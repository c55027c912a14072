"""Code bases of the kind that people write, each with one difficulty, and what --reference makes of them."""

import json
import textwrap

import pytest
import torch
from hand_written import build, checkpoint_of, own_logits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fledge.checkpoints.author.reference import load_reference
from fledge.checkpoints.loading import Checkpoint
from fledge.errors import UserError

pytestmark = pytest.mark.slow  # each test builds the modules of an author

V, D, T, LAYERS, HEADS = 13, 12, 8, 2, 3

PARTS = """
import math
import torch
import torch.nn as nn
import torch.nn.functional as F

class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.drop = nn.Dropout(0.5)

    def forward(self, x, mask=None):
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if mask is None:
            mask = torch.ones(x.shape[1], x.shape[1]).tril()
        scores = scores.masked_fill(mask == 0, float("-inf"))
        return (self.drop(scores.softmax(-1)) @ v).transpose(1, 2).flatten(2)

class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attn, self.norm = Attention(width, heads), nn.LayerNorm(width)

    def forward(self, x, mask=None):
        return x + self.attn(self.norm(x), mask)
"""
BODY = """
        super().__init__()
        self.tok = nn.Embedding({vocab}, {width})
        self.pos = nn.Embedding({context}, {width})
        self.blocks = nn.ModuleList([Block({width}, {heads}) for _ in range({layers})])
        self.head = nn.Linear({width}, {vocab})
"""
FORWARD = """
    def forward(self, ids):
        x = self.tok(ids) + self.pos(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(x)
"""


def model(signature: str, forward: str = FORWARD, before: str = "", **names: str) -> str:
    """A model's class whose constructor takes `signature` and calls its sizes by `names`."""
    usual = {"vocab": "vocab_size", "width": "n_embd", "context": "block_size", "heads": "n_head", "layers": "n_layer"}
    body = BODY.format(**(usual | names))
    return f"{before}\nclass GPT(nn.Module):\n    def __init__(self{signature}):{body}{forward}"


ARGUMENTS = ", vocab_size, n_embd, block_size, n_layer, n_head=3"
GLOBALS = model("", before=f"n_embd, n_layer, n_head = {D}, {LAYERS}, {HEADS}\nblock_size = {T}\n")


@pytest.fixture(scope="module")
def weights() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    namespace: dict = {}
    exec(PARTS + model(ARGUMENTS), namespace)
    torch.manual_seed(3)
    module = namespace["GPT"](V, D, T, LAYERS, HEADS)
    return module.double().eval(), {name: tensor.float() for name, tensor in module.float().state_dict().items()}


def checkpoint(weights, **config) -> Checkpoint:
    return Checkpoint(weights[1], config, {}, {})


def write(folder, files: dict[str, str]) -> str:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(content), encoding="utf-8")
    return str(folder)


def assert_own(author, weights) -> None:
    ids = torch.tensor([[1, 5, 2, 7, 3, 11]])
    expected, found = weights[0].double()(ids), author(ids)
    assert (found - expected[:, -found.shape[1] :]).abs().max() <= 1e-12


TRAINING = """
import wandb, IPython.display, tiktoken
from torchtext_of_another_time import datasets
text = open("C:/Users/me/input.txt").read()
chars = sorted(set(text))
vocab_size = len(chars)
device = "cuda"
wandb.init(project="gpt")
"""
AFTER = """
model = GPT().to(device)
raise SystemExit("trained when it was imported")
"""
CONFIG = """
from dataclasses import dataclass
@dataclass
class Settings:
    vocab_size: int
    n_embd: int = 12
    block_size: int = 1024
    n_layer: int = 2
    n_head: int = 3
"""
LAST = FORWARD.replace("return self.head(x)", "return self.head(x[:, -1])")
NEEDS_MASK = """
    def forward(self, ids, mask):
        x = self.tok(ids) + self.pos(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x)
"""
WITH_LOSS = FORWARD.replace("ids):", "ids, targets=None):").replace("return self.head(x)", "return self.head(x), None")
TAKES_TARGETS = FORWARD.replace("ids):", "ids, targets):").replace(
    "return self.head(x)",
    "x = self.head(x).flatten(0, 1)\n        return F.cross_entropy(x, targets.view(-1)), x",
)
DROPS = FORWARD.replace("return self.head(x)", "return self.head(F.dropout(x, 0.5, training=True))")
ON_GPU = FORWARD.replace("torch.arange(ids.shape[1])", "torch.arange(ids.shape[1], device='cuda')").replace(
    "return self.head(x)", "return self.head(x.cuda().to('cuda:0'))"
)
NARROW = FORWARD.replace("return self.head(x)", "return self.head(x.float().to(torch.float32).type_as(x))")
FIXED_LENGTH = FORWARD.replace("self.pos(torch.arange(ids.shape[1]))", "self.pos.weight")
IN_DICT = FORWARD.replace("return self.head(x)", "return {'logits': self.head(x)}")
READS_FIELD = "        self.config = config\n" + FORWARD.replace(
    "self.head(x)", "self.head(-x if self.config.debug else x)"
)
COUNTED = "        self.table = torch.tensor([math.cos(x) for x in torch.arange(4.0)])\n" + FORWARD
OR_ANOTHER = """
try:
    from fused_kernels import LayerNorm
except ModuleNotFoundError:
    from torch.nn import LayerNorm
"""
KEYS = ("vocab", "width", "context", "layers", "heads")
OBJECT = {key: f"config.{name}" for key, name in {
    "vocab": "vocab_size", "width": "n_embd", "context": "block_size", "heads": "n_head", "layers": "n_layer"
}.items()}  # fmt: skip
DICT = {key: value.replace("config.", "config['") + "']" for key, value in OBJECT.items()}
CODE = {
    "arguments": {"m.py": PARTS + model(ARGUMENTS)},
    "keyword only": {"m.py": PARTS + model(", *, vocab_size, n_embd, block_size, n_layer, n_head=3")},
    "globals": {"train.py": PARTS + TRAINING + GLOBALS + AFTER},
    "other globals": {"train.py": PARTS + TRAINING + GLOBALS.replace("= 12, 2, 3", "= 384, 6, 3") + AFTER},
    "command line": {
        "train.py": PARTS
        + "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('--n_head', type=int, default=3)\n"
        + "parser.add_argument('-block', required=True)\nargs = parser.parse_args()\nblock_size = args.block\n"
        + "n_head = args.n_head\n"
        + model(", vocab_size, n_embd, n_layer")
    },
    "dataclass": {"m.py": PARTS + CONFIG + model(", config: Settings", **OBJECT)},
    "dict": {"m.py": PARTS + model(", config", **DICT) + "\nGPT(dict(n_head=3))"},
    "object": {"m.py": PARTS + model(", config", **OBJECT) + "\nx = dict(n_head=3)"},
    "field of the forward": {
        "m.py": PARTS + model(", config", READS_FIELD, **OBJECT) + "\nx = dict(n_head=3, debug=False)"
    },
    "package or another": {"m.py": OR_ANOTHER + PARTS.replace("nn.LayerNorm", "LayerNorm") + model(ARGUMENTS)},
    "number by number": {"m.py": PARTS + model(ARGUMENTS, COUNTED)},
    "package": {
        "src/net/blocks.py": PARTS,
        "src/net/__init__.py": "from net.gpt import GPT",
        "src/net/gpt.py": "import torch\nfrom torch import nn\nfrom .blocks import Block\n" + model(ARGUMENTS),
    },
    "another root": {
        "Models/blocks.py": PARTS,
        "run.py": "import torch\nfrom torch import nn\nfrom models.blocks import *\n" + model(ARGUMENTS),
    },
    "positional call": {"m.py": PARTS + model(", a, b, c, d, e", **dict(zip(KEYS, "abcde", strict=True)))
                        + "\nmodel = GPT(13, 12, 8, 2, 3)"},
    "notebook": {
        "a.ipynb": json.dumps({"cells": [
            {"cell_type": "markdown", "source": ["# GPT"]},
            {"cell_type": "code", "source": ["!pip install torch\n", "%matplotlib inline\n", PARTS]},
            {"cell_type": "code", "source": [TRAINING, GLOBALS, AFTER]},
        ]})
    },
    "later Python": {"m.py": PARTS + model(ARGUMENTS) + "\nfor x in y:\n    print(f'{x['a']}' 'b' 3 4)\n"},
    "logits and loss": {"m.py": PARTS + model(ARGUMENTS, WITH_LOSS)},
    "targets needed": {"m.py": PARTS + model(ARGUMENTS, TAKES_TARGETS)},
    "a dict of logits": {"m.py": PARTS + model(ARGUMENTS, IN_DICT)},
    "last position": {"m.py": PARTS + model(ARGUMENTS, LAST)},
    "mask needed": {"m.py": PARTS + model(ARGUMENTS, NEEDS_MASK)},
    "dropout left on": {"m.py": PARTS + model(ARGUMENTS, DROPS)},
    "cuda": {"m.py": PARTS + model(ARGUMENTS, ON_GPU)},
    "float32 inside": {"m.py": PARTS + model(ARGUMENTS, NARROW)},
    "fixed length": {"m.py": PARTS + model(ARGUMENTS, FIXED_LENGTH)},
    "compiled": {"m.py": PARTS + "@torch.compile\n" + model(ARGUMENTS).lstrip()},
    "two copies": {"m.py": PARTS + model(ARGUMENTS), "old/m.py": PARTS + model(ARGUMENTS)},
    "wrapped": {"m.py": PARTS + model(ARGUMENTS) + "\nclass Lit(nn.Module):\n    def __init__(self): self.m = GPT()"},
}  # fmt: skip


@pytest.mark.parametrize("code", CODE)
def test_folder_is_enough(code, weights, tmp_path, capsys):
    author = load_reference(write(tmp_path, CODE[code]), None, checkpoint(weights))
    assert_own(author, weights)
    assert "--reference runs GPT of " in capsys.readouterr().out


def test_class_may_be_named_and_values_given(weights, tmp_path):
    folder = write(tmp_path, {"m.py": PARTS + model(ARGUMENTS.replace("=3", "=4")) + "\nclass Other: pass"})
    given = json.dumps({"n_head": 3})
    for spec in (f"{folder}/m.py:GPT", f"{folder}/m.py", folder):
        assert_own(load_reference(spec, given, checkpoint(weights)), weights)
        assert_own(load_reference(spec, None, checkpoint(weights, num_heads=3)), weights)
        assert_own(load_reference(spec, None, checkpoint(weights), {"n_head": 3}), weights)


def test_heads_that_nothing_states_are_asked_for(weights, tmp_path):
    folder = write(tmp_path, {"m.py": PARTS + model(ARGUMENTS.replace("=3", ""))})
    with pytest.raises(UserError, match=r"with n_head .*different logits.*neither the checkpoint nor the code says"):
        load_reference(folder, None, checkpoint(weights))


def test_two_classes_that_differ_are_asked_about(weights, tmp_path):
    other = PARTS.replace("math.sqrt(q.shape[-1])", "math.sqrt(x.shape[-1])")
    folder = write(tmp_path, {"a.py": PARTS + model(ARGUMENTS), "b.py": other + model(ARGUMENTS)})
    with pytest.raises(UserError, match=r"a\.py:GPT and b\.py:GPT both have .* FILE:CLASS"):
        load_reference(folder, None, checkpoint(weights))
    assert_own(load_reference(f"{folder}/a.py", None, checkpoint(weights)), weights)


def test_padding_is_left_out(weights, tmp_path):
    padded = FORWARD.replace(
        "x = block(x)",
        "x = block(x, (ids != self.pad_id)[:, None, None] * torch.ones(1, 1, ids.shape[1], ids.shape[1]).tril())",
    )
    folder = write(
        tmp_path, {"m.py": PARTS + model(ARGUMENTS + ", pad_id=2", "        self.pad_id = pad_id\n" + padded)}
    )
    author = load_reference(folder, None, checkpoint(weights))
    assert author.avoid == {2}
    ids = author.without_padding(torch.tensor([[2, 1, 2, 5]]))
    assert (author(ids) - weights[0].double()(ids)).abs().max() <= 1e-12


@pytest.mark.parametrize(
    ("said", "length"),
    [
        ("block_size = 6", (6, "block_size, m.py")),
        ("max_len = 40", (40, "max_len, m.py")),
        ("block_size = 6\nmax_len = 40", (6, "block_size, m.py")),
        ("block_size = 6\nCONFIG = {'block_size': 7}", None),
        ("", None),
    ],
)
def test_code_says_how_long_the_context_is(said, length, weights, tmp_path):
    code = model(ARGUMENTS.replace("block_size", "rows"), context="rows")
    folder = write(tmp_path, {"m.py": f"{said}\n{PARTS}{code}"})
    assert load_reference(folder, None, checkpoint(weights)).context_length == length


def test_nothing_but_definitions_runs(weights, tmp_path):
    marker = tmp_path / "ran"
    write = f"open({str(marker)!r}, 'w').write('x')"
    code = f"{write}\nn_layer = {write} or 2\n{PARTS}{model(ARGUMENTS)}\n{write}\nif True:\n    {write}\n"
    (tmp_path / "m.py").write_text(code, encoding="utf-8")
    assert_own(load_reference(str(tmp_path), None, checkpoint(weights)), weights)
    assert not marker.exists()


NAMES = {
    "vocab": ["vocab_size", "n_vocab", "vocabulary_size", "num_tokens"],
    "width": ["n_embd", "d_model", "embed_dim", "emb_size", "hidden_size", "dim"],
    "context": ["block_size", "max_len", "context_length", "seq_len", "n_positions"],
    "layers": ["n_layer", "num_layers", "depth", "n_blocks"],
    "heads": ["n_head", "num_heads", "nhead", "heads"],
}


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_constructor_is_solved(data, weights, tmp_path_factory):
    names = {key: data.draw(st.sampled_from(choices)) for key, choices in NAMES.items()}
    order = data.draw(st.permutations(list(names)))
    defaults = data.draw(st.sampled_from([0, 1, 2, 3]))
    wrong = {"vocab": 50257, "width": 768, "context": 1024, "layers": 12, "heads": 3}
    has_default = order[len(order) - defaults :]
    written = [names[key] + (f"={wrong[key]}" if key in has_default else "") for key in order]
    # Where the code states another width or depth, its number of heads is another model's.
    is_stated = "heads" in has_default and not {"width", "layers"} & {*has_default}
    kwargs = None if is_stated else json.dumps({names["heads"]: 3})
    folder = write(tmp_path_factory.mktemp("code"), {"m.py": PARTS + model(", " + ", ".join(written), **names)})
    assert_own(load_reference(folder, kwargs, checkpoint(weights)), weights)


@pytest.mark.parametrize(
    ("code", "kwargs", "reason"),
    [
        ("x = 1", None, "no class there sets blocks, head, pos, tok"),
        ("class Other:\n    pass", None, "found were Other; name the file"),
        ("def broken(:", None, "found were no classes"),
        (PARTS + model(ARGUMENTS).replace("self.head =", "self.extra = nn.Linear(3, 3); self.head ="), None,
         r"GPT comes nearest, with .* differs in extra\.weight \(only in the code\)"),
        (PARTS + model(ARGUMENTS), '{"n_embd": 16}', r"comes nearest.* and not \("),
        (PARTS + model(ARGUMENTS, FORWARD.replace("x = block(x)", "1 / 0")), None, "in its forward: ZeroDivisionError"),
        (PARTS + model(ARGUMENTS, FORWARD.replace("return self.head(x)", "return None")), None, "must return logits"),
        (PARTS + model(", stranger" + ARGUMENTS).replace("self.head =", "self.head = stranger + [] or"), None,
         r"cannot be built from .*TypeError.*--reference_kwargs"),
        (PARTS + model(ARGUMENTS), "{n_embd: 24}", "--reference_kwargs is no JSON object"),
        (PARTS + model(ARGUMENTS), "[1, 2]", "--reference_kwargs is no JSON object"),
    ],
)  # fmt: skip
def test_what_does_not_work_is_refused_in_one_sentence(code, kwargs, reason, weights, tmp_path):
    with pytest.raises(UserError, match=reason) as refused:
        load_reference(write(tmp_path, {"m.py": code}), kwargs, checkpoint(weights))
    assert "\n" not in str(refused.value)


def test_file_that_is_no_python_is_named_with_its_line(weights, tmp_path):
    """Of a file with the marks of an unfinished merge, the class that is left may lack what the other half has."""
    half = PARTS.replace("nn.LayerNorm(width)", "nn.Identity()")
    merged = f"<<<<<<< HEAD\n{PARTS}\n=======\n{half}\n>>>>>>> 598debe62758f52f88afd9708e3b31a0f870ae91\n"
    folder = write(tmp_path, {"parts.py": merged, "m.py": "from parts import *\n" + model(ARGUMENTS)})
    with pytest.raises(UserError, match=r"no Python: parts\.py \(line 1, <<<<<<< HEAD\)"):
        load_reference(folder, None, checkpoint(weights))


@pytest.mark.parametrize("spec", ["", "my_model", "my_model.py", "no_such.py:GPT", ":GPT", "/:GPT"])
def test_reference_that_names_no_file_is_refused(spec, weights):
    with pytest.raises(UserError, match="must be FILE, FILE:CLASS or a folder"):
        load_reference(spec, None, checkpoint(weights))


def test_class_that_a_file_does_not_define_is_named(weights, tmp_path):
    with pytest.raises(UserError, match=r"m\.py defines no Net; it has Attention, Block, GPT"):
        load_reference(write(tmp_path, {"m.py": PARTS + model(ARGUMENTS)}) + "/m.py:Net", None, checkpoint(weights))


def test_names_that_the_package_of_the_tests_defines_can_be_reached(tmp_path):
    module, config = build("nanogpt")
    (tmp_path / "m.py").write_text("from hand_written import NanoGPT as Model", encoding="utf-8")
    author = load_reference(f"{tmp_path}/m.py:Model", None, checkpoint_of(module, config))
    ids = torch.arange(8)[None]
    assert (author(ids) - own_logits(module, ids)).abs().max() <= 1e-9


def test_heads_of_another_size_of_the_code_are_asked_for(weights, tmp_path):
    other = ", vocab_size=13, n_embd=24, block_size=8, n_layer=6, n_head=2"
    (tmp_path / "m.py").write_text(PARTS + model(other))
    with pytest.raises(UserError, match=r"with n_head 2; .*n_head 3; .*neither the checkpoint nor the code says which"):
        load_reference(str(tmp_path), None, checkpoint(weights))
    assert_own(load_reference(str(tmp_path), json.dumps({"n_head": HEADS}), checkpoint(weights)), weights)


def test_forward_with_random_numbers_is_doubted(weights, tmp_path):
    (tmp_path / "m.py").write_text(PARTS + model(ARGUMENTS, FORWARD.replace("block(x)", "block(x + torch.randn(1))")))
    assert "random" in load_reference(str(tmp_path), None, checkpoint(weights)).doubt
