"""One measurement in a process of its own: `python benchmarks/arms.py '{"arm": "adapt", ...}'` prints one JSON object.

arm is a function of ours.py or peers.py, and takes what it names of all else. It tells when its steps ended (`ends`), and what it knows of precision, tokens, accuracy or vectors.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import sys

from given import memory_mb

MODULES = {
    "adapt": "ours",
    "profile": "ours",
    "apply_to_pictures": "ours",
    "apply_to_random_bert": "ours",
    "apply_to_random_net": "ours",
    "encode": "ours",
    "trainer": "peers",
    "trainer_on_pictures": "peers",
    "trainer_on_random_net": "peers",
    "sentence_transformers": "peers",
    "openvino": "peers",
}


def main() -> None:
    given = json.loads(sys.argv[1])
    name = given.pop("arm")
    with contextlib.redirect_stdout(sys.stderr):
        arm = getattr(importlib.import_module(MODULES[name]), name)
        found = arm(**{key: given[key] for key in inspect.signature(arm).parameters if key in given})
    print(json.dumps({"peak_mb": memory_mb("VmHWM"), **found}))


if __name__ == "__main__":
    main()
