# SPDX-License-Identifier: Apache-2.0
"""Render results as tables for the terminal and as HTML."""
