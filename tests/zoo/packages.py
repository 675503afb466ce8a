"""The packages of an extra, one a line: what `make zoo` and `make docs` install beside the tests' own."""

import re
import sys
from importlib.metadata import requires


def packages(extra: str) -> list[str]:
    """Without the condition that makes them an extra's."""
    wanted = re.compile(rf"extra == ['\"]{extra}['\"]")
    return [line.partition(";")[0].strip() for line in requires("ibp-triton") or [] if wanted.search(line)]


if __name__ == "__main__":
    sys.stdout.write("\n".join(packages(sys.argv[1])) + "\n")
