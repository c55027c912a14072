"""Base against instruct: the same held-out prompts, the same decoding, every answer kept and scored by its task.

`python evaluate_model.py --help` tells the use; the code is in fledge/scripts/evaluate_model.py.
"""

from fledge.cli import run
from fledge.scripts.evaluate_model import main

if __name__ == "__main__":
    run(main)
