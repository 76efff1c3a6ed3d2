"""Knobs of the store of layers, each also an environment variable `DSEC_IMAGES_<NAME>`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from dsec.address import default_directory
from dsec.edge.images.store import BYTES_MAX, LayerStore


class ImagesConfig(BaseSettings):
    """Where layers are: `directory` on a local file system, of `bytes_max` in all, and `shared`, a store on any POSIX
    mount that this host only reads.
    """

    model_config = SettingsConfigDict(env_prefix="DSEC_IMAGES_", frozen=True)

    directory: Path = Field(default_factory=lambda: default_directory() / "images")
    bytes_max: int = Field(default=BYTES_MAX, ge=1)
    shared: Path | None = None

    def store(self, disk_free_bytes_min: int) -> LayerStore:
        """The store, not yet open."""
        return LayerStore(self.directory, self.bytes_max, shared=self.shared, disk_free_bytes_min=disk_free_bytes_min)
