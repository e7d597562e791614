"""A Dask cluster as an executor, for whoever has one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Executor

from medssl._compat.quiet import silence_libraries
from medssl.errors import RequestError


@contextlib.contextmanager
def executor_of(address: str | None) -> Iterator[Executor | None]:
    """Give an executor over the workers of a running Dask scheduler; None for no address.

    Raises:
        RequestError: The extra is missing, or nothing answers at the address.
    """
    if address is None:
        yield None
        return
    try:
        from distributed import Client
    except ImportError as err:
        raise RequestError('dask: the package distributed is missing; install it with `pip install "medssl[cluster]"`') from err
    try:
        client = Client(address, timeout="10s", set_as_default=False)
    except (OSError, ValueError) as err:
        raise RequestError(
            f"dask: no scheduler answers at {address} ({type(err).__name__}); start one, or correct the address"
        ) from err
    with client, client.get_executor() as executor:
        client.register_worker_callbacks(silence_libraries)  # workers that join later too
        yield executor
