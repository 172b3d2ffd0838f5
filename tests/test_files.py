"""How files are written: whole or not at all, through links, and into pipes."""

import json
import os
import stat
import subprocess
import sys
import threading

import pytest

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
