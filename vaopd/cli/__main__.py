"""Makes `python -m vaopd.cli` the same as `vaopd`."""

import sys

from vaopd.cli import main

sys.exit(main())
