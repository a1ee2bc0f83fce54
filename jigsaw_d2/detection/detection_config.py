"""Detection configs: Detectron2's zoo, ours, the user's; and what differs between two of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg

from jigsaw_d2.config import add_jigsaw_config, find_config
from jigsaw_d2.errors import JigsawError

# In a file: the zoo config that lies under it. ``_BASE_`` could only name a path, which an
# installed Detectron2 has elsewhere on every machine.
ZOO_BASE = "_ZOO_BASE_"


class DetectionConfigError(JigsawError, ValueError):
    """A config that is not there, or overrides that do not fit it."""


def load_detection_config(config_file: str, overrides: Sequence[str] = ()) -> CfgNode:
    """Detectron2's defaults and our keys + ``config_file`` + overrides; nothing applied yet.

    Args:
        config_file: a path, the name of a shipped file ("finetune/faster_rcnn_R_50_C4_1x.yaml"),
            or a name in Detectron2's model zoo. ``_ZOO_BASE_: <zoo name>`` in a file lays a zoo
            config under it, wherever the file lies.

    Raises:
        DetectionConfigError: none of the three; or overrides of unknown keys or other types.
    """
    path = _find(config_file)
    try:
        cfg = _merged(path)
    except (KeyError, ValueError, AssertionError, yaml.YAMLError) as error:
        raise DetectionConfigError(f"{path}: no detection config: {error}") from None
    try:
        cfg.merge_from_list(list(overrides))
    except (KeyError, ValueError, AssertionError) as error:
        raise DetectionConfigError(f"overrides {list(overrides)}: {error}") from None
    return cfg


def _merged(path: str) -> CfgNode:
    if path.endswith(".py"):
        raise ValueError("a LazyConfig; name one of the YAML configs")
    cfg = get_cfg()
    add_jigsaw_config(cfg)
    loaded = CfgNode.load_yaml_with_base(path, allow_unsafe=True)
    zoo = loaded.pop(ZOO_BASE, None)
    if zoo is not None:
        cfg.merge_from_file(_zoo_file(zoo))
    if zoo is not None or loaded.get("VERSION") == cfg.VERSION:
        cfg.merge_from_other_cfg(CfgNode(loaded))
    else:
        cfg.merge_from_file(path)  # knows how to read older versions
    return cfg


def config_changes(before: CfgNode, after: CfgNode) -> dict[str, Any]:
    """Nested plain dict of the values in ``after`` that differ from ``before``."""
    changes: dict[str, Any] = {}
    for key, value in after.items():
        old = before.get(key)
        if isinstance(value, CfgNode):
            inner = config_changes(old if isinstance(old, CfgNode) else CfgNode(), value)
            if inner:
                changes[key] = inner
        elif key not in before or old != value:
            changes[key] = _plain(value)
    return changes


def changes_yaml(changes: Mapping[str, Any]) -> str:
    """As a block that can be pasted into a config."""
    return yaml.safe_dump(changes, sort_keys=True, default_flow_style=None) if changes else "{}\n"


def get_key(cfg: CfgNode, key: str) -> Any:
    """Value of a dotted key."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def set_key(cfg: CfgNode, key: str, value: Any) -> None:
    """Set a dotted key."""
    *nodes, last = key.split(".")
    for part in nodes:
        cfg = cfg[part]
    cfg[last] = value


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _find(config_file: str) -> str:
    try:
        return str(find_config(config_file))
    except FileNotFoundError:
        return _zoo_file(config_file)


def _zoo_file(name: str) -> str:
    try:
        return model_zoo.get_config_file(name)
    except RuntimeError:
        raise DetectionConfigError(
            f"no config {name!r}: not a file, nor one of ours (finetune/...), nor in Detectron2's "
            "model zoo (such as COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml)"
        ) from None
