"""Raw text → a byte-level BPE tokenizer that `AutoTokenizer` opens, with a report of what it is worth.

`python train_tokenizer.py --help` tells the use; the code is in fledge/scripts/train_tokenizer.py.
"""

from fledge.cli import run
from fledge.scripts.train_tokenizer import main

if __name__ == "__main__":
    run(main)
