"""Folders that are written whole: nothing beside them is lost, and nothing is left of a failure."""

import contextlib

import pytest
from prepared import files_in, run_prepare, write_lines

from mobilellm_jax import cli
from mobilellm_jax.checkpoints.store import save_model
from mobilellm_jax.errors import UserError
from mobilellm_jax.storage.atomic import atomic_folder
from mobilellm_jax.storage.exports import new_export
from mobilellm_jax.storage.untrusted import safe_child


def tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def replace(target, *, fail=False):
    with atomic_folder(target, writer="test", replace=True) as new:
        (new / "new").touch()
        if fail:
            new.joinpath("new").unlink()
            new.rmdir()  # it can no longer get its name


def test_a_folder_that_replaces_another_leaves_all_names_beside_it_alone(tmp_path):
    for name in ("a", "a.old", "b.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "keep").touch()
    replace(tmp_path / "a")
    assert tree(tmp_path) == ["a", "a.old", "a.old/keep", "a/new", "b.old", "b.old/keep"]


def test_a_folder_that_could_not_be_replaced_is_what_it_was(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "keep").touch()
    with pytest.raises(OSError):
        replace(tmp_path / "a", fail=True)
    assert tree(tmp_path) == ["a", "a/keep"]


@pytest.mark.parametrize("writer", ["prepare", "export"])
def test_a_name_that_a_later_run_would_remove_is_refused(writer, tmp_path):
    output = tmp_path / "out.partial"
    with pytest.raises(UserError, match="out.partial: .* choose another name"):
        if writer == "prepare":
            run_prepare([write_lines(tmp_path / "a.jsonl")], output, vocab_size=310)
        else:
            with new_export(output):
                pass
    assert not output.exists()


def fail_prepare(output, tmp_path):
    (tmp_path / "b.txt").write_bytes(b"\xff")
    run_prepare([tmp_path / "b.txt"], output, vocab_size=310)


def fail_export(output, _):
    with new_export(output):
        raise UserError("not this time")


def fail_import(output, _):
    save_model(output, None)  # fails once it needs the model


@pytest.mark.parametrize("fail", [fail_prepare, fail_export, fail_import])
def test_a_failure_leaves_no_folder_above_its_output(fail, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    with pytest.raises((UserError, AttributeError)):
        fail(there / "x" / "y" / "z", tmp_path)
    assert tree(there) == []


def test_prepare_writes_what_a_link_names_and_refuses_one_that_names_itself(tmp_path):
    path = write_lines(tmp_path / "a.jsonl")
    (tmp_path / "link").symlink_to("named")
    run_prepare([path], tmp_path / "link", vocab_size=310)
    assert (tmp_path / "link").is_symlink()
    assert {"dataset.json", "tokenizer.model"} < files_in(tmp_path / "named").keys()

    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="loop: is a link that leads to itself"):
        run_prepare([path], tmp_path / "loop", vocab_size=310)


def test_links_that_lead_to_themselves_are_no_traceback(tmp_path, capsys):
    (tmp_path / "loop").symlink_to("loop")
    with contextlib.chdir(tmp_path):
        assert cli.main(["evaluate", "--checkpoint=no", "--data=no", "--output=loop"]) == 2
    assert "error: no: no such folder" in capsys.readouterr().err
    assert not safe_child(tmp_path, "loop").exists()
