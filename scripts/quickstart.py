"""From nothing to a chat with two swappable skills, in one command and about ten minutes on a
laptop.

    python scripts/quickstart.py

Makes the project's own environment (.venv), trains a small model from zero on the bundled data,
teaches it two LoRA skills, asks the base and both skills the same questions and says how to go on.
Everything lands in out/quickstart under the current folder; repeated, it reuses the stages that are
finished. --use_this_python runs in the Python that started it and installs nothing. This file
parses on any Python 3, so that an old one can say what is wrong.
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from core.environment import ROOT, choose_python, run, run_main, stop


def main(argv=None):
    """Make the environment, then run the stages in it; return their exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    if arguments not in ([], ["--use_this_python"]):
        stop(
            "unexpected argument %r: quickstart.py takes only --use_this_python and --help"
            % arguments[-1]
        )
    python, _ = choose_python(["requirements.txt"], arguments)
    return run([python, os.path.join(ROOT, "scripts", "quickstart_stages.py")])


if __name__ == "__main__":
    run_main(main)
