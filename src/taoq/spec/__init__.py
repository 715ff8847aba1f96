# SPDX-License-Identifier: Apache-2.0
"""Specs: YAML with overrides into frozen dataclasses, and the reference pages made from them."""
