"""Documents come out of text, JSON lines and folders; what cannot be read is named by file and line."""

import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.documents import read_documents
from runtime.errors import CorruptDataError, DataPathError


def test_a_text_file_is_one_document_with_its_own_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\n\r\ntwö\rthree\n".encode())
    assert list(read_documents([path])) == ["one\r\n\r\ntwö\rthree\n"]


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 1 << 20])
def test_a_line_break_in_a_separator_is_of_either_kind(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.documents._CHUNK", chunk)
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo\r\n\r\nthree\n\r\n\nfour\r\r\n\n\r\n")
    assert list(read_documents([path], separator="\n\n")) == ["one\r\ntwo", "three", "\nfour\r", "\r\n"]


def test_a_separator_that_never_occurs_takes_time_that_grows_with_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40,000 chunks, of which each would be looked through together with all before it."""
    monkeypatch.setattr("data.documents._CHUNK", 100)
    path = tmp_path / "a.txt"
    path.write_text("0123456789" * 400_000)
    begin = time.process_time()
    (found,) = read_documents([path], separator="<never>")
    assert len(found) == 4_000_000
    assert time.process_time() - begin < 2


@pytest.mark.parametrize(
    "line", [rb'{"text": "a\ud800b"}', rb'{"text": "\udc00\ud800"}', b'{"text": "a\xed\xa0\x80b"}']
)
def test_half_a_character_is_named_by_file_and_line(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(rb'{"text": "\ud83d\ude00"}' + b"\n" + line)
    documents = read_documents([path])
    assert next(documents) == "\U0001f600"
    with pytest.raises(CorruptDataError, match=r"a\.jsonl:2: half of a surrogate pair.* at character [01] of .*'text'"):
        next(documents)


@settings(deadline=None)
@given(parts=st.lists(st.text(alphabet="ab", max_size=5), min_size=1, max_size=6), chunk=st.integers(1, 7))
def test_separators_across_chunks(tmp_path_factory: pytest.TempPathFactory, parts: list[str], chunk: int) -> None:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text("--".join(parts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.documents._CHUNK", chunk)
        assert list(read_documents([path], separator="--")) == parts


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "id": 1}\n\n{"text": "t\\u00f6o\u2028"}', encoding="utf-8")
    assert list(read_documents([path])) == ["one", "töo\u2028"]
    path.rename(tmp_path / "a.json")
    assert list(read_documents([tmp_path / "a.json"])) == ["one", "töo\u2028"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "a.jsonl:2: not a JSON object a line"),
        ("[" * 200_000, "a.jsonl:2: not a JSON object a line"),
        ("[1]", "a.jsonl:2: no text under 'text'; it is no object"),
        ('{"body": "x", "id": 1}', "a.jsonl:2: no text under 'text'; its keys are body, id; see --json-key"),
        ('{"text": 7}', "a.jsonl:2: no text under 'text'"),
        ('{"text": "x", "text": "y"}', "a.jsonl:2: .*key 'text' is there twice"),
        ('{"text": "x", "meta": {"id": 1, "id": 2}}', "a.jsonl:2: .*key 'id' is there twice"),
        (b'{"text": "\xff"}', "a.jsonl:2"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str | bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + (line if isinstance(line, bytes) else line.encode()))
    with pytest.raises(CorruptDataError, match=message):
        list(read_documents([path]))


def test_another_key(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "x"}')
    assert list(read_documents([path], json_key="body")) == ["x"]


def test_folders_are_searched_at_any_depth_in_order(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a.txt", "b/1.jsonl", "b/c.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"text": "1.jsonl"}' if name.endswith("jsonl") else path.name)
    assert list(read_documents([tmp_path])) == ["a.txt", "1.jsonl", "2.txt"]
    assert list(read_documents([tmp_path / "b" / "c.py", tmp_path / "a.txt"])) == ["c.py", "a.txt"]


def test_missing_inputs_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("x")
    with pytest.raises(DataPathError, match=f"no input {tmp_path}/corpos.txt; nearest: {tmp_path}/corpus.txt"):
        read_documents([tmp_path / "corpus.txt", tmp_path / "corpos.txt"])
    with pytest.raises(DataPathError, match=r"no input .*/nowhere/x.txt$"):
        read_documents([tmp_path / "nowhere" / "x.txt"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataPathError, match=r"empty holds no .txt or .jsonl file"):
        read_documents([tmp_path / "empty"])


def test_what_is_no_file_is_refused_for_what_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataPathError, match=r"pipe\.txt is a FIFO, no regular file"):
        read_documents([tmp_path / "pipe.txt"])
    with pytest.raises(DataPathError, match=r"/dev/null is a device"):
        read_documents([Path("/dev/null")])


def test_other_encodings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("für".encode("latin-1"))
    with pytest.raises(CorruptDataError, match=r"latin.txt is not UTF-8 text .*iconv"):
        list(read_documents([path]))


def test_texts_behind_links_are_taken_once(tmp_path):
    (tmp_path / "folder" / "own").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.txt").write_text("linked")
    (tmp_path / "folder" / "a.txt").write_text("own")
    (tmp_path / "folder" / "part").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "folder" / "own" / "again").symlink_to(tmp_path / "folder")
    assert list(read_documents([tmp_path / "folder"])) == ["own", "linked"]


def test_what_cannot_be_read_in_a_folder_is_named_and_not_left_out(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("own")
    link = tmp_path / "b.txt"
    link.symlink_to(tmp_path / "not mounted")
    for inputs in ([tmp_path], [link]):
        with pytest.raises(DataPathError, match=r"b\.txt is a link to .*not mounted, which is not there"):
            read_documents(inputs)
    link.unlink()
    os.mkfifo(link)
    with pytest.raises(DataPathError, match=r"b\.txt is a FIFO"):
        read_documents([tmp_path])
    link.unlink()

    def walk(folder, onerror, followlinks):
        onerror(PermissionError(13, "Permission denied", f"{folder}/closed"))
        yield from ()

    monkeypatch.setattr(os, "walk", walk)
    with pytest.raises(DataPathError, match="closed cannot be read: Permission denied"):
        read_documents([tmp_path])
