"""`python -m npgpt2`: the same as the command `npgpt2`."""

import sys

from npgpt2.cli import main

sys.exit(main())
