"""The transformers plug-in: `from_pretrained(model, quantization_config=PlanConfig(plan))`, and saved models.

`planner.hf.register` adds both classes to transformers' tables. May import: formats, sensitivity, planner.plan,
planner.codes, planner.hf.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.integrations.accelerate import get_device
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bitplan.formats.errors import BitplanError, CodesMissing, FileInvalid, FormatUnavailable, PlanMismatch
from bitplan.formats.kv.cache import use_kv_format
from bitplan.formats.modules import Packed, canonical, is_transposed, pack_parameter
from bitplan.formats.table import format_named
from bitplan.planner.codes import codes_folder, refuse_missing, unit_path, unquantized_path
from bitplan.planner.hf.checks import check_checkpoint, check_loaded, check_names
from bitplan.planner.hf.register import METHOD
from bitplan.planner.hf.streaming import RoundOnLoad, refuse_disk
from bitplan.planner.plan import Plan
from bitplan.sensitivity import source as sources
from bitplan.sensitivity.profile import read, validated
from bitplan.sensitivity.store import is_whole, load_tensors
from bitplan.sensitivity.weight_cache import from_file


def _answer_dtype(model: Any) -> None:
    """transformers takes a model's dtype from its first float parameter; if all are packed, the class provides it."""
    for module in model.modules():
        if hasattr(type(module), "save_pretrained"):
            facts = {"dtype": property(_slots_dtype), "__module__": type(module).__module__}
            module.__class__ = type(type(module).__name__, (type(module),), facts)


def _slots_dtype(model: Any) -> torch.dtype:
    slots = (slot for module in model.modules() if isinstance(module, Packed) for slot in module.slots.values())
    return next(slots).dtype


class PlanConfig(QuantizationConfigMixin):
    """A plan (a Plan, its dict, or the path of its file) as transformers' quantization_config."""

    def __init__(self, plan: Plan | dict | str | Path, **kwargs: Any):
        self.quant_method = METHOD  # type: ignore[assignment]
        if isinstance(plan, str | Path):
            plan = read(Path(plan), Plan)
        self.plan = (
            plan if isinstance(plan, Plan) else validated(plan, Plan, "the quantization_config holds no valid plan")
        )

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD, "plan": self.plan.model_dump(mode="json")}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PlanConfig) and self.plan == other.plan

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.plan.bytes:,} bytes, {self.plan.bits_per_weight:.2f} bits per weight)"


class SavedPlanConfig(PlanConfig):
    """The plan inside a saved checkpoint. A separate class, so that transformers refuses a PlanConfig for it."""

    def __init__(self, plan: Any = None, **kwargs: Any):
        if not isinstance(plan, Plan | dict):  # a stranger's config names no file of this machine
            raise FileInvalid(f"the quantization_config holds no valid plan, but {repr(plan)[:40]}")
        super().__init__(plan, **kwargs)


def refuse_unavailable(plan: Plan) -> None:
    """Raise FormatUnavailable if this machine cannot run one of the plan's formats."""
    for name in sorted({unit.format for unit in plan.units}):
        if reason := format_named(name).unavailable():
            count = sum(unit.format == name for unit in plan.units)
            raise FormatUnavailable(f"{name}, which {count} units of the plan have, cannot run here: {reason}")


def refuse_part(plan: Plan, model: Any) -> None:
    """Raises PlanMismatch for the base model of the plan's, which AutoModel builds: its modules have other names."""
    prefix = model.base_model_prefix
    inside = any(unit.name.startswith(f"{prefix}.") for unit in plan.units) if prefix else False
    if inside and not hasattr(model, prefix):
        raise PlanMismatch(
            f"the plan is for a causal LM, and {type(model).__name__} is a part of it: load it with"
            f" AutoModelForCausalLM.from_pretrained(…), whose .{prefix} that is"
        )


class PlanQuantizer(HfQuantizer):
    """Replaces modules before loading, rounds weights while loading (unless the checkpoint is packed), and checks the
    result."""

    requires_calibration = False

    def __init__(self, quantization_config: PlanConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.plan: Plan = quantization_config.plan
        self.packed = {name: unit for unit in self.plan.packed for name in unit.holders}
        self.changed: set[str] = set()
        """Unquantized tensors that differ from the checkpoint: rounding folded a scale into them, or distillation
        trained them."""
        self.device_map: Any = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """transformers calls it with the requested device map, and with the one that it infers for "auto"."""
        refuse_unavailable(self.plan)
        self.device_map = device_map
        refuse_disk(device_map, rounding=not self.pre_quantized)

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        planned: torch.dtype = getattr(torch, self.plan.provenance.model.dtype)
        if dtype not in (None, planned):
            warnings.warn(f"dtype={dtype} is not used: the plan's bytes are counted with {planned}", stacklevel=2)
        return planned

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            self._check_checkpoint(checkpoint_files)
        refuse_part(self.plan, model)
        for unit in self.plan.units:
            paths = [unit.parameter.rpartition(".")[0], *unit.tied]
            name = unit.parameter.rpartition(".")[2]
            try:
                modules = [model.get_submodule(path) for path in paths]
                parameters = [module._parameters[name] for module in modules]
            except (AttributeError, KeyError):
                raise PlanMismatch(f"the plan names {unit.name}, which {type(model).__name__} has not") from None
            for shape in (sorted(parameter.shape) if parameter is not None else [] for parameter in parameters):
                if len(shape) < 2 or shape != sorted((unit.experts, unit.rows, unit.columns)[-len(shape) :]):
                    raise PlanMismatch(
                        f"{unit.name} has the shape {shape}, and the plan's is {[unit.rows, unit.columns]}"
                    )
            if unit.is_native:
                continue
            format = format_named(unit.format)
            for module in modules:
                pack_parameter(module, name, format, placeholder=not self.pre_quantized)
                for suffix in format.specs(1, 1):  # for those on disk, which no loader sets and marks
                    module._parameters[name + suffix]._is_hf_initialized = True  # type: ignore[union-attr]
            for path in unit.tied:
                for suffix in format.specs(1, 1):
                    model.all_tied_weights_keys[f"{path}.{name}{suffix}"] = unit.parameter + suffix
        check_names(self.plan, model)
        if self.pre_quantized and checkpoint_files:
            check_checkpoint(self.plan, [Path(file) for file in checkpoint_files])

    def _check_checkpoint(self, files: list[str] | None) -> None:
        weights = [Path(file) for file in files or [] if str(file).endswith(".safetensors")]
        if not weights:
            raise PlanMismatch("a plan is applied to *.safetensors weights, and this model is loaded from none")
        facts = self.plan.provenance.model
        self.plan = self.plan.for_model(sources.check_model(facts, sources.of_files(weights, facts), "plan"))
        self.quantization_config.plan = self.plan  # type: ignore[attr-defined]  # what is saved with the model
        refuse_missing(self.plan)
        if self.plan.needs_text:
            folder = codes_folder(self.plan)
            self.changed = {
                kept.name for kept in self.plan.unquantized if is_whole(unquantized_path(folder, kept.name))
            }

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return not self.pre_quantized and (param_name in self.packed or param_name in self.changed)

    def update_weight_conversions(self, weight_conversions: list, *model: Any) -> list:  # 5.16 passes no model
        """Stack weights that the checkpoint stores separately (experts) on the CPU: it takes twice their size."""
        conversions: list = super().update_weight_conversions(weight_conversions, *model)
        for conversion in conversions:
            if hasattr(conversion, "force_cpu") and not self.pre_quantized:
                conversion.force_cpu = True
        return conversions

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """Bytes per element of a float placeholder, so that device maps are computed from packed sizes."""
        if self.pre_quantized or param_name not in self.packed:
            return param.element_size()
        unit = self.packed[param_name]
        shape, dtype = format_named(unit.format).specs(unit.experts * unit.rows, unit.columns)[""]
        return torch.Size(shape).numel() * dtype.itemsize / param.numel()

    def adjust_max_memory(self, max_memory: dict[str, Any]) -> dict[str, Any]:
        """Reserve memory on each device for the unit that is rounded there, in full precision."""
        units = [] if self.pre_quantized else self.plan.packed
        weights = max((unit.experts * unit.rows * unit.columns for unit in units), default=0)
        size = weights * getattr(torch, self.plan.provenance.model.dtype).itemsize
        return {device: most - (0 if device in ("cpu", "disk") else size) for device, most in max_memory.items()}

    def get_quantize_ops(self) -> RoundOnLoad:
        return RoundOnLoad(self._on_load)

    def _on_load(self, name: str, value: torch.Tensor, model: Any) -> dict[str, torch.Tensor]:
        """Convert a float weight of the checkpoint to its packed tensors, on their device."""
        device: Any = get_device(self.device_map, name, valid_torch_device=True)
        unit = self.packed.get(name)
        if name in self.changed:
            return {name: self._cached(unquantized_path, name)["tensor"].to(device, value.dtype)}
        if unit is None:
            return {name: value}
        if self.plan.needs_text:
            tensors = from_file(self._cached(unit_path, unit.name))
        else:
            weight = canonical(value, is_transposed(model.get_submodule(name.rpartition(".")[0])))
            tensors = format_named(unit.format).quantize_by_rows(weight, device)
        return {name + suffix: tensor.to(device) for suffix, tensor in tensors.items()}

    def _cached(self, path: Callable[[Path, str], Path], name: str) -> dict[str, torch.Tensor]:
        tensors = load_tensors(path(codes_folder(self.plan), name))
        if tensors is None:
            raise CodesMissing(f"{name}: its codes have gone from the cache; load again to make them")
        return tensors

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for unit in self.packed.values():
            path, _, name = unit.parameter.rpartition(".")
            if model.get_submodule(path)._parameters[name].is_floating_point():
                raise BitplanError(
                    f"{unit.name} was not packed: the checkpoint holds it in a form that is not supported"
                )
        if not any(parameter.is_floating_point() for parameter in model.parameters()):
            _answer_dtype(model)
        check_loaded(self.plan, model)
        # Saved under the model's own names: reversing a checkpoint's conversions would split packed tensors.
        model._weight_conversions = []
        use_kv_format(model, self.plan.workload.kv_format)
        if self.plan.workload.prefill_chunk:
            model.generation_config.prefill_chunk_size = self.plan.workload.prefill_chunk
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False
