import sys

from armchair.cli import main

sys.exit(main())
