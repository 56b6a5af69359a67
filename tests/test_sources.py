"""Sources: every format, every bad input with its place."""

import bz2
import contextlib
import gzip
import hashlib
import io
import json
import lzma
import os
import socket
import sys
from pathlib import Path

import pytest
from prepared import DOCUMENTS

from mobilellm_jax.data import sources
from mobilellm_jax.errors import UserError

# Formats ------------------------------------------------------------------------------------------


def _zstd(data):
    return pytest.importorskip("zstandard").ZstdCompressor().compress(data)


def _parquet(documents):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    buffer = io.BytesIO()
    table = pyarrow.table({"id": list(range(len(documents))), "text": documents})
    parquet.write_table(table, buffer, row_group_size=7)
    return buffer.getvalue()


_LINES = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS).encode()


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", lambda: _LINES),
        ("a.json", lambda: b"\xef\xbb\xbf" + _LINES.replace(b"\n", b"\r\n\n")[:-1]),
        ("a.jsonl.gz", lambda: gzip.compress(_LINES)),
        ("a.jsonl.bz2", lambda: bz2.compress(_LINES)),
        ("a.jsonl.xz", lambda: lzma.compress(_LINES)),
        ("a.jsonl.zst", lambda: _zstd(_LINES)),
        ("two_streams.jsonl.gz", lambda: gzip.compress(_LINES[:99]) + gzip.compress(_LINES[99:])),
        ("two_streams.jsonl.zst", lambda: _zstd(_LINES[:99]) + _zstd(_LINES[99:])),
        (
            "padded_streams.jsonl.xz",
            lambda: b"".join(lzma.compress(part) + bytes(4) for part in (_LINES[:99], _LINES[99:])),
        ),
        ("a.parquet", lambda: _parquet(DOCUMENTS)),
    ],
)
def test_every_format_holds_the_same_documents(tmp_path, name, write):
    (tmp_path / name).write_bytes(write())
    [source] = sources.find_sources([tmp_path / name])
    documents = list(source.documents())
    assert [document.text for document in documents] == DOCUMENTS
    assert all(document.first and document.last for document in documents)
    assert source.bytes_read == source.size == (tmp_path / name).stat().st_size
    assert source.sha256 == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.xz", "a.txt.zst", "README"])
def test_plain_text_is_one_document(tmp_path, name):
    text = "\n".join(DOCUMENTS)
    compress = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": _zstd}.get(name[5:], bytes)
    (tmp_path / name).write_bytes(compress(text.encode()))
    [document] = sources.iter_documents([tmp_path / name])
    assert document.text == text


def test_a_directory_stands_for_its_known_files_and_a_pattern_for_its_matches(tmp_path):
    (tmp_path / "deep" / ".hidden").mkdir(parents=True)
    names = ["b.txt", "a.jsonl.xz", "deep/c.parquet", "deep/.hidden/d.txt", "e.png", ".f.txt"]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    found = [Path(source.path).name for source in sources.find_sources([tmp_path])]
    assert found == ["a.jsonl.xz", "b.txt", "c.parquet"]
    assert [s.path for s in sources.find_sources([tmp_path / "*.txt"])] == [str(tmp_path / "b.txt")]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n", encoding="utf-8-sig")
    assert [document.text for document in sources.iter_documents([tmp_path])] == ["one\ntwo\n"]


@pytest.mark.parametrize(
    ("word", "split"),
    [
        *[(word, "train") for word in ("train", "training", "Train")],
        *[(word, "valid") for word in ("valid", "validation", "val", "dev", "DEV")],
        *[(word, "test") for word in ("test", "TEST")],
    ],
)
def test_the_usual_words_for_a_split_are_known(tmp_path, word, split):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a", "part": word}))
    [document] = sources.iter_documents([tmp_path], split_field="part")
    assert document.split == split


_MANY_KEYS = json.dumps({f"key{i}": i for i in range(3000)}).encode()
_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"

# Bad inputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt: the file is empty"),
        ("a.txt", b"abc\ndef\0ghi", "a.txt: NUL byte at byte 7"),
        ("a.txt", b"abc\xff\xfe", "a.txt: byte 0xff at byte 3"),
        ("a.txt.gz", b"not gzip", "a.txt.gz: damaged, or not a .gz file"),
        ("a.txt.gz", gzip.compress(_LINES)[:-20], "a.txt.gz.*truncated"),
        ("a.jsonl.xz", lzma.compress(_LINES)[:-20], "a.jsonl.xz.*truncated"),
        ("a.jsonl.bz2", bz2.compress(_LINES)[:-20], "a.jsonl.bz2.*truncated"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "\xff"}', "a.jsonl, line 3: not valid JSON"),
        ("a.json", b'[\n {"text": "a"}\n]', "jq -c"),
        ("a.jsonl", b'{"text": "a"}\n["a"]', "line 2: expected an object"),
        (
            "a.json",
            b'[{"text": "a"}, {"text": "b"}]',
            r"line 1: expected an object.*jq -c '\.\[",
        ),
        ("a.json", b'{\n "text": "a"\n}', r"jq -c '\.' "),
        ("a.jsonl", b'{"body": "a", "id": 1}', "line 1: no field 'text'; it has 'body', 'id'"),
        ("a.jsonl", _MANY_KEYS, "it has 'key0', .*'key19' and 2,980 more; name"),
        ("a.jsonl", json.dumps({"k" * 9000: 1}).encode(), r"it has 'k{56}\.\.\.; name"),
        ("a.txt", _LFS, "a.txt: is a pointer of Git LFS, .*git lfs pull"),
        ("a.parquet", _LFS, "a.parquet: is a pointer of Git LFS, .*git lfs pull"),
        ("a.jsonl.gz", _LFS, "a.jsonl.gz: is a pointer of Git LFS, .*git lfs pull"),
        ("a.jsonl", b'{"text": 5}', "line 1: field 'text' is 5, which is not text"),
        (
            "a.jsonl",
            rb'{"text": "a\ud83d b"}',
            r"line 1: \\ud83d at character 1 of field 'text' is half",
        ),
        ("a.jsonl", b'{"text": "a", "text": "b"}', "line 1: .*the key 'text' is given twice"),
        ("a.txt", "abc\n".encode("utf-16"), "a.txt: is text in UTF-16, .*iconv -f UTF-16 -t UTF-8"),
        ("a.txt", "abc\n".encode("utf-16-le"), "a.txt: is text in UTF-16LE"),
        ("a.txt", "abc\n".encode("utf-16-be"), "a.txt: is text in UTF-16BE"),
        ("a.txt", "abc\n".encode("utf-32"), "a.txt: is text in UTF-32"),
        ("a.jsonl", _LINES.decode().encode("utf-16"), "a.jsonl: is text in UTF-16"),
        ("a.jsonl.gz", gzip.compress(_LINES.decode().encode("utf-16-le")), "is text in UTF-16LE"),
        ("a" * 300, None, "the name is too long"),
        ("a.jsonl", b'{"text": null}', "line 1: field 'text' is None"),
        ("a.parquet", b"PAR1 nothing", "a.parquet: damaged or not a Parquet file"),
        ("a.png", None, "no such file"),
        ("*.png", None, "no file matches this pattern"),
        ("", None, "no file to read in this directory"),
    ],
)
def test_a_bad_input_is_named_with_its_place(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(sources.iter_documents([tmp_path / name]))


def test_what_is_wrong_with_a_column_of_bytes_is_shown(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(_parquet([b"a"]))
    with pytest.raises(UserError, match="field 'text' is b'a', which is not text"):
        list(sources.iter_documents([path]))


@pytest.mark.parametrize("target", ["nowhere", "a.txt"])
def test_a_link_to_nowhere_is_named_and_not_left_out(tmp_path, target):
    (tmp_path / "b.txt").write_text("text")
    (tmp_path / "a.txt").symlink_to(target)
    for path in (tmp_path / "a.txt", tmp_path, tmp_path / "*.txt"):
        with pytest.raises(UserError, match=f"a.txt: is a link to {target}, which is not there"):
            sources.find_sources([path])


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null", "fifo.txt", "socket.txt"])
def test_what_is_no_file_is_named_and_not_read(tmp_path, name):
    os.mkfifo(tmp_path / "fifo.txt")
    with socket.socket(socket.AF_UNIX) as unix, contextlib.chdir(tmp_path):
        unix.bind("socket.txt")
        kind = {"f": "a pipe", "s": "a socket"}.get(name[0], "a character device")
        with pytest.raises(UserError, match=f"{name}: is {kind}, not a file.*to a file"):
            sources.find_sources([name])


def test_an_input_that_is_listed_twice_by_two_names_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").symlink_to(tmp_path / "a.txt")
    with pytest.raises(UserError, match="b.txt: this input is listed twice"):
        sources.find_sources([tmp_path / "a.txt", tmp_path / "b.txt"])


def test_truncated_zstandard_is_noticed(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(_zstd(_LINES)[:-20])
    with pytest.raises(UserError, match="truncated"):
        list(sources.iter_documents([tmp_path]))


def test_a_missing_parquet_column_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(_parquet(DOCUMENTS))
    with pytest.raises(UserError, match="no field 'body'; it has 'id', 'text'"):
        list(sources.iter_documents([tmp_path], "body"))


def test_datasets_is_asked_for_with_its_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        list(sources.iter_documents(["hf:owner/name"]))
