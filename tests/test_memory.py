import subprocess
import sys
from textwrap import dedent

import pytest

from fledge.memory import return_freed_memory

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not return_freed_memory(), reason="no glibc, whose allocator this is about"),
]

MEASURES = """
    import resource
    from fledge import memory

    def faults():
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    def resident():
        return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20
"""


def measured(code: str) -> int:
    """What `code` prints, run in a process of its own: the settings are the process's."""
    program = dedent(MEASURES) + dedent(code)
    return int(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout)


def test_kept_memory_is_not_asked_for_again():
    steps = """
        {}
        before = faults()
        for _ in range(60):
            b"x" * (1 << 25)
        print(faults() - before)
    """
    plain, kept = measured(steps.format("")), measured(steps.format("assert memory.keep_freed_memory()"))
    assert plain > 60 * 16, "32 MB are pages to ask for, even huge ones"
    assert kept < plain / 3


def test_returned_memory_is_gone_between_live_blocks():
    steps = """
        {}
        b"x" * (30 << 20)  # from here on glibc keeps blocks of up to 30 MB
        blocks = [b"x" * (1 << 22) for _ in range(32)]
        before = resident()
        del blocks[::2]
        print(before - resident())
    """
    plain, returned = measured(steps.format("")), measured(steps.format("assert memory.return_freed_memory()"))
    assert plain < 32
    assert 60 <= returned <= 68


def test_emptied_memory_is_gone_although_it_was_to_be_kept():
    steps = """
        memory.keep_freed_memory()
        blocks = [b"x" * (1 << 22) for _ in range(32)]
        kept = b"x" * 5000
        del blocks
        before = resident()
        {}
        print(before - resident())
    """
    plain, emptied = measured(steps.format("")), measured(steps.format("assert memory.empty_memory()"))
    assert plain < 16
    assert emptied > 100
