"""Model cards for a pushed network and for the zoo, by huggingface_hub's card classes.

`python -m scripts.model_card` writes the zoo's card to MODEL_CARD.md.

Examples:
    >>> require_license({"license": "apache-2.0"})  # raises ValueError without one
    >>> data = metadata({"license": "apache-2.0"}, name="net")
    >>> data.tags
    ['image-classification', 'timm', 'timm_nf']
    >>> facts = Facts("nfnet_f0", {}, "hf-hub:user/net", parameters=9, dtype="float32", sha256="", size=99, versions={})
    >>> "hf-hub:user/net" in network_card(data, "net", facts)
    True
    >>> zoo().splitlines()[0]
    '---'
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .._text import quoted
from .._variant_table import COLUMNS, table_row
from ..variants import VARIANTS

__all__ = ["Facts", "metadata", "network_card", "require_license", "zoo"]

_TASK = "image-classification"


@dataclass(frozen=True)
class Facts:
    """What is known of the files that a card belongs to.

    Attributes:
        architecture: The name in timm's registry.
        arguments: Arguments of `timm.create_model` that are not the default.
        source: What `timm.create_model` loads, for example `hf-hub:user/repo`.
        parameters: Number of parameters.
        dtype: Dtype of the weights.
        sha256: The sha256 of model.safetensors.
        size: The size of model.safetensors, in bytes.
        versions: The version of each package that wrote the files.
        base: The repository that the weights come from, `user/repo@commit`; None if they were not pulled.
        deviation: Relative error of stock timm's logits against ours; None unless stock timm loads the files.
        recipe: Settings of the training.
    """

    architecture: str
    arguments: Mapping[str, Any]
    source: str
    parameters: int
    dtype: str
    sha256: str
    size: int
    versions: Mapping[str, str]
    base: str | None = None
    deviation: float | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def needs_timm_nf(self) -> bool:
        """Whether timm has the network only after timm_nf was imported."""
        return self.deviation is None and self.architecture in VARIANTS


def require_license(card: ModelCardData | Mapping[str, Any] | None) -> None:
    """Refuse a card without a license. Only the owner of the weights knows it.

    Raises:
        ValueError: if there is none.
    """
    license: object = card.license if isinstance(card, ModelCardData) else (card or {}).get("license")
    if not isinstance(license, str) or not license.strip():
        raise ValueError(
            "a license is required and never guessed: say under which one the weights are given away, as the Hub "
            "spells it (apache-2.0, cc-by-nc-4.0, other, ...)"
        )


def metadata(card: ModelCardData | Mapping[str, Any] | None, name: str, base: str | None = None) -> ModelCardData:
    """The card's metadata: the given fields, and those that every network of timm has.

    Args:
        card: The user's fields. They are not changed. The license is required.
        name: The model's name, for its evaluation results.
        base: The repository that the weights come from, for cards that name no base model.

    Raises:
        ValueError: if there is no license, or the Hub does not take a field.
    """
    require_license(card)
    if isinstance(card, ModelCardData):
        data = copy.deepcopy(card)
    else:
        given: dict[str, Any] = dict(card or {})
        if given.get("eval_results"):
            given = {"model_name": name, **given}
        data = ModelCardData(**given)
    data.library_name = data.library_name or "timm"
    data.pipeline_tag = data.pipeline_tag or _TASK
    data.base_model = data.base_model or base
    tags = data.tags or []
    data.tags = tags + [tag for tag in (_TASK, "timm", "timm_nf") if tag not in tags]
    return data


def network_card(data: ModelCardData, title: str, facts: Facts) -> str:
    """The card of one saved network.

    Args:
        data: The metadata, from `metadata`.
        title: The heading.
        facts: What is known of the files.
    """
    sections = {"": _about(facts), "Use": _use(facts)}
    if facts.deviation is not None:
        sections["In stock timm"] = (
            f"The weights are of a timm_nf network, saved for timm's own `{facts.architecture}`, which computes a "
            f"slightly different function. Its logits deviate by {facts.deviation:.1e} (norm of the difference over "
            "norm, one image of noise, measured when these files were written)."
        )
    if data.eval_results:
        sections["Results"] = _table(
            ("dataset", "split", "metric", "value"),
            [
                (r.dataset_name, r.dataset_split, r.metric_name or r.metric_type, r.metric_value)
                for r in data.eval_results
            ],
        )
    if facts.recipe:
        sections["Recipe"] = _table(("setting", "value"), [(f"`{k}`", f"`{v}`") for k, v in facts.recipe.items()])
    sections["Files"] = _files(facts)
    return _render(data, title, sections)


def _about(facts: Facts) -> str:
    library = "timm_nf" if facts.needs_timm_nf else "timm"
    arguments = ", ".join(f"{key}={value!r}" for key, value in facts.arguments.items())
    built = f" with `{arguments}`" if arguments else ""
    about = [f"`{facts.architecture}` of {library}{built}, {facts.parameters:,} parameters in {facts.dtype}."]
    if facts.base:
        about.append(f"Derived from `{facts.base}`.")
    if facts.needs_timm_nf:
        about.append(
            "The network is a normalizer-free network equal to the authors' code; timm has another one of its own, so "
            "`import timm_nf` comes first."
        )
    return " ".join(about)


def _files(facts: Facts) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in facts.versions.items())
    equal = " with equal logits" if facts.deviation is None else ""
    return (
        f"`model.safetensors`: {facts.size:,} bytes, sha256 `{facts.sha256}`.\n\nWritten with {versions}; "
        f"read back and compared tensor by tensor, and loaded as a network{equal}, before it was published."
    )


def _use(facts: Facts) -> str:
    registers = "import timm_nf  # registers the network\n" if facts.needs_timm_nf else ""
    checked = ""
    if facts.source.startswith("hf-hub:"):
        repo = facts.source.removeprefix("hf-hub:")
        checked = f"\n\n`timm_nf.hub.pull({repo!r})` also compares the download with the Hub's sha256."
    return f"""```python
import timm
import torch
{registers}from PIL import Image

model = timm.create_model({quoted(facts.source)}, pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.inference_mode():
    logits = model(transform(Image.open("picture.png").convert("RGB"))[None])
```{checked}"""


def _render(data: ModelCardData, title: str, sections: Mapping[str, str]) -> str:
    """The text of a card. The Hub's client reads its metadata back, and so checks it.

    Args:
        data: The metadata.
        title: The heading.
        sections: Markdown by heading. An empty heading is left out.
    """
    parts = [f"---\n{data}\n---", f"# {title}"]
    for heading, text in sections.items():
        if heading:
            parts.append(f"## {heading}")
        parts.append(text.strip())
    return str(ModelCard("\n\n".join(parts) + "\n"))


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: object) -> str:
    """A value as the text of a cell. A bar or a line break would end the cell."""
    if value is None:
        return ""
    return " ".join(str(value).split()).replace("|", "\\|")


def zoo() -> str:
    """The text of MODEL_CARD.md, the card of all networks of the package."""
    data = metadata({"license": "apache-2.0", "tags": ["nfnet", "normalizer-free"]}, "timm_nf")
    f4_plus, _ = VARIANTS["nfnet_f4_plus"].cfg.count(VARIANTS["nfnet_f4_plus"].train_size)
    with_weights = [name for name, row in VARIANTS.items() if row.hf_hub_id]
    numbers = {
        "{variants}": str(len(VARIANTS)),
        "{f4_plus}": f"{f4_plus / 1e6:.2f} M",
        "{first_repo}": str(VARIANTS[with_weights[0]].hf_hub_id),
        "{last_repo}": str(VARIANTS[with_weights[-1]].hf_hub_id),
        "{last}": with_weights[-1].removeprefix("nfnet_").upper(),
        "{networks}": _table(COLUMNS, [table_row(name) for name in VARIANTS]),
    }
    sections: dict[str, str] = {}
    for heading, text in _ZOO.items():
        for name, number in numbers.items():
            text = text.replace(name, number)
        sections[heading] = text
    return _render(data, "Model card: the timm_nf zoo", sections)


_ZOO = {
    "": """
Image classifiers without normalisation layers, in PyTorch, as timm models. {variants} variants in three families, each
equal to the authors' JAX code: same parameters, same function.
""",
    "Variants and weights": """
{networks}

GMACs are 10^9 multiply-adds, at the training size. `timm-nf list` computes and prints these numbers.

| family | names | architecture from | weights |
| --- | --- | --- | --- |
| NFNet | `nfnet_f0` to `f7`, `nfnet_f0_plus` to `f7_plus` | arXiv:2102.06171, `nfnets/nfnet.py` | F0 to {last} |
| NF-ResNet | `dm_nf_resnet50`, `101`, `152`, `200`, `288`, `600` | arXiv:2101.08692, `nfnets/nf_resnet.py` | none |
| NF-RegNet | `dm_nf_regnet_b0` to `b8` | arXiv:2101.08692, `nfnets/nf_regnet.py` | none |

The code is google-deepmind/deepmind-research at f5de0ede. Where code and paper differ, the networks follow the code,
because the weights came from it: squeeze-excite has a relu where the paper writes gelu, and F4+ has {f4_plus}
parameters where table 5 of arXiv:2102.06171 has 527 M.

`dm_in1k` are the authors' ImageNet-1k weights in timm's conversion. `pretrained=True` fetches them from the Hub
repositories `{first_repo}` to `{last_repo}`. The package contains no weights.

| | F0 | F1 | F2 | F3 | F4 | F5 | F6 |
| --- | --- | --- | --- | --- | --- | --- | --- |
| top-1 % in the paper (with SAM: F5 86.3, F6 86.5) | 83.6 | 84.7 | 85.1 | 85.7 | 85.9 | 86.0 | - |
| top-1 % of these files in timm's network, by timm | 83.47 | 84.70 | 85.18 | 85.68 | 85.84 | 86.10 | 86.36 |

Both rows are quoted (arXiv:2102.06171, table 3; timm's results for `dm_in1k`), not measured here.
""",
    "Preprocessing": """
RGB, ImageNet's mean and standard deviation, bicubic. For these weights timm resizes height and width to
size / crop_pct each, whatever the aspect ratio, and crops the centre. `timm.data.resolve_model_data_config(model)`
returns these settings. With `use_test_size=True` it returns the larger test size, at which the accuracies above were
measured.
""",
    "Intended use": """
Classification of photographs into ImageNet's classes, features for other vision tasks, fine-tuning, and research on
training without normalisation. The output for one example does not depend on the other examples of its batch. Training
and evaluation mode compute the same function when dropout and stochastic depth are off.

Not intended for decisions about people. The ImageNet weights inherit that data set's labels and biases.
""",
    "Limits": """
- Training NFNets at large batch sizes needs adaptive gradient clipping; `--opt agcsgd` has the paper's policy.
- At an output stride of 8 or 16, convolutions are dilated instead of strided. The authors have no such networks: the
  weights load, but the function is an approximation.
- With one input channel (grey images) or a multiple of three, converted pretrained weights keep their function. With
  any other number, standardisation removes the mean of the converted weights, and the function changes.
""",
    "How equality was established": """
The authors' code was run in float64 on synthetic parameters. Its numbers are stored in `tests/golden`, whose README
says how they were made: logits, pooled features and signal statistics of all three families, gradients and three
optimizer steps of NFNets and NF-ResNets. `python -m pytest tests -k golden` compares our networks with them. `timm-nf
verify` compares with a part of them on your device, in the dtypes that it has. Tests also compare the names and numbers
of parameters of all {variants} variants with those that the authors' code creates.
""",
    "What could not be verified where this was developed": """
There was no connection to the Hub and no accelerator.

- The `dm_in1k` files were never downloaded. They were made for timm's `dm_nfnet_f*`, and the state dicts of those
  networks load here. `timm-nf verify --pretrained` compares both networks on the real weights, and `--imagenet-val DIR`
  their accuracies.
- Nothing was run on a GPU. `timm-nf verify --device cuda` does that. No speed on accelerators is claimed anywhere.
- No network was trained on ImageNet here.
""",
    "Licence": """
This code and the authors' code are Apache-2.0. timm declares the converted weights as Apache-2.0 too (`license` in
their config).
""",
}
