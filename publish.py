"""A finished model, its dataset and a page to try it on → the Hub, or the same folders on this machine.

`python publish.py --help` tells the use; the code is in fledge/scripts/publish.py.
"""

from fledge.cli import run
from fledge.scripts.publish import main

if __name__ == "__main__":
    run(main)
