# SPDX-License-Identifier: Apache-2.0
"""Models that version 0.1.0 pickled whole still load, and give the same numbers."""

import importlib
import inspect
import pickle
from pathlib import Path

import pytest
import torch

import fastdense
from fastdense import _old_paths

FILE = Path(__file__).parent / "data" / "models_0.1.0.pt"
MODELS = torch.load(FILE, weights_only=False)


@pytest.mark.parametrize("name", MODELS)
def test_old_model_computes_what_it_did(name):
    model, x, expected = MODELS[name]
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is type(model)


def test_every_old_module_finds_the_names_of_its_new_ones():
    for old, homes in _old_paths._MODULES.items():
        module = importlib.import_module(f"fastdense.{old}")
        for home in homes:
            new = importlib.import_module(f"fastdense.{home}")
            parts = new.__name__, f"{new.__name__}."  # a package hands on what its modules have
            own = [
                name for name, value in vars(new).items() if f"{getattr(value, '__module__', None)}".startswith(parts)
            ]
            assert own
            assert all(getattr(module, name) is not None for name in own)
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            _ = module.nothing


def test_convert_is_a_function_and_a_module_path():
    from fastdense.convert import convert

    assert fastdense.convert is convert

    from fastdense.models.rdn import rdn

    assert fastdense.models.rdn is rdn


def test_renamed_classes():
    from fastdense.fusion.inferred_block import FusedInferredBlock
    from fastdense.nn.fused_found import FusedFoundBlock

    assert FusedFoundBlock is FusedInferredBlock


def test_old_modules_are_attributes_of_their_packages():
    assert fastdense.nn.fused.FusedModule is importlib.import_module("fastdense.fusion.base").FusedModule
    assert not hasattr(fastdense.nn, "no_such_module")


@pytest.mark.parametrize("name", [*_old_paths._MODULES, "convert", "models.rdn", "models.rrdbnet"])
def test_old_modules_leave_public_names_as_they_are(name):
    package, _, own = f"fastdense.{name}".rpartition(".")
    public = importlib.import_module(package)
    before = getattr(public, own) if own in public.__all__ else None
    assert inspect.ismodule(importlib.import_module(f"fastdense.{name}"))
    assert not inspect.ismodule(before)
    if before is not None:
        assert getattr(public, own) is before
