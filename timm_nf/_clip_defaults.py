"""The paper's clip settings, which functions, optimizers, recipes and checks have in common."""

CLIP_FACTOR = 0.01  # arXiv:2102.06171, A.1: at batches of 1024 to 4096
CLIP_EPS = 1e-3  # arXiv:2102.06171, section 4: weight norms below it count as it
