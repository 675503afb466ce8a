"""The command ``ibp-triton``, also as ``python -m ibp_triton``."""

import sys


def main() -> None:
    """Run the command; without the harness's packages say what to install."""
    try:
        from ibp_triton.harness.cli import main as command
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("ibp_triton"):
            raise
        sys.exit(f"ibp-triton needs the package {error.name}: pip install 'ibp-triton[harness]'")
    command()


if __name__ == "__main__":
    main()
