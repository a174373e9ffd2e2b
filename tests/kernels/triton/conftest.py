"""The numerics run where the kernels can: on a GPU, or in Triton's interpreter, which the environment must ask for
before triton is first imported and which must not reach other tests: `test_numerics.py` starts a process for them."""

import os

import torch

collect_ignore = [] if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1" else ["numerics"]
