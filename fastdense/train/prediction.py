# SPDX-License-Identifier: Apache-2.0
"""Classifiers with all that is needed to use them: names of the classes, size and normalisation of the pictures."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastdense import models
from fastdense._support import InputError, extra
from fastdense.models.hub import load_pretrained
from fastdense.models.sr.weight_files import read_entries
from fastdense.models.weights import first_convolution, last_layer, load_state, read_weights
from fastdense.models.weights.sources import CHECKPOINT
from fastdense.sr.images import IMAGENET_MEAN, IMAGENET_STD, CorruptImageError, open_rgb
from fastdense.train.samples import TEST_CROP, Transform, centre_crop, middle_square, read_ahead

_SIZE = 224
_PUBLISHED = ("IMAGENET1K_V1", "DEFAULT")
_TIMM = "timm/"
_FILES = (".pt", ".pth", ".bin", ".safetensors")


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A network in eval mode, and how pictures become its input.

    Attributes:
        model: of images ``[N, 3, size, size]`` to logits ``[N, classes]``.
        classes: names in the order of the logits; their numbers where nothing knows names.
        size: side of an image in pixels.
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1].
        resized: the shorter side of a picture in pixels, before its middle is cropped; None resizes the largest square.
        interpolation: ``"bilinear"`` or ``"bicubic"``.
    """

    model: nn.Module
    classes: tuple[str, ...]
    size: int = _SIZE
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    resized: int | None = None
    interpolation: str = "bilinear"

    def transform(self) -> Transform:
        """Of a picture to uint8 ``[3, size, size]``, as the network was tested with."""
        if self.resized is None:
            return middle_square(self.size)
        return centre_crop(self.size, self.resized, self.interpolation)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 ``[N, 3, H, W]`` as the network reads it, float32."""
        mean, std = (torch.tensor(values, device=images.device).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (images.float() / 255 - mean) / std

    def of_size(self, size: int) -> Classifier:
        """For images of another size; the share of the picture stays."""
        resized = None if self.resized is None else round(self.resized * size / self.size)
        return dataclasses.replace(self, size=size, resized=resized)


class Prediction(NamedTuple):
    """Of one picture: names of the likeliest classes and their probabilities, best first; or why there is none."""

    path: Path
    classes: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    problem: str | None = None


def load_classifier(
    op: str, weights: str | None, name: str | None = None, kwargs: Mapping[str, Any] | None = None
) -> Classifier:
    """Makes a classifier of what a user names.

    Args:
        op: what messages begin with.
        weights: a checkpoint of ``fastdense train``, a folder of ``save_pretrained`` or a repository of the Hugging
            Face hub, which know their network; else what the function of the network takes. None leaves random weights.
        name: of the network, where the weights do not know it.
        kwargs: arguments of the network's function.

    Raises:
        InputError: there is no such network, or the weights cannot be read or are another's.
    """
    given = dict(kwargs or {})
    if name is not None and (name not in models.list() or models.is_super_resolution(name)):
        known = ", ".join(one for one in models.list() if not models.is_super_resolution(one))
        raise InputError(f"{op}: expected --model to be one of {known}, got {name!r}")
    path = Path(weights) if weights else None
    if name is None and path is None:
        raise InputError(f"{op}: expected --weights that know their network, or --model, got neither")
    if name is None:
        assert path is not None and weights is not None
        if path.is_file():
            made = _of_checkpoint(op, path, given)
        elif path.is_dir() or _may_be_a_repository(weights):
            made = _of_data(*load_pretrained(op, weights, kwargs=given))
        else:
            raise InputError(
                f"{op}: expected --weights to be a checkpoint, a folder of save_pretrained or a repository of the "
                f"Hugging Face hub, or else --model, got {weights!r}"
            )
    else:
        made = _of_name(op, name, weights, given)
    channels = _channels(made.model)
    if channels != 3:
        raise InputError(f"{op}: expected a network that reads pictures of 3 channels, got one of {channels}")
    return made


def predict(
    classifier: Classifier,
    paths: Sequence[Path],
    *,
    batch: int = 32,
    top: int = 1,
    device: str = "cpu",
    dtype: str = "float32",
    workers: int = 0,
) -> Iterator[Prediction]:
    """Classifies pictures in the order of `paths`.

    Args:
        classifier: whose network is moved to `device`.
        paths: picture files.
        batch: pictures at once.
        top: classes per picture.
        device: a torch device.
        dtype: ``"float32"``, or ``"bfloat16"`` or ``"float16"`` for autocast.
        workers: processes that read pictures ahead; with 0 this one reads.

    Yields:
        A :class:`Prediction` for each; a picture that cannot be read has a `problem`. Probabilities are the softmax
        of the logits, in float32.
    """
    model = classifier.model.to(device).eval()
    top = min(top, len(classifier.classes))
    pictures = _Pictures(tuple(paths), classifier.transform())
    for read in read_ahead(pictures, batch, workers):
        images = [image for _, image in read if image is not None]
        found = [one for one, _ in read]
        rows = iter(_scores(classifier, model, torch.stack(images), device, dtype) if images else ())
        for one in found:
            if one.problem is None:
                values, indices = next(rows).topk(top)
                names = tuple(classifier.classes[index] for index in indices.tolist())
                one = Prediction(one.path, names, tuple(values.tolist()))
            yield one


class _Pictures(Dataset[tuple[Prediction, Tensor | None]]):
    """Pictures by their number, each with its image, or with its problem."""

    def __init__(self, paths: tuple[Path, ...], transform: Transform) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, at: int) -> tuple[Prediction, Tensor | None]:
        path = self.paths[at]
        try:
            return Prediction(path), self.transform(open_rgb(path))
        except CorruptImageError as error:
            return Prediction(path, problem=str(error)), None


@torch.no_grad()
def _scores(classifier: Classifier, model: nn.Module, images: Tensor, device: str, dtype: str) -> Tensor:
    kind = getattr(torch, dtype)
    with torch.autocast(torch.device(device).type, dtype=kind, enabled=kind is not torch.float32):
        logits = model(classifier.normalise(images.to(device)))
    return logits.float().softmax(1).cpu()


def _channels(model: nn.Module) -> int:
    """Channels of the input; networks of linear layers alone count as 3."""
    first = first_convolution(model)
    return 3 if first is None else int(model.get_submodule(first).in_channels)  # type: ignore[arg-type]


def _numbers(model: nn.Module) -> tuple[str, ...]:
    return tuple(map(str, range(len(model.state_dict()[f"{last_layer(model)[0]}.weight"]))))


def _of_data(model: nn.Module, data: Mapping[str, Any], augment: str = "crop") -> Classifier:
    """With what a file says of the data; ImageNet's usual values for what it does not say."""
    size = int(data.get("size", _SIZE))
    return Classifier(
        model.eval(),
        tuple(map(str, data.get("classes") or _numbers(model))),
        size,
        tuple(data.get("mean", IMAGENET_MEAN)),
        tuple(data.get("std", IMAGENET_STD)),
        round(size / TEST_CROP) if augment == "crop" else None,
    )


def _of_checkpoint(op: str, path: Path, kwargs: Mapping[str, Any]) -> Classifier:
    try:
        content = read_entries(op, path)
        if not str(content.get("format")).startswith(CHECKPOINT) or "data" not in content:
            raise InputError(f"{op}: expected --model for {path}, which is no checkpoint of fastdense train")
        config, data = content["config"], content["data"]
        model = _make(op, config["model"], {**config["model_kwargs"], "num_classes": len(data["classes"]), **kwargs})
        load_state(op, model, read_weights(op, path), path)
        return _of_data(model, data, config["augment"])
    except InputError:
        raise
    except ValueError as error:  # whose message names the file
        raise InputError(str(error)) from error
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{op}: expected {path} to be a whole checkpoint of fastdense train, got {error!r}") from error


def _of_name(op: str, name: str, weights: str | None, kwargs: Mapping[str, Any]) -> Classifier:
    model = _make(op, name, {**kwargs, "weights": weights})
    made = _of_data(model, {})
    if weights and weights.startswith(_TIMM):
        with extra("train"):
            import timm
        cfg: Any = timm.models.get_pretrained_cfg(weights.removeprefix(_TIMM))
        size = int(cfg.input_size[-1])
        made = Classifier(
            made.model,
            made.classes,
            size,
            tuple(cfg.mean),
            tuple(cfg.std),
            math.floor(size / cfg.crop_pct),
            cfg.interpolation,
        )
    of_imagenet = (weights is not None and weights.rpartition(".")[2] in _PUBLISHED) or (weights and "_in1k" in weights)
    if of_imagenet and len(made.classes) == 1000:
        with extra("train"):
            from torchvision.models import DenseNet121_Weights
        made = dataclasses.replace(made, classes=tuple(DenseNet121_Weights.DEFAULT.meta["categories"]))
    return made


def _may_be_a_repository(weights: str) -> bool:
    """Whether a name may be OWNER/NAME of the hub: a file that is not there is no reason to ask it."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", weights) is not None and Path(weights).suffix not in _FILES


def _make(op: str, name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    try:
        return models.create(name, **kwargs).eval()
    except (InputError, ImportError):
        raise
    except (ValueError, TypeError) as error:
        raise InputError(f"{op}: cannot create {name!r}: {error}") from error
