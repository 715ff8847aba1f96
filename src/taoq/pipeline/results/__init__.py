# SPDX-License-Identifier: Apache-2.0
"""What the functions of the pipeline return: frozen values with `to_json`, one file a function."""
