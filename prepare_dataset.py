"""Records → a dataset of instructions and responses, encoded for training, with a report of what it holds.

`python prepare_dataset.py --help` tells the use; the code is in fledge/scripts/prepare_dataset.py.
"""

from fledge.cli import run
from fledge.scripts.prepare_dataset import main

if __name__ == "__main__":
    run(main)
