import pytest
import torch
from conftest import run_script
from processes import fork_script

from fledge import SPINS, cpu


@pytest.mark.parametrize(
    ("flags", "onednn", "expected"),
    [
        ({"avx2", "avx512_f"}, True, False),
        ({"avx2", "avx512_f", "avx512_bf16"}, True, True),
        ({"avx2", "avx512_f", "avx512_bf16"}, False, False),
        ({"amx_bf16"}, AttributeError("no attribute '_is_mkldnn_bf16_supported'"), True),
    ],
)
def test_bf16_is_what_processor_and_onednn_both_do(flags, onednn, expected, monkeypatch):
    class Operators:
        def _is_mkldnn_bf16_supported(self):
            if isinstance(onednn, Exception):
                raise onednn
            return onednn

    monkeypatch.setattr(cpu, "_flags", lambda: flags)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops, "mkldnn", Operators())
    assert cpu.multiplies_bf16() is expected


def test_a_processor_is_described_with_what_it_acts_as(monkeypatch):
    monkeypatch.setattr(cpu, "_name", lambda: "Some CPU")
    monkeypatch.setattr(cpu, "cores", lambda: 4)
    monkeypatch.setattr(cpu, "_flags", lambda: {"avx2", "sse2"})
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    assert cpu.describe() == "Some CPU, 4 cores, AVX2, ATEN_CPU_CAPABILITY=default"


def test_torch_before_its_list_of_capabilities(monkeypatch):
    of_file = {"flags": "fpu sse2 avx2 avx512f avx512_bf16", "model name": "Some CPU"}
    monkeypatch.setattr(cpu, "_of_linux", of_file.get)
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert {"avx2", "avx512_f", "avx512_bf16"} <= cpu._flags()


# One process, because oneDNN reads the variable once.
EVERY_WAY = """
import sys, torch
from conftest import call_script
from fledge.generation.answers import answer_each
from fledge.generation.onednn import works
from fledge.models import load_model
from fledge.sampling import Sampling
model, base, data, out = sys.argv[1:]
asked = ("--prompt", "Lily had a ball.", "--max_new_tokens", 8)
assert call_script("generate.py", "--model", model, *asked, "--dtype", "bfloat16").stdout.strip()
common = ("train_sft.py", "--model_name_or_path", base, "--dataset", data, "--max_steps", 2, "--use_cpu")
print(call_script(*common, "--output_dir", f"{out}/asked", "--bf16", "true").stdout)
print(call_script(*common, "--output_dir", f"{out}/chosen").stdout)
model, tokenizer = load_model(model)
prompts = [tokenizer("Lily had a ball.")["input_ids"]] * 40
with torch.autocast("cpu", torch.bfloat16):
    answers = list(answer_each(model, tokenizer, prompts, Sampling(temperature=0, max_new_tokens=4), 40))
print("Answers:", len(answers), works(torch.float32))
"""


def test_bfloat16_where_no_unit_multiplies_it(tiny, tmp_path):
    given = (tiny.model, tiny.base, tiny.data, tmp_path)
    said = fork_script("-c", EVERY_WAY, *given, DNNL_MAX_CPU_ISA="AVX2").stdout
    assert "precision bf16: as asked for" in said
    assert "precision float32: this CPU has no bfloat16 matrix unit" in said
    assert "Answers: 40 True\n" in said


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, str(SPINS)),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, None),
    ],
)
def test_how_threads_wait_is_set_before_torch_unless_the_user_says(variables, expected, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    look = "import fledge.cli, os, sys; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    assert run_script("-c", look, **variables).stdout.split() == [str(expected), "False"]
