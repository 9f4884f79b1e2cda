"""What is renamed is on the disk before: a power cut leaves the old file or the new one."""

import os

import pytest

from grades_trl.durable import put_in_place
from grades_trl.report.strict_json import write_json
from grades_trl.trainers import checkpoint, whole_checkpoint


@pytest.fixture
def calls(monkeypatch):
    """fsync and rename, in their order, with the names of what they are called on."""
    made, names, is_open = [], {}, os.open
    fsync, replace = os.fsync, os.replace

    def opened(path, *args, **kwargs):
        descriptor = is_open(path, *args, **kwargs)
        names[descriptor] = os.path.basename(path)
        return descriptor

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (made.append(f"sync {names[descriptor]}"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda a, b: (made.append(f"rename {os.path.basename(b)}"), replace(a, b)))
    return made


def test_a_file_is_on_the_disk_before_its_name_is(tmp_path, calls):
    write_json(tmp_path / "a.json", {"a": 1})
    assert calls == ["sync a.json.partial", "rename a.json", f"sync {tmp_path.name}"]


def test_of_a_folder_all_files_and_folders_are(tmp_path, calls):
    (tmp_path / "_saving" / "grades").mkdir(parents=True)
    (tmp_path / "_saving" / "weights").write_text("w")
    (tmp_path / "_saving" / "grades" / "events").write_text("e")
    put_in_place(tmp_path / "_saving", tmp_path / "checkpoint-1")
    assert sorted(calls[:4]) == ["sync _saving", "sync events", "sync grades", "sync weights"]
    assert calls[4:] == ["rename checkpoint-1", f"sync {tmp_path.name}"]
    assert (tmp_path / "checkpoint-1" / "grades" / "events").read_text() == "e"


def test_a_state_has_its_tensors_before_its_values(tmp_path, calls):
    checkpoint.save_state(tmp_path / "c", {"tensors": {}, "step": 1})
    renamed = [call for call in calls if call.startswith("rename")]
    assert renamed == ["rename grades_state.safetensors", "rename grades_state.json"]
    assert checkpoint.load_state(tmp_path / "c") == {"tensors": {}, "step": 1}
    assert [p.name for p in sorted((tmp_path / "c").iterdir())] == ["grades_state.json", "grades_state.safetensors"]


def test_checkpoints_are_put_in_their_place_that_way():
    assert whole_checkpoint.put_in_place is put_in_place
