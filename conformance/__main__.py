"""`python -m conformance [--fast] [pytest arguments]`: fetch PEFT's tests, run them with our
configurations, fail if one fails.

--fast leaves out all but one configuration of each method and all but one decoder. Anything else
goes to pytest, such as `-k test_merge_layers` or `-x`.
"""

import os
import sys
from collections import Counter
from importlib.metadata import version

import pytest

from conformance import cases, plugin
from conformance.fetch import fetch_tests
from conformance.models import build_models

FILES = (
    "test_custom_models.py",
    "test_decoder_models.py",
    "test_low_level_api.py",
    "test_initialization.py",
    "test_tuners_utils.py",
)


def main() -> int:
    """Run the tests; the exit code is pytest's, or 2 where PEFT's tests could not be fetched."""
    arguments = sys.argv[1:]
    fast = "--fast" in arguments
    arguments = [argument for argument in arguments if argument != "--fast"]
    try:
        tests = fetch_tests()
    except RuntimeError as error:
        print(f"conformance: {error}", file=sys.stderr)
        return 2
    # PEFT's tests name models of the hub. A folder of that name below the working folder goes
    # before the hub.
    os.chdir(build_models())
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "--rootdir", str(tests), "-c", os.devnull]
    options += ["-W", "ignore", "--timeout=300"]
    sessions = [plugin.Plugin(fast), *(plugin.Plugin(fast, method) for method in cases.METHODS)]
    codes = [
        pytest.main([*options, *arguments, *(str(tests / file) for file in FILES)], [session]) for session in sessions
    ]
    counts = sum((session.counts for session in sessions), Counter())
    print(f"\nconformance to PEFT {version('peft')}: " + plugin.totals(counts))
    return next(
        (int(code) for code in codes if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)), 0
    )


if __name__ == "__main__":
    raise SystemExit(main())
