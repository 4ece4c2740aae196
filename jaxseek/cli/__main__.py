"""`python -m jaxseek.cli`."""

import sys

from jaxseek.cli.main import main

sys.exit(main())
