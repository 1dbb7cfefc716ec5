# SPDX-License-Identifier: Apache-2.0
"""What commands do with pictures they cannot use, with folders, links and results that lie among their inputs."""

import builtins
import errno
import json
import math
import os
from pathlib import Path

import numpy
import pytest
from PIL import Image

from fastdense.cli import main
from fastdense.sr.quality import luminance, psnr, ssim
from tests.cases.awkward import ALPHA, GREY, HEIGHT, RGB, WIDTH, stack


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save("in.png")
    return tmp_path


def save(path: str, samples: numpy.ndarray = RGB, **options: object) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(samples).save(path, **options)


def size_of(path: str) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def names(folder: str) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if not path.is_dir())


# One bad picture ------------------------------------------------------------------------------------------------------


def test_one_bad_picture_is_named_and_the_others_are_done(capsys):
    for name in ("a.png", "z.png"):
        save(f"in/{name}")
    save("in/alpha.jpg", stack(RGB, ALPHA), format="PNG")
    save("in/tiny.png", RGB[:1, :1])
    content = Path("in/a.png").read_bytes()
    Path("in/broken.png").write_bytes(content[: len(content) // 2])
    assert main(["resize", "in", "out", "--scale", "0.25"]) == 1
    text = capsys.readouterr().out
    assert "skipped in/alpha.jpg: the format of out/alpha.jpg cannot store the alpha" in text
    assert "skipped in/broken.png: " in text
    assert "skipped in/tiny.png: bicubic_resize: expected scale_factor to be large enough" in text
    assert "resized 2 of 5 pictures into out" in text
    assert names("out") == ["a.png", "z.png"]


def test_a_picture_that_may_not_be_read(monkeypatch, capsys):
    save("in/a.png")
    save("in/secret.png")

    def open_(path, *args, **options):
        if Path(path).name == "secret.png":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return builtins.open(path, *args, **options)

    monkeypatch.setattr("fastdense.sr.images.reading.open", open_, raising=False)
    assert main(["resize", "in", "out", "--scale", "2"]) == 1
    assert "skipped in/secret.png: Permission denied" in capsys.readouterr().out
    assert names("out") == ["a.png"]
    assert main(["resize", "in/secret.png", "out.png", "--scale", "2"]) == 2
    assert "resize: cannot read IN: in/secret.png: Permission denied" in capsys.readouterr().err


def test_a_full_disk_names_every_picture_and_leaves_nothing(monkeypatch, capsys):
    save("in/a.png")

    def fsync(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("fastdense._support.os.fsync", fsync)
    assert main(["resize", "in", "out", "--scale", "2"]) == 1
    text = capsys.readouterr().out
    assert "skipped in/a.png: " in text and "No space left on device" in text and names("out") == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "2000000x2000000"], "in.png: a result of 2000000 x 2000000 needs"),
        (["--scale", "1e6"], "GiB of memory, expected at most"),
        (["--scale", "1e9"], "small enough for a result of less than 2^31 samples"),
        (["--scale", "1e-9"], "large enough"),
        (["--scale", "0"], "expected scale_factor to be finite and positive"),
        (["--scale", "-1"], "expected scale_factor to be finite and positive"),
        (["--scale", "nan"], "expected scale_factor to be finite and positive"),
        (["--scale", "inf"], "expected scale_factor to be finite and positive"),
        (["--frame", "2", "--scale", "2"], "expected --frame from 1 to 1, got 2"),
    ],
)
def test_sizes_are_refused_before_any_work(options, message, folder, monkeypatch, capsys):
    monkeypatch.setattr("fastdense.sr.resize_samples.bicubic_resize", None)  # not called
    assert main(["resize", "in.png", "out.png", *options]) == 2
    text = capsys.readouterr().err
    (line,) = [line for line in text.splitlines() if "fastdense: resize: " in line]
    assert message in line and "Traceback" not in text
    assert not (folder / "out.png").exists()


@pytest.mark.parametrize("options", [["--device", "cuda"], ["--dtype", "float16"], ["--max-memory", "1G"]])
def test_what_bicubic_does_not_use_is_refused(options, capsys):
    assert main(["upscale", "in.png", "out.png", "--scale", "2", *options]) == 2
    assert "expected --device, --dtype and --max-memory with --model, got no model" in capsys.readouterr().err


def test_a_gpu_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["upscale", "in.png", "out.png", "--model", "net.pt", "--device", "cuda"]) == 2
    assert "expected --device to be there, got cuda but torch finds no CUDA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", "nothing.png", "in.png\n"])
def test_names_of_no_file(name, capsys):
    try:
        code: object = main(["resize", name, "out.png", "--scale", "2"])
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and "expected" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0x5", "5", "x", "5x-1", "5.5x4"])
def test_sizes_are_two_numbers(text, capsys):
    with pytest.raises(SystemExit):
        main(["resize", "in.png", "out.png", "--size", text])
    assert "expected" in capsys.readouterr().err


# Where results go -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["in.png", ".", "link.png"])
def test_originals_are_replaced_by_the_users_word(target, folder, capsys):
    (folder / "link.png").symlink_to("in.png")
    before = (folder / "in.png").read_bytes()
    assert main(["resize", "in.png", target, "--scale", "2"]) == 2
    assert "expected OUT to be other files than IN" in capsys.readouterr().err
    assert (folder / "in.png").read_bytes() == before
    assert main(["resize", "in.png", target, "--scale", "2", "--overwrite"]) == 0
    assert size_of("in.png") == (2 * WIDTH, 2 * HEIGHT) and (folder / "link.png").is_symlink()


def test_a_folder_is_replaced_by_the_users_word(capsys):
    save("in/a.png")
    save("in/sub/b.png")
    for target in ("in", "in/../in"):
        assert main(["resize", "in", target, "--scale", "2"]) == 2
        assert "give --overwrite to replace originals" in capsys.readouterr().err
    assert main(["resize", "in", "in", "--scale", "2", "--overwrite"]) == 0
    assert {size_of(f"in/{name}") for name in ("a.png", "sub/b.png")} == {(2 * WIDTH, 2 * HEIGHT)}


def test_results_below_the_input_are_not_read_again():
    save("in/a.png")
    for _ in range(2):
        assert main(["resize", "in", "in/out", "--scale", "2"]) == 0
    assert names("in") == ["a.png", "out/a.png"] and size_of("in/out/a.png") == (2 * WIDTH, 2 * HEIGHT)


def test_an_empty_folder_is_an_error(folder, capsys):
    (folder / "empty").mkdir()
    (folder / "empty/notes.txt").touch()
    assert main(["resize", "empty", "out", "--scale", "2"]) == 2
    assert "expected IN to hold pictures (.avif, .bmp" in capsys.readouterr().err


def test_a_link_at_the_result_is_written_through(folder):
    save("real/there.png")
    (folder / "link.png").symlink_to("real/there.png")
    assert main(["resize", "in.png", "link.png", "--scale", "3"]) == 0
    assert (folder / "link.png").is_symlink() and names("real") == ["there.png"]
    assert size_of("real/there.png") == (3 * WIDTH, 3 * HEIGHT)


def test_a_link_in_a_circle_is_no_place_for_a_result(folder, capsys):
    (folder / "link.png").symlink_to("link.png")
    assert main(["resize", "in.png", "link.png", "--scale", "2"]) == 1
    assert "Too many levels of symbolic links: 'link.png'" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["-1", "two", "1.5", "5000", "9" * 5000])
def test_numbers_of_threads_are_counts(text, capsys):
    with pytest.raises(SystemExit):
        main(["upscale", "in.png", "out.png", "--scale", "2", "--threads", text])
    assert f"argument --threads: expected a whole number from 0 to 4096, got '{text}'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["plan", "bench", "train"])
def test_seeds_fit_into_64_bits(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--seed", str(2**63)])
    assert f"argument --seed: expected a whole number from 0 to {2**63 - 1}, got '{2**63}'" in capsys.readouterr().err


def test_links_in_a_folder(folder, capsys):
    """To the folder itself, to nothing, to themselves; and one to a picture, which is read."""
    save("in/a.png")
    (folder / "in/loop").symlink_to(".")
    (folder / "in/broken.png").symlink_to("nowhere.png")
    (folder / "in/self.png").symlink_to("self.png")
    (folder / "in/good.png").symlink_to("a.png")
    assert main(["resize", "in", "out", "--scale", "2"]) == 0
    assert names("out") == ["a.png", "good.png"]
    assert "left out 2 other files (2 .png)" in capsys.readouterr().out


def test_files_of_somebody_else_stay(folder):
    """Whatever temporary names one would guess."""
    others = ["out.png.tmp", ".out.png", ".out.png.fastdense-tmp"]
    for name in others:
        (folder / name).write_text("precious")
    assert main(["resize", "in.png", "out.png", "--scale", "2"]) == 0
    assert all((folder / name).read_text() == "precious" for name in others)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*others, "in.png", "out.png"])


def test_names_of_all_kinds(capsys):
    """One stem with several endings, spaces, capitals, other scripts, as long as the system takes."""
    given = ["a.png", "a.jpg", "A b ü 漢.png", "sub dir/x y.PNG", "漢" * 83 + ".png"]
    for name in given:
        save(f"in/{name}")
    assert main(["resize", "in", "out", "--scale", "2"]) == 0
    assert names("out") == sorted(given)
    assert "resized 5 of 5 pictures into out (1 .jpg, 4 .png)" in capsys.readouterr().out


def test_known_endings_are_pictures_and_others_are_counted(folder, capsys):
    known = ["a.png", "b.jfif", "c.pgm", "d.tga", "e.avif", "f.webp", "g.bmp", "h.ppm", "i.tif", "j.gif", "k.jpeg"]
    for name in known:
        save(f"in/{name}", GREY if name.endswith("pgm") else RGB, **({"format": "JPEG"} if "jfif" in name else {}))
    for name in ("notes.txt", "more.txt", "README", "film.mp4", ".hidden.png"):
        (folder / "in" / name).touch()
    assert main(["resize", "in", "out", "--scale", "2"]) == 0
    text = capsys.readouterr().out
    assert names("out") == known
    assert "left out 4 other files (1 without ending, 1 .mp4, 2 .txt)" in text
    assert main(["evaluate", "--data", "in", "--scale", "2"]) == 0
    assert "left out 4 other files" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["out", "out.jp2", "out.txt"])
def test_endings_that_cannot_be_written(name, capsys):
    assert main(["resize", "in.png", name, "--scale", "2"]) == 2
    assert "resize: expected OUT to end in .avif, .bmp, .gif, .jfif, .jpeg, .jpg, .pgm, .png" in capsys.readouterr().err


def test_a_folder_as_the_result_of_one_picture(folder):
    (folder / "folder.png").mkdir()
    assert main(["resize", "in.png", "folder.png", "--scale", "2"]) == 0
    assert names("folder.png") == ["in.png"]


# Evaluation -----------------------------------------------------------------------------------------------------------


def test_rows_are_paths(capsys):
    save("data/a/x.png")
    save("data/b/x.png", RGB[::-1].copy())
    assert main(["evaluate", "--data", "data", "--scale", "2", "--json", "out.json"]) == 0
    rows = json.loads(Path("out.json").read_text())["pictures"]
    assert list(rows) == ["a/x.png", "b/x.png"]
    text = capsys.readouterr().out
    assert "a/x.png" in text and "b/x.png" in text


def test_grey_with_opaque_alpha_is_grey():
    save("data/grey.png", GREY)
    save("data/la.png", stack(GREY, GREY * 0 + 255))
    save("data/deep.png", GREY.astype(numpy.uint16) * 257)
    assert main(["evaluate", "--data", "data", "--scale", "2", "--json", "out.json"]) == 0
    rows = json.loads(Path("out.json").read_text())["pictures"]
    assert rows["grey.png"] == rows["la.png"] == rows["deep.png"]
    assert rows["grey.png"]["bicubic_psnr"] < 90


def test_a_flat_picture_has_no_error(capsys):
    save("data/flat.png", numpy.full((64, 64, 3), 90, numpy.uint8))
    assert main(["evaluate", "--data", "data", "--scale", "2"]) == 0
    assert "inf" in capsys.readouterr().out


def test_ones_own_results_are_compared_with_the_truth(capsys):
    """Everywhere 10 brighter: 20 log10(255 / 10) = 28.131 dB, since grey is its own luminance."""
    save("truth/sub/one.png", GREY)
    save("mine/sub/one.png", GREY + 10)
    save("truth/odd.png", GREY[:, :-1])
    save("mine/odd.png", GREY[:, :-2])  # as protocols crop to a multiple of the scale
    save("truth/two.png", GREY)
    save("mine/three.png", GREY)
    save("truth/small.png", GREY)
    save("mine/small.png", GREY[:20])
    options = ["--data", "mine", "--reference", "truth", "--scale", "2", "--json", "out.json"]
    assert main(["evaluate", *options]) == 1
    numbers, text = json.loads(Path("out.json").read_text()), capsys.readouterr().out
    rows = numbers["pictures"]
    assert sorted(rows) == ["odd.png", "sub/one.png"] and numbers["reference"] == "truth"
    assert rows["sub/one.png"]["psnr"] == pytest.approx(20 * math.log10(255 / 10), abs=1e-9)
    wanted = ssim(luminance(GREY + 10), luminance(GREY), 2)
    assert rows["sub/one.png"]["ssim"] == pytest.approx(wanted)
    assert psnr(luminance(GREY), luminance(GREY), 2) == math.inf and rows["odd.png"]["psnr"] is None  # in JSON
    assert "28.131" in text and "skipped two.png: not in mine" in text and "skipped three.png: not in truth" in text
    assert "skipped small.png: expected a picture as large as the reference" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "data", "--reference", "missing"], "expected --reference to be a folder, got missing"),
        (["--data", "data", "--reference", "empty"], "expected --reference to hold pictures, got none in empty"),
        (["--data", "data", "--reference", "data", "--model", "x"], "expected --model or --reference, got both"),
        (["--data", "empty"], "expected --data to hold pictures, got none in empty"),
    ],
)
def test_evaluate_refuses_what_it_cannot_compare(options, message, folder, capsys):
    save("data/a.png")
    (folder / "empty").mkdir()
    assert main(["evaluate", *options]) == 2
    assert f"evaluate: {message}" in capsys.readouterr().err
