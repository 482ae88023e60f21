import os
import stat
import time
from pathlib import Path

import pytest

from nanofed import files
from nanofed.errors import ConfigError
from nanofed.files import created, keep_short, sha256, write_atomically


def test_a_file_that_cannot_be_written_keeps_its_old_content_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]
    assert path.read_text() == "old"


def test_a_link_stays_and_what_it_names_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link, target = tmp_path / "link", tmp_path / "elsewhere" / "target"
    link.symlink_to(target)
    write_atomically(link, b"content")
    assert link.is_symlink()
    assert target.read_bytes() == b"content"


def test_a_private_file_is_for_its_user_only(tmp_path: Path) -> None:
    write_atomically(tmp_path / "key", "secret", mode=0o600)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


def test_a_hash_is_of_the_content(tmp_path: Path) -> None:
    write_atomically(tmp_path / "empty", "")
    assert sha256(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_a_file_is_hashed_once_for_every_state_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read, now, hour = tmp_path / "shard", list[Path](), time.time_ns(), 3600 * 10**9

    def counted(file: Path) -> str:
        read.append(file)
        return sha256(file)

    monkeypatch.setattr(files, "sha256", counted)
    states = [("a", -1, 1), ("a", -1, 1), ("b", -2, 2), ("b", 1, 3), ("b", 1, 3), ("b", 0, 4), ("b", 0, 5)]
    for content, hours, reads in states:
        path.write_text(content)
        os.utime(path, ns=(now + hours * hour,) * 2)
        assert files.sha256_once(path) == sha256(path)
        assert len(read) == reads, "a file that has just been changed may change again within the same tick"


def test_a_log_is_kept_short_under_the_process_that_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "server.log"
    keep_short(path, 10)  # there is none
    with path.open("ab", buffering=0) as log:
        for line in (b"the first line\n", b"the second line\n", b"the third line\n"):
            log.write(line)
            keep_short(path, 10)
        assert path.read_bytes() == b""
        log.write(b"short\n")
        keep_short(path, 10)
    assert path.read_bytes() == b"short\n"
    assert path.with_name("server.log.1").read_bytes() == b"the third line\n"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_created_is_there_whole_or_not_at_all(kind: str, tmp_path: Path) -> None:
    def write(place: Path) -> None:
        if kind == "folder":
            place.mkdir()
            place = place / "content"
        place.write_text("new")
        place.chmod(0o600)  # as libraries leave what they wrote by a temporary file

    path = tmp_path / "above" / "made"
    with pytest.raises(ZeroDivisionError), created(path) as place:
        write(place)
        raise ZeroDivisionError
    assert list(path.parent.iterdir()) == []
    before = os.umask(0o027)
    try:
        with created(path) as place:
            write(place)
            assert not path.exists()
    finally:
        os.umask(before)
    file = path if kind == "file" else path / "content"
    assert (file.read_text(), stat.S_IMODE(file.stat().st_mode)) == ("new", 0o640)
    with pytest.raises(ConfigError, match="made is there already"), created(path):
        pytest.fail("nothing is written over it")
    assert [p.name for p in path.parent.iterdir()] == ["made"]
    os.mkfifo(pipe := tmp_path / "pipe")
    with pytest.raises(ConfigError, match="pipe is there already"), created(pipe):
        pytest.fail("what reads from it would wait for ever")
