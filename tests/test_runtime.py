"""The machine as nanofed sees it: compilers, folders, streams."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from nanofed import runtime
from nanofed.errors import ConfigError

needs_compiler = pytest.mark.skipif(not runtime.has_compiler(), reason="needs a C++ compiler")


def compiler_that(folder: Path, does: str) -> str:
    path = folder / "c++"
    path.write_text(f"#!/bin/sh\n{does}\n")
    path.chmod(0o755)
    return str(path)


# --- compilers


@needs_compiler
def test_the_compiler_of_this_machine_can_build_what_torch_compile_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    assert runtime.why_not_compiled() is None


def test_auto_is_eager_with_a_line_where_CXX_names_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    with caplog.at_level(logging.WARNING):
        assert runtime.should_compile("auto", "cpu") is False
    assert caplog.messages == [
        "the model runs eager, which is slower: CXX names '/nonexistent/c++', which cannot be run"
    ]


def test_auto_is_eager_where_CXX_is_no_program_but_a_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "ccache g++")
    assert runtime.should_compile("auto", "cpu") is False
    assert "the name of one program" in (runtime.why_not_compiled() or "")


@needs_compiler
def test_auto_is_eager_where_CXX_does_not_compile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    answers_but_fails = 'case "$*" in *--version*) echo 1;; *) echo "c++: fatal error: no licence" >&2; exit 1;; esac'
    monkeypatch.setenv("CXX", compiler_that(tmp_path, answers_but_fails))
    assert runtime.should_compile("auto", "cpu") is False
    assert "fatal error: no licence" in (runtime.why_not_compiled() or "")


@needs_compiler
def test_a_path_to_a_compiler_that_works_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", compiler_that(tmp_path, f'exec {shutil.which("g++") or "c++"} "$@"'))
    assert runtime.should_compile("auto", "cpu") is True


def test_compiling_that_is_asked_for_and_cannot_work_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    with pytest.raises(ConfigError, match=r"model\.compile True: torch\.compile cannot work here, since CXX names"):
        runtime.should_compile(True, "cpu")
