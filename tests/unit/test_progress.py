import io
import sys

import pytest

from locft.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_bar() -> None:
    with progress("training", 200, "edits") as step:
        step(50, note="loss 1.250")
        step(150)


def test_nothing_is_written_where_stderr_is_piped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_bar()
    assert capsys.readouterr() == ("", "")


def test_a_terminal_sees_the_label_the_count_and_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    run_bar()
    shown = terminal.getvalue()
    assert "training" in shown
    assert "200/200" in shown
    assert "edits/s" in shown


def test_the_bar_goes_away_when_the_body_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(ValueError, match="stop"), progress("training", 2, "edits"):
        raise ValueError("stop")
