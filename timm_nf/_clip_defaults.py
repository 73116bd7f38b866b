"""The paper's clip factor and eps. They are the defaults everywhere."""

CLIP_FACTOR = 0.01  # arXiv:2102.06171, A.1: for batch sizes of 1024 to 4096
CLIP_EPS = 1e-3  # arXiv:2102.06171, section 4: a lower bound on weight norms
