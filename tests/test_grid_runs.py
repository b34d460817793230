"""run_grid.py: how it names its runs and knows them on disk."""

import os
import sys

import pytest
from conftest import ROOT

import run_grid


def test_labels():
    """The script, and the flags that not all have; of one command all."""
    assert run_grid.shorten(("a/b.py --n 1",)) == {"a/b.py --n 1": "b --n 1"}
    labels = run_grid.shorten(("x.py --n 1 --m 8", "y.py --m 8 --k", "y.py --m  8"))
    assert [*labels.values()] == ["x --n 1 --m 8", "y --m 8 --k", "y --m  8"]
    assert [*run_grid.shorten(("x.py --n 1 --m 8", "y.py --m 8 --k")).values()] == ["x --n 1", "y --k"]


def test_a_resumed_run_has_today_s_tracking_and_checkpoints(tmp_path):
    flags = "--no-track --checkpoint-interval 50 --wandb-entity me --keep-replay --gamma 0.9"
    command = f"{ROOT}/dense_td3_continuous.py {flags}"
    run = run_grid.make_run(command, "dense", "toy_envs:Reach-v0", 3, str(tmp_path))
    again = "--no-track --wandb-project-name nm-sparse-rl --wandb-entity me --checkpoint-interval 50 --no-capture-video"
    assert run.resume_argv == [*again.split(), "--keep-replay"]
    free = "runs_dir resume evaluate track wandb_project_name wandb_entity checkpoint_interval capture_video"
    assert {*run.defaults} - {*run.identity} == {*free.split(), "keep_replay", "threads"}


def test_which_of_a_run_s_folders_counts(tmp_path):
    """The one of its own code before others, then a finished one, then the newest checkpoint; else none."""
    run = run_grid.make_run(f"{ROOT}/dense_td3_continuous.py", "dense", "toy_envs:Reach-v0", 3, str(tmp_path))
    folders = [  # best first: code, exit reason, age of its checkpoint in seconds
        (run.code, "finished", 900),
        (run.code, "error", 100),
        (run.code, "running", 500),
        ("other", "finished", 1),
        ("other", "running", 1),
    ]
    found = []
    for i, (code, reason, age) in enumerate(folders):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "checkpoint.pt").touch()
        os.utime(tmp_path / str(i) / "checkpoint.pt", (1e9 - age, 1e9 - age))
        meta = {"script": "dense_td3_continuous.py", "args": run.identity, "code": code, "exit_reason": reason}
        found.insert(0, (tmp_path / str(i), meta))
    (tmp_path / "no checkpoint").mkdir()
    foreign = {"script": "rnm_td3_continuous.py"}, {"args": run.identity | {"seed": 4}}
    rest = [(tmp_path / "0", found[-1][1] | change) for change in foreign]
    rest += [(tmp_path / "no checkpoint", found[-1][1] | {"exit_reason": "error"})]
    while found:
        assert run_grid.look(run, found + rest) is found[-1][1]
        folder, meta = found.pop()
        assert run.folder == folder and run.state == ("finished" if meta["exit_reason"] == "finished" else "stopped")
    assert run_grid.look(run, rest) == {} and (run.state, run.folder) == ("missing", None)


def test_a_damaged_run_stops_the_grid_at_its_start_only(monkeypatch, capsys, tmp_path):
    """It may be a finished one. A grid that runs goes on, and so it does if a folder is deleted."""
    for name, text in {"a": '{"script": "dense_td3', "b": "[]"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.json").write_text(text)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "meta.json").symlink_to("gone")
    assert run_grid.read_runs(str(tmp_path)) == []
    command = ["--commands", f"{ROOT}/dense_td3_continuous.py", "--env-ids", "toy_envs:Reach-v0"]
    monkeypatch.setattr(sys, "argv", ["run_grid.py", *command, "--runs-dir", str(tmp_path), "--dry-run"])
    with pytest.raises(SystemExit, match="2"):
        run_grid.main()
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path}/a/meta.json can't be read (") and "move its folder away" in said
