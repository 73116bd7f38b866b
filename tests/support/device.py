"""The device of the tests that are marked `gpu`: that of TIMM_NF_DEVICE, or CUDA.

With TIMM_NF_DEVICE=cpu a machine without one runs the same lines.
"""

import os

import torch

DEVICE = torch.device(os.environ.get("TIMM_NF_DEVICE", "cuda"))
ON_CPU = DEVICE.type == "cpu"
COMPILER = "aot_eager" if ON_CPU else "inductor"  # which needs a C++ compiler on a CPU
