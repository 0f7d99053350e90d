"""From nothing to a chat with three swappable skills: one command, minutes on a laptop.

    python scripts/quickstart.py

Makes the project's own environment (.venv), trains a small model from zero on the bundled data,
teaches it three LoRA skills and asks all the same questions. Everything lands in out/quickstart;
repeated, it reuses finished stages. --use_this_python runs in this Python and installs nothing.
"""

import os
import sys

if sys.version_info < (3, 10):  # this file parses on any Python 3, the ones it imports do not
    sys.stderr.write("error: this Python is too old: use 3.10 to 3.14, 64-bit, from python.org\n")
    sys.exit(2)
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from core import errors
from core.environment import ROOT, choose_python, run


def main(argv=None):
    """Make the environment, run the stages in it and end with their exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments in (["-h"], ["--help"]):
        print(__doc__)
        return
    if arguments not in ([], ["--use_this_python"]):
        raise errors.UserError("quickstart.py takes no argument but --use_this_python and --help")
    python, _ = choose_python(["requirements.txt"], arguments)
    sys.exit(run([python, os.path.join(ROOT, "scripts", "quickstart_stages.py")]))


if __name__ == "__main__":
    errors.run(main)
