"""What is needed next is made by threads while the GPU works on what is there.

By threads, not by processes: while they read sound, make features or copy frames, numpy and torch
hold no lock of Python's (of two cores two threads got 1.6 to 1.9 times the clips of one), nothing
has to be copied between processes, and an error is the one that it would be without threads. On a
CPU nothing is made ahead: its cores are busy with the model.
"""

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice

READERS = min(8, os.cpu_count() or 1)  # threads that read sound and make features of it


@contextmanager
def ahead(function, items, threads):
    """Yields an iterator of function(item), in the order of the items.

    `threads` of them make up to twice as many results before they are asked for; 0: each is made
    when it is asked for. An error comes when it is its item's turn.
    """
    if not threads:
        yield map(function, items)
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ahead")
    try:
        yield in_turn(pool, function, iter(items), 2 * threads)
    finally:
        pool.shutdown(cancel_futures=True)


def in_turn(pool, function, items, most):
    """The results, one after the other; at most so many are made or waiting."""
    waiting = deque(pool.submit(function, item) for item in islice(items, most))
    while waiting:
        result = waiting.popleft().result()
        for item in islice(items, 1):  # one more, if there is one
            waiting.append(pool.submit(function, item))
        yield result
