"""``python -m lowcomm``: see `lowcomm.cli`."""

import sys

from lowcomm.cli import main

sys.exit(main())
