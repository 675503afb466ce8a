"""Work for a process on another machine, which has the same packages and, unless runs lie in a bucket, folder."""

from __future__ import annotations

import os
import pickle
import socket
import sys
from dataclasses import dataclass
from typing import Any

from ibp_triton.errors import LaunchError


@dataclass(frozen=True)
class Parcel:
    """Any values, with the folder in which a command was given and where it looks for modules.

    `apart`: the folder is of use where it is there, but need not be.
    """

    folder: str
    path: tuple[str, ...]
    content: bytes
    apart: bool = False

    @classmethod
    def of(cls, *values: Any, apart: bool = False) -> Parcel:
        """These values, to be opened elsewhere."""
        return cls(os.getcwd(), tuple(sys.path), pickle.dumps(values), apart)

    def open(self) -> Any:
        """The values; this process is in that folder from then on, and its own modules come before the command's.

        Raises:
            LaunchError: where there is no such folder.
        """
        try:
            os.chdir(self.folder)
        except OSError as error:
            if self.apart:
                return self._values()
            raise LaunchError(
                f"{self.folder}: not to be reached from {socket.gethostname()} ({error.strerror}); give the command in "
                "a folder that every machine has under this path, such as one of a shared file system, or name a "
                "bucket by output"
            ) from error
        return self._values()

    def _values(self) -> Any:
        sys.path.extend(place for place in self.path if place not in sys.path)
        return pickle.loads(self.content)
