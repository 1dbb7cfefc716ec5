# SPDX-License-Identifier: Apache-2.0
"""Models in folders and on the Hugging Face hub: ``config.json`` and ``model.safetensors``, in the form of timm."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdense import _build_info
from fastdense._support import InputError, extra, finite, write_atomically
from fastdense.models.key_mapping import load_exactly
from fastdense.models.recipe import recipe_of
from fastdense.models.registry import create, is_super_resolution, list, takes_weights
from fastdense.models.weights import first_convolution, last_layer, load_state, read_weights

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
_OLD_WEIGHTS = "pytorch_model.bin"  # of timm, where there is no other


class Pretrained(NamedTuple):
    """A model and what its ``config.json`` says of the data, perhaps nothing."""

    model: nn.Module
    data: dict[str, Any]


def from_pretrained(source: str | os.PathLike[str], *, revision: str | None = None, **kwargs: Any) -> nn.Module:
    """Loads a model from a folder of :func:`save_pretrained` or from the Hugging Face hub.

    Repositories of timm, such as "timm/densenet121.ra_in1k", are read as well, where the zoo has the network. Needs
    ``pip install 'fastdense[hub]'``; files of the hub stay in its cache. Nothing in a file is executed.

    Args:
        source: a folder, or a repository such as "me/flowers".
        revision: a branch, tag or commit of the repository.
        **kwargs: arguments of the model's function that replace those it was saved with, such as ``num_classes``,
            which makes a new last layer, or ``memory``.

    Returns:
        The model, in eval mode.

    Raises:
        ValueError: no such folder or repository, or its files are no model of this library's networks.
        MissingExtraError: huggingface_hub or safetensors is not installed.
    """
    return load_pretrained("from_pretrained", source, revision, kwargs).model


def load_pretrained(
    op: str, source: str | os.PathLike[str], revision: str | None = None, kwargs: Mapping[str, Any] | None = None
) -> Pretrained:
    """As :func:`from_pretrained`, with what is known of the data; messages begin with ``op``."""
    folder = Path(source)
    if folder.is_file():
        raise InputError(f"{op}: expected a folder or a repository, got the file {folder}, which load_weights reads")
    is_folder = folder.is_dir()
    config_file = folder / CONFIG if is_folder else _fetch(op, source, CONFIG, revision)
    config = _read_config(op, config_file)
    if is_folder:
        found = [folder / name for name in (WEIGHTS, _OLD_WEIGHTS) if (folder / name).exists()]
        weights = found[0] if found else folder / WEIGHTS
    else:
        weights = _fetch(op, source, WEIGHTS, revision)
    name, own = config["architecture"], config.get("fastdense", {})
    given = dict(own.get("kwargs", {})) | dict(kwargs or {})
    try:
        if takes_weights(name):
            model = create(name, weights=weights, **given)
        else:
            model = create(name, **given)
            load_state(op, model, read_weights(op, weights), weights)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"{op}: cannot make {name} of {source}: {error}") from error
    return Pretrained(model.eval(), dict(own.get("data", {})))


def save_pretrained(model: nn.Module, folder: str | os.PathLike[str], *, data: Mapping[str, Any] | None = None) -> Path:
    """Writes ``config.json`` and ``model.safetensors``, from which :func:`from_pretrained` makes the model again.

    A model card, ``README.md``, says how to load the model. What it was trained on, and its licence, are for you to
    add. A card that exists stays.

    Networks with timm's names are read by timm as well: ``timm.create_model("local-dir:FOLDER", pretrained=True)``.

    Args:
        model: a classifier made by a function of :mod:`fastdense.models`; its last layer may have been replaced.
        folder: is created.
        data: what users of the model need, such as ``classes``, ``size``, ``mean`` and ``std``: plain values, as
            under "data" in a checkpoint of ``fastdense train``.

    Returns:
        The folder.

    Raises:
        ValueError: the model was made otherwise, or was changed since. Nothing is written.
        MissingExtraError: safetensors is not installed.
    """
    folder = Path(folder)
    return _write(model, folder, data, folder.resolve().name)


def _write(model: nn.Module, folder: Path, data: Mapping[str, Any] | None, title: str) -> Path:
    with extra("hub"):
        from safetensors.torch import save
    config, state = _describe("save_pretrained", model, data)
    text = json.dumps(finite(config), indent=2, allow_nan=False) + "\n"
    content = save(state, metadata={"format": "pt"})
    write_atomically(folder / WEIGHTS, lambda file: file.write(content))
    write_atomically(folder / CONFIG, lambda file: file.write(text.encode()))
    if not (folder / CARD).exists():
        card = _card(config, title)
        write_atomically(folder / CARD, lambda file: file.write(card.encode()))
    return folder


def push_to_hub(
    model: nn.Module,
    repository: str,
    *,
    data: Mapping[str, Any] | None = None,
    private: bool = False,
    token: str | None = None,
    message: str = "Upload a model of fastdense",
) -> str:
    """Uploads what :func:`save_pretrained` writes to the Hugging Face hub; a model card that is there stays.

    Args:
        model: see :func:`save_pretrained`.
        repository: such as "me/flowers"; made if there is none.
        data: see :func:`save_pretrained`.
        private: whether a new repository is private.
        token: of the hub; None takes the one of ``hf auth login``.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        ValueError: as :func:`save_pretrained`; nothing is uploaded.
        MissingExtraError: huggingface_hub or safetensors is not installed.
    """
    with extra("hub"):
        from huggingface_hub import HfApi
    with tempfile.TemporaryDirectory() as folder:
        place = _write(model, Path(folder), data, repository)
        hub = HfApi(token=token)
        hub.create_repo(repository, private=private, exist_ok=True)
        if hub.file_exists(repository, CARD):
            (place / CARD).unlink()
        return str(hub.upload_folder(repo_id=repository, folder_path=place, commit_message=message))


def _describe(op: str, model: nn.Module, data: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of the two files; the model is checked against a new one of the same recipe."""
    recipe = recipe_of(model)
    if recipe is None or is_super_resolution(recipe.name):
        raise InputError(
            f"{op}: expected a classifier made by a function of fastdense.models, got {type(model).__name__}; "
            "torch.save(model.state_dict(), path) keeps any other"
        )
    state = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    with torch.device("meta"):
        fresh = create(recipe.name, **recipe.kwargs)
        (head, *_), first = last_layer(fresh), first_convolution(fresh)
        classes = len(state[f"{head}.weight"]) if f"{head}.weight" in state else None
        kwargs = recipe.kwargs
        if classes is not None and classes != len(fresh.state_dict()[f"{head}.weight"]):
            kwargs = {name: value for name, value in kwargs.items() if name != "out_channels"} | {
                "num_classes": classes
            }
            fresh = create(recipe.name, **kwargs)
    try:
        load_exactly(op, fresh, {key: value.to("meta") for key, value in state.items()})
        json.dumps(kwargs)
        json.dumps(data)
    except (TypeError, ValueError) as error:
        raise InputError(f"{op}: expected {recipe.name} as it was made, and plain values, got: {error}") from error
    size = int((data or {}).get("size", 224))
    channels = state[f"{first}.weight"].shape[1] if first else 3
    timm = {"num_classes": classes, "input_size": [channels, size, size], "first_conv": first, "classifier": head}
    timm |= {name: value for name, value in (data or {}).items() if name in ("mean", "std")}
    own = {"version": _build_info.version(), "kwargs": kwargs, "data": dict(data or {})}
    return {"architecture": recipe.name, "num_classes": classes, "pretrained_cfg": timm, "fastdense": own}, state


_CARD = """---
library_name: fastdense
pipeline_tag: image-classification
tags:
- image-classification
---

# {title}

A {architecture} with {outputs}.

```python
from fastdense.models import from_pretrained

model = from_pretrained("{title}")  # a folder, or a repository of the hub
```

It needs `pip install 'fastdense[hub]'`. On the command line: `fastdense predict pictures/ --weights {title}`.

## Pictures

{pictures}

## Data and licence

Please say here what the network was trained on and how well it does, and choose a licence: `license:` at the head of
this file.
"""
# Names of classes that a model card lists.
_LISTED = 100


def _card(config: Mapping[str, Any], title: str) -> str:
    """The text of a model card, by what ``config.json`` says."""
    data, count = config["fastdense"]["data"], config["num_classes"]
    names = [str(name) for name in data.get("classes") or ()]
    known = {"size": "side in pixels", "mean": "mean of each channel", "std": "standard deviation of each channel"}
    lines = [f"* {words}: {data[name]}" for name, words in known.items() if name in data]
    if names:
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        lines.append(f"* classes: {', '.join(names[:_LISTED])}{more}")
    return _CARD.format(
        title=title,
        architecture=config["architecture"],
        outputs="one map of classes" if count is None else f"{count} classes",
        pictures="\n".join(lines) or "Its author has not said how pictures become its input.",
    )


def _read_config(op: str, path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{op}: expected {path.parent} to hold {CONFIG}, as save_pretrained writes it, got none")
    try:
        config = json.loads(path.read_text())
        known = config["architecture"] in list() and not is_super_resolution(config["architecture"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{op}: expected {path} to be a whole {CONFIG} of save_pretrained or timm") from error
    if not known:
        names = ", ".join(name for name in list() if not is_super_resolution(name))
        raise InputError(f"{op}: expected a network out of {names}, got {config['architecture']!r} in {path}")
    return config


def _fetch(op: str, repository: str | os.PathLike[str], name: str, revision: str | None) -> Path:
    """A file of a repository, from the hub's cache or downloaded to it."""
    with extra("hub"):
        import huggingface_hub
    try:
        return Path(huggingface_hub.hf_hub_download(os.fspath(repository), name, revision=revision))
    except Exception as error:  # no network, no such repository, no permission ...
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(
            f"{op}: expected a folder of save_pretrained or a repository of the Hugging Face hub with {name}, "
            f"got {os.fspath(repository)!r}: {reason}"
        ) from error
