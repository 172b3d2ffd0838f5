"""How files are written: whole or not at all, through links, and into pipes."""

import json
import os
import stat
import subprocess
import sys
import threading

import pytest

from qcfs_fast import files
from qcfs_fast.files import write_text_atomically, written_atomically


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    def interrupted(path):
        with written_atomically(path) as temporary:
            temporary.write_text("half of the n")
            raise KeyboardInterrupt

    target = tmp_path / "result.json"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        interrupted(target)
    assert target.read_text() == "old"
    write_text_atomically(target, "new")
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["result.json"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.txt"
    link.symlink_to(tmp_path / "real" / "file.txt")
    for text in ("one", "two"):
        write_text_atomically(link, text)
        assert link.is_symlink()
        assert (tmp_path / "real" / "file.txt").read_text() == text


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_text_atomically(pipe, "page")
    reader.join(10)
    assert read == ["page"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder; name a file in it"):
        write_text_atomically(tmp_path, "page")


def test_permissions_are_those_of_a_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    write_text_atomically(tmp_path / "page", "page")
    assert (tmp_path / "page").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_folder_must_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="create it first"):
        write_text_atomically(tmp_path / "no" / "file", "text")


ADD = """
import sys
from qcfs_fast.files import update_json
for i in range(40):
    update_json(sys.argv[1], lambda there: {**(there or {}), f"{sys.argv[2]} {i}": i})
"""


def test_processes_that_add_to_one_file_lose_nothing(tmp_path):
    path = tmp_path / "results.json"
    adding = [subprocess.Popen([sys.executable, "-c", ADD, str(path), name], cwd=tmp_path) for name in "ab"]
    assert [process.wait(120) for process in adding] == [0, 0]
    assert len(json.loads(path.read_text())) == 80
    assert os.listdir(tmp_path) == ["results.json"]


# ------------------------------------------------------------------------------------- folders with one user

HOLD = """
import sys, time
from pathlib import Path
from qcfs_fast.files import sole_user
with sole_user(Path(sys.argv[1]), "--state"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_has_one_user_until_that_one_is_dead(tmp_path):
    folder = tmp_path / "state"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, cwd=tmp_path)
    try:
        assert holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(BlockingIOError, match=rf"state: process {holder.pid} on .* works in it.*another --state"),
            files.sole_user(folder, "--state"),
        ):
            pass
    finally:
        holder.kill()
        holder.communicate()
    assert os.listdir(folder)  # the dead one's lock, which bars nobody
    with files.sole_user(folder, "--state"):
        (folder / "mine").write_text("")
    assert os.listdir(folder) == ["mine"]
    (folder / "mine").unlink()
    with files.sole_user(folder, "--state"):
        pass
    assert os.listdir(folder) == []  # it was there before
    folder.rmdir()
    with files.sole_user(folder, "--state"):
        pass
    assert not folder.exists()


def test_a_lock_follows_no_link(tmp_path):
    (tmp_path / "precious").write_text("data")
    (tmp_path / ".qcfs-fast.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match=r"qcfs-fast\.lock"), files.sole_user(tmp_path, "--state"):
        pass
    assert (tmp_path / "precious").read_text() == "data"


def test_what_others_wrote_is_never_removed(tmp_path):
    own = ["0.json", "12.json", f"3.json.{'0a' * 8}.part"]
    others = ["a.json", "0.json.bak", "0.json.part", "thesis.tex"]
    for name in own + others:
        (tmp_path / name).write_text("")
    (tmp_path / "7.json").mkdir()
    files.remove_written(tmp_path, r"[0-9]+\.json")
    assert sorted(os.listdir(tmp_path)) == sorted(["7.json", *others])
