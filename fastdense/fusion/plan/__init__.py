# SPDX-License-Identifier: Apache-2.0
"""What a fused module has been read into, and whether that still holds."""
