"""Pre-train a language model with 2:4 sparse linear layers.

    deepspeed launch/pretrain.py --config configs/quickstart.yaml [--flags]
    python -m torch.distributed.run --nproc-per-node 2 launch/pretrain.py --config ...

`--help` lists every flag.
"""

import os
import sys

from megasparse.config import build_parser

if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        build_parser().print_help()
        sys.exit(0)
    from megasparse.train.main import main

    code = main()
    if code:
        # Other ranks may wait in a collective: leave without their goodbye.
        sys.stderr.flush()
        os._exit(code)
