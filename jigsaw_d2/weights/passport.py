"""The passport of a weight file: everything that must hold where its tensors are used.

It travels inside the file, and as YAML beside it. A digest over passport and tensors tells whether
either was changed since they were written.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import yaml

from jigsaw_d2.errors import JigsawError
from jigsaw_d2.weights.architecture import Architecture, ArchitectureError

FORMAT_VERSION = 1
PASSPORT_KEY = "jigsaw_passport"
ORIGINS = ("jigsaw", "imagenet", "scratch")


class PassportError(JigsawError, ValueError):
    """A passport that is damaged, altered, or of a form that this version does not know."""


@dataclass(frozen=True)
class Passport:
    """Where weights come from, and what a detector needs to use them.

    Attributes:
        origin: "jigsaw", "imagenet", or "scratch" (no weights at all).
        architecture: of the backbone.
        input_format: "RGB" or "BGR", the order of the channels that the first convolution sees.
        pixel_mean, pixel_std: per channel in that order, in units of 0..255 pixels.
        categories: names, in the order of the labels, without background.
        template: {"size": [height, width], "split": [y, x]} in canvas pixels, or None.
        objective, tau: the loss of the pre-training; "" and None where there was none of ours.
        iterations, images_seen: optimiser steps and training images; None if unknown.
        dataset, dataset_hash: name, and hash of the image ids, of the pre-training set.
        code_version: of the software that trained the weights.
        digest: SHA-256 over passport and tensors; "" until they are written.
    """

    origin: str
    architecture: Architecture
    input_format: str
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    categories: tuple[str, ...] = ()
    template: dict[str, list[int]] | None = field(default=None, hash=False)
    objective: str = ""
    tau: float | None = None
    iterations: int | None = None
    images_seen: int | None = None
    dataset: str = ""
    dataset_hash: str = ""
    code_version: str = ""
    format_version: int = FORMAT_VERSION
    digest: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, which YAML, JSON and ``torch.load(weights_only=True)`` can read."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["architecture"] = self.architecture.to_dict()
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "passport") -> "Passport":
        """The reverse of ``to_dict``; ``where`` opens the message of an error.

        Raises:
            PassportError: unknown version, missing or unknown keys, impossible values.
        """
        if not isinstance(values, Mapping):
            raise PassportError(f"{where}: expected a mapping, found {type(values).__name__}")
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise PassportError(
                f"{where}: format version {version}, this code reads {FORMAT_VERSION}; "
                "use the version of jigsaw_d2 that wrote the file"
            )
        names = {f.name for f in fields(cls)}
        missing, unknown = sorted(names - set(values)), sorted(set(values) - names)
        if missing or unknown:
            raise PassportError(f"{where}: missing keys {missing}, unknown keys {unknown}")
        values = dict(values)
        try:
            values["architecture"] = Architecture.from_dict(values["architecture"])
            for key in ("pixel_mean", "pixel_std"):
                values[key] = tuple(float(v) for v in values[key])
            values["categories"] = tuple(str(v) for v in values["categories"])
        except (ArchitectureError, TypeError, ValueError) as error:
            raise PassportError(f"{where}: {error}") from None
        passport = cls(**values)
        passport._check(where)
        return passport

    def to_yaml(self) -> str:
        """For the file beside the weights."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None)

    @classmethod
    def from_yaml(cls, text: str, where: str = "passport") -> "Passport":
        """The reverse of ``to_yaml``.

        Raises:
            PassportError: also when ``text`` is no YAML.
        """
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise PassportError(f"{where}: no YAML: {error}") from None
        return cls.from_dict(values, where)

    def demands(self) -> dict[str, Any]:
        """Config keys that a detector must take over, with the values.

        A backbone trained with batch norm is used with its norm frozen (paper, Sec. 4.1); a group
        norm stays what it is.
        """
        demanded: dict[str, Any] = {
            "INPUT.FORMAT": self.input_format,
            "MODEL.PIXEL_MEAN": list(self.pixel_mean),
            "MODEL.PIXEL_STD": list(self.pixel_std),
        }
        if self.architecture.is_resnet:
            norm = self.architecture.norm
            demanded["MODEL.RESNETS.NORM"] = "FrozenBN" if norm == "BN" else norm
            demanded["MODEL.RESNETS.STRIDE_IN_1X1"] = self.architecture.stride_in_1x1
        return demanded

    def sealed(self, tensors: Mapping[str, np.ndarray]) -> "Passport":
        """This passport with the digest over itself and ``tensors``."""
        return replace(self, digest=self._digest(tensors))

    def check_seal(self, tensors: Mapping[str, np.ndarray], where: str = "passport") -> None:
        """Recompute the digest.

        Raises:
            PassportError: passport or tensors are not those that were written together.
        """
        if self.digest != self._digest(tensors):
            raise PassportError(
                f"{where}: passport or tensors were changed after they were written "
                f"(digest {self.digest[:12]}..., found {self._digest(tensors)[:12]}...); "
                "convert the checkpoint again"
            )

    def _digest(self, tensors: Mapping[str, np.ndarray]) -> str:
        said = {key: value for key, value in self.to_dict().items() if key != "digest"}
        sha = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
        for name in sorted(tensors):
            array = np.ascontiguousarray(tensors[name])
            sha.update(f"{name} {array.dtype.str} {array.shape}".encode())
            sha.update(array.data)
        return sha.hexdigest()

    def _check(self, where: str) -> None:
        if self.origin not in ORIGINS:
            raise PassportError(f"{where}: origin {self.origin!r} is none of {ORIGINS}")
        if self.input_format not in ("RGB", "BGR"):
            raise PassportError(
                f"{where}: input_format {self.input_format!r} is neither RGB nor BGR"
            )
        if len(self.pixel_mean) != len(self.pixel_std) or min(self.pixel_std, default=0) <= 0:
            raise PassportError(
                f"{where}: pixel_mean {self.pixel_mean} and pixel_std {self.pixel_std} must be "
                "equally long, and every std positive"
            )


def compare_passports(one: Passport, other: Passport) -> list[str]:
    """Each key in which the two differ, with both values."""
    mine, yours = one.to_dict(), other.to_dict()
    return [f"{key}: {mine[key]} / {yours[key]}" for key in mine if mine[key] != yours[key]]
