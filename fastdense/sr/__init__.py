# SPDX-License-Identifier: Apache-2.0
"""Super-resolution on pictures: upscaling within a memory limit, quality measures, picture files."""
