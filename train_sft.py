"""A base and a dataset → an instruct model, through TRL's SFTTrainer, on completions only.

`python train_sft.py --help` tells the use; the code is in fledge/scripts/train_sft.py.
"""

from fledge.cli import run
from fledge.scripts.train_sft import main

if __name__ == "__main__":
    run(main)
