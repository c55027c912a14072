"""Raw text and a tokenizer → a GPT-2 trained from random weights, through transformers' Trainer.

`python pretrain.py --help` tells the use; the code is in fledge/scripts/pretrain.py.
"""

from fledge.cli import run
from fledge.scripts.pretrain import main

if __name__ == "__main__":
    run(main)
