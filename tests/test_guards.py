import ast
import copy
import re
from collections import Counter
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT
from small import random_rows, small_gpt2, small_tokenizer, trainer_for
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from transformers import Cache, PreTrainedModel, Trainer, TrainerCallback
from trl import SFTTrainer, TrlParser
from typing_extensions import override

from fledge.errors import UserError
from fledge.generation import answers
from fledge.guards import borrow, check_overrides
from fledge.models import attention_of
from fledge.sampling import Sampling
from fledge.training import sharding, trainer
from fledge.training.lineage import Lineage, load_optimizer
from fledge.training.loss import has_fused_head
from fledge.training.trainer import InstructTrainer, prepare_model
from fledge.training.trial import time_needed

LIBRARIES = ("torch", "transformers", "trl", "datasets", "accelerate", "peft")
# Each name that Fledge uses and a library calls private: at how many places, and what is done where it is missing.
PRIVATE = {
    "_linear_pointwise": (1, "fledge.generation.onednn.works() tries it; layers then multiply as they did"),
    "_reorder_linear_weight": (1, "as before"),
    "_supports_attention_backend": (2, "transformers documents it; without it in a model, can_group() is False"),
    "_is_mkldnn_bf16_supported": (1, "fledge.cpu.multiplies_bf16() then goes by the processor's flags alone"),
    "_attn_implementation": (2, "fledge.models.attention_of() is then None; FledgeGPT attends by its own code"),
    "_last_lr": (1, "is written and never read: what the log says of one step"),
    "_from_accelerator": (1, "a UserError"),
    "_total_train_tokens": (3, "a UserError before training, by start_from()"),
    "_load_optimizer_and_scheduler": (2, "check_overrides"),
    "_get_grad_norm": (2, "check_overrides"),
    "_save_checkpoint": (2, "check_overrides"),
    "_get_per_token_logps_and_entropies": (2, "check_overrides"),
    "_get_train_sampler": (2, "check_overrides"),
    "_prepare_dataset": (1, "check_overrides"),
    "_precompute_ref_logps": (1, "check_overrides"),
    "_set_signature_columns_if_needed": (2, "check_overrides"),
    "_signature_columns": (2, "transformers' Trainer has had it for years; without it a row's length gives an error"),
    "_prepare_inputs": (2, "check_overrides"),
    "_buffered_inputs": (7, "a UserError when the trainer is made"),
    "_remove_final_layer_norm": (1, "a key of OPT's config.json; the proof of equal logits refuses a model without it"),
    **dict.fromkeys(
        ("_init_weights", "_no_split_modules", "_skip_keys_device_placement", "_supports_sdpa", "_tied_weights_keys"),
        (1, "what each modeling file of transformers says of its model; the proof refuses one that opens otherwise"),
    ),
    # Python's own.
    "_actions": (4, "argparse has had it under this name in every release"),
    "_Unpickler": (2, "the unpickler in Python, which Python's own tests use under this name"),
}
# Modules of the libraries that their documentation does not list, and what is done where they are missing.
UNLISTED: dict[str, str] = {
    "peft.tuners.lora": "LoRA's layers and their merge(), which the developer guides of PEFT name",
    "transformers.pytorch_utils": "Conv1D, of GPT-2 since its first release",
    "transformers.generation.streamers": "BaseStreamer, the base of the documented streamers",
    "transformers.dynamic_module_utils": "how trust_remote_code opens a model",
    "transformers.modeling_layers": "as each modeling file of transformers does",
    "transformers.modeling_utils": "as each modeling file of transformers does",
}
LISTED = (
    "accelerate.state", "accelerate.utils", "datasets.utils.logging", "torch.distributed.fsdp",
    "torch.distributed.tensor", "torch.nn.functional", "torch.nn.utils.rnn", "torch.optim.lr_scheduler",
    "torch.overrides",
    "torch.utils.data", "transformers.cache_utils", "transformers.integrations", "transformers.modeling_outputs",
    "transformers.trainer_callback", "transformers.trainer_utils", "transformers.utils",
)  # fmt: skip


DOCUMENTED = ("_exit", "_replace")  # by Python, for `os` and for named tuples
# Classes whose methods Fledge overrides, and does not mean to add to.
BASES = (SFTTrainer, Trainer, TrainerCallback, TrlParser, Cache)


OF_LIBRARY = {name for base in (*BASES, PreTrainedModel) for name in dir(base)}


@cache
def trees() -> list[ast.Module]:
    files = [*(ROOT / "fledge").rglob("*.py"), *ROOT.glob("*.py")]
    return [ast.parse(file.read_text(encoding="utf-8")) for file in files]


def is_private(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"_[A-Za-z]\w*", name) is not None


def last_names(node: ast.AST) -> list[str]:
    """The last two names of `a.b.c`; `ast.unparse` takes seconds for a package."""
    if isinstance(node, ast.Attribute):
        return [*last_names(node.value), node.attr][-2:]
    return [node.id] if isinstance(node, ast.Name) else []


def of_library(tree: ast.Module) -> tuple[set[str], list[ast.ClassDef]]:
    """The names that a module imports from a library, and its classes that inherit from one."""
    names, classes = set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            names.update(a.asname or a.name for a in node.names if a.name.split(".")[0] in LIBRARIES)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).split(".")[0] in names for base in node.bases):
            classes.append(node)
            names.add(node.name)
    return names, classes


def is_override(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and any(ast.unparse(mark) == "override" for mark in node.decorator_list)


def own_names(tree: ast.Module) -> set[str]:
    """Private names that Fledge gives: functions, methods, fields, and attributes of classes that are its alone."""
    found, (_, inheriting) = set(), of_library(tree)
    hooks = [node for cls in inheriting for node in cls.body if getattr(node, "name", None) in OF_LIBRARY]
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not is_override(node) and node not in hooks:
            found.add(node.name)
        if isinstance(node, ast.Call) and last_names(node.func) == ["__dict__", "update"]:
            found.update(keyword.arg for keyword in node.keywords)
        if isinstance(node, (ast.ClassDef, ast.Module)) and node not in inheriting:
            for part in ast.walk(node) if isinstance(node, ast.ClassDef) else node.body:
                targets = part.targets if isinstance(part, ast.Assign) else [getattr(part, "target", None)]
                found.update(t.id for t in targets if isinstance(t, ast.Name))
                found.update(t.attr for t in targets if isinstance(t, ast.Attribute) and ast.unparse(t.value) == "self")
    return {name for name in found if is_private(name)}


def used_names(tree: ast.Module) -> Counter:
    """Private names at the places where a library might be meant: attributes, imports, keywords, text in `getattr`."""
    found: Counter = Counter()
    for cls in of_library(tree)[1]:
        named = [n.name for n in cls.body if isinstance(n, ast.FunctionDef) and not is_override(n)]
        named += [n.targets[0].id for n in cls.body if isinstance(n, ast.Assign)]
        found.update(OF_LIBRARY.intersection(named))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found[node.attr] += 1
        elif is_override(node):
            found[node.name] += 1
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
            found.update([*node.module.split("."), *(alias.name for alias in node.names)])
        elif isinstance(node, ast.Call):
            found.update(keyword.arg for keyword in node.keywords)
            if last_names(node.func) in (["getattr"], ["hasattr"], ["setattr"]):
                found[getattr(node.args[1], "value", None)] += 1
        elif isinstance(node, ast.Compare):
            found[getattr(node.left, "value", None)] += isinstance(node.left, ast.Constant)
    return Counter({name: n for name, n in found.items() if is_private(name) and name not in DOCUMENTED})


@pytest.mark.slow
def test_every_private_name_of_a_library_is_known_and_guarded():
    own = set().union(*map(own_names, trees())) - PRIVATE.keys()
    used = sum(map(used_names, trees()), Counter())
    assert {name: count for name, count in used.items() if name not in own} == {
        name: count for name, (count, _) in PRIVATE.items()
    }


@pytest.mark.parametrize(
    "code",
    [
        "schedule._hidden",
        "super()._hidden(model)",
        "from torch.utils import _hidden",
        "from torch._hidden import device",
        "import torch\ntorch.ops.mkldnn._hidden()",
        "State(cpu=True, _hidden=True)",
        "getattr(model.config, '_hidden', None)",
        "'_hidden' in vars(trainer)",
        "from trl import SFTTrainer\nclass Mine(SFTTrainer):\n    @override\n    def _hidden(self): pass",
        "from trl import SFTTrainer\nclass Mine(SFTTrainer):\n    def start(self): self._hidden = 0",
    ],
)
def test_an_access_to_a_private_name_is_seen(code):
    tree = ast.parse(code)
    assert used_names(tree).keys() - own_names(tree) == {"_hidden"}


@pytest.mark.slow
def test_every_unlisted_module_of_a_library_is_known():
    modules = {
        node.module
        for tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and "." in (node.module or "") and node.module.split(".")[0] in LIBRARIES
    }
    assert modules - {*LISTED} == UNLISTED.keys()


@pytest.mark.slow
def test_every_override_of_a_trainer_or_a_callback_is_checked():
    for tree in trees():
        for cls in of_library(tree)[1]:
            base = next((kind for kind in BASES if kind.__name__ == ast.unparse(cls.bases[0])), object)
            methods = [node for node in cls.body if isinstance(node, ast.FunctionDef) and hasattr(base, node.name)]
            if methods := [node for node in methods if node.name not in dir(object)]:
                assert all(map(is_override, methods)), cls.name
                assert "check_overrides" in map(ast.unparse, cls.decorator_list), cls.name


class Earlier:
    def step(self, inputs, count=None):
        return inputs

    def save(self, **keywords):
        return keywords


class Later(Earlier):
    def step(self, *args, **kwargs):
        return super().step(*args, **kwargs)


def test_an_override_that_overrides_is_left_as_it_is():
    @check_overrides
    class Mine(Later):
        @override
        def step(self, inputs, count=None):
            return super().step(inputs, count) + 1

        @override
        def save(self, folder=None, **keywords):
            return folder

        def own(self, anything):
            return anything

    assert Mine().step(1) == 2


@pytest.mark.parametrize(
    ("base", "lost"),
    [
        (type("Base", (), {}), "Base.step"),
        (type("Base", (), {"step": lambda self: None}), r"Base.step\(inputs\)"),
        (type("Base", (Later,), {"step": lambda self, inputs: None}), r"Base.step\(count\)"),
        (type("Base", (Later,), {"__doc__": "", "step": lambda self, inputs, *rest: None}), r"Base.step\(count\)"),
    ],
)
def test_an_override_that_no_longer_overrides_is_refused(base, lost, monkeypatch):
    base.__module__ = "trl.trainer.sft_trainer"
    with pytest.raises(UserError, match=rf"^trl \d\S* has no {lost}, which Fledge builds on; install an earlier trl, "):

        @check_overrides
        class Mine(base):
            @override
            def step(self, inputs, count=None):
                return inputs


@pytest.mark.parametrize("name", ["core_model_loading.gone", "gone.revert_weight_conversion"])
def test_what_is_borrowed_and_gone_is_named(name):
    module, _, attribute = f"transformers.{name}".rpartition(".")
    with pytest.raises(UserError, match=rf"^transformers \d\S* has no {module}.{attribute}, which Fledge builds on"):
        borrow(module, attribute)
    assert borrow("transformers.core_model_loading", "revert_weight_conversion")


def test_tokens_that_trl_no_longer_counts_stop_a_run_before_it_begins():
    with pytest.raises(UserError, match=r"^trl \d\S* has no SFTTrainer._total_train_tokens, which"):
        object.__new__(InstructTrainer).start_from(None)


def test_an_accelerate_that_makes_its_state_otherwise_is_named(monkeypatch):
    def state(mixed_precision=None, cpu=False, dynamo_plugin=None):
        return AcceleratorState

    config = SimpleNamespace(
        use_cpu=True,
        world_size=2,
        fsdp={"fsdp_version": 2},
        deepspeed=None,
        fsdp_plugin_args=None,
        mixed_precision="no",
    )
    monkeypatch.setattr(sharding, "AcceleratorState", state)
    with pytest.raises(UserError, match=r"^accelerate \d\S* has no AcceleratorState\(_from_accelerator\), which"):
        sharding.shard_on_cpus(config)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_answers_where_a_model_does_not_tell_its_attention(attention, monkeypatch):
    assert attention_of(SimpleNamespace(config=SimpleNamespace())) is None
    model = small_gpt2().eval()
    model.set_attn_implementation(attention)
    prompts, greedy = [[5], [7, 8, 9, 10], [11, 12]], Sampling(temperature=0, max_new_tokens=6)
    expected = dict(answers.answer_each(model, small_tokenizer(), prompts, greedy, 3))
    monkeypatch.setattr(answers, "attention_of", lambda model: None)
    assert dict(answers.answer_each(model, small_tokenizer(), prompts, greedy, 3)) == expected


def test_training_where_a_model_does_not_tell_its_attention(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "attention_of", lambda model: None)
    made = trainer_for(small_gpt2(), tmp_path, bf16=True)
    assert prepare_model(made) == "Loss: supervised positions only, padding without a mask"
    assert attention_of(made.model) == "sdpa"


def test_a_trl_without_a_fused_head_keeps_its_own_loss(tmp_path):
    made = trainer_for(small_gpt2(), tmp_path, random_rows(8))
    assert has_fused_head(made.model)
    batch = dict(next(iter(made.get_train_dataloader())))
    with torch.no_grad():
        expected = made.compute_loss(made.model, dict(batch))
        del made.model.forward  # back to transformers' own
        assert not has_fused_head(made.model)
        assert prepare_model(made).startswith("Loss: TRL's own")
        torch.testing.assert_close(made.model(**batch).loss, expected)
    assert "tokens/s in a short trial" in time_needed(made, 0)


class Forgetful(LambdaLR):
    """A schedule that keeps no `_last_lr`, as a later torch may."""

    def get_last_lr(self):
        return [group["lr"] for group in self.optimizer.param_groups]


@pytest.mark.parametrize("kind", [LambdaLR, Forgetful, ReduceLROnPlateau])
def test_a_changed_rate_wins_over_the_saved_one(kind):
    def made(rate):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=rate)
        schedule = kind(optimizer) if kind is ReduceLROnPlateau else kind(optimizer, lambda step: 1 / (1 + step))
        return optimizer, schedule

    optimizer, schedule = made(0.8)
    optimizer.step()
    schedule.step(1.0) if kind is ReduceLROnPlateau else schedule.step()
    saved = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
    optimizer, schedule = made(0.2)
    lineage = Lineage({}, [{"first_step": 0}, {"first_step": 1, "changed": {"learning_rate": [0.8, 0.2]}}])
    running = SimpleNamespace(
        optimizer=optimizer, lr_scheduler=schedule, callback_handler=SimpleNamespace(callbacks=[lineage])
    )

    def load(checkpoint):
        optimizer.load_state_dict(saved[0])
        schedule.load_state_dict(saved[1])

    load_optimizer(running, load, "checkpoint-1")
    expected = 0.2 if kind is ReduceLROnPlateau else 0.1
    assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)
    assert kind is ReduceLROnPlateau or schedule.get_last_lr() == pytest.approx([expected])
