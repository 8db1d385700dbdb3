"""What programs that `python -m` runs, like lab.step, have in common; none is in COMMANDS."""

import inspect
import sys

from support.console import is_out_of_memory, want_of_memory
from support.files import UserError, WriteError
from support.options import parse_options


def run_program(name, kind, function, room="lab"):
    """Call a function with the options, a dataclass `kind`, that were typed; returns the exit code.

    As of a command of mtbi.py, what a user can mend is said in one line, with exit code 2.
    """
    try:
        about = inspect.getdoc(function)
        function(parse_options(kind, sys.argv[1:], f"python -m {room}.{name}", about))
    except (UserError, WriteError, OSError) as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, WriteError) else 2
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        print(f"{name}: {want_of_memory(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
