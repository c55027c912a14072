"""The packages of the wheel; all else is in pyproject.toml.

`model_card/` stands at the root, where people look for it, and is installed as `fledge/model_card`. pyproject.toml can
list packages or find them, and this needs both.
"""

from setuptools import find_packages, setup

CARDS = {
    "fledge.model_card": "model_card",
    "fledge.model_card.space": "model_card/space",
    "fledge.model_card.static_space": "model_card/static_space",
}

setup(packages=[*find_packages(include=["fledge", "fledge.*"]), *CARDS], package_dir=CARDS)
