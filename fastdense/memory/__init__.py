# SPDX-License-Identifier: Apache-2.0
"""What a training step saves for its backward pass: a mode for each block, and the choice that fits a budget."""
