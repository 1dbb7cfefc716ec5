# SPDX-License-Identifier: Apache-2.0
"""Networks that are registered with timm, scripts that are run with them, and torch.hub."""

import copy
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import _factory
from torch import Tensor, nn

import fastdense
import fastdense.timm
from fastdense.fusion.base import FusedModule
from fastdense.fusion.dense_block import FusedDenseBlock
from fastdense.fusion.dual_path import FusedDualPathBlock
from fastdense.fusion.plan.state import state_of
from fastdense.timm.__main__ import main
from tests.cases.random_block import relative

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tests/cases/timm_script.py"
SMALL = ("densenet121", "dpn48b")


def pair(name: str, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """timm's network, and the registered one with the same weights."""
    plain = timm.create_model(name, **kwargs)
    fast = timm.create_model(f"fastdense_{name}", **kwargs)
    fast.load_state_dict(plain.state_dict())
    return plain.eval(), fast.eval()


def pictures(channels: int = 3, size: int = 64) -> Tensor:
    return torch.rand(2, channels, size, size)


def assert_close(mine: Any, theirs: Any) -> None:
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def modes(net: nn.Module) -> set[str]:
    """Memory modes of the blocks."""
    blocks = (FusedDenseBlock, FusedDualPathBlock)
    return {state_of(module).memory for module in net.modules() if isinstance(module, blocks)}


def test_names_and_configurations() -> None:
    for name in fastdense.timm.ARCHITECTURES:
        mine, theirs = (timm.models.get_arch_pretrained_cfgs(one) for one in (f"fastdense_{name}", name))
        assert [one.removeprefix("fastdense_") for one in mine] == list(theirs) != []
        for tag, cfg in theirs.items():
            assert mine[f"fastdense_{tag}"].hf_hub_id == cfg.hf_hub_id
            assert mine[f"fastdense_{tag}"].input_size == cfg.input_size
    assert "fastdense_densenet121.ra_in1k" in timm.list_pretrained("fastdense_*")
    assert set(timm.list_models("fastdense_*")) == {f"fastdense_{name}" for name in fastdense.timm.ARCHITECTURES}


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_every_method_of_timm(name: str) -> None:
    plain, fast = pair(name, num_classes=3, in_chans=1)
    assert any(isinstance(module, FusedModule) for module in fast.modules())
    x = pictures(1)
    assert_close(fast(x), plain(x))
    features = plain.forward_features(x)
    assert_close(fast.forward_features(x), features)
    assert_close(fast.forward_head(features, pre_logits=True), plain.forward_head(features, pre_logits=True))
    for options in ({}, {"indices": 2, "intermediates_only": True}, {"indices": [0, 3], "stop_early": True}):
        assert_close(fast.forward_intermediates(x, **options), plain.forward_intermediates(x, **options))
    assert fast.num_features == plain.num_features and fast.feature_info == plain.feature_info
    assert fast.get_classifier() is fast.classifier
    cfg = fast.pretrained_cfg
    assert (cfg["input_size"], cfg["classifier"]) == (plain.pretrained_cfg["input_size"], "classifier")
    assert fast.group_matcher() == plain.group_matcher()
    fast.reset_classifier(5)
    assert fast(x).shape == (2, 5)
    fast.reset_classifier(0)
    assert_close(fast(x), plain.forward_head(features, pre_logits=True))
    plain.prune_intermediate_layers(2)
    fast.prune_intermediate_layers(2)
    assert_close(fast(x), plain(x))


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_features_only(name: str) -> None:
    plain, fast = pair(name, features_only=True, out_indices=(1, 2, 4))
    assert fast.feature_info.channels() == plain.feature_info.channels()
    x = pictures()
    assert_close(fast(x), plain(x))


@pytest.mark.parametrize("name", SMALL)
def test_checkpointing_is_a_memory_mode(name: str) -> None:
    plain, fast = (net.double() for net in pair(name, num_classes=3))
    assert modes(fast) == {"balanced"}
    fast.set_grad_checkpointing()
    assert modes(fast) == {"min"}
    x = pictures().double()
    for net in (plain, fast):
        net.train()(x).square().sum().backward()
    for (key, mine), theirs in zip(fast.named_parameters(), plain.parameters(), strict=True):
        assert relative(mine.grad, theirs.grad) <= 1e-8, key
    fast.set_grad_checkpointing(False)
    assert modes(fast) == {"balanced"}


def test_memory_modes_by_arguments() -> None:
    assert modes(timm.create_model("fastdense_dpn48b", memory="reversible")) == {"reversible"}
    assert modes(timm.create_model("fastdense_densenet121", memory_efficient=True)) == {"min"}
    listed = timm.create_model("fastdense_densenet121", features_only=True)
    listed.set_grad_checkpointing()
    assert modes(listed) == {"min"} and not listed.grad_checkpointing
    with pytest.raises(ValueError, match="memory"):
        timm.create_model("fastdense_densenet121", memory="least")


def test_copies_and_pickles() -> None:
    _, fast = pair("dpn48b", num_classes=2)
    x = pictures()
    file = io.BytesIO(pickle.dumps(fast))
    for again in (copy.deepcopy(fast), pickle.load(file)):
        assert type(again) is fastdense.timm.DPN
        again.set_grad_checkpointing()
        assert modes(again) == {"min"} and modes(fast) == {"balanced"}
        assert_close(again(x), fast(x))


def test_pretrained_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    theirs = timm.create_model("dpn68b").eval()
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    asked = []

    def hand_out(repo_id: str, filename: str, **kwargs: Any) -> str:
        asked.append(repo_id)
        return str(tmp_path / filename)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", hand_out)
    mine = timm.create_model("fastdense_dpn68b.mx_in1k", pretrained=True).eval()
    x = pictures()
    assert_close(mine(x), theirs(x))
    assert timm.create_model("fastdense_dpn68b", pretrained=True, num_classes=3).classifier.out_channels == 3
    assert asked == ["timm/dpn68b.mx_in1k", "timm/dpn68b.ra_in1k"]


# --- scripts ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_timm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Puts back what a script changes: timm's function, its arguments, where Python looks for modules."""
    for module in (timm, timm.models, _factory):
        monkeypatch.setattr(module, "create_model", timm.create_model)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    torch.set_default_dtype(torch.float32)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[list[float], str]:
    """Losses of the script's steps, and the class of its network."""
    main(list(arguments))
    *losses, last = capsys.readouterr().out.splitlines()
    return [float(line.removeprefix("loss ")) for line in losses], last.rpartition(" ")[2]


@pytest.mark.usefixtures("own_timm")
def test_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    """The same losses by timm's network, by the registered one, and by the one that --convert makes."""
    wanted, its_class = printed(capsys, str(SCRIPT), "--model", "dpn48b")
    assert len(wanted) == 2 and its_class == "timm.models.dpn.DPN"
    for arguments in (
        (str(SCRIPT), "--model", "fastdense_dpn48b", "--grad-checkpointing"),
        ("--convert", "--memory=min", str(SCRIPT), "--model", "dpn48b"),
    ):
        losses, its_class = printed(capsys, *arguments)
        assert losses == pytest.approx(wanted, abs=2e-6) and its_class == "fastdense.timm.DPN"


@pytest.mark.usefixtures("own_timm")
def test_other_models_stay_with_a_warning() -> None:
    put_back = fastdense.timm.convert_created_models("min")
    with pytest.warns(UserWarning, match="^fastdense: the model of timm stays plain: convert: expected model to"):
        net = timm.create_model("resnet10t", num_classes=2)
    assert type(net).__module__ == "timm.models.resnet"
    assert modes(timm.create_model("densenet121", num_classes=2)) == {"min"}
    assert modes(timm.models.create_model("fastdense_dpn48b")) == {"balanced"}
    put_back()
    assert modes(timm.create_model("densenet121", num_classes=2)) == set()


def test_the_command() -> None:
    command = [sys.executable, "-m", "fastdense.timm", SCRIPT, "--model", "fastdense_dpn48b"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    made = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert made.stdout.splitlines()[-1].endswith(" fastdense.timm.DPN")


def test_mistakes_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["missing.py"], "expected SCRIPT to be a Python file, got missing.py"),
        (["--memory=min", str(SCRIPT)], "expected --memory with --convert"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert message in capsys.readouterr().err


# --- torch.hub -------------------------------------------------------------------------------------------------------


def test_torch_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "_get_cache_or_reload", lambda *args, **kwargs: str(ROOT))
    listed = torch.hub.list("owner/fastdense", trust_repo=True)
    wanted = [name for name in fastdense.models.list() if not fastdense.models.is_super_resolution(name)]
    assert sorted(listed) == wanted
    net = torch.hub.load(str(ROOT), "densenet121", source="local", num_classes=3)
    assert isinstance(net, fastdense.models.DenseNet) and net.classifier.out_features == 3


def test_torch_hub_takes_the_installed_package_where_its_own_is_not_built(tmp_path: Path) -> None:
    (tmp_path / "fastdense").mkdir()
    (tmp_path / "fastdense/__init__.py").write_text("raise ImportError('not built')\n")
    (tmp_path / "hubconf.py").write_text((ROOT / "hubconf.py").read_text())
    code = f"import torch; print(type(torch.hub.load({str(tmp_path)!r}, 'dpn48b', source='local')).__name__)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    made = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert made.stdout == "DPN\n", made.stderr
