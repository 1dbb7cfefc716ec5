# SPDX-License-Identifier: Apache-2.0
"""``import fastdense`` loads torch and numpy, and no other package."""

import json
import subprocess
import sys

CODE = """
import json, sys
import numpy, torch
before = set(sys.modules)
import fastdense
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
"""


def test_no_other_package_is_loaded():
    made = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True)
    loaded = set(json.loads(made.stdout)) - sys.stdlib_module_names
    assert "fastdense" in loaded
    assert loaded <= {"fastdense", "torch", "numpy"}, loaded
