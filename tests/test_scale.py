import gzip
import sys
from importlib.util import find_spec

import pytest
from conftest import ROOT, write_records
from processes import fork_script

from fledge.scripts import prepare_dataset
from fledge.tokenizers import load_tokenizer

pytest.importorskip("datatrove")

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("way", [(), ("--ray",)], ids=["here", "on Ray"])
def test_two_workers_of_datatrove_write_what_prepare_dataset_writes(way, tmp_path, monkeypatch):
    if way:
        pytest.importorskip("ray", reason="ray is not installed")
    for name, count in (("one.txt", 300), ("two.txt.gz", 160), ("three.txt", 240)):
        file = tmp_path / name.removesuffix(".gz")
        write_records(file, count)
        if name.endswith(".gz"):
            file.with_name(name).write_bytes(gzip.compress(file.read_bytes()))
    load_tokenizer(str(ROOT / "examples" / "scratch_gpt" / "tokenizer.json"), 128).save_pretrained(tmp_path / "base")
    common = [
        *("--data", tmp_path / "one.txt", tmp_path / "two.txt.gz", tmp_path / "three.txt"),
        *("--tokenizer", tmp_path / "base", "--balance", "ending", "--near_duplicates", "0.95"),
    ]
    arguments = (*common, "--output_dir", tmp_path / "one_machine")
    monkeypatch.setattr(sys, "argv", [str(part) for part in ("prepare", *arguments)])
    prepare_dataset.main()
    fork_script(
        "recipes/scale/prepare.py", *common, "--tasks", 3, "--workers", 2, "--output_dir", tmp_path / "many",
        *way, HOME=str(tmp_path),
    )  # fmt: skip

    written = [
        {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        for folder in (tmp_path / "one_machine", tmp_path / "many")
    ]
    assert len(written[0]) > 10
    assert written[0].keys() == written[1].keys()
    for name, content in written[0].items():
        if not name.endswith(".png"):
            assert content == written[1][name], name


@pytest.mark.skipif(find_spec("ray") is not None, reason="ray is installed")
def test_ray_that_is_not_installed_is_named(tmp_path):
    (tmp_path / "one.txt").write_text("Story: \n\nA cat.\n<|endoftext|>\n", encoding="utf-8")
    tokenizer = ROOT / "examples" / "scratch_gpt" / "tokenizer.json"
    load_tokenizer(str(tokenizer), 128).save_pretrained(tmp_path / "base")
    given = ("--data", tmp_path / "one.txt", "--tokenizer", tmp_path / "base", "--output_dir", tmp_path / "out")
    done = fork_script("recipes/scale/prepare.py", *given, "--ray", check=False)
    assert done.returncode == 2
    assert "--ray needs Ray, which is not installed: pip install ray." in done.stderr
