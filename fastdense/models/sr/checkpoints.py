# SPDX-License-Identifier: Apache-2.0
# SPDX-License-Identifier: Apache-2.0
"""Loads checkpoints of super-resolution networks from other projects. No code in a file is executed."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fastdense._support import write_atomically
from fastdense.models.key_mapping import load_exactly
from fastdense.models.sr.base import SuperResolutionNet
from fastdense.models.sr.drcn import DRCN
from fastdense.models.sr.edsr import EDSR
from fastdense.models.sr.ncnn import read_ncnn
from fastdense.models.sr.rdn import RDN
from fastdense.models.sr.rrdbnet import RRDBNet
from fastdense.models.sr.srcnn import SRCNN
from fastdense.models.sr.srdensenet import SRDenseNet
from fastdense.models.sr.vdsr import VDSR

_OP = "load_super_resolution"


_WRAPPERS = ("params_ema", "params", "state_dict")


_PREFIXES = ("module.", "generator.", "netG.")


_FORMAT = "fastdense-network-1"


State = dict[str, Tensor]


_Rules = tuple[tuple[str, str], ...]


_RRDB_RULES: _Rules = (
    (r"^RRDB_trunk\.(\d+)\.RDB(\d)\.", r"body.\1.rdb\2."),
    (r"^trunk_conv\.", "conv_body."),
    (r"^upconv(\d)\.", r"conv_up\1."),
    (r"^HRconv\.", "conv_hr."),
)


_RDN_RULES: _Rules = (
    (r"^SFENet(\d)\.", r"sfe\1."),
    (r"^RDBs\.(\d+)\.convs\.(\d+)\.conv\.0\.", r"rdbs.\1.layers.\2.conv."),
    (r"^RDBs\.(\d+)\.LFF\.", r"rdbs.\1.lff."),
    (r"^GFF\.", "gff."),
)


_EDSR_RULES: _Rules = (
    (r"^head\.0\.", "conv_first."),
    (r"^body\.(\d+)\.body\.0\.", r"body.\1.conv1."),
    (r"^body\.(\d+)\.body\.2\.", r"body.\1.conv2."),
    (r"^body\.\d+\.(weight|bias)$", r"conv_after_body.\1"),
    (r"^tail\.0\.(\d)\.", r"upsample.\1."),
    (r"^tail\.1\.", "conv_last."),
)


def load_super_resolution(path: str | Path) -> SuperResolutionNet:
    """Creates the network of a checkpoint and loads its weights.

    Scale, depth and widths follow from the entries. Known are RRDBNet by the names of BasicSR and Real-ESRGAN
    (``body.0.rdb1.conv1``, in ``params_ema`` or ``params``), of ESRGAN (``RRDB_trunk.0.RDB1.conv1``), the oldest
    (``model.1.sub.0.RDB1.conv1.0``), and as saved for ncnn (``.param`` and ``.bin``); EDSR of BasicSR and its
    authors' later code; RDN and SRDenseNet of common reimplementations; and files of :func:`save_super_resolution`.

    Args:
        path: of the file. Nothing in it is executed (``weights_only``).

    Returns:
        The network in eval mode, float32, on the CPU.

    Raises:
        ValueError: no checkpoint, a damaged one, one of another network, or an entry that is missing, unknown or of
            another shape; the message names it.
    """
    path = Path(path)
    settings: dict[str, Any] = {}
    if path.suffix in (".param", ".bin") and path.with_suffix(".param").exists():
        state = _ncnn_state(path)
    else:
        content = _read(path)
        if content.get("format") == _FORMAT and isinstance(content.get("settings"), Mapping):
            settings = dict(content["settings"])
        state = _unwrap(path, content)
    for make in _MAKERS:
        try:
            made = make(state, settings)
        except (KeyError, IndexError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            name, reason = make.__name__.removeprefix("_make_"), str(error).partition("\n")[0]
            raise ValueError(f"{_OP}: expected {path} to hold a whole {name}, got a problem with {reason}") from error
        if made is not None:
            net, renamed = made
            load_exactly(f"{_OP}: {path}", net, renamed)
            return net.eval()
    some = ", ".join(list(state)[:3])
    raise ValueError(f"{_OP}: expected {path} to hold a known network, got entries such as {some}")


def save_super_resolution(net: SuperResolutionNet, path: str | Path) -> None:
    """Saves a network for :func:`load_super_resolution`.

    Args:
        net: a network of :mod:`fastdense.models`.
        path: of the file; replaced whole or not at all.
    """
    content = {"format": _FORMAT, "settings": net.settings(), "params": net.state_dict()}
    write_atomically(Path(path), lambda file: torch.save(content, file))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{_OP}: expected path to be a file, got {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways: zip, pickle, storage sizes ...
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{_OP}: expected {path} to be a whole checkpoint of tensors, got: {reason}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{_OP}: expected {path} to hold entries by name, got a {type(content).__name__}")
    return dict(content)


def _unwrap(path: Path, content: Mapping[str, Any]) -> State:
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    state: State = {}
    for key, value in content.items():
        if not isinstance(value, Tensor) or not isinstance(key, str):
            raise ValueError(f"{_OP}: expected {path} to hold tensors only, got {key} of type {type(value).__name__}")
        while any(key.startswith(prefix) for prefix in _PREFIXES):
            key = key.partition(".")[2]
        state[key] = value
    return state


def _rename(state: Mapping[str, Tensor], rules: _Rules) -> State:
    renamed: State = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        if key in renamed:
            raise ValueError(f"{key}, which occurs twice")
        renamed[key] = value
    return renamed


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """Different numbers at the group of a pattern."""
    return len({found[1] for key in state if (found := re.match(pattern, key))})


_Made = tuple[SuperResolutionNet, State] | None


def _make_rrdbnet(state: State, settings: Mapping[str, Any]) -> _Made:
    if "model.1.sub.0.RDB1.conv1.0.weight" in state:
        state = _oldest_rrdb(state)
    state = _rename(state, _RRDB_RULES)
    if "body.0.rdb1.conv1.weight" not in state:
        return None
    first, last = state["conv_first.weight"], state["conv_last.weight"]
    colours = last.shape[0]
    unshuffle = {4: 2, 16: 4}.get(first.shape[1] // colours, 1)
    doublings = _count(state, r"conv_up(\d)\.weight")
    net = RRDBNet(
        2**doublings // unshuffle,
        _count(state, r"body\.(\d+)\."),
        first.shape[0],
        state["body.0.rdb1.conv1.weight"].shape[0],
        in_channels=first.shape[1] // unshuffle**2,
        out_channels=colours,
        unshuffle=unshuffle,
    )
    return net, state


def _oldest_rrdb(state: State) -> State:
    """Names of ``model.N``: first, blocks and their convolution, convolutions that enlarge, the last two."""
    tops = sorted({int(key.split(".")[1]) for key in state if re.match(r"model\.\d+\.(weight|bias)$", key)})
    *ups, hr, last = [at for at in tops if at > 1]
    blocks = max(int(found[1]) for key in state if (found := re.match(r"model\.1\.sub\.(\d+)\.", key)))
    rules = [
        (r"^model\.0\.", "conv_first."),
        (rf"^model\.1\.sub\.{blocks}\.(weight|bias)", r"conv_body.\1"),
        (r"^model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0\.", r"body.\1.rdb\2.conv\3."),
        *((rf"^model\.{at}\.", f"conv_up{number}.") for number, at in enumerate(ups, 1)),
        (rf"^model\.{hr}\.", "conv_hr."),
        (rf"^model\.{last}\.", "conv_last."),
    ]
    return _rename(state, tuple(rules))


def _ncnn_state(path: Path) -> State:
    convolutions = read_ncnn(path)
    blocks, rest = divmod(len(convolutions) - 6, 15)
    if blocks < 1 or rest:
        raise ValueError(f"{_OP}: expected {path} to hold 15 convolutions a block and 6, got {len(convolutions)}")
    inner = [f"body.{b}.rdb{r}.conv{c}" for b in range(blocks) for r in (1, 2, 3) for c in (1, 2, 3, 4, 5)]
    names = ["conv_first", *inner, "conv_body", "conv_up1", "conv_up2", "conv_hr", "conv_last"]
    state: State = {}
    for name, conv in zip(names, convolutions, strict=True):
        activated = not name.endswith(("conv5", "conv_first", "conv_body", "conv_last"))
        if (conv.slope is not None) != activated or (activated and abs(cast(float, conv.slope) - 0.2) > 1e-6):
            raise ValueError(f"{_OP}: expected {conv.name} of {path} to be {name} of RRDBNet, got slope {conv.slope}")
        state[f"{name}.weight"], state[f"{name}.bias"] = conv.weight, conv.bias
    return state


def _shuffled_scale(state: State, name: str, width: int) -> int:
    return 4 if f"{name}.2.weight" in state else round((state[f"{name}.0.weight"].shape[0] / width) ** 0.5)


def _make_edsr(state: State, settings: Mapping[str, Any]) -> _Made:
    state = {key: value for key, value in state.items() if not key.startswith(("sub_mean.", "add_mean."))}
    state = _rename(state, _EDSR_RULES)
    if "body.0.conv1.weight" not in state:
        return None
    width = state["conv_first.weight"].shape[0]
    # No entry of other people's files tells the factor; the paper's two networks differ so.
    factor = settings.get("residual_scale", 0.1 if width >= 256 else 1.0)
    net = EDSR(_shuffled_scale(state, "upsample", width), _count(state, r"body\.(\d+)\."), width, factor)
    return net, state


def _make_rdn(state: State, settings: Mapping[str, Any]) -> _Made:
    state = _rename(state, _RDN_RULES)
    if "rdbs.0.lff.weight" in state:
        layers = _count(state, r"rdbs\.0\.layers\.(\d+)\.")
        state = _rename(state, ((r"\.lff\.", f".conv{layers + 1}."),))
        numbered = {key: re.sub(r"layers\.(\d+)\.conv", lambda m: f"conv{int(m[1]) + 1}", key) for key in state}
        state = {numbered[key]: value for key, value in state.items()}
    if "rdbs.0.conv1.weight" not in state:
        return None
    layers = _count(state, r"rdbs\.0\.conv(\d+)\.") - 1
    ups = sorted(int(found[1]) for key in state if (found := re.match(r"UPNet\.(\d)\.weight", key)))
    if ups:
        state = _rename(state, ((rf"^UPNet\.{ups[-1]}\.", "output."), (r"^UPNet\.", "upscale.")))
    width, growth = state["sfe1.weight"].shape[0], state["rdbs.0.conv1.weight"].shape[0]
    net = RDN(_shuffled_scale(state, "upscale", width), _count(state, r"rdbs\.(\d+)\."), layers, growth, width)
    return net, state


def _make_srdensenet(state: State, settings: Mapping[str, Any]) -> _Made:
    if "dense_blocks.0.block.0.conv.weight" not in state:
        return None
    blocks, layers = _count(state, r"dense_blocks\.(\d+)\."), _count(state, r"dense_blocks\.0\.block\.(\d+)\.")
    growth = state["dense_blocks.0.block.0.conv.weight"].shape[0]
    net = SRDenseNet(blocks, layers, growth, state["bottleneck.0.weight"].shape[0])
    return net, state


def _make_srcnn(state: State, settings: Mapping[str, Any]) -> _Made:
    if set(state) != {f"conv{at}.{kind}" for at in (1, 2, 3) for kind in ("weight", "bias")}:
        return None
    first, second, third = (state[f"conv{at}.weight"].shape for at in (1, 2, 3))
    return SRCNN(_scale(settings), (first[2], second[2], third[2]), (first[0], second[0])), state


def _make_vdsr(state: State, settings: Mapping[str, Any]) -> _Made:
    if "convs.0.weight" not in state:
        return None
    return VDSR(_scale(settings), _count(state, r"convs\.(\d+)\."), state["convs.0.weight"].shape[0]), state


def _make_drcn(state: State, settings: Mapping[str, Any]) -> _Made:
    if "recursive.weight" not in state:
        return None
    return DRCN(_scale(settings), state["weights"].shape[0], state["recursive.weight"].shape[0]), state


def _scale(settings: Mapping[str, Any]) -> int:
    if "scale" not in settings:
        raise ValueError("its scale, which these weights do not contain: only files of this library do")
    return settings["scale"]


_MAKERS = (_make_rrdbnet, _make_rdn, _make_edsr, _make_srdensenet, _make_srcnn, _make_vdsr, _make_drcn)
