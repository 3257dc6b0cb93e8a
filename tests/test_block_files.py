"""Records of the disk cache: kept, refused when anything about them is wrong, given up in order, one writer."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import abyssal.engine.block_files as block_files
from abyssal.engine.block_files import FOLDER, HASH_BYTES, MAGIC, PAGE, BlockFiles, times_of_use

A, B = "a" * 64, "b" * 64  # fingerprints
ROOM = 1 << 30


def key(n: int) -> bytes:
    return n.to_bytes(32, "little")


def payload(n: int, size: int = 300) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, size, dtype=np.uint8)


def files_with(folder: Path, numbers: range | list[int], *, max_bytes: int = ROOM, fingerprint: str = A) -> BlockFiles:
    files = BlockFiles(folder, max_bytes=max_bytes)
    for n in numbers:
        assert files.write(fingerprint, key(n), payload(n), used_ns=n)
    return files


def read(files: BlockFiles, n: int, *, fingerprint: str = A, size: int = 300) -> np.ndarray | None:
    into = np.zeros(size, np.uint8)
    return into if files.has(fingerprint, key(n)) and files.read(fingerprint, key(n), into) else None


def kept(files: BlockFiles, numbers: range) -> list[int]:
    return [n for n in numbers if (got := read(files, n)) is not None and (got == payload(n)).all()]


def test_what_was_written_is_there_after_a_restart(tmp_path: Path):
    files = files_with(tmp_path, range(5))
    assert kept(files, range(6)) == [0, 1, 2, 3, 4]
    assert not files.write(A, key(3), payload(3), used_ns=9)  # it is there
    files.close()
    again = BlockFiles(tmp_path, max_bytes=ROOM)
    assert kept(again, range(6)) == [0, 1, 2, 3, 4] and again.n_bytes == 5 * PAGE
    assert read(again, 2, fingerprint=B) is None


def test_only_its_user_may_look_inside_whatever_the_umask(tmp_path: Path):
    before = os.umask(0)
    try:
        (tmp_path / FOLDER).mkdir()
        files_with(tmp_path, [1])
    finally:
        os.umask(before)
    paths = [tmp_path / FOLDER, *(tmp_path / FOLDER).rglob("*")]
    assert sorted(oct(path.stat().st_mode & 0o777) for path in paths) == ["0o600", "0o600", "0o700", "0o700"]


def test_a_folder_of_somebody_elses_is_refused(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / FOLDER).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match="belongs to somebody else"):
        BlockFiles(tmp_path, max_bytes=ROOM)


@given(
    victim=st.integers(0, 5),
    place=st.floats(0, 1, exclude_max=True),
    how=st.sampled_from(["flip", "cut", "grow", "zero the end", "empty"]),
    bit=st.integers(0, 7),
)
def test_a_spoilt_record_is_never_used_and_spoils_no_other(tmp_path_factory, victim, place, how, bit):
    folder = tmp_path_factory.mktemp("spoilt")
    files_with(folder, range(6)).close()
    path = folder / FOLDER / A / key(victim).hex()
    content = bytearray(path.read_bytes())
    at = int(place * len(content))
    if how == "flip":
        content[at] ^= 1 << bit
    elif how == "zero the end":  # what a power cut may leave
        content[at:] = bytes(len(content) - at)
    elif how == "grow":
        content[at:at] = b"x"
    else:
        content = content[: at if how == "cut" else 0]
    changed = bytes(content) != path.read_bytes()
    path.write_bytes(content)
    files = BlockFiles(folder, max_bytes=ROOM)
    assert kept(files, range(6)) == [n for n in range(6) if n != victim or not changed]
    if changed:
        files.discard(A, key(victim))
        assert not path.exists() and files.write(A, key(victim), payload(victim), used_ns=0)  # the place is free again
    assert kept(files, range(6)) == list(range(6))
    files.close()


def test_a_record_under_another_name_or_of_other_weights_is_refused(tmp_path: Path):
    files = files_with(tmp_path, [0, 1])
    folder = tmp_path / FOLDER
    (folder / B).mkdir()
    (folder / A / key(0).hex()).rename(folder / B / key(0).hex())
    (folder / A / key(1).hex()).rename(folder / A / key(2).hex())
    files.close()
    again = BlockFiles(tmp_path, max_bytes=ROOM)
    assert again.has(B, key(0)) and read(again, 0, fingerprint=B) is None
    assert again.has(A, key(2)) and read(again, 2) is None
    (folder / B / key(0).hex()).rename(folder / A / key(0).hex())
    again.close()
    assert kept(BlockFiles(tmp_path, max_bytes=ROOM), range(3)) == [0]


def test_another_version_and_another_length_are_refused(tmp_path: Path):
    files = files_with(tmp_path, [0, 1])
    path = tmp_path / FOLDER / A / key(0).hex()
    path.write_bytes(MAGIC.replace(b"1", b"2") + path.read_bytes()[len(MAGIC) :])
    assert kept(files, range(2)) == [1]
    assert read(files, 1, size=299) is None and read(files, 1, size=301) is None


def test_what_a_killed_writer_left_is_swept_up_and_strange_files_are_left_alone(tmp_path: Path):
    files_with(tmp_path, [0]).close()
    folder = tmp_path / FOLDER / A
    for name in (key(1).hex() + ".new", "notes.txt"):
        (folder / name).write_bytes(b"half")
    (tmp_path / FOLDER / "other").mkdir()
    (tmp_path / FOLDER / "other" / key(1).hex()).write_bytes(b"whole")
    files = BlockFiles(tmp_path, max_bytes=ROOM)
    assert kept(files, range(2)) == [0] and files.n_bytes == PAGE
    assert sorted(path.name for path in folder.iterdir()) == sorted([key(0).hex(), "notes.txt"])
    assert (tmp_path / FOLDER / "other" / key(1).hex()).exists()


def test_the_room_is_kept_and_the_longest_unused_goes_first(tmp_path: Path):
    files = files_with(tmp_path, range(4), max_bytes=4 * PAGE)
    files.touch(A, [key(0)], now_ns=4)
    files.write(A, key(4), payload(4), used_ns=5)  # 95 % of four pages are three: two go
    assert kept(files, range(6)) == [0, 3, 4] and files.n_evicted == 2 and files.n_bytes == 3 * PAGE
    files.close()
    again = BlockFiles(tmp_path, max_bytes=2 * PAGE)  # less room after a restart; the order is remembered
    assert kept(again, range(6)) == [4] and again.n_bytes == PAGE
    assert not again.write(A, key(5), payload(5, size=3 * PAGE), used_ns=6) and kept(again, range(6)) == [4]


def test_blocks_of_other_weights_take_room_and_go_too(tmp_path: Path):
    files_with(tmp_path, range(3), fingerprint=B).close()
    files = files_with(tmp_path, range(4), max_bytes=4 * PAGE)
    assert files.n_bytes <= 4 * PAGE and kept(files, range(4)) == [0, 1, 2, 3][-len(kept(files, range(4))) :]
    assert len(list((tmp_path / FOLDER / B).iterdir())) + len(kept(files, range(4))) == files.n_bytes // PAGE


def test_the_end_of_a_prompt_goes_before_its_beginning(tmp_path: Path):
    files = BlockFiles(tmp_path, max_bytes=8 * PAGE)
    for n, used_ns in enumerate(times_of_use(10**18, 8)):
        files.write(A, key(n), payload(n), used_ns=used_ns)
    files.touch(A, [key(n) for n in range(8)], now_ns=10**18 + 10**6)
    files.close()
    for room, left in ((6, [0, 1, 2, 3, 4]), (3, [0, 1])):
        files = BlockFiles(tmp_path, max_bytes=room * PAGE)
        assert kept(files, range(8)) == left
        files.close()


def test_one_process_writes_and_another_reads(tmp_path: Path):
    owner = files_with(tmp_path, [0])
    reader = BlockFiles(tmp_path, max_bytes=ROOM)
    assert owner.is_owner and not reader.is_owner
    owner.write(A, key(1), payload(1), used_ns=1)
    assert kept(reader, range(3)) == [0, 1]
    owner.discard(A, key(0))
    assert kept(reader, range(3)) == [1]
    reader.close()
    owner.close()
    assert BlockFiles(tmp_path, max_bytes=ROOM).is_owner


def test_a_dead_process_owns_nothing(tmp_path: Path):
    child = os.fork()
    if child == 0:
        files_with(tmp_path, [0])
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    files = BlockFiles(tmp_path, max_bytes=ROOM)
    assert files.is_owner and kept(files, range(2)) == [0]


@pytest.mark.parametrize("call", ["utime", "rename", "open"])
def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str):
    files = files_with(tmp_path, [0])

    def full(*args: object, **settings: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(block_files.os, call, full)
        with pytest.raises(OSError, match="No space left"):
            files.write(A, key(1), payload(1), used_ns=1)
    assert [path.name for path in (tmp_path / FOLDER / A).iterdir()] == [key(0).hex()]
    assert kept(files, range(2)) == [0] and files.n_bytes == PAGE
    assert files.write(A, key(1), payload(1), used_ns=1) and kept(files, range(2)) == [0, 1]


def test_a_record_has_nothing_but_its_hash_before_the_block(tmp_path: Path):
    files_with(tmp_path, [0])
    content = (tmp_path / FOLDER / A / key(0).hex()).read_bytes()
    assert content[: len(MAGIC)] == MAGIC and content[len(MAGIC) + HASH_BYTES :] == payload(0).tobytes()
