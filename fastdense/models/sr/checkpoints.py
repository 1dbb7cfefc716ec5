# SPDX-License-Identifier: Apache-2.0
"""Loads checkpoints of super-resolution networks from other projects. No code in a file is executed."""

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fastdense._support import MissingExtraError, extra, write_atomically
from fastdense.models.key_mapping import load_exactly
from fastdense.models.sr.base import SuperResolutionNet, check_rgb_range, check_scale
from fastdense.models.sr.drcn import DRCN
from fastdense.models.sr.edsr import EDSR
from fastdense.models.sr.ncnn import read_ncnn
from fastdense.models.sr.other_networks import make_other_network
from fastdense.models.sr.rdn import RDN
from fastdense.models.sr.rrdbnet import RRDBNet
from fastdense.models.sr.srcnn import SRCNN
from fastdense.models.sr.srdensenet import SRDenseNet
from fastdense.models.sr.vdsr import VDSR
from fastdense.models.sr.weight_files import State, check_floats, read_entries, unwrap

_OP = "load_super_resolution"


# Files of save_super_resolution: the first format keeps what the weights do not tell, the second every argument.
_FORMATS = ("fastdense-network-1", "fastdense-network-2")

_NETWORKS: dict[str, type[SuperResolutionNet]] = {
    net.__name__: net for net in (DRCN, EDSR, RDN, RRDBNet, SRCNN, SRDenseNet, VDSR)
}


# Of networks on enlarged pictures: the scale that most of them are published and tried with.
_USUAL_SCALE = 2

_Rules = tuple[tuple[str, str], ...]
_Made = tuple[SuperResolutionNet, State] | None


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


class SettingError(ValueError):
    """An argument that does not fit the weights."""


@contextlib.contextmanager
def _telling_settings() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise SettingError(str(error)) from error


class Choices:
    """What weights do not tell of a network: the user's word, or the file's, or what is usual.

    Attributes:
        given: arguments of the user, None where there are none.
        settings: what a file of this library says.
        notes: a sentence for each choice that was left open, and made here.
    """

    def __init__(self, given: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        self.given = {name: value for name, value in given.items() if value is not None}
        for name, value in self.given.items():
            if not math.isfinite(value):
                raise SettingError(f"{_OP}: expected {name} to be finite, got {value!r}")
        with _telling_settings():
            check_rgb_range(_OP, self.given.get("rgb_range", 1))
        self.settings = settings
        self.notes: list[str] = []

    def choose(self, name: str, usual: float) -> Any:
        """What the weights do not tell."""
        if name in self.settings:
            return self.settings[name]
        if name in self.given:
            return self.given[name]
        if not self.settings:
            self.notes.append(f"the weights do not tell {name}; took {usual:g}")
        return usual

    def scale(self) -> int:
        """Of a network on enlarged pictures."""
        with _telling_settings():
            return int(check_scale(_OP, self.choose("scale", _USUAL_SCALE)))

    def check(self, net: SuperResolutionNet) -> None:
        """Raises:
        SettingError: the network has no such argument, or the weights tell another value.
        """
        for name, value in self.given.items():
            known = getattr(net, name, None)
            if known is None:
                raise SettingError(f"{_OP}: expected no {name} for {type(net).__name__}, got {value:g}")
            if known != value:
                raise SettingError(f"{_OP}: expected {name} to be {known:g} like the network's, got {value:g}")


def load_super_resolution(
    path: str | Path,
    *,
    scale: int | None = None,
    rgb_range: float | None = None,
    residual_scale: float | None = None,
) -> SuperResolutionNet:
    """Creates the network of a weight file and loads the weights.

    Scale, depth and widths follow from the entries. Known are RRDBNet by the names of BasicSR and Real-ESRGAN
    (``body.0.rdb1.conv1``, in ``params_ema`` or ``params``), of ESRGAN (``RRDB_trunk.0.RDB1.conv1``), the oldest
    (``model.1.sub.0.RDB1.conv1.0``), and as saved for ncnn (``.param`` and ``.bin``); EDSR of BasicSR and its
    authors' later code; RDN, SRDenseNet, SRCNN and VDSR of common reimplementations; and files of
    :func:`save_super_resolution`. What training programs wrap around the entries is taken off. Other networks run
    through spandrel, where it is installed and knows them.

    Args:
        path: of the file, of ``torch.save`` or ``.safetensors``. Nothing in it is executed (``weights_only``).
        scale: of SRCNN, VDSR and DRCN, whose weights do not tell it; taken for 2.
        rgb_range: what stands for white inside EDSR and RDN, 1 or 255. EDSR's weights mostly tell it; RDN by the names
            of EDSR-PyTorch is taken for 255, by other names for 1.
        residual_scale: factor of EDSR's residuals; taken for 0.1 from 256 channels on, for 1 below.

    Returns:
        The network in eval mode, float32, on the CPU. Its ``notes`` say what the file left open and was chosen.

    Raises:
        ValueError: no checkpoint, a damaged one, one of another network, or an entry that is missing, unknown, of
            another shape, or no plain tensor of finite floating-point numbers; or an argument that does not fit the
            weights. The message names it.
        MissingExtraError: safetensors is not installed.
    """
    path = Path(path)
    settings: dict[str, Any] = {}
    name: object = None
    if path.suffix in (".param", ".bin") and path.with_suffix(".param").exists():
        state = _ncnn_state(path)
    else:
        content = read_entries(_OP, path)
        if content.get("format") in _FORMATS and isinstance(content.get("settings"), Mapping):
            settings, name = dict(content["settings"]), content.get("network")
        state = unwrap(_OP, path, content)
    choices = Choices({"scale": scale, "rgb_range": rgb_range, "residual_scale": residual_scale}, settings)
    makers = _MAKERS if name is None else (_of_this_library(name),)
    for make in makers:
        known = make.__name__.removeprefix("_make_")
        try:
            made = make(state, choices)
        except SettingError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{_OP}: expected {path} to hold a whole {known}, got a problem with {reason}") from error
        if made is not None:
            net, renamed = made
            choices.check(net)
            check_floats(_OP, path, renamed)
            load_exactly(f"{_OP}: {path}", net, renamed)
            net.notes = tuple(choices.notes)
            return net.eval()
    other, hint = _other_network(path, state)
    if other is not None:
        choices.check(other)
        return other
    some = ", ".join(list(state)[:3])
    raise ValueError(f"{_OP}: expected {path} to hold a known network, got entries such as {some}{hint}")


def _other_network(path: Path, state: State) -> tuple[SuperResolutionNet | None, str]:
    """A network that spandrel knows; or None, and what to install."""
    try:
        with extra("spandrel"):
            net = make_other_network(state)
    except MissingExtraError as error:
        return None, f"; spandrel knows more networks: {error}"
    except Exception as error:  # weights that look like a network's, and do not fit it
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{_OP}: expected {path} to hold a whole network, got a problem with {reason}") from error
    return net, ""


def save_super_resolution(net: SuperResolutionNet, path: str | Path) -> None:
    """Saves a network for :func:`load_super_resolution`, which makes the same network again.

    Args:
        net: a network of :mod:`fastdense.models`.
        path: of the file; replaced whole or not at all.

    Raises:
        ValueError: a network of another class.
    """
    name = type(net).__name__
    if _NETWORKS.get(name) is not type(net):
        raise ValueError(f"save_super_resolution: expected net to be one of {', '.join(_NETWORKS)}, got {name}")
    content = {"format": _FORMATS[1], "network": name, "settings": net.settings(), "params": net.state_dict()}
    write_atomically(Path(path), lambda file: torch.save(content, file))


def _of_this_library(name: object) -> Callable[[State, Choices], _Made]:
    """Makes a network by its class and arguments, once the weights are seen to fit them."""

    def make(state: State, choices: Choices) -> _Made:
        if name not in _NETWORKS:
            raise ValueError(f"its class, {name}; update fastdense")
        network, settings = _NETWORKS[str(name)], choices.settings
        # Each argument counts modules, entries or channels: larger ones would only take time and memory.
        most = max([8, 255, len(state), *(size for value in state.values() for size in value.shape)])
        for key, value in settings.items():
            for number in value if isinstance(value, list | tuple) else [value]:
                if not isinstance(number, int | float) or not abs(number) <= most:
                    raise ValueError(f"its {key}, {number!r}")
        with torch.device("meta"):
            claimed, held = (sum(v.numel() for v in s.values()) for s in (network(**settings).state_dict(), state))
        if claimed > held:
            raise ValueError(f"its arguments, which make {claimed:,} weights of {held:,}")
        return network(**settings), state

    make.__name__ = f"_make_{str(name).lower()}"
    return make


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


def _make_rrdbnet(state: State, choices: Choices) -> _Made:
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


def _make_edsr(state: State, choices: Choices) -> _Made:
    if not {"body.0.conv1.weight", "body.0.body.0.weight"} & set(state):
        return None
    shift = state.get("sub_mean.bias")
    state = {key: value for key, value in state.items() if not key.startswith(("sub_mean.", "add_mean."))}
    state = _rename(state, _EDSR_RULES)
    width = state["conv_first.weight"].shape[0]
    if shift is not None and shift.any():  # the mean colour times the range
        rgb_range = 1 if shift.abs().max() < 1 else 255
    else:
        rgb_range = choices.choose("rgb_range", 255)
    # No entry of other people's files tells the factor; the paper's two networks differ so.
    factor = choices.choose("residual_scale", 0.1 if width >= 256 else 1.0)
    net = EDSR(_shuffled_scale(state, "upsample", width), _count(state, r"body\.(\d+)\."), width, factor, rgb_range)
    return net, state


def _make_rdn(state: State, choices: Choices) -> _Made:
    usual = 255 if "SFENet1.weight" in state else 1  # EDSR-PyTorch, and reimplementations
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
    rgb_range = choices.choose("rgb_range", usual)
    net = RDN(
        _shuffled_scale(state, "upscale", width), _count(state, r"rdbs\.(\d+)\."), layers, growth, width, rgb_range
    )
    return net, state


def _make_srdensenet(state: State, choices: Choices) -> _Made:
    if "dense_blocks.0.block.0.conv.weight" not in state:
        return None
    blocks, layers = _count(state, r"dense_blocks\.(\d+)\."), _count(state, r"dense_blocks\.0\.block\.(\d+)\.")
    growth = state["dense_blocks.0.block.0.conv.weight"].shape[0]
    net = SRDenseNet(blocks, layers, growth, state["bottleneck.0.weight"].shape[0])
    return net, state


def _make_srcnn(state: State, choices: Choices) -> _Made:
    if set(state) != {f"conv{at}.{kind}" for at in (1, 2, 3) for kind in ("weight", "bias")}:
        return None
    first, second, third = (state[f"conv{at}.weight"].shape for at in (1, 2, 3))
    return SRCNN(choices.scale(), (first[2], second[2], third[2]), (first[0], second[0])), state


def _make_vdsr(state: State, choices: Choices) -> _Made:
    inner = _count(state, r"residual_layer\.(\d+)\.conv\.weight")  # twtygqyy/pytorch-vdsr
    ends = (("^input\\.", "convs.0."), ("^output\\.", f"convs.{inner + 1}."))
    state = _rename(
        {re.sub(r"^residual_layer\.(\d+)\.conv", lambda m: f"convs.{int(m[1]) + 1}", k): v for k, v in state.items()},
        ends if inner else (),
    )
    if "convs.0.weight" not in state:
        return None
    return VDSR(choices.scale(), _count(state, r"convs\.(\d+)\."), state["convs.0.weight"].shape[0]), state


def _make_drcn(state: State, choices: Choices) -> _Made:
    if "recursive.weight" not in state:
        return None
    return DRCN(choices.scale(), state["weights"].shape[0], state["recursive.weight"].shape[0]), state


_MAKERS = (_make_rrdbnet, _make_rdn, _make_edsr, _make_srdensenet, _make_srcnn, _make_vdsr, _make_drcn)
