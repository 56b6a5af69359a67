"""A manifest tells every change of a folder and never raises or looks outside of it."""

import json
import os
import random
from pathlib import Path

import pytest

from mobilellm_jax.storage import manifest
from mobilellm_jax.storage.atomic import write_file
from mobilellm_jax.storage.manifest import MANIFEST_NAME, find_damage, write_manifest

STEP = 7


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / str(STEP)
    (folder / "params" / "d").mkdir(parents=True)
    (folder / "params" / "d" / "data").write_bytes(random.Random(0).randbytes(5000))
    (folder / "params" / "empty").write_bytes(b"")
    (folder / "opt_state").mkdir()
    (folder / "opt_state" / "data").write_bytes(b"moments")
    (folder / "metadata.json").write_bytes(b'{"step": 7}\n')
    (folder / "_CHECKPOINT_METADATA").write_bytes(b"Orbax writes this later")
    write_manifest(folder, STEP)
    return folder


def _rewrite(folder, change):
    """Lets `change` edit the parsed manifest and writes it in its own form."""
    path = folder / MANIFEST_NAME
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


@pytest.fixture
def synced(monkeypatch):
    """The calls of fsync, in order: path, and bytes at that moment."""
    forced = []

    def fsync(descriptor, original=os.fsync):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        forced.append((path, os.fstat(descriptor).st_size))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return forced


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")


@needs_proc
def test_all_files_and_folders_are_on_the_disk_before_the_manifest(folder, synced):
    write_manifest(folder, STEP)
    paths = [path for path, _ in synced]
    before = set(paths[: paths.index(folder / f".{MANIFEST_NAME}.tmp")])
    listed = {folder / name for name in json.loads((folder / MANIFEST_NAME).read_bytes())["files"]}
    assert len(listed) == 4
    assert before >= listed | {path.parent for path in listed}


@needs_proc
def test_a_file_is_on_the_disk_whole_before_its_name_is(tmp_path, synced):
    write_file(tmp_path / "file", b"content")
    (temporary, size), (parent, _) = synced
    assert (temporary.parent, size) == (tmp_path, 7) and temporary.name != "file"
    assert parent == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_untouched_folder_is_valid_under_any_name(folder):
    assert find_damage(folder, STEP) == []
    copy = folder.rename(folder.with_name("best"))
    assert find_damage(copy, None) == []


def test_the_manifest_lists_every_file_but_itself_and_what_orbax_writes_last(folder):
    names = set(json.loads((folder / MANIFEST_NAME).read_bytes())["files"])
    assert names == {"metadata.json", "opt_state/data", "params/d/data", "params/empty"}


@pytest.mark.parametrize("change", ["flip", "truncate", "extend", "delete", "link"])
@pytest.mark.parametrize("name", ["params/d/data", "metadata.json"])
def test_each_change_of_a_file_is_told_by_its_name(folder, name, change):
    path = folder / name
    content = bytearray(path.read_bytes())
    if change == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif change == "truncate":
        path.write_bytes(content[:-1])
    elif change == "extend":
        path.write_bytes(content + b"\0")
    else:
        copy = path.rename(folder.parent / "elsewhere")
        if change == "link":
            path.symlink_to(copy)
    (damage,) = find_damage(folder, STEP)
    assert damage.startswith(f"{name}: ")


def test_an_additional_file_is_damage_even_with_orbax_names_further_down(folder):
    (folder / "params" / "_CHECKPOINT_METADATA").write_bytes(b"x")
    assert find_damage(folder, STEP) == ["params/_CHECKPOINT_METADATA: not in the manifest"]


def test_every_flipped_byte_of_the_manifest_is_noticed(folder):
    path = folder / MANIFEST_NAME
    whole = path.read_bytes()
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        assert find_damage(folder, STEP), f"flip in byte {position} of the manifest"


def test_every_truncation_of_the_manifest_is_noticed(folder):
    path = folder / MANIFEST_NAME
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert find_damage(folder, STEP), f"manifest cut to {length} bytes"


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "a/../../secret", "params//x", ".", "", "a\\b", "a\0b"]
)
def test_names_that_lead_out_of_the_folder_are_refused_unopened(folder, name, monkeypatch):
    (folder.parent / "secret").write_bytes(b"secret")
    opened = []
    monkeypatch.setattr(manifest, "sha256_file", lambda path, **_: opened.append(path))
    _rewrite(folder, lambda c: c["files"].update({name: {"sha256": "0" * 64, "size": 6}}))
    (damage,) = find_damage(folder, STEP)
    assert "file name" in damage
    assert opened == []


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.clear(),
        lambda c: c.update(files=[]),
        lambda c: c.pop("step"),
        lambda c: c.update(step=True),
        lambda c: c.update(step=STEP + 1),
        lambda c: c.update(step="7"),
        lambda c: c.update(format=2),
        lambda c: c.update(more=1),
        lambda c: c["files"].clear(),
        lambda c: c["files"].pop("metadata.json"),
        lambda c: c["files"].update({"metadata.json": None}),
        lambda c: c["files"]["metadata.json"].update(size=-1),
        lambda c: c["files"]["metadata.json"].update(size=10**400),
        lambda c: c["files"]["metadata.json"].update(size=12.0),
        lambda c: c["files"]["metadata.json"].update(sha256="z" * 64),
        lambda c: c["files"]["metadata.json"].update(sha256=5),
    ],
)
def test_a_well_formed_manifest_with_other_content_is_damage(folder, change):
    _rewrite(folder, change)
    assert find_damage(folder, STEP)


@pytest.mark.parametrize(
    "raw",
    [b"", b"\xff\xfe\x00", b"[]", b"[" * 100_000, b'{"files":' * 50_000, b"1" * 5000, b"NaN"],
    ids=["empty", "binary", "list", "deep list", "deep dict", "long number", "NaN"],
)
def test_a_manifest_that_is_not_ours_is_damage(folder, raw):
    (folder / MANIFEST_NAME).write_bytes(raw)
    assert find_damage(folder, STEP)


def test_a_huge_manifest_is_refused_without_reading_it(folder):
    os.truncate(folder / MANIFEST_NAME, 1 << 40)  # sparse
    (damage,) = find_damage(folder, STEP)
    assert "more than" in damage


@pytest.mark.parametrize("replace", ["nothing", "folder", "link"])
def test_a_manifest_that_is_no_file_is_damage(folder, replace):
    path = folder / MANIFEST_NAME
    copy = path.rename(folder.parent / "copy")
    if replace == "folder":
        path.mkdir()
    elif replace == "link":
        path.symlink_to(copy)
    (damage,) = find_damage(folder, STEP)
    assert damage.startswith(MANIFEST_NAME)


def test_a_folder_that_is_not_there_is_damage(tmp_path):
    assert find_damage(tmp_path / "9", 9) == ["manifest.json: missing"]


def test_sizes_only_skips_hashing_but_not_measuring(folder):
    (folder / "opt_state" / "data").write_bytes(b"MOMENTS")
    assert find_damage(folder, STEP)
    assert find_damage(folder, STEP, sizes_only="opt_state") == []
    (folder / "opt_state" / "data").write_bytes(b"moment")
    assert find_damage(folder, STEP, sizes_only="opt_state")


def test_sizes_only_hashes_what_only_begins_like_the_name(folder):
    (folder / "opt_states").write_bytes(b"abc")
    write_manifest(folder, STEP)
    (folder / "opt_states").write_bytes(b"ABC")
    (damage,) = find_damage(folder, STEP, sizes_only="opt_state")
    assert damage.startswith("opt_states: sha256")


def test_a_file_that_cannot_be_written_whole_keeps_its_old_content(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_file(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
