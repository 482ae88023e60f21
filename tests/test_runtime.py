"""The machine as nanofed sees it: compilers, folders, streams."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest

from nanofed import runtime
from nanofed.data.demo import prepare_demo
from nanofed.errors import ConfigError, NanofedError

needs_compiler = pytest.mark.skipif(runtime.why_not_compiled() is not None, reason="needs a C++ compiler")


def compiler_that(folder: Path, does: str) -> str:
    path = folder / "c++"
    path.write_text(f"#!/bin/sh\n{does}\n")
    path.chmod(0o755)
    return str(path)


# --- paths


def test_home_is_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert runtime.user_path("~/runs") == Path("/home/somebody/runs")
    monkeypatch.delenv("NANOCHAT_BASE_DIR", raising=False)
    assert runtime.base_dir() == Path("/home/somebody/.cache/nanochat")


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without an account and without HOME, as in many a container."""
    for name in ("HOME", "USER", "LOGNAME", "NANOCHAT_BASE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 54321)


@pytest.mark.usefixtures("homeless")
def test_without_a_home_only_what_needs_one_is_refused() -> None:
    assert runtime.dataset_dir("/data") == Path("/data")
    with pytest.raises(ConfigError, match="this user has no home folder; give the full path in the place of ~"):
        runtime.user_path("~/runs")
    with pytest.raises(ConfigError, match="no home folder: set NANOCHAT_BASE_DIR"):
        runtime.dataset_dir("demo")


@pytest.mark.usefixtures("homeless")
def test_without_a_home_compiled_code_is_kept_for_this_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")  # and what is set below goes with the test
    runtime.keep_compiled_code()
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).is_dir()
    assert "what is compiled is not kept for the next run: this user has no home folder" in caplog.text


def test_a_cache_that_cannot_be_written_costs_only_compiled_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "file"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    runtime.keep_compiled_code()
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).is_dir()
    assert f"{tmp_path}/file/inductor cannot be written: Not a directory" in caplog.text


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("a/" + "n" * 256, "too long a path: a name has 255 bytes at most"),
        ("€" * 86, "too long a path"),
        ("a/" * 2100, "too long a path"),
        ("a\0b", "no text that can name a file"),
        ("a\ud800b", "no text that can name a file"),
    ],
    ids=["name", "bytes", "path", "NUL", "surrogate"],
)
def test_a_path_that_no_file_can_have_is_refused(path: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refused:
        runtime.user_path(path)
    assert len(str(refused.value)) < 250 and str(refused.value).isprintable()


# --- compilers


def test_auto_is_eager_with_a_line_where_CXX_names_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    with caplog.at_level(logging.WARNING):
        assert runtime.should_compile("auto", "cpu") is False
    reason = "CXX names '/nonexistent/c++', which cannot be run"
    assert caplog.messages == [f"the model runs eager, which is slower: {reason}"]


FAILS = 'case "$*" in *--version*) echo 1;; *) echo "c++: fatal error: no licence" >&2; exit 1;; esac'
WORKS = f'exec {shutil.which("g++") or "c++"} "$@"'


@pytest.mark.parametrize(
    ("compiler", "says"),
    [
        ("ccache g++", "the name of one program"),
        pytest.param(FAILS, "fatal error: no licence", marks=needs_compiler, id="one that fails"),
        pytest.param(WORKS, "", marks=needs_compiler, id="one that works"),
    ],
)
def test_auto_compiles_where_CXX_names_a_compiler_that_works(
    compiler: str, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = compiler in (FAILS, WORKS)
    monkeypatch.setenv("CXX", compiler_that(tmp_path, compiler) if script else compiler)
    assert runtime.should_compile("auto", "cpu") is (says == "")
    assert says in (runtime.why_not_compiled() or "")


def test_compiling_that_is_asked_for_and_cannot_work_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    with pytest.raises(ConfigError, match=r"model\.compile True: torch\.compile cannot work here, since CXX names"):
        runtime.should_compile(True, "cpu")


def test_a_cache_that_nobody_may_write_is_used_where_all_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def read_only(path: Path) -> Path:
        raise NanofedError(f"{path} cannot be written: Read-only file system")

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(runtime, "make_folder", read_only)
    with pytest.raises(NanofedError, match="Read-only"):
        prepare_demo()
    for part in ("demo/data/dataset.json", "demo/tokenizer/tokenizer.json"):
        (tmp_path / part).parent.mkdir(parents=True)
        (tmp_path / part).write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    prepare_demo()
    assert sorted(tmp_path.rglob("*")) == before
