"""A model whose vocabulary is larger than its text needs → the same model with the tokens that the text uses.

`python trim_vocabulary.py --help` tells the use; the code is in fledge/scripts/trim_vocabulary.py.
"""

from fledge.cli import run
from fledge.scripts.trim_vocabulary import main

if __name__ == "__main__":
    run(main)
