"""The table of the networks that the command line and the model card print."""

from .variants import VARIANTS

COLUMNS = ("name", "parameters (M)", "GMACs", "train / test px", "weights")


def table_row(name: str) -> tuple[str, str, str, str, str]:
    """The cells of one network, in the order of `COLUMNS`. GMACs are counted at the training size."""
    variant = VARIANTS[name]
    parameters, macs = variant.cfg.count(variant.train_size)
    sizes = f"{variant.train_size} / {variant.test_size}"
    weights = "dm_in1k" if variant.hf_hub_id else "-"
    return name, f"{parameters / 1e6:.1f}", f"{macs / 1e9:.2f}", sizes, weights
