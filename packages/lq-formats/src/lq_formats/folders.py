"""Whether files can be written somewhere: asked before long work, not after it."""

import os
from pathlib import Path


def why_not_place(file: Path) -> str:
    """Return why a file that was written beside it cannot take this name, or an empty text; as :func:`why_not_write`."""
    try:
        return "it is a folder" if file.is_dir() else why_not_write(file.parent)
    except OSError as error:
        return error.strerror or str(error)


def why_not_write(folder: Path) -> str:
    """Return why no files can be made in a folder, or an empty text. Nothing is created.

    That it is missing is no reason, nor are folders above it: the first one that is there decides.
    """
    try:
        place = next(each for each in (folder, *folder.absolute().parents) if each.exists() or each.is_symlink())
        if not place.is_dir():
            return f"{str(place)!r} is no folder"
        return "" if os.access(place, os.W_OK | os.X_OK) else f"the folder {str(place)!r} may not be written"
    except OSError as error:  # a name that is too long, or a folder that cannot be searched
        return error.strerror or str(error)
