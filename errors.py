"""How every script here reports a user's mistake: one line on stderr and exit status 2."""

import argparse
import os
import re
import signal
import sys

from terminal import printable, style


class UserError(Exception):
    """A mistake the user can mend. The message is one line that names the thing and the remedy."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, but a wrong flag is one line like any other mistake, not a page of usage.

    A path may begin with ~, which not every shell expands behind make's "IN=".
    """

    def parse_known_args(self, args=None, namespace=None):
        args = [
            re.sub(r"^(--[a-z-]+=)?(~/.*)", _from_home, text, flags=re.S)
            for text in (sys.argv[1:] if args is None else args)
        ]
        return super().parse_known_args(args, namespace)

    def error(self, message):
        raise UserError(f"{message} ({self.prog} --help lists the flags)")


def _from_home(found):
    return (found[1] or "") + os.path.expanduser(found[2])


def positive(text):
    """An argparse type: a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def matriculation(text):
    """An argparse type: a matriculation number, in capitals."""
    if not re.fullmatch("[A-Z][0-9]{8}[A-Z]", text.upper()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a letter, eight digits and a letter, as A12345678B")
    return text.upper()


def tell(message, kind="error"):
    """Print an error or a warning as one line on stderr, whatever stands in the names that it mentions."""
    print(f"{style(f'{kind}:', kind, sys.stderr)} {printable(str(message))}", file=sys.stderr)


def run_main(main):
    """Call `main()`; print a UserError as one line and exit with status 2, Ctrl-C with 130, SIGTERM with 143.

    So are errors of the system told (no permission, a full disk, a name too long). Any other exception is a
    programming error and keeps its traceback.
    """
    # As an exception it lets temporary files and worker processes be cleared away.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        sys.exit(main())
    except UserError as error:
        # Of several processes that meet the same mistake the first one tells.
        if os.environ.get("RANK", "0") == "0":
            tell(error)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output (head, less) has gone: not an error of ours.
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        tell(f"{error.filename}: {error.strerror}" if error.filename else error)
        sys.exit(2)
