# SPDX-License-Identifier: Apache-2.0
"""Results as text: tables on the screen, pages of HTML."""
