"""A Python for the processes that tests start: it knows the small backbone and draws a quick gallery, as the tests themselves.

`small_python.py EXECUTABLE -m MODULE ...` and `... -c CODE ...` run like Python's. The process starts others by EXECUTABLE. The
fixture `small_processes` makes an executable of it.
"""

import runpy
import sys

import small_backbone

from advmoe.evaluation import snapshot

if __name__ == "__main__":
    small_backbone.register()
    snapshot.GALLERY_ATTACK = "pgd_10"
    sys.executable, option, program, *arguments = sys.argv[1:]
    sys.argv = [option, *arguments]
    if option == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        exec(program, {"__name__": "__main__"})
