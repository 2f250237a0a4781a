import sys

from kvortex.cli import main

sys.exit(main())
