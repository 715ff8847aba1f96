# SPDX-License-Identifier: Apache-2.0
"""Semantic segmentation as a task of taoq, in a package of its own."""
