"""Clients of Dask clusters, which only those who have one know of."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from natgrad_array import _arrays


def check_client(client: Any) -> None:
    """Refuse what is no client of a running cluster.

    Raises
    ------
    TypeError, ValueError
        If it is not a client, or one for asynchronous code.
    ConnectionError
        If it has no cluster.
    """
    distributed = sys.modules.get("distributed")
    if distributed is None or not isinstance(client, distributed.Client):
        raise TypeError(f"client must be a dask.distributed.Client, got {_arrays.describe(client)}")
    if client.asynchronous:
        raise ValueError("client must not be asynchronous: what it is asked for is waited for")
    if client.status != "running":
        raise ConnectionError(f"client must be connected to a running cluster, its status is {client.status!r}")


def submit(client: Any, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Have a worker call a function, a task of its own each time.

    Arguments stay with the scheduler until it is done: a worker that dies takes nothing
    along that cannot be made again, as data that were scattered would.
    """
    with sys.modules["dask"].config.set({"distributed.admin.large-graph-warning-threshold": "1TB"}):
        return client.submit(function, *arguments, pure=False, **options)


def keep(client: Any, value: Any, **options: Any) -> Any:
    """Send a value that several tasks need."""
    return submit(client, _same, value, **options)


def _same(value: Any) -> Any:
    return value
