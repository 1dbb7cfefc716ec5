# SPDX-License-Identifier: Apache-2.0
"""The building blocks in plain PyTorch: what :mod:`fastdense.fusion` fuses and falls back to."""
