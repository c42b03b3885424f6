"""``python -m deploy`` is the command ``headstart``."""

import sys

from deploy.cli import main

sys.exit(main())
