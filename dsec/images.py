"""What a store knows about layers and images: as it lies on the disk (JSON), and as clients see it.

See: docs/formats/layers.md, "Records".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

import msgspec

from dsec.errors import InvalidArgumentError
from dsec.types import Defaults, LayerId

_LAYER_ID = re.compile(r"sha256:[0-9a-f]{64}")
_PART = r"[a-z0-9]+(?:[._-]+[a-z0-9]+)*"
_IMAGE_NAME = re.compile(rf"{_PART}(?:/{_PART})*:\w[\w.-]{{0,127}}", re.ASCII)
IMAGE_NAME_CHARS_MAX = 200


class LayerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One layer.  `made_from` names its source; `parents` are the layers that it was made over, the topmost first.

    `metadata_offset` is where every inode lies, up to the file's end; -1 if they are all over the file.
    """

    size_bytes: int
    metadata_offset: int
    entries_count: int
    content_bytes: int
    created_at_s: float
    made_from: str = ""
    parents: tuple[LayerId, ...] = ()


class Layer(LayerFacts, frozen=True, kw_only=True):
    """A layer as it is shown."""

    id: LayerId


class ImageConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How an image wants its commands run; what the sandbox's caller says goes before it.

    `entrypoint` and `command` are kept and shown; a sandbox runs what it is told to, and neither of them.
    """

    env: dict[str, str] = {}
    workdir: str = "/"
    user: str = ""
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()

    @property
    def defaults(self) -> Defaults:
        """For the commands of a sandbox; `/`, where commands run anyway, is as good as nothing."""
        return Defaults(env=self.env, cwd=self.workdir if self.workdir != "/" else "", user=self.user)


class Image(msgspec.Struct, frozen=True, kw_only=True):
    """A name for layers, the topmost first as in `SandboxSpec.layers`, over the `base` that they were made over."""

    name: str
    layers: tuple[LayerId, ...]
    base: Literal["host", ""] = ""
    config: ImageConfig = ImageConfig()
    created_at_s: float = 0.0
    source: str = ""


def over_each_other(images: Sequence[Image]) -> Image:
    """A nameless image of others, the topmost first, over the base of the lowest.

    How it runs is theirs, the topmost's before the others'.
    """
    configs = [image.config for image in images]
    defaults = Defaults()
    for config in reversed(configs):
        defaults = config.defaults.over(defaults)
    whole = ImageConfig(
        env=defaults.env,
        workdir=defaults.cwd or "/",
        user=defaults.user,
        entrypoint=next((config.entrypoint for config in configs if config.entrypoint), ()),
        command=next((config.command for config in configs if config.command), ()),
    )
    layers = dict.fromkeys(layer for image in images for layer in image.layers)
    return Image(name="", layers=tuple(layers), base=images[-1].base if images else "", config=whole)


def is_layer_id(text: str) -> bool:
    """True for `sha256:` and 64 hex digits."""
    return _LAYER_ID.fullmatch(text) is not None


def check_layer_id(text: str) -> LayerId:
    """The id.  InvalidArgumentError for anything that is none: ids become file names."""
    if not is_layer_id(text):
        raise InvalidArgumentError(f"no layer id: {text!r:.100}; one is sha256: and 64 hex digits")
    return LayerId(text)


def check_image_name(name: str) -> str:
    """The name, with `:latest` where it has no tag.  InvalidArgumentError for what cannot be one."""
    tagged = name if ":" in name else f"{name}:latest"
    if len(tagged) > IMAGE_NAME_CHARS_MAX or _IMAGE_NAME.fullmatch(tagged) is None or is_layer_id(tagged):
        raise InvalidArgumentError(f"no image name: {name!r:.100}; one is like debian or team/tools:1.2")
    return tagged
