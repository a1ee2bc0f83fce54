"""Where config files lie, and what of them may run: tags, programs, modules that they name."""

import importlib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import detectron2
import yaml
from detectron2.config import CfgNode

from jigsaw_d2.io import ConfigError

logger = logging.getLogger(__name__)

# Files of MODEL.JIGSAW.BACKBONE_FROM that this process may run.
_PROGRAMS: set[Path] = set()


def config_dir() -> Path:
    """Folder of the shipped YAML files: inside an installed package, or ``configs/`` of a checkout.

    Raises:
        FileNotFoundError: neither exists, as after a broken install.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "Base-JigsawPretrain.yaml").is_file():
            return folder
    raise FileNotFoundError(
        f"no configs beside {package}: reinstall jigsaw_d2, or run from a checkout of the project"
    )


def find_config(name: str) -> Path:
    """Path of a config given as a path or as a name among the shipped ones.

    Raises:
        FileNotFoundError: naming both places that were searched.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = config_dir() / str(name).removeprefix("configs/")
    if shipped.is_file():
        return shipped
    names = ", ".join(sorted(p.name for p in config_dir().glob("*.yaml")))
    raise FileNotFoundError(f"no config {name!r}: not a file, nor among the shipped ones ({names})")


def refuse_code(path: str, trust: bool = False) -> None:
    """Look for YAML tags that could run code, in a config file and in the files of its ``_BASE_``.

    Detectron2 loads such by default. Here only files of its own model zoo may have them (RetinaNet
    computes its anchors so): they were installed with its code.

    Raises:
        ConfigError: naming the file and the tag; not with ``trust``.
    """
    if trust or Path(path).resolve().is_relative_to(zoo_configs()):
        return
    with CfgNode._open_cfg(path) as stream:
        try:
            values = yaml.safe_load(stream)
        except yaml.constructor.ConstructorError as error:
            problem = str(error.problem).replace("tag:yaml.org,2002:", "!!")
            tag = re.search("'(!.*)'", problem)
            raise ConfigError(
                f"{path}: refused, because reading it could run code from it "
                f"({f'the tag {tag[1]}' if tag else problem}); write the values out, or, if the "
                "file is your own, --trust reads it"
            ) from None
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}: no config, which has KEY: VALUE lines")
    bases = values.get("_BASE_", [])
    for base in [bases] if isinstance(bases, str) else bases:
        base = os.path.expanduser(base)
        remote = base.startswith(("http://", "https://"))  # found as fvcore finds them
        refuse_code(base if remote else os.path.join(os.path.dirname(path), base))


def zoo_configs() -> Path:
    """Folder of the configs of Detectron2's model zoo, which were installed with its code."""
    return (Path(detectron2.__file__).parent / "model_zoo" / "configs").resolve()


def refuse_program(
    cfg: CfgNode, where: str | Path, overrides: Sequence[str] = (), trust: bool = False
) -> None:
    """Refuse a file of MODEL.JIGSAW.BACKBONE_FROM that ``where`` names, and no command line.

    One that is among ``overrides``, KEY VALUE ..., or read with ``trust``, may run in this process
    from then on, whoever names it: a checkpoint names the same as its config.

    Raises:
        ConfigError: naming both.
    """
    key, program = "MODEL.JIGSAW.BACKBONE_FROM", cfg.MODEL.JIGSAW.BACKBONE_FROM
    path, zoo = Path(program).resolve(), zoo_configs()
    path = path if path.is_file() else (zoo / program).resolve()  # may be a name like ../../file.py
    if trust or key in overrides[::2]:
        _PROGRAMS.add(path)
    elif path.is_file() and not path.is_relative_to(zoo) and path not in _PROGRAMS:
        raise ConfigError(
            f"{where}: refused, because its {key} {program} is a program that would run; if that "
            f"file is your own, --trust runs it, or {key} {program} among the KEY VALUE pairs"
        )


def import_kept(settings: Mapping[str, Any], where: str | Path, trust: bool) -> None:
    """With ``trust``, import the MODEL.JIGSAW.REGISTER of a config's plain ``settings``.

    Before Detectron2's defaults are copied, to which a module may add keys. One that cannot be
    imported may not be needed: the log names it.
    """
    names = settings.get("MODEL", {}).get("JIGSAW", {}).get("REGISTER", ()) if trust else ()
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # of anyone's module
            said = f"{type(error).__name__}: {error}"
            logger.warning("%s, MODEL.JIGSAW.REGISTER: %s is not imported (%s)", where, name, said)
