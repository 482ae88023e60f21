"""A run's folder: locked, marked, replaced only once the new run has done a step, and never emptied of a person's files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nanofed.errors import ConfigError, NanofedError
from nanofed.training.checkpoint.atomic import CheckpointError
from nanofed.training.run_folder import Reached, check_usable, hold_run, open_run, reach, read_marker, resume_checkpoint
from nanofed.training.run_lock import ROUNDS, RunLock
from nanofed.training.run_options import RunOptions
from nanofed.training.summary import CONFIG, MARKER, SUMMARY
from tests.small_checkpoint import save_small


def options(folder: Path, **changes: Any) -> RunOptions:
    return RunOptions(**{"name": "run", "runs_dir": str(folder), **changes})


def opened(folder: Path, config: str = "config", **changes: Any) -> Path:
    """Open a run, and leave its folder as a command that has ended leaves it."""
    given = options(folder, **changes)
    with hold_run(given.folder):
        open_run(given, "fit", config)
    return given.folder


def trained(folder: Path, config: str = "old") -> Path:
    """Return a run with a checkpoint, as a fit leaves it."""
    run = opened(folder, config)
    reach(run, Reached.STEP)
    save_small(run / "checkpoints" / "step_00000010", 10, 10)
    reach(run, Reached.CHECKPOINT)
    for name in (SUMMARY, "events.out.tfevents.1.host", "hparams.yaml"):
        (run / name).write_text("{}")
    return run


def listed(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() or path.is_symlink())


def test_a_new_run_has_config_and_marker_in_it(tmp_path: Path) -> None:
    run = opened(tmp_path / "deep" / "runs", "depth: 4\n")
    assert run == tmp_path / "deep" / "runs" / "run" and (run / CONFIG).read_text() == "depth: 4\n"
    assert listed(tmp_path / "deep" / "runs") == [f"run/{CONFIG}", f"run/{MARKER}"], "the lock went with its process"


def test_a_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    run = trained(tmp_path)
    with pytest.raises(ConfigError, match=r"already holds a run: go on with --ckpt_path last"):
        opened(tmp_path, "second")
    assert (run / CONFIG).read_text() == "old"
    opened(tmp_path, "resumed", ckpt_path="last")
    assert (run / CONFIG).read_text() == "resumed" and len(listed(run)) == 9


@pytest.mark.parametrize(
    "there",
    ["config.yaml", "summary.json", "checkpoints/epoch=1.ckpt", "server/app/main.py", "events.out.tfevents.1.h"],
)
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_of_somebody_else_is_not_touched(tmp_path: Path, there: str, overwrite: bool) -> None:
    file = tmp_path / "run" / there
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    with pytest.raises(ConfigError, match="is no run of this nanofed"):
        opened(tmp_path, overwrite=overwrite)
    assert listed(tmp_path) == [f"run/{there}"] and file.read_text() == "precious"


def test_a_folder_that_was_made_for_the_run_is_taken(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "server").mkdir(parents=True)
    (tmp_path / "run" / "server" / "weights").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    run = opened(tmp_path)
    assert listed(run) == [CONFIG, MARKER, "notes.txt", "server/weights"]


class TestOverwriting:
    def test_the_old_run_goes_with_the_first_step_of_the_new_one(self, tmp_path: Path) -> None:
        run = trained(tmp_path)
        new = options(tmp_path, overwrite=True)
        with hold_run(run):
            open_run(new, "fit", "new")
            assert (tmp_path / ".run.replaced" / CONFIG).read_text() == "old"
            reach(run, Reached.STEP)
            assert not (tmp_path / ".run.replaced").exists()
        assert listed(tmp_path) == [f"run/{CONFIG}", f"run/{MARKER}"] and (run / CONFIG).read_text() == "new"

    def test_a_new_run_that_fails_before_its_first_step_gives_the_old_one_back(self, tmp_path: Path) -> None:
        run = trained(tmp_path)
        before = listed(run)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError), hold_run(run):
                open_run(options(tmp_path, overwrite=True), "fit", "new")
                (run / "flower.log").write_text("why")
                raise ZeroDivisionError
            assert listed(run) == before and (run / CONFIG).read_text() == "old"
            assert (tmp_path / ".run.failed" / "flower.log").read_text() == "why"
        assert resume_checkpoint(run, "last") == run / "checkpoints" / "step_00000010"

    @pytest.mark.parametrize("new_folder", [True, False])
    def test_a_killed_start_is_put_right_by_the_next_one(self, tmp_path: Path, new_folder: bool) -> None:
        run = trained(tmp_path)
        before = listed(run)
        open_run(options(tmp_path, overwrite=True), "fit", "new")  # as a process that is killed now
        if not new_folder:
            for path in run.iterdir():
                path.unlink()
            run.rmdir()
        with hold_run(run):
            assert listed(run) == before and (run / CONFIG).read_text() == "old"

    def test_a_deletion_that_was_killed_is_finished(self, tmp_path: Path) -> None:
        run = trained(tmp_path)
        open_run(options(tmp_path, overwrite=True), "fit", "new")
        content = json.loads((run / MARKER).read_text())
        (run / MARKER).write_text(json.dumps({**content, "reached": Reached.STEP}))
        (tmp_path / ".run.replaced" / MARKER).unlink()
        with hold_run(run):
            assert listed(tmp_path / "run") == [CONFIG, MARKER] and not (tmp_path / ".run.replaced").exists()

    def test_what_nanofed_did_not_write_is_kept(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        run = trained(tmp_path)
        mine = ["notes.md", "export/weights.bin", "checkpoints/step_00000010/README", "checkpoints/best/model.bin"]
        for name in [*mine, "link"]:
            (run / name).parent.mkdir(exist_ok=True)
            (run / name).symlink_to("/nowhere") if name == "link" else (run / name).write_text("mine")
        with hold_run(run):
            open_run(options(tmp_path, overwrite=True), "fit", "new")
            (run / "notes.md").write_text("newer")
            reach(run, Reached.STEP)
        assert listed(run) == sorted([CONFIG, MARKER, *mine, "link"]) and (run / "notes.md").read_text() == "newer"
        assert listed(tmp_path / "run.kept") == ["notes.md"] and (tmp_path / "run.kept/notes.md").read_text() == "mine"
        assert all(name in caplog.text for name in mine)

    def test_a_file_in_the_place_of_a_folder_of_ours_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run/checkpoints").write_text("mine")
        with pytest.raises(ConfigError, match="checkpoints, which is no folder"):
            opened(tmp_path)

    def test_an_older_nanofeds_run_is_resumed_but_not_replaced(self, tmp_path: Path) -> None:
        run = trained(tmp_path)
        (run / MARKER).unlink()
        with pytest.raises(ConfigError, match="is no run of this nanofed"):
            opened(tmp_path, overwrite=True)
        with pytest.raises(ConfigError, match=r"holds a run: go on with --ckpt_path last, choose another --name$"):
            opened(tmp_path)
        opened(tmp_path, ckpt_path="last")
        marker = read_marker(run)
        assert marker is not None and marker.reached == Reached.CHECKPOINT

    def test_a_linked_run_is_replaced_behind_its_link(self, tmp_path: Path) -> None:
        (tmp_path / "disk" / "store").mkdir(parents=True)
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / "run").symlink_to(tmp_path / "disk" / "store")
        run = trained(tmp_path / "runs")
        with hold_run(run):
            open_run(options(tmp_path / "runs", overwrite=True), "fit", "new")
            reach(run, Reached.STEP)
        assert run.is_symlink() and listed(tmp_path / "disk") == [f"store/{CONFIG}", f"store/{MARKER}"]

    def test_links_in_a_run_are_not_followed(self, tmp_path: Path) -> None:
        run = trained(tmp_path)
        (run / "checkpoints").rename(tmp_path / "big")
        (run / "checkpoints").symlink_to(tmp_path / "big")
        with pytest.raises(ConfigError, match=r"checkpoints is a link to .*big: --overwrite true does not follow it"):
            opened(tmp_path, overwrite=True)
        assert (tmp_path / "big" / "step_00000010").is_dir()


class TestABegunRunThatCannotBeRead:
    @pytest.mark.parametrize("is_empty", [True, False])
    @pytest.mark.parametrize("ckpt_path", [None, "last"])
    def test_checkpoints_that_are_gone_are_missed(self, tmp_path: Path, is_empty: bool, ckpt_path: str | None) -> None:
        run = trained(tmp_path)
        (run / "checkpoints").rename(tmp_path / "unmounted")
        if is_empty:
            (run / "checkpoints").mkdir()
        before = listed(run)
        found = "empty" if is_empty else "not there"
        with pytest.raises(ConfigError, match=f"checkpoints is {found}: was it moved, or is"):
            check_usable(options(tmp_path, ckpt_path=ckpt_path))
            resume_checkpoint(run, ckpt_path)
        assert listed(run) == before

    def test_a_config_alone_proves_nothing(self, tmp_path: Path) -> None:
        run = trained(tmp_path)
        (run / MARKER).unlink()
        (run / "checkpoints").rename(tmp_path / "unmounted")
        with pytest.raises(ConfigError, match=r"is no run of this nanofed and holds config\.yaml"):
            opened(tmp_path, ckpt_path="last")

    def test_one_that_never_saved_starts_anew_when_asked(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        run = opened(tmp_path, "first")
        opened(tmp_path, "second")  # before the first step there is nothing to lose
        reach(run, Reached.STEP)
        with pytest.raises(ConfigError, match="before its first checkpoint: start it anew with --ckpt_path last"):
            opened(tmp_path, "third")
        caplog.set_level("INFO")
        assert resume_checkpoint(run, "last") is None
        opened(tmp_path, "fourth", ckpt_path="last")
        assert (run / CONFIG).read_text() == "fourth" and "--ckpt_path last starts it anew" in caplog.text


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NanofedError, match=r"file/run cannot be written: .*choose another --runs_dir"):
        opened(tmp_path / "file")
    (tmp_path / "run").symlink_to(tmp_path / "unmounted" / "run")
    with pytest.raises(NanofedError, match=r"is a link to .*/unmounted/run, which is not there: is its disk mounted\?"):
        check_usable(options(tmp_path))
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(NanofedError, match="a cannot be written"):
        opened(tmp_path, name="a")


def test_the_last_checkpoint_is_the_newest_that_verifies(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = opened(tmp_path)
    assert resume_checkpoint(run, None) is None
    assert resume_checkpoint(run, "last") is None, "a run that was stopped before its first checkpoint starts anew"
    paths = [save_small(run / "checkpoints" / f"step_{step:08d}", step, 10) for step in (10, 80, 90)]
    (run / "checkpoints" / ".step_00000095.77.tmp").mkdir()
    assert resume_checkpoint(run, "last") == resume_checkpoint(run, str(run)) == paths[2] and not caplog.records
    (paths[2] / "manifest.json").unlink()
    (paths[1] / "state.pt").write_bytes(b"")
    for _ in range(2):
        assert resume_checkpoint(run, "last") == resume_checkpoint(run, str(run)) == paths[0]
    skipped = [record.getMessage() for record in caplog.records]
    assert len(skipped) == 2, "one line a damaged one, however often they are looked for"
    assert "step_00000090 is no whole checkpoint: manifest.json cannot be read" in skipped[0]
    assert "step_00000080/state.pt has another size" in skipped[1] and skipped[1].endswith(f"checkpoint is {paths[0]}")
    (paths[0] / "model.safetensors").unlink()
    for where in ("last", str(run)):
        with pytest.raises(
            CheckpointError,
            match=r"run/checkpoints holds no checkpoint that is whole: step_00000090 .*_00000080/.*_00000010/",
        ):
            resume_checkpoint(run, where)
    with pytest.raises(ConfigError, match="is a URL"):
        resume_checkpoint(run, "https://example.org/last")
    with pytest.raises(ConfigError, match="is a URL"):
        options(tmp_path, runs_dir="s3://bucket/runs")


class TestLock:
    def test_a_second_process_is_refused_until_the_first_is_dead(self, tmp_path: Path) -> None:
        run = trained(tmp_path)
        said = "from pathlib import Path; from nanofed.training.run_folder import hold_run; import sys, time"
        script = f"{said}\nwith hold_run(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(600)"
        with subprocess.Popen([sys.executable, "-c", script, str(run)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"held\n"
            before = listed(tmp_path)
            link = tmp_path / "link"
            link.symlink_to(run)
            for name in (run, link):
                with pytest.raises(NanofedError, match=rf"is in use by process {process.pid} on \S+ since 20\d\d-"):
                    hold_run(name).__enter__()
            assert listed(tmp_path) == sorted([*before, "link"])
            assert resume_checkpoint(run, "last") is not None, "reading needs no lock"
            process.kill()
        with hold_run(run):
            pass
        assert not list(tmp_path.glob(".run*"))

    def test_a_round_loop_that_outlives_its_command_keeps_the_run(self, tmp_path: Path) -> None:
        run = tmp_path / "run"
        with hold_run(run) as rounds:
            rounds.release()
            orphan = RunLock(run, ROUNDS).__enter__()
        with pytest.raises(NanofedError, match="is in use by process"):
            hold_run(run).__enter__()
        with hold_run(run, end_leftovers=orphan.release):
            pass

    def test_an_error_of_the_file_system_is_one_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*args: object) -> None:
            raise OSError(5, os.strerror(5))

        monkeypatch.setattr("nanofed.training.run_lock.fcntl.flock", broken)
        with pytest.raises(NanofedError, match="run cannot be written: Input/output error"):
            hold_run(tmp_path / "run").__enter__()

    def test_a_file_system_without_locks_is_said(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def without(*args: object) -> None:
            raise OSError(37, os.strerror(37))

        monkeypatch.setattr("nanofed.training.run_lock.fcntl.flock", without)
        with hold_run(tmp_path / "run"):
            assert "has no locks (No locks available)" in caplog.text
