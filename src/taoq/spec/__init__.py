# SPDX-License-Identifier: Apache-2.0
"""Specs: load YAML files with overrides into frozen dataclasses; generate reference pages from the dataclasses."""
