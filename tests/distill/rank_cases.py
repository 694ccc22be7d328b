"""Runs of `distill` one after the other in the same processes: torchrun starts them once.

argv: a JSON list of argument lists. Every run sets up its parallelism anew.
"""

import json
import os
import sys

from accelerate.state import AcceleratorState

from distill.main import main

environment = dict(os.environ)
for arguments in json.loads(sys.argv[1]):
    AcceleratorState._reset_state(reset_partial_state=False)
    os.environ.clear()  # what one run's FSDP has written there, the next one's DDP would take for its own
    os.environ.update(environment)
    assert main(arguments) == 0
