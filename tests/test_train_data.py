# SPDX-License-Identifier: Apache-2.0
"""What training reads: folders, the digits, augmentation, and that workers change nothing."""

import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdense._support import InputError
from fastdense.train import train
from fastdense.train.data import Dataset, Files, Images, load_digits, load_folder
from fastdense.train.processes import Processes
from fastdense.train.samples import Batches, Part, Samples
from tests.cases.training import paint, red_and_blue, tiny, weights

ALONE = Processes(torch.device("cpu"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return red_and_blue(tmp_path / "pictures")


def names(files: Files | Images) -> list[str]:
    assert isinstance(files, Files)
    return [files.path(index).relative_to(files.folder).as_posix() for index in range(len(files))]


def test_a_folder_is_split_by_class_and_sorted(pictures: Path) -> None:
    (pictures / "red" / "deep").mkdir()
    paint(pictures / "red" / "deep" / "ä.PNG", (200, 0, 0), 1)
    for ignored in (".hidden.png", "text.txt", ".hidden/1.png", "folder.png/2.txt"):
        (pictures / "blue" / ignored).parent.mkdir(exist_ok=True)
        (pictures / "blue" / ignored).write_bytes(b"")
    (pictures / "blue" / "nowhere.png").symlink_to("missing")
    (pictures / ".hidden").mkdir()
    data = load_folder(pictures, 8)
    assert data.classes == ["blue", "red"]
    both = names(data.train) + names(data.test)
    expected = [f"{name}/{seed}.png" for name in ("red", "blue") for seed in range(20)] + ["red/deep/ä.PNG"]
    assert sorted(both) == sorted(expected)
    for part in (data.train, data.test):
        assert [data.classes[label] for label in part.labels] == [name.partition("/")[0] for name in names(part)]
    assert [name.partition("/")[0] for name in names(data.test)] == ["blue"] * 4 + ["red"] * 4
    assert names(data.train) == names(load_folder(pictures, 32).train)


def test_fingerprint_sees_names_sizes_and_classes(pictures: Path, tmp_path: Path) -> None:
    seen = {load_folder(pictures, 8).fingerprint()}
    (tmp_path / "moved").symlink_to(pictures)
    assert load_folder(tmp_path / "moved", 8).fingerprint() in seen  # the same pictures elsewhere
    assert load_folder(pictures, 9).fingerprint() not in seen

    def is_new() -> bool:
        before = len(seen)
        seen.add(load_folder(pictures, 8).fingerprint())
        return len(seen) > before

    with open(pictures / "red" / "0.png", "ab") as file:
        file.write(b"\0")
    assert is_new()
    (pictures / "red" / "1.png").rename(pictures / "red" / "99.png")
    assert is_new()
    (pictures / "red" / "2.png").rename(pictures / "blue" / "2b.png")
    assert is_new()
    (pictures / "red").rename(pictures / "green")
    assert is_new()
    assert load_digits(8).fingerprint() != load_digits(9).fingerprint()


def test_unusable_folders_are_named(pictures: Path, tmp_path: Path) -> None:
    (pictures / "green").mkdir()
    with pytest.raises(InputError, match="green to hold pictures, got none"):
        load_folder(pictures)
    with pytest.raises(InputError, match="at least 2 classes, got 0"):
        load_folder(pictures / "red")
    with pytest.raises(InputError, match="'digits' or a folder"):
        load_folder(tmp_path / "absent")
    for name in ("a", "b"):
        paint(tmp_path / "single" / name / "0.png", (0, 0, 0), 0)
    with pytest.raises(InputError, match="at least one class with two pictures or more"):
        load_folder(tmp_path / "single")


def test_train_and_val_folders_replace_the_split(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("val", 2)):
        for name in ("a", "b"):
            for seed in range(count):
                paint(tmp_path / part / name / f"{seed}.png", (90, 90, 90), seed)
    data = load_folder(tmp_path, 8)
    assert (len(data.train), len(data.test), data.classes) == (6, 4, ["a", "b"])
    (tmp_path / "val" / "b").rename(tmp_path / "val" / "c")
    with pytest.raises(InputError, match="same classes, got only in one: b, c"):
        load_folder(tmp_path, 8)


def test_digits_split_is_stratified() -> None:
    data = load_digits()
    assert isinstance(data.train, Images) and data.train.images.shape[1:] == (3, 16, 16)
    assert len(data.train) + len(data.test) == 1797
    total = np.bincount(np.concatenate([data.train.labels, data.test.labels]))
    assert (np.abs(np.bincount(data.test.labels) / total - 0.2) < 0.01).all()
    assert data.train.images.min() >= 0 and data.train.images.max() <= 1


def numbered(size: int, flips: bool) -> Dataset:
    """One image whose pixels are all different, and none of which is black."""
    image = torch.arange(1.0, 1 + 3 * size * size).view(1, 3, size, size) / (3 * size * size)
    part = Images(image, np.zeros(1, np.int64))
    return Dataset(part, part, ["a", "b"], size, (0.0,) * 3, (1.0,) * 3, flips)


@pytest.mark.parametrize("flips", [False, True])
def test_shifts_move_by_up_to_an_eighth_and_mirror(flips: bool) -> None:
    data = numbered(16, flips)
    samples = Samples(data, "shift", 0)
    padded = torch.nn.functional.pad(data.train.images[0], (2,) * 4)
    windows = {
        (top, left, mirrored): (padded.flip(2) if mirrored else padded)[:, top : top + 16, left : left + 16]
        for top in range(5)
        for left in range(5)
        for mirrored in (False, True)[: 1 + flips]
    }
    seen = set()
    for epoch in range(400):
        image = samples[Part(epoch, np.zeros(1, np.int64))].images[0]
        (found,) = [name for name, window in windows.items() if torch.equal(window, image)]
        seen.add(found)
    assert len(seen) == len(windows)
    assert torch.equal(samples[Part(None, np.zeros(1, np.int64))].images, data.test.images)


def test_crops_are_those_of_torchvision(tmp_path: Path) -> None:
    """Of the scale and aspect that its transform draws; the middle of 8 of 7 for testing."""
    from torchvision.transforms import v2

    for name in ("a", "b"):
        for number in range(5):
            noise = np.random.default_rng(number).integers(0, 256, (40, 60, 3), dtype=np.uint8)
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(noise).save(tmp_path / name / f"{number}.png")
    data = load_folder(tmp_path, 14)
    samples = Samples(data, "crop", 5)
    batch = samples[Part(3, np.arange(len(data.train)))]
    assert batch.images.dtype == torch.uint8 and batch.images.shape == (8, 3, 14, 14) and batch.corrupt == []
    transform = v2.Compose([v2.RandomResizedCrop(14), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    for index, image in enumerate(batch.images):
        seed = int(np.random.SeedSequence([5, 3, index]).generate_state(1, np.uint64)[0])
        torch.manual_seed(seed)
        assert torch.equal(image, transform(Image.open(data.train.path(index))))
    middle = v2.Compose([v2.Resize(16), v2.CenterCrop(14), v2.PILToTensor()])
    tested = samples[Part(None, np.arange(len(data.test)))].images
    assert torch.equal(tested, torch.stack([middle(Image.open(data.test.path(index))) for index in range(2)]))


def test_no_augmentation_is_the_middle(pictures: Path) -> None:
    data = load_folder(pictures, 8)
    parts = [Part(epoch, np.arange(4)) for epoch in (0, 1)]
    first, second = (Samples(data, "none", 0)[part].images for part in parts)
    assert torch.equal(first, second)
    assert torch.equal(first, Samples(data, "none", 9)[parts[0]].images)


def test_normalised_as_said() -> None:
    data = numbered(2, False)
    data = Dataset(data.train, data.test, data.classes, 2, (0.5, 0.4, 0.3), (0.25, 0.5, 0.1), False)
    pixels = torch.tensor([255, 51, 0], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    expected = torch.tensor([2.0, -0.4, -3.0])
    for images in (pixels, pixels / 255):
        made = data.normalise(images)
        assert made.dtype == torch.float32
        torch.testing.assert_close(made, expected.view(1, 3, 1, 1).expand(1, 3, 2, 2))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augment", ["crop", "shift"])
def test_batches_are_a_function_of_seed_and_epoch(pictures: Path, workers: int, augment: str) -> None:
    data = load_folder(pictures, 8)

    def epoch(number: int, seed: int = 0, first: int = 0, workers: int = workers) -> list[torch.Tensor]:
        state = torch.get_rng_state()
        made = list(Batches(Samples(data, augment, seed), 5, workers, ALONE).train(number, first))
        assert torch.equal(torch.get_rng_state(), state)  # dropout draws from it
        return [torch.cat(column) for column in zip(*made, strict=True)]

    images, labels = epoch(1)
    again, _ = epoch(1, workers=0)
    assert torch.equal(images, again)
    assert sorted(labels.tolist()) == [0] * 16 + [1] * 16
    tail, _ = epoch(1, first=3)
    assert torch.equal(tail, images[sum([4, 5, 4]) :])  # seven steps of 32 images
    for other in (epoch(2), epoch(1, seed=1)):
        assert not torch.equal(other[0], images)


def test_batches_are_shared_and_of_equal_size() -> None:
    class Pair(Processes):
        def __init__(self, rank: int) -> None:
            super().__init__(torch.device("cpu"))
            self.rank, self.world = rank, 2

    data = load_digits(8)
    alone = Batches(Samples(data, "none", 0), 100, 0, ALONE)
    shares = [Batches(Samples(data, "none", 0), 100, 0, Pair(rank)) for rank in range(2)]
    sizes = []
    for whole, *parts in zip(alone.train(0, 0), *(share.train(0, 0) for share in shares), strict=True):
        assert torch.equal(whole[0], torch.cat([images for images, _ in parts]))
        sizes.append(len(whole[1]))
    assert sum(sizes) == len(data.train) and max(sizes) - min(sizes) <= 1 and len(sizes) == alone.steps == 15
    tested = [torch.cat([images for images, _ in batches.test()]) for batches in (alone, *shares)]
    assert len(tested[0]) == len(data.test) == len(tested[1]) + len(tested[2])


def test_samples_can_be_sent_to_workers_that_are_not_forked(pictures: Path) -> None:
    """As DataLoader does where it does not fork: Python 3.14, or a program that asks for it."""
    for augment in ("crop", "shift", "none"):
        samples = Samples(load_folder(pictures, 8), augment, 0)
        part = Part(0, np.arange(3))
        assert torch.equal(pickle.loads(pickle.dumps(samples))[part].images, samples[part].images)


def break_pictures(folder: Path, *chosen: str) -> None:
    for name in chosen:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_pictures_are_named_once_and_left_out(
    pictures: Path, tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    data = load_folder(pictures, 8)
    bad = [names(data.train)[3], names(data.test)[0]]
    break_pictures(pictures, *bad)
    config = tiny(tmp_path / "out", data=str(pictures), epochs=2, workers=workers)
    train(config, progress=False)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all("skipped a corrupt picture" in line for line in lines)
    assert all(any(name in line for line in lines) for name in bad)
    metrics = json.loads((config.out / "metrics.json").read_text())
    assert metrics["images"]["skipped"] == 2 and len(metrics["skipped"]) == 2
    data = load_folder(pictures, 8)
    samples = Samples(data, "none", 0)
    trained, tested = samples[Part(0, np.array([2, 3, 4]))], samples[Part(None, np.array([0, 1]))]
    assert torch.equal(trained.images[1], trained.images[2]) and len(trained.images) == 3
    assert torch.equal(tested.images, samples[Part(None, np.array([1]))].images)


def test_a_folder_of_broken_pictures_is_refused(pictures: Path, tmp_path: Path) -> None:
    break_pictures(pictures, *(f"{path.parent.name}/{path.name}" for path in pictures.rglob("*.png")))
    with pytest.raises(InputError, match=r"expected pictures that can be read, got 100 in a row that cannot, as .*png"):
        train(tiny(tmp_path / "out", data=str(pictures)), progress=False)


def test_test_pictures_that_are_all_broken_are_refused(pictures: Path, tmp_path: Path) -> None:
    break_pictures(pictures, *names(load_folder(pictures, 8).test))
    with pytest.raises(InputError, match="expected test pictures that can be read, got none"):
        train(tiny(tmp_path / "out", data=str(pictures)), progress=False)


def test_a_worker_that_dies_is_named(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdense.train.data.open_rgb", lambda path: os._exit(3))
    with pytest.raises(InputError, match=r"expected the workers that read pictures to live, .* fewer --workers"):
        train(tiny(tmp_path / "out", data=str(pictures), workers=1), progress=False)


# Memory of a process that walks through a folder of so many pictures.
WALK = """
import gc, os, sys, time
from pathlib import Path
import numpy as np, psutil, torch
from fastdense.train.data import load_folder
from fastdense.train.processes import Processes
from fastdense.train.samples import Batches, Samples
import torchvision.transforms.v2

# Bytes of its own, and its share of those it has together with its workers; not of libraries, which others use.
def own(process):
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))

def all_own():
    here = psutil.Process()
    return sum(own(process) for process in [here, *here.children()])

# A garbage collection would write to objects that workers share, and so copy their pages, whatever the folder.
gc.collect()
gc.freeze()
before = all_own()
data = load_folder(Path(sys.argv[1]), 32)
batches = Batches(Samples(data, "crop", 0), 32, 2, Processes(torch.device("cpu"))).train(0, 0)
most = 0
for _ in range(40):
    images, labels = next(batches)
    most = max(most, all_own() - before)
print(len(data.train), most)
"""


def test_memory_does_not_grow_with_the_folder(tmp_path: Path) -> None:
    """Names take what they are long: some 30 bytes here."""
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(content, "JPEG")
    measured = []
    for count in (2_000, 22_000):
        for name in ("a", "b"):
            folder = tmp_path / str(count) / name
            folder.mkdir(parents=True)
            (folder / "0.jpg").write_bytes(content.getvalue())
            for number in range(1, count // 2):
                os.link(folder / "0.jpg", folder / f"{number}.jpg")
        walk = subprocess.run(
            [sys.executable, "-c", WALK, str(tmp_path / str(count))], capture_output=True, text=True, check=True
        )
        measured.append([int(number) for number in walk.stdout.split()])
    (few, small), (many, large) = measured
    assert (few, many) == (1_600, 17_600)
    assert large - small < 600 * (many - few), measured  # a picture alone would be 3 KB


def test_weights_do_not_depend_on_workers(pictures: Path, tmp_path: Path) -> None:
    made = []
    for workers in (0, 1, 3):
        out = tmp_path / str(workers)
        train(tiny(out, data=str(pictures), workers=workers, augment="crop", seed=4), progress=False)
        made.append(weights(out))
    for other in made[1:]:
        assert all(torch.equal(other[name], value) for name, value in made[0].items())
