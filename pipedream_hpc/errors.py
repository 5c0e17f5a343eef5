"""Errors a person can act on."""

from __future__ import annotations


class PipedreamError(Exception):
    """Bad input or a broken run, told in one sentence: what, where, and how to mend it.

    The command line prints the text alone, without a traceback, and exits with status 2.
    """
