# SPDX-License-Identifier: Apache-2.0
"""Modules of version 0.1.0 by their old paths, so that a model that was pickled whole then still loads."""

import importlib
import sys
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# The modules, below the package, that now hold what an old one did.
_MODULES = {
    "_enlarge": ("sr.upscale_samples",),
    "_pictures": ("sr.images",),
    "bench.floor": ("bench.roofline",),
    "model_report": ("fusion.report",),
    "models.dialects": ("models.key_mapping",),
    "models.ncnn": ("models.sr.ncnn",),
    "models.sr_checkpoints": ("models.sr.checkpoints",),
    "models.super_resolution": (
        "models.sr.base",
        "models.sr.drcn",
        "models.sr.edsr",
        "models.sr.srcnn",
        "models.sr.srdensenet",
        "models.sr.vdsr",
    ),
    "nn.channel_order": ("fusion.channel_order",),
    "nn.dual_path_structure": ("fusion.dual_path_layers",),
    "nn.found_structure": ("fusion.inferred_layers",),
    "nn.fused": ("fusion.base", "fusion.batch_statistics", "fusion.dense_block", "fusion.sequential"),
    "nn.fused_dual_path": ("fusion.dual_path",),
    "nn.fused_found": ("fusion.inferred_block",),
    "nn.fused_residual": ("fusion.residual_dense_block",),
    "nn.recomputed": ("fusion.max_pool_transition",),
    "nn.residual_structure": ("fusion.residual_layers",),
    "nn.shared_statistics": ("fusion.batch_statistics",),
    "nn.stem": ("fusion.stem",),
    "nn.stochastic_depth": ("plain.stochastic_depth",),
    "nn.structure": ("fusion.checks", "fusion.dense_layers"),
    "nn.trial": ("fusion.equivalence", "fusion.plan.outcome"),
    "quality": ("sr.quality",),
    "upscaling": ("sr.upscaling",),
}
_NAMES = {
    "FoundBlock": "InferredBlock",
    "FusedFoundBlock": "FusedInferredBlock",
    "FusedFoundRow": "FusedInferredLayers",
    "NewestFirst": "PrependedFeatures",
}


class _OldPaths(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        package, _, module = name.partition(".")
        return ModuleSpec(name, self) if package == "fastdense" and module in _MODULES else None

    def exec_module(self, module: ModuleType) -> None:
        homes = _MODULES[module.__name__.partition(".")[2]]

        def look_up(name: str) -> Any:
            now = _NAMES.get(name, name)
            for home in homes:
                found = importlib.import_module(f"fastdense.{home}")
                if hasattr(found, now):
                    return getattr(found, now)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__dict__["__getattr__"] = look_up


def _submodule(package: str, name: str) -> ModuleType:
    """An old module as an attribute of its package, which it was without an import of its own."""
    if f"{package}.{name}".partition(".")[2] in _MODULES:
        return importlib.import_module(f"{package}.{name}")
    raise AttributeError(f"module {package!r} has no attribute {name!r}")


def install() -> None:
    """Makes the old paths importable, once."""
    if not any(isinstance(finder, _OldPaths) for finder in sys.meta_path):
        sys.meta_path.append(_OldPaths())
    for package in {f"fastdense.{name}".rpartition(".")[0] for name in _MODULES} & sys.modules.keys():
        sys.modules[package].__dict__.setdefault("__getattr__", partial(_submodule, package))
    # Found before they are imported: an import would put the module in the place of the function of the same name.
    sys.modules["fastdense.convert"] = importlib.import_module("fastdense.fusion.convert")
    for name in ("rdn", "rrdbnet"):
        sys.modules[f"fastdense.models.{name}"] = importlib.import_module(f"fastdense.models.sr.{name}")
