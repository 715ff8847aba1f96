# SPDX-License-Identifier: Apache-2.0
"""python -m taoq."""

import sys

from taoq.cli import main

sys.exit(main())
