"""What an `adapter_config.json` of PEFT says, where it describes LoRA that HookLens implements."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hooklens.arguments import show
from hooklens.errors import UnsupportedModelError
from hooklens.weights.lora import lora_scale

# What of LoRA's kinds changes the network in another way than by adding to weights, or is not read from files.
_NOT_IMPLEMENTED: Mapping[str, str] = {
    "megatron_config": "maps of Megatron",
    "trainable_token_indices": "single trained tokens",
    "alora_invocation_tokens": "activated LoRA, which starts to act at certain tokens",
    "layer_replication": "repeated layers",
    "use_qalora": "QALoRA, which pools inputs",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow, which routes between adapters",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
}
# What says how an adapter was trained, or where: it changes no number of the adapter that is read.
_INERT = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config",
        "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
        "layers_to_transform", "lora_bias", "lora_dropout", "lora_ga_config", "loftq_config", "megatron_core",
        "modules_to_save", "modules_to_tie", "peft_type", "qalora_group_size", "r", "revision", "runtime_config",
        "target_modules", "target_modules_to_tie", "task_type",
    }
)  # fmt: skip
_READ = frozenset(
    {"alpha_pattern", "lora_alpha", "peft_version", "rank_pattern", "target_parameters", "use_dora", "use_rslora"}
)
# Ways to draw the first values that leave the base's weights alone. Others move a part of them into the adapter.
_INITS = (True, False, "gaussian", "eva", "orthogonal")
_MERGE = "Merge it with peft, PeftModel.from_pretrained(base, adapter).merge_and_unload(), and load what that saves"


@dataclass(frozen=True)
class LoraSettings:
    """The settings of one LoRA adapter.

    Attributes:
        base: name or path of the model that it was made for; None: not told.
        base_revision: which revision of that on the hub.
        rank, alpha: of all maps that the patterns do not name.
        rank_pattern, alpha_pattern: by pattern of names of modules.
        rslora: the scale is `alpha / sqrt(rank)`.
        dora: each row's length is a parameter of its own.
        target_parameters: endings of names of parameters that are changed by themselves, without their module being a
            linear map (experts).
        turns_experts: PEFT took each tensor of experts to hold their maps as `[in, out]`, whatever transformers says of
            it: versions before 0.19 do. Those before 0.18 do not write which they are.
    """

    base: str | None
    base_revision: str | None
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    dora: bool
    target_parameters: tuple[str, ...]
    turns_experts: bool

    def rank_of(self, module: str) -> int:
        """The rank of a module's change.

        Args:
            module: name of the module, or of the parameter, in the model that was trained.
        """
        return self.rank_pattern.get(_find_pattern(self.rank_pattern, module), self.rank)

    def scale_of(self, module: str) -> float:
        """What a module's product of matrices is multiplied by."""
        alpha = self.alpha_pattern.get(_find_pattern(self.alpha_pattern, module), self.alpha)
        return lora_scale(alpha, self.rank_of(module), rslora=self.rslora)

    def targets(self, parameter: str) -> bool:
        """Whether a parameter is changed by itself."""
        return any(parameter == one or parameter.endswith(f".{one}") for one in self.target_parameters)


def _find_pattern(patterns: Mapping[str, Any], module: str) -> str:
    """The first pattern that names a module, as PEFT matches them: all of the name, or its last segments."""
    return next((one for one in patterns if re.match(rf"(.*\.)?({one})$", module)), module)


def read_settings(config: Mapping[str, Any], *, where: str) -> LoraSettings:
    """The settings in an `adapter_config.json`.

    Args:
        config: its contents.
        where: what to call the adapter in texts of errors.

    Raises:
        UnsupportedModelError: it is no LoRA adapter, or one of a kind that is not implemented; all that stands against
            it is listed.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedModelError(
            f"{where}: is a PEFT adapter of type {show(kind)}; of PEFT's types LORA is implemented. {_MERGE}"
        )
    problems = [f"{key}: {what}" for key, what in _NOT_IMPLEMENTED.items() if config.get(key)]
    init = config.get("init_lora_weights", True)
    if not any(type(init) is type(known) and init == known for known in _INITS):
        problems.append(f"init_lora_weights={show(init)}: it moved a part of the base's weights into the adapter")
    known = _INERT | _READ | _NOT_IMPLEMENTED.keys()
    problems += [f"{key}={show(value)}: unknown" for key, value in config.items() if key not in known and value]
    wrong = _find_misshapen(config)
    if problems or wrong:
        raise UnsupportedModelError(
            f"{where}: adapter_config.json holds what is not implemented: {'; '.join([*problems, *wrong])}. {_MERGE}"
        )
    return LoraSettings(
        base=config.get("base_model_name_or_path") or None,
        base_revision=config.get("revision") or None,
        rank=config.get("r", 8),
        alpha=config.get("lora_alpha", 8),
        rank_pattern=dict(config.get("rank_pattern") or {}),
        alpha_pattern=dict(config.get("alpha_pattern") or {}),
        rslora=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
        target_parameters=tuple(config.get("target_parameters") or ()),
        turns_experts=_version(config.get("peft_version") or "0") < (0, 19),
    )


def _find_misshapen(config: Mapping[str, Any]) -> list[str]:
    """Values that are read and are not of the kind that they have to be."""
    numbers = {"r": config.get("r", 8), "lora_alpha": config.get("lora_alpha", 8)}
    wrong = [f"{key}={show(value)}: expected a number" for key, value in numbers.items() if not _is_number(value)]
    if _is_number(numbers["r"]) and (not isinstance(numbers["r"], int) or numbers["r"] < 1):
        wrong.append(f"r={show(numbers['r'])}: expected a positive whole number")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not isinstance(pattern, Mapping) or not all(map(_is_number, pattern.values())):
            wrong.append(f"{key}={show(pattern)}: expected numbers by pattern")
        else:
            if key == "rank_pattern" and not all(isinstance(one, int) and one > 0 for one in pattern.values()):
                wrong.append(f"{key}={show(pattern)}: expected positive whole numbers by pattern")
            wrong += [f"{key} holds {show(one)}: is no regular expression" for one in pattern if not _is_pattern(one)]
    targets = config.get("target_parameters") or ()
    if not isinstance(targets, list | tuple) or not all(isinstance(one, str) for one in targets):
        wrong.append(f"target_parameters={show(targets)}: expected a list of names")
    version = config.get("peft_version")
    if version is not None and not (isinstance(version, str) and re.match(r"\d+\.\d+", version)):
        wrong.append(f"peft_version={show(version)}: expected a version, as '0.21.0'")
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(config.get(key), str | None):
            wrong.append(f"{key}={show(config[key])}: expected a text")
    return wrong


def _version(text: str) -> tuple[int, ...]:
    """The first two numbers of a version, `"0.18.1.dev0@..."` for one."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True
