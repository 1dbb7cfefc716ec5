# SPDX-License-Identifier: Apache-2.0
"""Files are replaced whole or not at all, whoever else writes there and whatever the disk does."""

import contextlib
import errno
import os
import resource
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
from PIL import Image

from fastdense import _support, models
from fastdense._support import InputError, remove_leftovers, write_atomically
from fastdense.bench import BenchConfig, BenchResult, Net, Row
from fastdense.bench.environment import describe
from fastdense.cli import main


def write(path: Path, content: bytes) -> None:
    write_atomically(path, lambda file: file.write(content))


def test_two_writers_do_not_tear_a_file(tmp_path):
    path = tmp_path / "file"
    contents = [bytes([65 + letter]) * 200_000 for letter in range(2)]
    errors: list[Exception] = []

    def repeat(content: bytes) -> None:
        try:
            for _ in range(30):
                write(path, content)
        except Exception as error:
            errors.append(error)

    write(path, contents[0])
    writers = [threading.Thread(target=repeat, args=(content,)) for content in contents]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert path.read_bytes() in contents
    assert not errors and os.listdir(tmp_path) == ["file"]


def test_a_planted_link_is_not_followed(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    monkeypatch.setattr(_support.secrets, "token_hex", lambda _: "guessed")
    link = tmp_path / ".guessed.fastdense-tmp"
    link.symlink_to(victim)
    with pytest.raises(FileExistsError):
        write(tmp_path / "file", b"content")
    assert victim.read_text() == "untouched" and link.is_symlink()


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_and_its_file_is_replaced(tmp_path, exists):
    (tmp_path / "elsewhere").mkdir()
    file, link = tmp_path / "elsewhere" / "file", tmp_path / "link"
    if exists:
        file.write_text("old")
        file.chmod(0o600)
    link.symlink_to(Path("elsewhere") / "file")
    write(link, b"content")
    assert link.is_symlink() and file.read_bytes() == b"content" and not file.is_symlink()
    assert os.listdir(tmp_path / "elsewhere") == ["file"] and sorted(os.listdir(tmp_path)) == ["elsewhere", "link"]
    assert not exists or stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_link_that_points_to_itself_is_refused(tmp_path):
    link = tmp_path / "loop"
    link.symlink_to(link)
    with pytest.raises(OSError, match="loop"):
        write(link, b"content")
    assert link.is_symlink() and os.listdir(tmp_path) == ["loop"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions_are_those_of_the_old_file_or_the_umask(tmp_path, umask):
    seen = []

    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    before = os.umask(umask)
    try:
        write(tmp_path / "new", b"1")
        for old in (0o600, 0o664, 0o444):
            path = tmp_path / f"{old:o}"
            path.touch()
            path.chmod(old)
            write_atomically(path, lambda file: seen.append(stat.S_IMODE(os.fstat(file.fileno()).st_mode)))
            assert mode(path) == old
    finally:
        os.umask(before)
    assert mode(tmp_path / "new") == 0o666 & ~umask
    assert seen == [0o600, 0o664, 0o444]  # and so while they are written


def test_a_name_as_long_as_the_system_takes_is_written(tmp_path):
    write(tmp_path / ("n" * 255), b"content")


@pytest.mark.parametrize("stop", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError()])
def test_nothing_is_left_of_a_write_that_failed(tmp_path, stop):
    path = tmp_path / "file"
    write(path, b"old")

    def fail(file):
        file.write(b"part")
        raise stop

    with pytest.raises(type(stop)) as caught:
        write_atomically(path, fail)
    assert os.listdir(tmp_path) == ["file"] and path.read_bytes() == b"old"
    if isinstance(stop, OSError):
        assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)


def test_what_is_no_file_is_not_replaced(tmp_path):
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("/dev/null")
    for name in ("folder.png", "pipe.png", "link.png"):
        with pytest.raises(InputError, match=f"{name} to be a file, got something else"):
            write(tmp_path / name, b"")
        assert main(["evaluate", "--picture", str(tmp_path / name)]) == 2
    assert sorted(os.listdir(tmp_path)) == ["folder.png", "link.png", "pipe.png"]


def test_leftovers_of_a_killed_process_can_be_removed(tmp_path):
    kept = [tmp_path / "file", tmp_path / ".hidden.tmp", tmp_path / "a.fastdense-tmp"]
    for path in [*kept, tmp_path / ".0123456789abcdef.fastdense-tmp"]:
        path.touch()
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """The system refuses to make files larger than that, as at the end of a quota."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(5):
        samples = numpy.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=numpy.uint8)
        Image.fromarray(samples).save(folder / f"{number}.png")
    return folder


TRAIN = ["--threads", "1", "--size", "8", "--out", "OUT"]


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["resize", "PICTURES/0.png", "OUT/made.png", "--scale", "0.9"], "made.png"),
        (["evaluate", "--data", "PICTURES", "--picture", "OUT/side.png"], "side.png"),
        (["evaluate", "--data", "PICTURES", "--json", "OUT/numbers.json"], "numbers.json"),
        (["bench", "--json", "OUT/bench.json"], "bench.json"),
        (["bench", "--plot", "OUT/bench.svg"], "bench.svg"),
        (["train", *TRAIN, "--epochs", "1", "--depth", "10", "--batch", "512"], "checkpoint.pt"),
        (["train", *TRAIN, "--task", "sr", "--data", "PICTURES", "--steps", "1"], "checkpoint.pt"),
    ],
)
def test_a_full_disk_ends_in_one_line(command, name, pictures, tmp_path, capsys, monkeypatch):
    measured = BenchResult(
        BenchConfig(Net("densenet121"), ("plain",)), describe(1), "", [], [Row("plain", seconds=[1.0])]
    )
    monkeypatch.setattr("fastdense.bench.run_bench", lambda *_: measured)
    out = tmp_path / "out"
    arguments = [word.replace("PICTURES", str(pictures)).replace("OUT", str(out)) for word in command]
    with file_size_limit(100):
        code = main(arguments)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastdense:")]
    assert (code, lines) == (1, [f"fastdense: [Errno 27] File too large: '{out / name}'"])
    assert not list(out.iterdir())


def test_a_full_disk_while_a_network_is_saved(tmp_path):
    path = tmp_path / "model.pt"
    net = models.SRCNN(2)
    models.save_super_resolution(net, path)
    old = path.read_bytes()
    with file_size_limit(1000), pytest.raises(OSError, match="File too large") as caught:
        models.save_super_resolution(net, path)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["model.pt"]
