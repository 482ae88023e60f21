"""Checkpoints survive what ends or hinders a save, and damage to them is always seen."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from nanofed import cli
from nanofed.errors import ConfigError
from nanofed.training.checkpoint.atomic import CheckpointError, NoSpaceError, SaveError
from nanofed.training.checkpoint.folder import MANIFEST, checkpoints, prune_checkpoints
from nanofed.training.checkpoint.format import _checksum, find_checkpoint, read_manifest, read_state, read_weights
from nanofed.training.summary import Summary
from tests.faults.children import call, mount_disk, start
from tests.faults.fits import arguments, fit, probe
from tests.faults.saves import die_everywhere, reported, save_forever, step
from tests.parity.test_paths import corpus
from tests.small_checkpoint import number_in, save_small

__all__ = ["corpus"]  # the fixture

Snapshot = dict[str, tuple[int, bytes]]


def snapshot(folder: Path) -> Snapshot:
    """Return content and time of change of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with one checkpoint, of step 1."""
    save_small(step(tmp_path, 1), 1, 500)
    return tmp_path


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory, where syncing takes no time."""
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("needs /dev/shm")
    with tempfile.TemporaryDirectory(prefix="nanofed-test-", dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture(params=["where temporary files are", "another filesystem"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder for a run, on the filesystem of $TMPDIR and on another one."""
    if request.param == "where temporary files are":
        return tmp_path
    folder: Path = request.getfixturevalue("memory")
    if folder.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs /dev/shm as another filesystem")
    return folder


# --- killed


@pytest.mark.timeout(3600)
def test_a_killed_save_leaves_a_whole_newest_one(
    place: Path, tmp_path: Path, count: Callable[[int, int], int], record_property: Callable[[str, object], None]
) -> None:
    report, draw = tmp_path / "report", random.Random(0)
    in_a_save = number = 0
    kills = count(12, 200)
    for _ in range(kills):
        before = reported(report)
        process = start(save_forever, place, number, report)
        limit = time.monotonic() + 120
        while reported(report) == before:
            assert process.is_alive() and time.monotonic() < limit
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        in_a_save += any(path.name.startswith(".") for path in (place / "checkpoints").iterdir())
        done = reported(report)
        number = number_in(find_checkpoint(place))
        assert number in (done, done + 1), "a save that was done, or the one after it"
        for path in checkpoints(place):
            number_in(path)
    assert in_a_save > kills // 4
    record_property("killed in the middle of a save", f"{in_a_save} of {kills}")
    save_small(step(place, number), number)
    prune_checkpoints(place, 2)
    assert [path.name for path in sorted((place / "checkpoints").iterdir())] == [p.name for p in checkpoints(place)]


def test_a_save_may_die_at_every_operation(memory: Path, record_property: Callable[[str, object], None]) -> None:
    died = call(die_everywhere, memory)
    assert died >= 50
    record_property("operations that it died at", died)


def test_everything_is_synced_before_it_takes_its_name(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    at_rename: list[tuple[str, set[str]]] = []
    real_sync, real_rename = os.fsync, Path.rename

    def sync(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        real_sync(descriptor)

    def rename(path: Path, target: Path) -> Path:
        at_rename.append((target.name, set(synced)))
        return real_rename(path, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    save_small(step(run, 2), 2, 500)
    [(name, before)] = at_rename
    assert name == "step_00000002"
    assert {Path(path).relative_to(run / "checkpoints").parts[1:] for path in before} == {
        (),
        ("model.safetensors",),
        ("state.pt",),
        ("tokenizer",),
        ("tokenizer", "tokenizer.json"),
        ("manifest.json",),
    }
    assert synced[-1] == str(run / "checkpoints") and synced[-1] not in before
    assert synced.index(next(path for path in synced if path.endswith(MANIFEST))) == 3, "after the other three files"


def test_only_temporaries_that_no_process_holds_are_deleted(run: Path) -> None:
    folder = run / "checkpoints"
    mine, stale, foreign = folder / ".step_00000007.1.tmp", folder / ".step_00000008.1.tmp", folder / ".cache.tmp"
    for path in (mine, stale, foreign):
        path.mkdir()
    held = os.open(mine, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    save_small(step(run, 2), 2, 500)
    assert (mine.exists(), stale.exists(), foreign.exists()) == (True, False, True)
    os.close(held)
    save_small(step(run, 3), 3, 500)
    assert (mine.exists(), foreign.exists()) == (False, True)


def test_what_was_to_be_replaced_is_found_and_gets_its_name_back(run: Path) -> None:
    old = step(run, 1).rename(run / "checkpoints" / ".step_00000001.old")
    assert find_checkpoint(run) == old and number_in(old) == 1 and checkpoints(run) == [old]
    save_small(step(run, 2), 2, 500)
    assert [number_in(path) for path in checkpoints(run)] == [1, 2] and not old.exists()
    shutil.copytree(step(run, 1), old)  # killed after the second rename
    assert checkpoints(run) == [step(run, 1), step(run, 2)]
    save_small(step(run, 3), 3, 500)
    assert not old.exists()


# --- no space, no folder


def _fill_a_disk(disk: Path) -> int:
    mount_disk(disk, "3m")
    run = disk / "run"
    run.mkdir()
    save_small(step(run, 1), 1, 20_000)
    before = snapshot(disk)
    with pytest.raises(NoSpaceError, match=r"step_00000002 is not saved: it needs .* MB and its disk has .* MB left"):
        save_small(step(run, 2), 2, 200_000)
    assert snapshot(disk) == before
    # Room that is gone when it is needed: a quota, or another program that writes meanwhile.
    generous = shutil._ntuple_diskusage(1 << 40, 0, 1 << 40)
    shutil.disk_usage = lambda path: generous
    ballast, failed = disk / "ballast", 0
    for left in range(0, 420_000, 12_000):
        with ballast.open("wb") as file:
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            file.write(bytes(max(0, free - left)))
        before = snapshot(run)
        try:
            save_small(step(run, 1 + left % 24_000 // 12_000), 3 + left, 20_000)
        except NoSpaceError as error:
            assert "could not be saved: No space left on device; those before it are kept" in str(error)
            assert snapshot(run) == before
            assert len(list((run / "checkpoints").iterdir())) == len(checkpoints(run))
            failed += 1
        else:
            assert number_in(find_checkpoint(run)) == 3 + left
            prune_checkpoints(run, 1)
        ballast.unlink()
    return failed


def test_a_full_disk(tmp_path: Path) -> None:
    assert call(_fill_a_disk, tmp_path) > 10


def _fit(args: list[str]) -> tuple[int, str]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = cli.main(["fit", *args])
    return code, said.getvalue()


def _fit_on_a_small_disk(corpus: Path, disk: Path) -> None:
    torch.set_num_threads(1)
    options = {"save_every": 4, "keep_checkpoints": 1}
    code, said = _fit(arguments(corpus, disk.parent, "whole", **options))
    assert code == 0, said
    one = sum(path.stat().st_size for path in find_checkpoint(disk.parent / "whole").rglob("*") if path.is_file())
    mount_disk(disk, str((1 << 20) + one * 3 // 2))
    here = arguments(corpus, disk, "run", **options)
    code, said = _fit(here)
    assert code == 1, said
    last = step(disk / "run", 4)
    assert f"step 8 could not be saved: {step(disk / 'run', 8)} is not saved: it needs" in said
    assert f"the run goes on, and the last good checkpoint is {last}" in said
    assert "the run could not be saved at step 12" in said.splitlines()[-1]
    assert [path.name for path in (disk / "run" / "checkpoints").iterdir()] == [last.name]
    mount_disk(disk, str((2 << 20) + one * 3), "larger")
    code, said = _fit([*here, "--ckpt_path=last"])
    assert code == 0 and f"resuming from {last}" in said, said
    weights = [read_weights(find_checkpoint(run)) for run in (disk / "run", disk.parent / "whole")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_a_run_on_a_full_disk_tells_and_goes_on_and_fails_at_its_end(corpus: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    call(_fit_on_a_small_disk, corpus, disk)


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)  # TensorBoard's writing thread ends so
def test_figures_that_cannot_be_written_end_no_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_later(real: Callable[..., Any]) -> Callable[..., Any]:
        def write(*args: Any, **kwargs: Any) -> Any:
            if step(tmp_path / "run", 4).exists():  # until the third checkpoint takes its place
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        return write

    args = arguments(corpus, tmp_path, "whole", sample_every=4, save_every=4, keep_checkpoints=2)
    assert _fit(args)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "write", full_later(RecordWriter.write))
        patch.setattr(Summary, "write", full_later(Summary.write))
        code, said = _fit([*args, "--name=run"])
    assert code == 0 and said.count(f"the figures of {tmp_path / 'run'} cannot be written: No space left") >= 1, said
    figures = EventAccumulator(str(tmp_path / "run")).Reload().Scalars("val/bpb")
    assert [figure.step for figure in figures] == [0, 12], (
        "written until the disk was full, and when there was room again"
    )
    weights = [read_weights(find_checkpoint(tmp_path / name)) for name in ("whole", "run")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_a_run_that_went_back_stays_there_though_it_dies_before_it_saves(corpus: Path, tmp_path: Path) -> None:
    args, run = arguments(corpus, tmp_path, "run", save_every=4, keep_checkpoints=0), tmp_path / "run"
    fit(args, tmp_path)
    killed = probe(at="micro", number=3, signals=[signal.SIGKILL])
    fit([*args, f"--ckpt_path={step(run, 4)}", killed], tmp_path, code=-signal.SIGKILL)
    assert checkpoints(run) == [step(run, 4)]
    assert {path.name for path in (run / "checkpoints" / "superseded").iterdir()} == {"step_00000008", "step_00000012"}
    assert f"resuming from {step(run, 4)}" in fit([*args, "--ckpt_path=last"], tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "state.pt", "tokenizer.json", "manifest.json"])
@pytest.mark.parametrize("name", ["step_00000002", "step_00000001"])
def test_a_disk_that_is_full_at_any_file(run: Path, monkeypatch: pytest.MonkeyPatch, file: str, name: str) -> None:
    before, real = snapshot(run), Path.open

    def full(path: Path, *args: Any, **kwargs: Any) -> Any:
        return real(Path("/dev/full"), "wb", buffering=0) if path.name == file else real(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(NoSpaceError, match="No space left on device"):
            save_small(run / "checkpoints" / name, 2, 500)
    assert snapshot(run) == before and number_in(find_checkpoint(run)) == 1
    assert number_in(save_small(run / "checkpoints" / name, 2, 500)) == 2


@pytest.mark.parametrize(
    ("code", "kind", "says"),
    [
        (errno.EDQUOT, NoSpaceError, "Disk quota exceeded"),
        (errno.EIO, SaveError, "Input/output error"),
        (errno.EROFS, SaveError, "cannot be written"),
    ],
)
@pytest.mark.parametrize("call_name", ["fsync", "rename"])
def test_an_error_at_the_end(
    run: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[SaveError], says: str, call_name: str
) -> None:
    before = snapshot(run)

    def fail(path: Any, *args: Any) -> None:
        if call_name == "fsync" or str(path).endswith(".tmp"):
            raise OSError(code, os.strerror(code))
        real(path, *args)

    real: Any = os.rename if call_name == "rename" else None
    for number in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(os, call_name, fail)
            with pytest.raises(SaveError, match=says) as error:
                save_small(step(run, number), 7, 500)
        assert type(error.value) is kind and snapshot(run) == before
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000001"]


def test_one_that_cannot_be_deleted_is_told(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save_small(step(run, 2), 2, 500)

    def refuse(path: Path, target: Path) -> Path:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    prune_checkpoints(run, 1)
    assert "step_00000001 is not needed any more, and cannot be deleted: Permission denied" in caplog.text
    assert [number_in(path) for path in checkpoints(run)] == [1, 2]


def _read_only(disk: Path) -> None:
    mount_disk(disk, "3m")
    run = disk / "run"
    run.mkdir()
    save_small(step(run, 1), 1, 500)
    save_small(step(run, 2), 2, 500).rename(run / "checkpoints" / ".step_00000002.old")
    mount_disk(disk, "3m", "ro")
    before = snapshot(disk)
    with pytest.raises(
        SaveError, match=r"not be saved: .*/run/checkpoints cannot be written \(Read-only file system\)"
    ):
        save_small(step(run, 3), 3, 500)
    assert snapshot(disk) == before
    assert number_in(find_checkpoint(run)) == 2


def test_a_disk_that_has_become_read_only(tmp_path: Path) -> None:
    call(_read_only, tmp_path)


def test_a_folder_without_permission(run: Path) -> None:
    (run / "checkpoints").chmod(0o500)
    try:
        if os.access(run / "checkpoints", os.W_OK):
            pytest.skip("root may write everywhere")
        with pytest.raises(SaveError, match=r"checkpoints cannot be written \(Permission denied\)"):
            save_small(step(run, 2), 2, 500)
        assert number_in(find_checkpoint(run)) == 1
    finally:
        (run / "checkpoints").chmod(0o700)


def test_a_run_folder_that_is_gone_is_not_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    run.mkdir()
    save_small(step(run, 1), 1, 500)
    real = torch.save

    def in_the_middle(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        shutil.rmtree(run)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", in_the_middle)
        with pytest.raises(SaveError, match="run is gone or is none"):
            save_small(step(run, 2), 2, 500)
    for _ in range(2):
        with pytest.raises(SaveError, match="run is gone or is none"):
            save_small(step(run, 3), 3, 500)
        assert not run.exists()
        run.write_text("a file")
        with pytest.raises(SaveError, match="run is gone or is none"):
            save_small(step(run, 3), 3, 500)
        run.unlink()


# --- damaged


def same_json(one: bytes, other: bytes) -> bool:
    with contextlib.suppress(ValueError):
        return bool(json.loads(one) == json.loads(other))
    return False


def test_damage_anywhere_is_seen_and_skipped(run: Path, count: Callable[[int, int], int]) -> None:
    path = save_small(step(run, 2), 2, 500)
    whole = {file: file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
    assert len(whole) == 4
    draw = random.Random(0)
    for number in range(count(160, 5_000)):
        file = list(whole)[number % 4]
        content = bytearray(whole[file])
        at = draw.randrange(len(content))
        kind = draw.choice(["flip", "flip", "cut", "insert", "overwrite", "missing"])
        if kind == "flip":
            content[at] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del content[at : at + draw.choice([1, 64, len(content)])]
        elif kind == "insert":
            content[at:at] = draw.randbytes(draw.randrange(1, 64))
        elif kind == "overwrite":
            content[at : at + 512] = bytes(len(content[at : at + 512]))
        if file.name == MANIFEST and same_json(bytes(content), whole[file]):
            continue  # other blanks between its values
        if bytes(content) == whole[file] and kind != "missing":
            continue
        file.write_bytes(content) if kind != "missing" else file.unlink()
        try:
            read_manifest(path)
        except CheckpointError as damaged:
            assert str(path) in str(damaged), (number, kind)
        else:
            pytest.fail(f"{number}: {kind} at {at} of {file.name} is not seen")
        assert find_checkpoint(run) == step(run, 1), (number, kind)
        file.write_bytes(whole[file])
    assert find_checkpoint(run) == path and number_in(path) == 2


def rewrite(path: Path, **changes: Any) -> None:
    """Change a manifest as one would who means harm: with the checksum that belongs to it."""
    raw = json.loads((path / MANIFEST).read_text())
    raw = {name: value for name, value in {**raw, **changes}.items() if name != "checksum"}
    (path / MANIFEST).write_text(json.dumps({**raw, "checksum": _checksum(raw)}))


@pytest.mark.parametrize(
    "name",
    ["../../x", "..", "/etc/passwd", "tokenizer/../../x", "a/b/c", "", ".", "./x", "a//b", "a\\..\\b", ".x", "x\0", "x\n", "~/x"],
)  # fmt: skip
def test_a_manifest_that_names_files_elsewhere_is_refused(run: Path, name: str) -> None:
    path = step(run, 1)
    (run.parent / "x").write_bytes(b"")
    files = dict(read_manifest(path).files)
    empty = {"bytes": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
    rewrite(path, files={**files, name: empty})
    with pytest.raises(CheckpointError, match="which is no name of a file in a checkpoint"):
        read_manifest(path)
    with pytest.raises(CheckpointError, match="which is no name of a file in a checkpoint"):
        read_manifest(path, verify=False)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"state.pt": ...}, r"does not list state\.pt"),
        ({"model.safetensors": ..., "tokenizer/tokenizer.json": ...}, r"not list model\.safetensors, tokenizer/tok"),
        ({"state.pt": {}}, r"does not give size and SHA-256 of state\.pt"),
        ({"state.pt": None}, r"does not give size and SHA-256 of state\.pt"),
        ({"state.pt": {"bytes": "all", "sha256": None}}, r"state\.pt has another size"),
    ],
)
def test_a_manifest_that_vouches_for_less_is_refused(run: Path, change: dict[str, Any], says: str) -> None:
    path = step(run, 1)
    files = {**read_manifest(path).files, **change}
    rewrite(path, files={name: entry for name, entry in files.items() if entry is not ...})
    with pytest.raises(CheckpointError, match=says):
        read_manifest(path)


class Harm:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["NANOFED_TEST_HARM"],)


@pytest.mark.parametrize("wrap", [lambda harm: harm, lambda harm: {"clock": {"step": harm}}], ids=["bare", "inside"])
def test_code_in_a_state_is_not_run(run: Path, wrap: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOFED_TEST_HARM", str(run / "harm"))
    path = step(run, 1)
    torch.save(wrap(Harm()), path / "state.pt")
    with pytest.raises(CheckpointError, match=r"state\.pt cannot be read: it holds something else than tensors"):
        read_state(path)
    assert not (run / "harm").exists()
    torch.load(path / "state.pt", weights_only=False)
    assert (run / "harm").exists(), "else this test would show nothing"


@pytest.mark.parametrize(
    "url", ["https://example.org/run", "http:/example.org", "s3://bucket/run", "file:///etc", "hf://m"]
)
def test_urls_are_refused(url: str) -> None:
    for where in (url, Path(url)):
        with pytest.raises(ConfigError, match="is a URL: checkpoints are read from local folders only"):
            find_checkpoint(where)
