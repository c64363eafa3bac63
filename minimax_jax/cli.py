"""The command line: parse, call, show. No logic, and no heavy import before a command runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from minimax_jax import console
from minimax_jax.errors import CheckpointError
from minimax_jax.jobs.streamed import streamed_targets

EXIT_DIFFERENT, EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 3, 130, 143

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


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="minimax_jax")
def cli() -> None:
    """Move MiniMax-M2 checkpoints between Hugging Face FP8, JAX and NeMo AutoModel, exact to the bit.

    Exit codes: 0 good, 1 a difference was found, 2 usage, 3 bad input, 130 interrupted, 143 terminated.
    """


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command with `--json`, and turn the library's errors into exit codes."""

    @functools.wraps(function)
    def guarded(*, as_json: bool, **options: Any) -> None:
        with console.stoppable():
            try:
                function(as_json=as_json, **options)
            except CheckpointError as error:
                console.show_error(error, as_json=as_json)
                raise click.exceptions.Exit(EXIT_BAD_INPUT) from error
            except KeyboardInterrupt as error:
                console.show_interrupt(error, as_json=as_json)
                terminated = isinstance(error, console.Terminated)
                raise click.exceptions.Exit(EXIT_TERMINATED if terminated else EXIT_INTERRUPTED) from error

    with_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")(guarded)
    return cli.command()(with_json)


class Place(click.ParamType[str | Path]):
    """A path of this machine, or a URL such as `hf://org/name`, which a path would take a slash from."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | Path:
        """The URL as text, all else as a path."""
        return value if isinstance(value, Path) or "://" in value else Path(value)


_PATH = click.Path(path_type=Path)
_PLACE = Place()
_quiet = click.option("-q", "--quiet", is_flag=True, help="No progress.")
_ignore = click.option(
    "--ignore-attribute", "ignore", multiple=True, metavar="NAME", help="An unknown attribute of config.json to ignore."
)


_TARGETS, _DTYPES = ("native", "hf", "hf-fp8"), ("bf16", "f32", "fp8")


def _fitting(context: click.Context, parameter: click.Parameter, dtype: str | None) -> str | None:
    """`--dtype`, which must not contradict `--to`."""
    from minimax_jax.jobs import front

    to = context.params["to"]
    try:
        front.target("native" if to in streamed_targets() else to, dtype)
    except CheckpointError as error:
        raise click.BadParameter(str(error), context, parameter) from error
    return dtype


def _sample(context: click.Context, parameter: click.Parameter, sample: str | None) -> str | None:
    """`--sample`, which must be a share or a number."""
    from minimax_jax.jobs.sample import require_sample

    try:
        if sample is not None:
            require_sample(sample)
    except CheckpointError as error:
        raise click.BadParameter(str(error), context, parameter) from error
    return sample


def _conversion_options(function: Callable[..., None], *, targets: Sequence[str] = _TARGETS) -> Callable[..., None]:
    options = (
        click.option("--to", type=click.Choice(targets), default="native", show_default=True, is_eager=True),
        click.option("--dtype", type=click.Choice(_DTYPES), callback=_fitting, help="Of the block-scaled weights."),
        click.option("--max-memory", "max_memory_bytes", type=Size(), default="4GiB", show_default=True),
        click.option("--shard-size", "shard_bytes", type=Size(), default="5GB", show_default=True),
        click.option("--workers", type=click.IntRange(min=1), default=2, show_default=True, help="Threads."),
        _ignore,
    )
    return functools.reduce(lambda decorated, option: option(decorated), reversed(options), function)


@_command
@click.argument("path", type=_PLACE)
@_ignore
def inspect(path: str | Path, ignore: tuple[str, ...], as_json: bool) -> None:
    """What a checkpoint is, from its headers; all that is wrong with it otherwise."""
    from minimax_jax.jobs import front, report

    seen = front.inspect(path, ignore=ignore)
    console.show_json(report.inspection_json(seen)) if as_json else console.show(report.inspection_view(seen))


@_command
@click.argument("src", type=_PLACE)
@_conversion_options
def plan(src: str | Path, as_json: bool, **options: Any) -> None:
    """What a conversion would read and write, and the memory it needs; nothing is written."""
    from minimax_jax.jobs import front, report

    made = front.plan(src, **options)
    console.show_json(report.plan_json(made)) if as_json else console.show(report.plan_view(made))


@_command
@click.argument("src", type=_PLACE)
@click.argument("dst", type=_PATH)
@functools.partial(_conversion_options, targets=[*_TARGETS, *streamed_targets()])
@click.option(
    "--check",
    type=click.Choice(["none", "sample", "all"]),
    default="sample",
    show_default=True,
    help="What to read back from the disk at the end.",
)
@click.option("--restart", is_flag=True, help="Throw away what an unfinished run left, instead of going on with it.")
@click.option("--distributed", is_flag=True, help="Share the work with the other processes of jax.distributed.")
@_quiet
def convert(src: str | Path, dst: Path, quiet: bool, as_json: bool, **options: Any) -> None:
    """Convert the checkpoint SRC into the new folder DST, streaming. The same command again goes on after a stop.

    \b
    minimax-jax convert MiniMax-M2 m2-native                         FP8 to bf16 grouped experts
    minimax-jax convert MiniMax-M2 m2-native-fp8 --dtype fp8         grouped experts that stay FP8
    minimax-jax convert m2-native m2-back --to hf-fp8                and back, byte for byte
    """  # noqa: D301 - click wants the character, not the escape
    from minimax_jax.jobs import front, report

    with console.progress("convert", quiet=quiet) as listener:
        done = front.convert(src, dst, progress=listener, **options)
    console.show_json(report.report_json(done)) if as_json else console.show(report.report_view(done))


@_command
@click.argument("first", type=_PLACE)
@click.argument("second", type=_PLACE, required=False)
@click.option("--by", type=click.Choice(["value", "bytes"]), default="value", show_default=True)
@click.option("--sample", callback=_sample, metavar="N%|N", help="Look at a part only, always the same.")
@click.option("--certificate", type=_PATH, help="Hold FIRST against this certificate, byte for byte.")
@click.option("-o", "--output", type=_PATH, help="Write the certificate to this file.")
@click.option("--workers", type=click.IntRange(min=1), default=2, show_default=True, help="Threads.")
@_ignore
@_quiet
def verify(first: str | Path, second: str | Path | None, quiet: bool, as_json: bool, **options: Any) -> None:
    """Compare two checkpoints, in any two layouts, and certify every tensor; or digest one.

    By value, FP8 weights are dequantised and compared in the less precise dtype of the two; by bytes, dtypes, codes and
    scales must be the same. An earlier certificate tells any bit that has changed since. Exits with 1 on a difference.
    """
    from minimax_jax.jobs import front, report
    from minimax_jax.jobs.certificate import certificate

    if second is not None and options["certificate"] is not None:
        raise click.UsageError("--certificate takes one checkpoint")
    with console.progress("verify", quiet=quiet) as listener:
        seen = front.verify(first, second, progress=listener, **options)
    console.show_json(certificate(seen)) if as_json else console.show(report.verification_view(seen))
    if not seen.good:
        raise click.exceptions.Exit(EXIT_DIFFERENT)


@_command
@click.argument("dst", type=_PATH)
@click.option("--real", is_flag=True, help="The published sizes; a tiny model otherwise.")
@click.option("--layers", type=click.IntRange(min=1), help="Instead of the size's own.")
@click.option("--experts", type=click.IntRange(min=1), help="Instead of the size's own.")
@click.option("--dtype", type=click.Choice(_DTYPES), default="fp8", show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--shard-size", "shard_bytes", type=Size(), default="5GB", show_default=True)
@click.option("--sparse", is_flag=True, help="Headers alone: files of full size that take no room, and read as zeros.")
@_quiet
def synth(
    dst: Path,
    real: bool,
    layers: int | None,
    experts: int | None,
    dtype: str,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Write a made-up checkpoint in the exact published layout into the new folder DST.

    \b
    minimax-jax synth tiny                                  under 1 MB
    minimax-jax synth layer --real --layers 1               one real layer, 3.6 GB
    minimax-jax synth whole --real --sparse                 all 230 GB, in a few MB of disk
    """  # noqa: D301 - click wants the character, not the escape
    from minimax_jax import synthetic
    from minimax_jax.jobs import front, report

    config = synthetic.config(real=real, layers=layers, experts=experts)
    with console.progress("synth", quiet=quiet) as listener:
        synthetic.synthesize(dst, config, scaled=front.STORED[dtype], progress=listener, **options)
    seen = front.inspect(dst)
    console.show_json(report.inspection_json(seen)) if as_json else console.show(report.inspection_view(seen))


class Ids(click.ParamType[tuple[int, ...]]):
    """Token ids such as `1,2,3`."""

    name = "ids"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """The ids."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(text) for text in value.replace(",", " ").split())
        except ValueError:
            return self.fail(f"{value!r} is not a list of token ids such as 1,2,3", param, ctx)


@_command
@click.argument("path", type=_PLACE)
@click.option("--prompt-ids", "prompts", type=Ids(), multiple=True, required=True, help="Once for each prompt.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0: the likeliest.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--dtype", type=click.Choice(_DTYPES), default="fp8", show_default=True, help="Of weights on the device.")
@_ignore
@_quiet
def generate(path: str | Path, quiet: bool, as_json: bool, **options: Any) -> None:
    """Continue prompts of token ids with the model in PATH, over all devices of this machine: a smoke test.

    \b
    minimax-jax generate m2-native --prompt-ids 1,2,3 --prompt-ids 7,8
    """  # noqa: D301 - click wants the character, not the escape
    from minimax_jax.models.smoke import smoke_test

    with console.progress("load", quiet=quiet) as listener:
        rows = smoke_test(path, progress=listener, **options)
    console.show_json({"tokens": rows}) if as_json else console.show(",".join(map(str, row)) for row in rows)


@_command
@click.argument("folder", type=_PATH, default="minimax-demo")
def demo(folder: Path, as_json: bool) -> None:
    """Show it all on a tiny checkpoint in FOLDER: FP8 to native and back, byte for byte, with the certificate."""
    from minimax_jax import demo as demonstration
    from minimax_jax.jobs import report
    from minimax_jax.jobs.certificate import certificate

    seen = demonstration.run(folder, say=lambda line: click.echo(line, err=as_json))
    console.show_json(certificate(seen)) if as_json else console.show(report.certificate_view(seen))
    if not seen.good:
        raise click.exceptions.Exit(EXIT_DIFFERENT)


def main() -> None:
    """Entry point of `minimax-jax`."""
    cli()
