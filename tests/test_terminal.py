import io
import sys

import pytest

from fledge import terminal
from fledge.terminal import has_colours, progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "variables", "expected"),
    [
        (Terminal(), {}, True),
        (Terminal(), {"NO_COLOR": ""}, True),
        (Terminal(), {"NO_COLOR": "1"}, False),
        (Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {}, False),
    ],
)
def test_colours_are_for_terminals_that_want_them(monkeypatch, stream, variables, expected):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert has_colours(stream) is expected


def test_a_log_gets_a_plain_line_now_and_then(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress("answers", 1200) as tell:
        for done in range(1, 1201):
            monkeypatch.setattr(terminal, "BETWEEN", 0.0 if done == 700 else 60.0)
            tell(done)
    assert sys.stderr.getvalue() == "  answers: 700/1,200\n  answers: 1,200/1,200\n"


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress("answers", 12) as tell:
        tell(12)
    assert "12/12" in sys.stderr.getvalue()
    assert "\r" in sys.stderr.getvalue()
