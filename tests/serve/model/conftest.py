"""interpreted/ runs on a GPU, or in Triton's interpreter, which `test_reroute.py` starts a process for."""

import os

import torch

collect_ignore = [] if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
