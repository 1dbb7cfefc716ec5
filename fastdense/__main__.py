# SPDX-License-Identifier: Apache-2.0
"""``python -m fastdense``."""

import sys

from fastdense.cli import main

if __name__ == "__main__":
    sys.exit(main())
