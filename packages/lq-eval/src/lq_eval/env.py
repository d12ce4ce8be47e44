"""Every environment variable that lq-eval reads.

- ``LQ_GIT_COMMIT`` (text; default: what ``git`` says): the commit that records name, for a machine that has the files of a
  checkout but not its ``.git``: ``LQ_GIT_COMMIT=$(git rev-parse --short=12 HEAD)``. It is believed; append ``-dirty``
  yourself if files changed.
"""

import os


def git_commit() -> str | None:
    """Return the commit that ``LQ_GIT_COMMIT`` names, or None if it is not set."""
    return os.environ.get("LQ_GIT_COMMIT", "").strip() or None
