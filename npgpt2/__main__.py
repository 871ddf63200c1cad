"""`python -m npgpt2`, and the command `npgpt2`: `npgpt2.cli.main`, which Ctrl-C ends quietly from beginning to end."""

import os
import sys


def main() -> int:
    """Run the command as a program, whose exit status this returns.

    Most of the first tenths of a second goes into importing NumPy, where an exception from a signal could come up in
    any line of others' code, which may catch it, or print it and go on. So none is raised until that is over, nor when
    all is done and Python takes itself apart.
    """
    try:
        import signal

        # What is started in the background ignores Ctrl-C from the outset.
        interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if interruptible:
            signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
        from npgpt2 import cli

        try:
            if interruptible:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            return cli.main()
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
