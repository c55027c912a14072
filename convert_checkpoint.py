"""A hand-written checkpoint → a Hugging Face model, with a proof that both compute the same.

`python convert_checkpoint.py --help` tells the use; the code is in fledge/scripts/convert_checkpoint.py.
"""

from fledge.cli import run
from fledge.scripts.convert_checkpoint import main

if __name__ == "__main__":
    run(main)
