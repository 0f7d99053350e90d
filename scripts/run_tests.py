"""Check the style and run the tests in .venv: python scripts/run_tests.py [pytest arguments]

pytest uses up to four cores (-n 0: one process, as --pdb needs it). --use_this_python runs in the
Python that started it and installs nothing.
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
    """Run every stage and end with the exit code of the first that failed."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments in (["-h"], ["--help"]):
        print(__doc__)
        return
    requirements = ["requirements.txt", "requirements-4bit.txt", "requirements-test.txt"]
    python, pytest_arguments = choose_python(requirements, arguments)
    os.chdir(ROOT)
    # On a build server a reference tool that is missing must fail its test, not skip it.
    variables = {"REQUIRE_ORACLES": "1"} if os.environ.get("CI") else {}
    variables["OMP_NUM_THREADS"] = "1"  # the models are small: another test makes more of a core
    pytest = ["pytest", "--numprocesses", "auto", "--maxprocesses", "4", "--dist", "worksteal"]
    failure = 0
    for stage in (["ruff", "check"], ["ruff", "format", "--check"], pytest + pytest_arguments):
        print("== " + " ".join(stage))
        code = run([python, "-m"] + stage, variables)
        if code == 130:
            sys.exit(code)
        failure = failure or code
    sys.exit(failure)


if __name__ == "__main__":
    errors.run(main)
