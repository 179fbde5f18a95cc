"""`python -m irkd_dist`, and so `accelerate launch -m irkd_dist`: the same command line as `irkd`."""

import sys

from irkd_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
