# SPDX-License-Identifier: Apache-2.0
"""Machinery that finds dense blocks in models and runs each as one operator."""
