"""The packages of the extra ``zoo``, one a line: what `make zoo` installs beside the tests' own."""

import re
import sys
from importlib.metadata import requires


def packages() -> list[str]:
    """Without the condition that makes them an extra's."""
    wanted = re.compile(r"extra == ['\"]zoo['\"]")
    return [line.partition(";")[0].strip() for line in requires("ibp-triton") or [] if wanted.search(line)]


if __name__ == "__main__":
    sys.stdout.write("\n".join(packages()) + "\n")
