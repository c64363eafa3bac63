"""`MiniMaxConfig`: what config.json says about a checkpoint of the MiniMax-M2 family.

Two published forms are read: the legacy one (`rotary_dim`, `rope_theta`, `scoring_func`, ...) and that of
transformers v5 (`rope_parameters`). What the library does not support is refused, never guessed; what is written is
the union of both forms.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Never

from minimax_jax.errors import ConfigError, FormatError, Problem, raise_if
from minimax_jax.layout import attributes, fields
from minimax_jax.nearby import did_you_mean
from minimax_jax.paths import is_file, is_folder, path_of, require_inside

DEFAULT_BLOCK = (128, 128)

CONFIG_NAME = "config.json"
MOST_CONFIG_BYTES = 2**24

_UNREADABLE = f"{CONFIG_NAME} cannot be read"
_AGAIN = f"put that of its source in its place: `hf download ORG/NAME {CONFIG_NAME}` fetches it, and says where to"
_HUB = "hf://"
_FORMS = "give a checkpoint folder, a config.json, or the name of a hub repository (org/name)"


@dataclass(frozen=True, kw_only=True)
class MiniMaxConfig:
    """The architecture of one checkpoint; hashable, so that what derives from it can be cached.

    Attributes:
        weight_block_size: rows and columns of one FP8 block, or None for a checkpoint that is not quantised.
        modules_to_not_convert: module names that the quantisation left alone, as published.
        dtype: name of the dtype of tensors that are not quantised.
        extra: attributes that change no tensor (token ids, training knobs), kept as they were read; equality and
            hash leave them out.

    Raises:
        ConfigError: fields with impossible values, or with values that contradict each other.

    Examples:
        >>> mj.synthesize("MiniMax-M2")
        >>> config = mj.MiniMaxConfig.from_pretrained("MiniMax-M2")
        >>> config.num_local_experts, config.weight_block_size
        (4, (128, 128))
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_local_experts: int
    num_experts_per_tok: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    vocab_size: int
    rope_theta: float = 5e6
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 196608
    tie_word_embeddings: bool = False
    dtype: str = "bfloat16"
    weight_block_size: tuple[int, int] | None = None
    modules_to_not_convert: tuple[str, ...] = fields.MODULES_TO_NOT_CONVERT
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        raise_if(fields.problems({name: getattr(self, name) for name in fields.FIELDS}), ConfigError)

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of one FP8 block: the checkpoint's own, or the published (128, 128)."""
        return self.weight_block_size or DEFAULT_BLOCK

    @property
    def mtp_modules(self) -> int:
        """How many MTP modules config.json announces; published checkpoints lack them all the same."""
        return attributes.mtp_modules(self.extra)

    def replace(self, **changes: Any) -> MiniMaxConfig:
        """A copy with `changes` applied; unknown names raise TypeError."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_dict(
        cls, raw: Mapping[str, Any], *, file: str | None = None, ignore: Collection[str] = ()
    ) -> MiniMaxConfig:
        """Read the contents of a config.json, of either published form.

        Args:
            raw: the parsed JSON object.
            file: where it came from, for messages.
            ignore: names of attributes that this library does not know and that `extra` may keep all the same. Those
                that it knows are checked even so.

        Raises:
            ConfigError: every attribute that is missing, malformed, unknown or of an unsupported value.
        """
        return cls(**attributes.read(raw, file=file, ignore=ignore))

    @classmethod
    def from_pretrained(cls, path: str | Path, *, ignore: Collection[str] = ()) -> MiniMaxConfig:
        """Read the config of a checkpoint folder, of a config.json, or of a hub repository.

        Args:
            path: a folder or file; `org/name`, or `hf://org/name@revision`.
            ignore: as in `from_dict`.

        Raises:
            ConfigError: as `from_dict`, and when there is no config.json at `path`, it is a link out of that folder
                (but that of the hub's cache), or it is not JSON.
            RequestError: no file can have such a name.
        """
        file = _locate(path)
        return cls.from_json(_read(file), file=str(file), ignore=ignore)

    @classmethod
    def from_json(cls, text: bytes, *, file: str, ignore: Collection[str] = ()) -> MiniMaxConfig:
        """Read the text of a config.json.

        Args:
            text: JSON in UTF-8.
            file: where it came from, for messages.
            ignore: as in `from_dict`.

        Raises:
            ConfigError: as `from_dict`, and when it is not JSON.
        """
        return cls.from_dict(_parse(text, file), file=file, ignore=ignore)

    def to_dict(self) -> dict[str, Any]:
        """The contents of config.json: the union of both forms, as vLLM, SGLang and transformers expect it."""
        return attributes.write(self)


def _locate(path: str | Path) -> Path:
    """The config.json that `path` means; only a path that does not exist can be the name of a hub repository."""
    text, local = str(path), path_of(path)
    if text.startswith(_HUB):
        return _download(text.removeprefix(_HUB).partition("?")[0].rstrip("/"))
    if is_folder(local):
        local = local / CONFIG_NAME
        _require_own(local)
    elif is_hub_id(text) and not os.path.lexists(local):
        return _download(text)
    if not is_file(local):
        what = "not a regular file" if os.path.lexists(local) else "no such file"
        how = f"copy the model's {CONFIG_NAME} into it, or {_FORMS}" if is_folder(path_of(path)) else _FORMS
        raise ConfigError(Problem(what=what, file=str(local), remedy=did_you_mean(Path(path), how)))
    return local


def _require_own(file: Path) -> None:
    """Check that the config.json of a folder, if there is one, lies in it."""
    try:
        if os.path.lexists(file):
            require_inside(file, file.parent)
    except FormatError as error:
        raise ConfigError(error.problems) from error


def is_hub_id(text: str) -> bool:
    """Whether a text that is no path of this machine has the form of a hub repository's name: `org/name`."""
    return text.count("/") == 1 and not text.startswith((".", "/", "~")) and all(text.split("/"))


def _download(repository: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        remedy = "pip install 'minimax_jax[hub]' to read from the hub, or " + _FORMS
        raise ConfigError(Problem(what="no such folder", file=repository, remedy=remedy)) from error
    try:
        name, _, revision = repository.partition("@")
        return Path(hf_hub_download(name, CONFIG_NAME, revision=revision or None))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        what = "neither a local folder nor a hub repository that can be reached"
        raise ConfigError(Problem(what=what, file=repository, got=str(error), remedy=_FORMS)) from error


def _read(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            text = stream.read(MOST_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError(Problem(what=_UNREADABLE, file=str(file), got=str(error))) from error
    if len(text) > MOST_CONFIG_BYTES:
        raise _damaged(str(file), f"more than {MOST_CONFIG_BYTES} bytes")
    return text


def _parse(text: bytes, file: str) -> dict[str, Any]:
    """The JSON object in a text; what other readers of it could read differently is refused."""
    try:
        raw = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, error) from error
    if not isinstance(raw, dict):
        raise _damaged(file, type(raw).__name__, what=f"{CONFIG_NAME} is not a JSON object")
    return raw


def _damaged(file: str, why: object, *, what: str = _UNREADABLE) -> ConfigError:
    return ConfigError(Problem(what=what, file=file, got=str(why), remedy=_AGAIN))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"named twice: {', '.join(map(repr, twice))}")
    return dict(pairs)


def _refuse(constant: str) -> Never:
    raise ValueError(f"{constant} is not JSON")
