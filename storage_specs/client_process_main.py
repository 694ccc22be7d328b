"""The other end of `client_process`:  python -m storage_specs.client_process_main URL

Opens the objects under the URL, and answers calls on stdin until it ends.
"""

import os
import pickle
import sys
from collections.abc import Iterator
from typing import IO

from storage_specs.client_process import send
from storage_specs.object_roots import open_objects


def _serve(url: str, calls: IO[bytes], answers: IO[bytes]) -> None:
    objects = open_objects(url)
    while True:
        try:
            method, arguments = pickle.load(calls)
        except EOFError:
            return
        try:
            answer = getattr(objects, method)(*arguments)
            reply = True, list(answer) if isinstance(answer, Iterator) else answer
        except Exception as error:
            reply = False, error
        send(answers, reply)


if __name__ == "__main__":
    pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever is printed goes elsewhere
    _serve(sys.argv[1], sys.stdin.buffer, pipe)
