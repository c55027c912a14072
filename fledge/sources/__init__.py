"""Sources: raw files → records. One file a source; each has `records(file)`."""

from types import ModuleType

from fledge.cli import UserError
from fledge.sources import tinystories_instruct

SOURCES: dict[str, ModuleType] = {"tinystories_instruct": tinystories_instruct}


def load_source(name: str) -> ModuleType:
    """Raises:
    UserError: there is no source of that name.
    """
    if name not in SOURCES:
        raise UserError(f"The source {name!r} is unknown; choose one of {', '.join(SOURCES)}.")
    return SOURCES[name]
