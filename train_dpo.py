"""An instruct model and pairs of answers → a model that prefers the better ones, through TRL's DPOTrainer.

`python train_dpo.py --help` tells the use; the code is in fledge/scripts/train_dpo.py.
"""

from fledge.cli import run
from fledge.scripts.train_dpo import main

if __name__ == "__main__":
    run(main)
