"""`python -m launcher.supervisor STAGE_JSON`."""

import sys

from launcher.supervisor.main import main

sys.exit(main(sys.argv[1:]))
