# SPDX-License-Identifier: Apache-2.0
"""Dense and dual path blocks that compute anything: one buffer is saved for backward, and layers run again there.

No operator stands in for the layers. They run as the plain modules that they are, and so any module may be one.
"""
