# SPDX-License-Identifier: Apache-2.0
"""The networks of TAO, for classification and as backbones of detectors: built from libraries or here, and their names.

Imports no task: tasks decide what a network is used for.
"""
