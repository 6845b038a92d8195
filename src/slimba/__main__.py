"""`python -m slimba` is `slimba`."""

import sys

from slimba.cli.main import main

sys.exit(main())
