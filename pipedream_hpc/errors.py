"""The exception for errors that the user can correct."""

from __future__ import annotations


class PipedreamError(Exception):
    """Invalid input or a failed run, described in one sentence: what is wrong, where, and how to fix it.

    The command line prints only the text, without a traceback, and exits with status 2.
    """
