"""What weights require of the network that uses them, and where they come from.

It travels inside a converted file, and as YAML beside it. A digest tells whether it or the tensors
were changed since; the tensors' shapes, whether what it says of the network is true.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
import yaml

from jigsaw_d2.config import keywords
from jigsaw_d2.io import CheckpointError, WeightsError

FORMAT_VERSION = 2
_SINCE_2 = ("network",)  # keys that files of version 1 have not
STAGES = ("res2", "res3", "res4", "res5")
# Norms with the same tensors (weight, bias, running statistics), so that one loads the other.
BATCH_NORMS = ("BN", "SyncBN", "FrozenBN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")
RESNET_BUILDERS = (
    "build_resnet_backbone",
    "build_resnet_fpn_backbone",
    "build_retinanet_resnet_fpn_backbone",
    "build_fcos_resnet_fpn_backbone",
)
# Blocks of res2..res5 by (depth, has a third convolution), as Detectron2's builder has them.
_BLOCKS = {
    (18, False): (2, 2, 2, 2),
    (34, False): (3, 4, 6, 3),
    (50, True): (3, 4, 6, 3),
    (101, True): (3, 4, 23, 3),
    (152, True): (3, 8, 36, 3),
}
# Between two means or stds in units of 0..255 pixels: 123.675 is also 0.485 * 255 printed shorter.
_PIXEL_TOLERANCE = 1e-3
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Architecture:
    """Keys of MODEL.RESNETS that decide names, shapes or meaning of a backbone's tensors.

    ``norm`` is the family: "BN" stands for batch norm of any kind, frozen or synchronised. All but
    ``backbone`` are None for a backbone that is not Detectron2's ResNet.
    """

    backbone: str = RESNET_BUILDERS[0]
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

    @classmethod
    def from_config(cls, model: Mapping[str, Any], is_resnet: bool = False) -> "Architecture":
        """From the MODEL node of a config, or a plain dict of it; of others' backbones the name.

        ``is_resnet``: it is known that the backbone is Detectron2's, whoever builds it.
        """
        name = model["BACKBONE"]["NAME"]
        if name not in RESNET_BUILDERS and not is_resnet:
            return cls(backbone=name)
        res = model["RESNETS"]
        numbers = ["depth", "num_groups", "width_per_group"]
        numbers += ["stem_out_channels", "res2_out_channels"]
        deform = tuple(bool(stage) for stage in res["DEFORM_ON_PER_STAGE"])
        return cls(
            **{key: int(res[key.upper()]) for key in numbers},
            norm=norm_family(res["NORM"]),
            stride_in_1x1=bool(res["STRIDE_IN_1X1"]),
            deform_on_per_stage=deform,
            deform_modulated=bool(res["DEFORM_MODULATED"]) and any(deform),
            deform_num_groups=int(res["DEFORM_NUM_GROUPS"]) if any(deform) else 1,
        )

    def required_config(self) -> dict[str, Any]:
        """Config keys on which the tensors' shapes depend, with the values; empty if no ResNet."""
        if not self.is_resnet:
            return {}
        keys = ["depth", "num_groups", "stem_out_channels", "res2_out_channels"]
        keys += ["deform_on_per_stage"]
        if self.depth not in (18, 34):  # basic blocks have no groups to be wide
            keys += ["width_per_group"]
        if any(self.deform_on_per_stage):
            keys += ["deform_modulated", "deform_num_groups"]
        return {f"MODEL.RESNETS.{key.upper()}": _plain(getattr(self, key)) for key in keys}


def norm_family(norm: str) -> str:
    """ "BN" for every batch norm, else the name as it is."""
    return "BN" if norm in BATCH_NORMS else norm


def fits(key: str, have: Any, need: Any) -> bool:
    """Whether value ``have`` of a config key serves weights that require ``need``."""
    if key in ("MODEL.RESNETS.NORM", "MODEL.FPN.NORM"):
        return norm_family(have) == norm_family(need)
    if key.endswith(".KWARGS"):  # position embeddings are fitted to another size of images
        return keywords(have) | {"img_size": 0} == keywords(need) | {"img_size": 0}
    if isinstance(need, (list, tuple)) and isinstance(have, (list, tuple)):
        near = (abs(a - b) <= _PIXEL_TOLERANCE for a, b in zip(have, need))
        return len(have) == len(need) and all(near)
    return have == need


def read_architecture(shapes: Shapes) -> dict[str, Any]:
    """What the tensors of a Detectron2 ResNet say about it, as values of ``Architecture`` keys.

    Args:
        shapes: name without prefix ("res2.0.conv1.weight") -> shape; trailing stages may be absent.

    Raises:
        WeightsError: the names or the counts of blocks are no ResNet of Detectron2's.
    """
    if not {"stem.conv1.weight", "res2.0.conv2.weight"} <= set(shapes):
        some = ", ".join(sorted(shapes)[:4])
        raise WeightsError(f"no ResNet, which has stem.conv1.weight, res2.0.conv2...; found {some}")
    bottleneck = "res2.0.conv3.weight" in shapes
    blocks = {match[0] for match in (re.match(r"res[2-5]\.\d+\.", n) for n in shapes) if match}
    per_stage = (sum(block.startswith(stage) for block in blocks) for stage in STAGES)
    counts = tuple(filter(None, per_stage))
    fitting = (
        depth
        for (depth, has_third), expected in _BLOCKS.items()
        if has_third == bottleneck and counts == expected[: len(counts)]
    )
    depth = next(fitting, None)
    if depth is None:
        raise WeightsError(
            f"{counts} {'bottleneck' if bottleneck else 'basic'} blocks in res2..res5: no ResNet "
            "of depth 18, 34, 50, 101 or 152; is a tensor missing, or one too many?"
        )
    width, inner = shapes["res2.0.conv2.weight"][:2]
    groups = width // inner if bottleneck else 1
    norm = "GN" if "stem.conv1.norm.weight" in shapes else ""
    found = {
        "depth": depth,
        "num_groups": groups,
        "stem_out_channels": shapes["stem.conv1.weight"][0],
        "res2_out_channels": shapes[f"res2.0.conv{3 if bottleneck else 2}.weight"][0],
        "norm": "BN" if "stem.conv1.norm.running_mean" in shapes else norm,
        "deform_on_per_stage": tuple(f"{s}.0.conv2_offset.weight" in shapes for s in STAGES),
    }
    return found | ({"width_per_group": width // groups} if bottleneck else {})


def check_architecture(said: Architecture, shapes: Shapes) -> None:
    """Raise ``WeightsError``, with both values, where the tensors are not what is said of them."""
    if not said.is_resnet:
        return
    tensors = read_architecture(shapes)
    if tensors["norm"] == "GN" and said.norm not in ("BN", ""):
        tensors["norm"] = said.norm  # every norm over groups of channels has the same tensors
    wrong = [
        f"{key}: said {getattr(said, key)}, the tensors are {found}"
        for key, found in tensors.items()
        if getattr(said, key) != found
    ]
    if wrong:
        raise WeightsError("metadata and tensors disagree: " + "; ".join(wrong))


@dataclass(frozen=True)
class WeightsMetadata:
    """Where weights come from, and what a network needs to use them."""

    # "jigsaw", "imagenet", "scratch" (no weights at all), "detector" (a whole one), or as named
    origin: str
    architecture: Architecture
    input_format: str  # "RGB" or "BGR": order of the channels that the first convolution sees
    pixel_mean: tuple[float, ...]  # per channel in that order, in units of 0..255 pixels
    pixel_std: tuple[float, ...]
    categories: tuple[str, ...] = ()  # in the order of the labels, without background
    # {"size": [height, width], "split": [y, x]} in canvas pixels
    template: dict[str, list[int]] | None = field(default=None, hash=False)
    objective: str = ""  # of a pre-training of ours, as tau
    tau: float | None = None
    iterations: int | None = None
    images_seen: int | None = None
    dataset: str = ""  # of the pre-training; the hash is over its image ids
    dataset_hash: str = ""
    code_version: str = ""  # of the software that trained the weights
    # What the backbone is and computes, see ``network.describe``; None in files of version 1
    network: dict[str, Any] | None = field(default=None, hash=False)
    # {"trained": features that were classified} and of a feature pyramid {"norm": its family,
    # "fuse_type", "out_channels"}; None, and then not in the file, where res5 alone was
    levels: dict[str, Any] | None = field(default=None, hash=False)
    format_version: int = FORMAT_VERSION
    digest: str = ""  # SHA-256 over metadata and tensors; "" until they are written

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, which YAML, JSON and ``torch.load(weights_only=True)`` can read."""
        values = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        values["architecture"] = {k: _plain(v) for k, v in asdict(self.architecture).items()}
        if self.format_version == 1:
            values = {key: value for key, value in values.items() if key not in _SINCE_2}
        if self.levels is None:
            del values["levels"]  # as in older files, which keep their digest
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "metadata") -> "WeightsMetadata":
        """The reverse of ``to_dict``; ``where`` opens the message of an error.

        Raises:
            CheckpointError: unknown version, missing or unknown keys, impossible values.
        """
        if not isinstance(values, Mapping):
            raise CheckpointError(f"{where}: expected a mapping, found {type(values).__name__}")
        version = values.get("format_version")
        if version not in (1, FORMAT_VERSION):
            raise CheckpointError(
                f"{where}: format version {version}, this code reads 1 to {FORMAT_VERSION}; "
                "use the version of jigsaw_d2 that wrote the file"
            )
        expected = {f.name for f in fields(cls)} - set(_SINCE_2 if version == 1 else ())
        odd = (set(values) ^ expected) - {"levels"}
        if odd:
            raise CheckpointError(f"{where}: missing or unknown keys {sorted(odd)}")
        values = dict(values)
        try:
            values["architecture"] = Architecture(
                **{
                    k: tuple(v) if isinstance(v, list) else v
                    for k, v in values["architecture"].items()
                }
            )
            for key in ("pixel_mean", "pixel_std"):
                values[key] = tuple(float(v) for v in values[key])
            values["categories"] = tuple(str(v) for v in values["categories"])
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{where}: {error}") from None
        return cls(**values)

    def to_yaml(self) -> str:
        """For the file beside the weights."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None)

    @classmethod
    def from_yaml(cls, text: str, where: str = "metadata") -> "WeightsMetadata":
        """The reverse of ``to_yaml``; raises as ``from_dict``, also when ``text`` is no YAML."""
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise CheckpointError(f"{where}: no YAML: {error}") from None
        return cls.from_dict(values, where)

    def required_config(self) -> dict[str, Any]:
        """Config keys that whoever uses the weights must take over, with the values.

        Batch norm is used frozen (paper, Sec. 4.1); a group norm stays what it is.
        """
        required: dict[str, Any] = {
            "INPUT.FORMAT": self.input_format,
            "MODEL.PIXEL_MEAN": list(self.pixel_mean),
            "MODEL.PIXEL_STD": list(self.pixel_std),
        }
        if self.architecture.is_resnet:
            norm = self.architecture.norm
            required["MODEL.RESNETS.NORM"] = "FrozenBN" if norm == "BN" else norm
            required["MODEL.RESNETS.STRIDE_IN_1X1"] = self.architecture.stride_in_1x1
        network = self.network or {"config": {}}
        for library in {key.split(".")[1] for key in network["config"] if network["batch_norm"]}:
            required[f"MODEL.{library}.FREEZE_NORM"] = True
        if self.levels and "norm" in self.levels:
            norm = self.levels["norm"]
            required["MODEL.FPN.NORM"] = "FrozenBN" if norm == "BN" else norm
            required["MODEL.FPN.FUSE_TYPE"] = self.levels["fuse_type"]
            required["MODEL.FPN.OUT_CHANNELS"] = self.levels["out_channels"]
        return required

    def network_config(self) -> dict[str, Any]:
        """Config keys that make the network what it is, with the values; see ``Architecture``."""
        return self.architecture.required_config() | (self.network or {"config": {}})["config"]

    def sealed(self, tensors: Mapping[str, np.ndarray]) -> "WeightsMetadata":
        """This metadata with the digest over itself and ``tensors``, of any shapes, by name."""
        said = {key: value for key, value in self.to_dict().items() if key != "digest"}
        sha = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
        for name in sorted(tensors):
            array = np.ascontiguousarray(tensors[name])
            sha.update(f"{name} {array.dtype.str} {array.shape}".encode())
            sha.update(array.data)
        return replace(self, digest=sha.hexdigest())


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
