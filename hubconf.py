# SPDX-License-Identifier: Apache-2.0
"""Entry points of ``torch.hub``: ``torch.hub.load("OWNER/fastdense", "densenet121", weights="DEFAULT")``.

The compiled package must be there: in this checkout (``source="local"``), or installed by pip.
"""

import sys as _sys
from pathlib import Path as _Path
from typing import Any as _Any

dependencies = ["torch", "numpy"]


def _models() -> _Any:
    """The package that is installed where this checkout was not built; torch.hub has put the checkout in front."""
    here = _Path(__file__).resolve().parent
    paths = list(_sys.path)
    if not list((here / "fastdense").glob("_C*.so")):
        _sys.path[:] = [path for path in paths if _Path(path).resolve() != here]
    try:
        from fastdense import models
    except ModuleNotFoundError:
        _sys.path[:] = paths
        from fastdense import models  # says how to build it
    finally:
        _sys.path[:] = paths
    return models


_found = _models()
globals().update({name: getattr(_found, name) for name in _found.list() if not _found.is_super_resolution(name)})
