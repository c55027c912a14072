"""How a training ends where several processes share it."""

import pytest
from processes import fork_two

ENDED = """
import sys, weakref
import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments
sys.path.insert(0, "tests")
from small import random_rows, small_gpt2
from fledge.training.opening import close_trainer

rows = [{"input_ids": row["input_ids"][:8], "labels": row["input_ids"][:8]} for row in random_rows(8)]
rows = [row for row in rows if len(row["input_ids"]) == 8]
config = TrainingArguments(output_dir=sys.argv[1], max_steps=1, report_to="none", use_cpu=True, save_strategy="no")
trainer = Trainer(small_gpt2(), config, train_dataset=rows)
trainer.train()
wrapped = weakref.ref(trainer.model_wrapped)
assert isinstance(wrapped(), DistributedDataParallel)
close_trainer(trainer)
assert wrapped() is None
assert not torch.distributed.is_initialized()
"""


@pytest.mark.slow
def test_ddp_is_freed_before_the_process_group(tmp_path):
    """Else the process can wait for itself: DDP's reducer ends the group's threads with the interpreter's lock."""
    fork_two("-c", ENDED, tmp_path)
