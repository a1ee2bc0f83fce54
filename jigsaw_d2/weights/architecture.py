"""What a backbone is, as far as its weights depend on it; read off a config, or off the tensors.

The two readings check each other: a passport that lies about depth, groups, norm or deformable
stages is found out by the shapes of the tensors it travels with.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from jigsaw_d2.errors import JigsawError

RESNET_BUILDER = "build_resnet_backbone"
# Blocks of res2..res5 by (depth, has a third convolution), as Detectron2's builder has them.
BLOCKS = {
    (18, False): (2, 2, 2, 2),
    (34, False): (3, 4, 6, 3),
    (50, True): (3, 4, 6, 3),
    (101, True): (3, 4, 23, 3),
    (152, True): (3, 8, 36, 3),
}
# Norms with the same tensors (weight, bias, running statistics), so that one loads the other.
BATCH_NORMS = ("BN", "SyncBN", "FrozenBN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")
STAGES = ("res2", "res3", "res4", "res5")


class ArchitectureError(JigsawError, ValueError):
    """Tensors, passport or config that do not describe one and the same backbone."""


@dataclass(frozen=True)
class Architecture:
    """Keys of MODEL.RESNETS that decide names, shapes or meaning of a backbone's tensors.

    ``norm`` is the family: "BN" stands for batch norm of any kind, frozen or synchronised. All but
    ``backbone`` are None for a backbone that is not Detectron2's ResNet.
    """

    backbone: str = RESNET_BUILDER
    depth: int | None = None
    num_groups: int | None = None
    width_per_group: int | None = None
    stem_out_channels: int | None = None
    res2_out_channels: int | None = None
    norm: str | None = None
    stride_in_1x1: bool | None = None
    deform_on_per_stage: tuple[bool, ...] | None = None
    deform_modulated: bool | None = None
    deform_num_groups: int | None = None

    @property
    def is_resnet(self) -> bool:
        """Whether this is Detectron2's own ResNet, whose every key is known."""
        return self.depth is not None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, lists for tuples."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Architecture":
        """The reverse of ``to_dict``.

        Raises:
            ArchitectureError: naming keys that are unknown or values of another type.
        """
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ArchitectureError(f"architecture has unknown keys {sorted(unknown)}")
        values = dict(values)
        stages = values.get("deform_on_per_stage")
        if stages is not None:
            values["deform_on_per_stage"] = tuple(bool(stage) for stage in stages)
        return cls(**values)

    @classmethod
    def from_config(cls, model: Mapping[str, Any]) -> "Architecture":
        """From the MODEL node of a config, or from the same as a plain dict.

        A backbone that a user registered under another name is known by that name alone.
        """
        name = model["BACKBONE"]["NAME"]
        if name not in (RESNET_BUILDER, "build_resnet_fpn_backbone", *_RETINANET_BUILDERS):
            return cls(backbone=name)
        res = model["RESNETS"]
        deform = tuple(bool(stage) for stage in res["DEFORM_ON_PER_STAGE"])
        return cls(
            depth=int(res["DEPTH"]),
            num_groups=int(res["NUM_GROUPS"]),
            width_per_group=int(res["WIDTH_PER_GROUP"]),
            stem_out_channels=int(res["STEM_OUT_CHANNELS"]),
            res2_out_channels=int(res["RES2_OUT_CHANNELS"]),
            norm=norm_family(res["NORM"]),
            stride_in_1x1=bool(res["STRIDE_IN_1X1"]),
            deform_on_per_stage=deform,
            deform_modulated=bool(res["DEFORM_MODULATED"]) and any(deform),
            deform_num_groups=int(res["DEFORM_NUM_GROUPS"]) if any(deform) else 1,
        )

    def config_keys(self) -> dict[str, Any]:
        """Config keys whose values the tensors need: shapes depend on them. Empty if no ResNet."""
        if not self.is_resnet:
            return {}
        keys = {
            "DEPTH": self.depth,
            "NUM_GROUPS": self.num_groups,
            "STEM_OUT_CHANNELS": self.stem_out_channels,
            "RES2_OUT_CHANNELS": self.res2_out_channels,
            "DEFORM_ON_PER_STAGE": list(self.deform_on_per_stage or ()),
        }
        if self.depth not in (18, 34):  # basic blocks have no groups to be wide
            keys["WIDTH_PER_GROUP"] = self.width_per_group
        if any(self.deform_on_per_stage or ()):
            keys["DEFORM_MODULATED"] = self.deform_modulated
            keys["DEFORM_NUM_GROUPS"] = self.deform_num_groups
        return {f"MODEL.RESNETS.{key}": value for key, value in keys.items()}


_RETINANET_BUILDERS = (
    "build_retinanet_resnet_fpn_backbone",
    "build_fcos_resnet_fpn_backbone",
)


def norm_family(norm: str) -> str:
    """ "BN" for every batch norm, else the name as it is."""
    return "BN" if norm in BATCH_NORMS else norm


def read_architecture(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What the tensors of a Detectron2 ResNet say about it, as values of ``Architecture`` keys.

    Args:
        shapes: name without prefix ("res2.0.conv1.weight") -> shape; trailing stages may be absent.

    Raises:
        ArchitectureError: the names or the counts of blocks are no ResNet of Detectron2's.
    """
    if "stem.conv1.weight" not in shapes or "res2.0.conv2.weight" not in shapes:
        some = ", ".join(sorted(shapes)[:4])
        raise ArchitectureError(
            f"no ResNet: expected stem.conv1.weight and res2.0.conv2.weight among the tensors, "
            f"found {some or 'none'}"
        )
    bottleneck = "res2.0.conv3.weight" in shapes
    last = "conv3" if bottleneck else "conv2"
    width, inner = shapes["res2.0.conv2.weight"][:2]
    groups = width // inner if bottleneck else 1
    deform = tuple(f"{stage}.0.conv2_offset.weight" in shapes for stage in STAGES)
    found = {
        "depth": _depth(shapes, bottleneck),
        "num_groups": groups,
        "stem_out_channels": shapes["stem.conv1.weight"][0],
        "res2_out_channels": shapes[f"res2.0.{last}.weight"][0],
        "norm": _norm(shapes),
        "deform_on_per_stage": deform,
    }
    if bottleneck:
        found["width_per_group"] = width // groups
    return found


def check_architecture(said: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare what is said with what the tensors are.

    Raises:
        ArchitectureError: listing each key with both values.
    """
    if not said.is_resnet:
        return
    wrong = []
    for key, found in read_architecture(shapes).items():
        value = getattr(said, key)
        if key == "norm" and found == "GN":  # the affine tensors of any group-like norm
            same = value not in ("BN", "")
        else:
            same = value == found
        if not same:
            wrong.append(f"{key}: said {value}, the tensors are {found}")
    if wrong:
        raise ArchitectureError("passport and tensors disagree: " + "; ".join(wrong))


def _depth(shapes: Mapping[str, tuple[int, ...]], bottleneck: bool) -> int:
    blocks: dict[str, set[int]] = {}
    for name in shapes:
        match = re.match(r"(res[2-5])\.(\d+)\.", name)
        if match:
            blocks.setdefault(match[1], set()).add(int(match[2]))
    counts = tuple(len(blocks[stage]) for stage in STAGES if stage in blocks)
    for (depth, has_third), expected in BLOCKS.items():
        if has_third == bottleneck and counts == expected[: len(counts)]:
            return depth
    kind = "bottleneck" if bottleneck else "basic"
    raise ArchitectureError(
        f"{counts} {kind} blocks in {', '.join(sorted(blocks))}: no ResNet of depth 18, 34, 50, "
        "101 or 152; is a tensor missing, or one too many?"
    )


def _norm(shapes: Mapping[str, tuple[int, ...]]) -> str:
    if "stem.conv1.norm.running_mean" in shapes:
        return "BN"
    return "GN" if "stem.conv1.norm.weight" in shapes else ""
