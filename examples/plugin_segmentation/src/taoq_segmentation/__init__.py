# SPDX-License-Identifier: Apache-2.0
"""A package that adds the task `segmentation` to taoq."""
