# SPDX-License-Identifier: Apache-2.0
"""The work of the actions, as functions that take values and return frozen results. Nothing here prints."""
