"""Every exception raised on purpose. Rejects are values, not exceptions (see ``rejects.py``).

    StreamScorerError
    ├── ConfigurationError   settings, schema or topics are wrong: fix and start again (exit status 78)
    ├── FatalError           the process must stop: nothing was committed that was not published (exit status 1)
    │   └── CommitRefused    all work is done, but the group did not take the last offsets: some of it is done again
    └── RecoverableError     try again, or degrade; the loop goes on
        └── ModelRefused     a model version failed its checks and is not served; ``reason`` is a metric label

Each message is one line that says what is wrong and what to do about it.
"""

from __future__ import annotations


class StreamScorerError(Exception):
    """The root of the tree."""


class ConfigurationError(StreamScorerError):
    """Something the operator wrote or prepared is wrong."""


class FatalError(StreamScorerError):
    """The process cannot keep its promises and must stop."""


class CommitRefused(FatalError):
    """The group did not take the last offsets."""


class RecoverableError(StreamScorerError):
    """The operation failed, the process need not."""


class ModelRefused(RecoverableError):
    """A model version must not be served."""

    def __init__(self, version: int, reason: str, detail: str) -> None:
        """``reason`` is one of corrupt | schema | shape | nonfinite | probe | missing; ``detail`` is for the log."""
        super().__init__(f"model version {version} refused ({reason}): {detail}")
        self.version = version
        self.reason = reason
        self.detail = detail
