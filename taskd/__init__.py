"""
Run heavy work in a pool of processes, asked by one line of JSON.

What a task module needs is here: ``task`` registers a function, ``progress``
tells its caller how far it is. Callers use ``taskd.client``.
"""

from __future__ import annotations

from taskd.functions import progress, task

__all__ = ["__version__", "progress", "task"]

__version__ = "0.1.0"
