"""Standard streams as other programs leave them: closed, full, without a reader, unable to say a character."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import REPOSITORY, ended

SECURE = "import sys; from nanofed import streams; streams.secure(lasting={lasting})\n"


def python(code: str, shell: str = "", *, lasting: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code after `secure` under a shell's redirections."""
    command = ["bash", "-c", f'"$0" -c "$1" {shell}', sys.executable, SECURE.format(lasting=lasting) + code]
    environment |= {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY)}
    return ended(command, env=environment, errors="replace")


WRITES = "print('x' * 100_000, flush=True); print('more', flush=True); print('end', file=sys.stderr)"


@pytest.mark.parametrize("redirected", [">&-", ">/dev/full", "2>&1 | true; exit ${PIPESTATUS[0]}", "1</dev/null"])
def test_a_lasting_command_goes_on_without_its_output(redirected: str) -> None:
    done = python("import time; time.sleep(0.2)\n" + WRITES, redirected)
    assert done.returncode == 0 and "Error" not in done.stderr


@pytest.mark.parametrize("redirected", ["2>&-", "2>/dev/full", "2>&- <&- >&-"])
def test_no_command_needs_standard_error(redirected: str) -> None:
    assert python(WRITES, redirected, lasting=False).returncode == 0


def test_a_closed_stream_gives_its_number_to_no_other_file(tmp_path: Path) -> None:
    opened = python(f"file = open({str(tmp_path / 'x')!r}, 'w'); sys.exit(file.fileno())", "<&- >&- 2>&-")
    assert opened.returncode > 2


@pytest.mark.parametrize(
    ("redirected", "raised"),
    [(">/dev/full", "NanofedError: the output cannot be written: No space left on device"), ("| true", "ReaderGone")],
)
def test_a_command_that_is_run_for_its_output_hears_that_it_is_lost(redirected: str, raised: str) -> None:
    code = "import time; time.sleep(0.2)\ntry:\n    print('x', flush=True)\nexcept Exception as error:\n"
    code += "    print(f'{type(error).__name__}: {error}', file=sys.stderr)"
    done = python(code, redirected, lasting=False)
    assert done.stderr.startswith(raised) and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1:strict", "utf-8"])
def test_a_character_that_the_encoding_cannot_say_is_escaped(encoding: str) -> None:
    code = "text = 'caf\\u00e9 \\u20ac \\udcff'\nprint(text)\nimport logging; logging.warning(text)"
    done = python(code, PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and "\\udcff" in done.stdout and "\\udcff" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_printed_arrives_in_order_and_whole() -> None:
    done = python("print('a', end=''); sys.stdout.write('b\\n'); print('c'); sys.exit(3)")
    assert (done.stdout, done.stderr, done.returncode) == ("ab\nc\n", "", 3)
