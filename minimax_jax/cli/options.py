"""Types of arguments, and the options that several commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from minimax_jax.errors import CheckpointError
from minimax_jax.jobs.budget import DEFAULT_WORKERS
from minimax_jax.jobs.streamed import streamed_targets

TARGETS, DTYPES = ("native", "hf", "hf-fp8", "transformers-v5"), ("bf16", "f32", "fp8")

_DIGITS = 9
"""Most that a token id has: no vocabulary comes near."""

_SIZES = {"": 1, "B": 1, **{f"{p}B": 1000**n for n, p in enumerate("KMGT", 1)}}
_SIZES |= {f"{p}IB": 1024**n for n, p in enumerate("KMGT", 1)}


class Size(click.ParamType[int]):
    """A positive number of bytes such as `4GiB`, `5GB` or `300000000`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes."""
        if isinstance(value, int):
            return value
        number = value.rstrip("kKmMgGtTiIbB ")
        try:
            nbytes = int(float(number) * _SIZES[value[len(number) :].strip().upper()])
        except (KeyError, ValueError, OverflowError):
            nbytes = 0
        return nbytes if nbytes > 0 else self.fail(f"{value!r} is not a size such as 4GiB, 5GB or 300MB", param, ctx)


class Place(click.ParamType[str | Path]):
    """A path of this machine, or a URL such as `hf://org/name`, which a path would take a slash from."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | Path:
        """The URL as text, all else as a path."""
        return value if isinstance(value, Path) or "://" in value else Path(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Files and folders of this machine, as the shell completes them."""
        return [CompletionItem(incomplete, type="file")]


class MeshShape(click.ParamType[dict[str, int]]):
    """Sizes of mesh axes such as `expert=2,tensor=2`."""

    name = "mesh"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, int]:
        """Sizes by name."""
        if isinstance(value, dict):
            return value
        axes = [axis.partition("=") for axis in value.split(",")]
        sizes = {name.strip(): int(size) if size.strip().isdecimal() else 0 for name, _, size in axes}
        if len(sizes) < len(axes) or not all(name.isidentifier() and size for name, size in sizes.items()):
            self.fail(f"{value!r} is not a mesh such as expert=2,tensor=2", param, ctx)
        return sizes


class Ids(click.ParamType[tuple[int, ...]]):
    """Token ids such as `1,2,3`."""

    name = "ids"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """The ids."""
        if isinstance(value, tuple):
            return value
        ids = [text.strip() for text in value.split("," if "," in value else None)]
        if not ids or not all(text.isascii() and text.isdecimal() and len(text) <= _DIGITS for text in ids):
            self.fail(f"{value!r} is not a list of token ids such as 1,2,3", param, ctx)
        return tuple(map(int, ids))


def _sample(context: click.Context, parameter: click.Parameter, sample: str | None) -> str | None:
    """`--sample`, which must be a share or a number."""
    from minimax_jax.jobs.sample import require_sample

    try:
        if sample is not None:
            require_sample(sample)
    except CheckpointError as error:
        raise click.BadParameter(str(error), context, parameter) from error
    return sample


def _fitting(context: click.Context, parameter: click.Parameter, dtype: str | None) -> str | None:
    """`--dtype`, which must not contradict `--to`."""
    from minimax_jax.jobs.targets import target

    try:
        target(context.params["to"], dtype)
    except CheckpointError as error:
        raise click.BadParameter(str(error), context, parameter) from error
    return dtype


PATH = click.Path(path_type=Path)
PLACE = Place()

ignore = click.option(
    "--ignore-attribute", "ignore", multiple=True, metavar="NAME", help="An unknown attribute of config.json to ignore."
)
leave_out = click.option(
    "--leave-out", multiple=True, metavar="PREFIX", help="Leave out tensors whose names begin with these parts."
)
sample = click.option("--sample", callback=_sample, metavar="N%|N", help="Look at a part only, always the same.")
shard_size = click.option(
    "--shard-size", "shard_bytes", type=Size(), default="5GB", show_default=True, help="Most data in one file."
)
private = click.option("--private", is_flag=True, help="Make a new repository private.")
_AS_MANY = "one for each core, 2 to 8"
workers = click.option(
    "--workers", type=click.IntRange(min=1), default=DEFAULT_WORKERS, show_default=_AS_MANY, help="Threads."
)
_workers_within = click.option(
    "--workers", type=click.IntRange(min=1), show_default=f"{_AS_MANY}, as the memory allows", help="Threads."
)


def conversion(function: Callable[..., None]) -> Callable[..., None]:
    """The options of what to convert to, and within which bounds."""
    targets = [*TARGETS, *streamed_targets()]
    options = (
        click.option("--to", type=click.Choice(targets), default="native", show_default=True, is_eager=True),
        click.option("--dtype", type=click.Choice(DTYPES), callback=_fitting, help="Of the block-scaled weights."),
        click.option("--max-memory", "max_memory_bytes", type=Size(), default="4GiB", show_default=True),
        shard_size,
        _workers_within,
        ignore,
        leave_out,
    )
    return functools.reduce(lambda decorated, option: option(decorated), reversed(options), function)
