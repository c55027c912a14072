"""Text from a model, through its own prompt template: one prompt, a conversation, or a file of prompts.

`python generate.py --help` tells the use; the code is in fledge/scripts/generate.py.
"""

from fledge.cli import run
from fledge.scripts.generate import main

if __name__ == "__main__":
    run(main)
