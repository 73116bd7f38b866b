"""A pytest plugin that runs timm's test_models.py and test_optim.py on our names.

Models: where a test is parametrised over timm's registry, our names are kept and the others dropped; where it names
other models although the claim holds for any model, ours take their place (OURS_INSTEAD). Optimizers: tests keep
saying `sgd`, so that timm's tables of exceptions apply as they are, and what they create is `agcsgd`.

Nothing drops out quietly: a test function that is neither run on one of our names nor in EXCLUDED, an entry of a
table here that fits no test function, a skip for a reason not in ALLOWED_SKIPS, and an optimizer test that created none
of our optimizers are all errors.
"""

import fnmatch
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Generator
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.optim._optim_factory import list_optimizers

import timm_nf  # noqa: F401  (registers our models and optimizers)

# Test functions that name other models, and make a claim about every model. The value: their further arguments.
OURS_INSTEAD: dict[str, tuple[Any, ...]] = {
    # timm selects these by module: from a list that has `nfnet`, and not our `nfnets`.
    "test_model_forward_intermediates": (),
    "test_model_forward_intermediates_features": (),
    "test_prune_intermediate_layers_contract": (),
    # These name a few models each.
    "test_feature_getter_stage_ends_torchscript": (),
    "test_features_only_feature_cls_class": (),
    "test_features_only_grad_checkpointing_backward": (),
    "test_forward_intermediates_stop_early_final_norm": ({},),
    "test_head_hidden_size": ({},),
    "test_model_features_output_stride": (),
    "test_model_forward_torchscript_with_features_fx": (),
    "test_prune_intermediate_layers_last_feature": (True,),
    "test_prune_intermediate_layers_params_used": (),
    "test_prune_to_stem_feature": (),
    "test_reset_classifier_keeps_pool": (),
    "test_resnetv2_stem_feature_odd_size": ({},),
    "test_model_init_weights_after_to_empty": ({},),
}
# On the meta device, where even the largest variants fit: run on all of them with --every-config.
ON_META = "test_model_default_cfgs"

_NETWORK = "downloads weights"
_OTHER = "about another architecture"
_CLASS = "constructs a stock optimizer class directly"
_CUDA = "needs CUDA"
# Patterns of test functions that do not apply, and why.
EXCLUDED: dict[str, dict[str, str]] = {
    "test_models": {
        "test_pruned_features_torchscript": "passes img_size, which convolutional networks do not take",
        "test_model_inference": _NETWORK,
        "test_model_load_pretrained": _NETWORK,
        "test_model_features_pretrained": _NETWORK,
        "test_model_default_cfgs_non_std": "transformers and hybrids; ours take test_model_default_cfgs",
        "test_catavgmax_unsupported": "claims that a pooling is refused; ours support it",
        "test_forward_after_prune_intermediate_layers": "claims that nothing follows the last stage",
        "test_headless_checkpoint_reload": "tests the checkpoint_filter_fn of other architectures",
        "test_feature_hook_net_grad_checkpointing_order": "feature hooks on Xception; ours are read by wrapped lists",
        "test_model_features_space2depth_reduction": _OTHER,
        "test_nfnet_stem_feature_consistency": "names timm's own test_nfnet",
        **dict.fromkeys(
            [
                "test_*efficientnet*", "test_*efficientvim*", "test_*gemma4*", "test_*inception*", "test_*mobilenetv5*",
                "test_*naflexvit*", "test_*vit_*", "test_attention_bias_cache*", "test_eval_*attention*",
                "test_eva_*", "test_gcvit_*", "test_mobile_model_*", "test_prune_class_token*",
                "test_prune_extra_blocks*", "test_radio_*", "test_relpos_*", "test_resnet_pruned*", "test_swin_*",
            ],
            _OTHER,
        ),
    },
    "test_optim": {
        "test_optimizer_grad_unchanged": "p.grad holds the clipped gradient after a step, as after clip_grad_norm_",
        "test_complex_param_matches_real_view": "complex gradients are refused",
        "test_capturable_*": _CUDA,
        "test_*_cuda_graph": _CUDA,
        "test_param_groups_*": "timm's own grouping functions, without one of our optimizers",
        **dict.fromkeys(
            [
                "test_adafactor_*", "test_adahessian_*", "test_adamuon_*", "test_compiled_*", "test_kron_*",
                "test_laprop_*", "test_lookahead_load_*", "test_mars_*", "test_muon_*", "test_novograd_*",
            ],
            _CLASS,
        ),
    },
}  # fmt: skip
ALLOWED_SKIPS = {
    "no timm foreach impl": "timm tests only its own multi-tensor code",
    "capturable requires CUDA": _CUDA,
    # timm's table of optimizers that by design lack a property (_PROPERTY_EXCEPTIONS)
    "global grad norm clipping spans all param groups": "timm's exception",
    "the preconditioner update / balance RNG is shared across params": "timm's exception",
    "torch.optim.Adagrad < 2.12 inits state in __init__*": "timm's exception",
    "lr is folded into the*": "timm's exception",
    "momentum accumulates lr scaled updates*": "timm's exception",
    "torch.optim.NAdam keeps mu_product in fp32*": "timm's exception",
}
# Tests whose numbers presuppose that the gradient arrives as it is. They run with an infinite clip factor, under which
# our class, its step and its pickling stay in place.
UNCLIPPED = {
    "test_optimizer_convergence?*": "learning rates made for Rosenbrock gradients 200 times the weights",
    "test_adam_clipping_threshold?*": "measures Adam's own damping of a spike, which would be clipped before",
    "test_optimizer_tensor_lr?agcmuon?": "last bits of weights reach clipped gradients; Muon rounds to bfloat16",
}
_NAME_ARGUMENTS = {"model_name", "optimizer", "optimizer_name", "config"}
_adapted: dict[str, list[str]] = {}  # module: its excluded test functions
_agc_used: list[str] = []  # what the running test asked for
_clip: dict[str, float] = {}  # and with which clip settings


def _matches(name: str, patterns: Any) -> str | None:
    return next((pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)), None)


# -- models ------------------------------------------------------------------------------------------------------------


def _our_models(function: str, config: pytest.Config) -> list[str]:
    if function == ON_META and config.getoption("--every-config"):
        return timm.list_models(module="nfnets")
    chosen = str(config.getoption("--our-models")).split(",")
    foreign = [name for name in chosen if timm.models.model_entrypoint(name).__module__ != "timm_nf.models.nfnets"]
    if foreign:
        raise pytest.UsageError(f"--our-models: expected models of timm_nf.nfnets, got {foreign}")
    return chosen


def _model_values(function: str, values: list[Any], ours: list[str]) -> list[Any]:
    if function in OURS_INSTEAD:
        further = OURS_INSTEAD[function]
        return [(name, *further) if further else name for name in ours]
    return [value for value in values if isinstance(value, str) and value.split(".")[0] in ours]  # name.tag


# -- optimizers --------------------------------------------------------------------------------------------------------


def _agc(name: str) -> str:
    return re.sub(r"^(lookahead_)?", r"\1agc", name, count=1)


def _route(module: ModuleType) -> None:
    """Lets the module's lookups of `sgd` find `agcsgd`, after its tables were computed for the bare names."""

    create = module.create_optimizer_v2

    def routed(lookup: Callable[..., Any], position: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if "opt" in kwargs:
                kwargs["opt"] = name = _agc(kwargs["opt"])
            else:
                name = _agc(args[position])
                args = (*args[:position], name, *args[position + 1 :])
            _agc_used.append(name)
            return lookup(*args, **kwargs, **(_clip if lookup is create else {}))

        return call

    for function, position in {"create_optimizer_v2": 1, "get_optimizer_class": 0, "get_optimizer_info": 0}.items():
        setattr(module, function, routed(getattr(module, function), position))


def _optimizer_values(values: list[Any]) -> list[Any]:
    """The bare names (alone or first in a tuple), each of which must have its agc form."""
    ours = set(list_optimizers())
    bare = [value for value in values if not (value if isinstance(value, str) else value[0]).startswith("agc")]
    names = {(value if isinstance(value, str) else value[0]).removeprefix("lookahead_") for value in bare}
    missing = sorted(name for name in names if f"agc{name}" not in ours)
    if missing:
        raise pytest.Collector.CollectError(f"expected an agc form of every optimizer timm tests, none of: {missing}")
    return bare


# -- collection --------------------------------------------------------------------------------------------------------


def _adapt(function: FunctionType, suite: str, config: pytest.Config) -> bool:
    """Puts our names into the function's parametrize marks; whether one of them is there to be tested."""
    marks: list[pytest.Mark] = getattr(function, "pytestmark", [])
    ours = suite == "test_optim"  # tests without a name argument are checked when they run
    for i, mark in enumerate(marks):
        if mark.name != "parametrize" or mark.args[0].replace(",", " ").split()[0] not in _NAME_ARGUMENTS:
            continue
        ids = None
        if suite == "test_models":
            values = _model_values(function.__name__, list(mark.args[1]), _our_models(function.__name__, config))
        else:
            values = _optimizer_values(list(mark.args[1]))
            ids = [_agc((mark.kwargs.get("ids") or str)(value)) for value in values]
        ours = bool(values)
        marks[i] = pytest.mark.parametrize(mark.args[0], values, ids=ids).mark
    return ours


def _prepare(module: ModuleType, suite: str, config: pytest.Config) -> None:
    functions = {
        name: f for name, f in vars(module).items() if name.startswith("test_") and isinstance(f, FunctionType)
    }
    excluded = EXCLUDED[suite]
    _adapted[suite] = [name for name in functions if _matches(name, excluded)]
    if suite == "test_optim":
        _route(module)
    lost = [name for name, f in functions.items() if name not in _adapted[suite] and not _adapt(f, suite, config)]
    stale = [pattern for pattern in excluded if not fnmatch.filter(functions, pattern)]
    if suite == "test_models":
        stale += [name for name in [*OURS_INSTEAD, ON_META] if name not in functions]
    if lost or stale:
        raise pytest.Collector.CollectError(
            f"timm {timm.__version__}, {suite}: every test function must run on one of our names or be excluded.\n"
            f"Collected none of our names (add to OURS_INSTEAD or EXCLUDED): {lost}\n"
            f"Fit no test function any more (remove): {stale}"
        )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--our-models", required=True, help="comma-separated names of the models to test")
    parser.addoption("--every-config", action="store_true", help=f"{ON_META} on all our models")


def pytest_pycollect_makeitem(collector: Any, name: str, obj: object) -> list[pytest.Item] | None:
    module = collector.getparent(pytest.Module).obj
    suite = module.__name__.rpartition(".")[2]
    if suite not in _adapted:
        _prepare(module, suite, collector.config)
    return [] if name in _adapted[suite] else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:  # timm's limits of 120 s to 360 s are reached beside other work, which slows a test down tenfold
        item.add_marker(pytest.mark.timeout(1800), append=False)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test draws without a seed does not depend on those that this process ran before, which is luck."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    _agc_used.clear()
    _clip.clear()
    if _matches(item.name, UNCLIPPED):
        _clip["clip_factor"] = math.inf
    result = yield
    if "test_optim.py" in item.nodeid and not _agc_used:
        pytest.fail("this test used none of our optimizers; add it to EXCLUDED with a reason")
    return result


# -- results -----------------------------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not _matches(reason, ALLOWED_SKIPS):
            report.outcome = "failed"
            report.longrepr = f"skipped for a reason that is not in ALLOWED_SKIPS: {reason}"
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints what passed, what was skipped and what was left out, with every reason."""
    stats: dict[str, list[Any]] = terminalreporter.stats
    outcomes = ("passed", "failed", "error", "skipped")
    suites = sorted({report.nodeid.split("::")[0] for key in outcomes for report in stats.get(key, [])})
    terminalreporter.section(f"conformance with timm {timm.__version__}'s tests")
    for suite in suites:
        counts = {k: sum(report.nodeid.startswith(suite) for report in stats.get(k, [])) for k in outcomes}
        terminalreporter.line(f"{suite}: " + ", ".join(f"{count} {key}" for key, count in counts.items()))
    skips = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in stats.get("skipped", []))
    for reason, count in sorted(skips.items()):
        terminalreporter.line(f"  skipped {count:4}  {reason}")
    for pattern, reason in UNCLIPPED.items() if "tests/test_optim.py" in suites else []:
        terminalreporter.line(f"  clip factor inf  {pattern}: {reason}")
    for suite in suites:
        functions = re.findall(r"def (test_\w+)", (terminalreporter.config.rootpath / suite).read_text())
        for pattern, reason in EXCLUDED[suite.rpartition("/")[2].removesuffix(".py")].items():
            count = len(fnmatch.filter(functions, pattern))
            terminalreporter.line(f"  excluded {count:3} function{'s'[: count != 1]}  {pattern}: {reason}")
