"""One run at a time per output folder: a lock that the system lets go of when its process ends, however it ends."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import BinaryIO

from ..pictures import PictureError

log = logging.getLogger(__name__)

HELD = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}
FAR = 2**40  # Windows locks bytes, which nobody else can read then: one behind any end


def hold(file: BinaryIO, folder: Path) -> None:
    """Lock an open file until it is closed or this process ends; raises PictureError where another run has it.

    Where the file system knows no locks, a warning says so.
    """
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(FAR)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            raise PictureError(
                f"another run is writing into {folder}; wait until it has ended, or choose another folder"
            ) from error
        log.warning("%s cannot be locked (%s); start no second run into it", folder, error.strerror)
