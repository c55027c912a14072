"""An instruct model and its prompts → a model that follows them better, through TRL's GRPOTrainer.

`python train_grpo.py --help` tells the use; the code is in fledge/scripts/train_grpo.py.
"""

from fledge.cli import run
from fledge.scripts.train_grpo import main

if __name__ == "__main__":
    run(main)
