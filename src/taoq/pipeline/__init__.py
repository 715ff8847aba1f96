# SPDX-License-Identifier: Apache-2.0
"""What the actions do, as functions of values that return frozen results. Nothing here prints."""
