"""Work for a process on another machine, which shares the folder of this one and has the same packages."""

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
    """Any values, with the folder in which a command was given and where it looks for modules."""

    folder: str
    path: tuple[str, ...]
    content: bytes

    @classmethod
    def of(cls, *values: Any) -> Parcel:
        """These values, to be opened elsewhere."""
        return cls(os.getcwd(), tuple(sys.path), pickle.dumps(values))

    def open(self) -> Any:
        """The values; this process is in that folder from then on, and its own modules come before the command's.

        Raises:
            LaunchError: where there is no such folder.
        """
        try:
            os.chdir(self.folder)
        except OSError as error:
            raise LaunchError(
                f"{self.folder}: not to be reached from {socket.gethostname()} ({error.strerror}); give the command in "
                "a folder that every machine has under this path, such as one of a shared file system"
            ) from error
        sys.path.extend(place for place in self.path if place not in sys.path)
        return pickle.loads(self.content)
