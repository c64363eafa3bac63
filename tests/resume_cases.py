"""Conversions that die at named moments, and what is done of them then."""

import pytest

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.io import orbax_rows, points
from minimax_jax.io.folder import workshop_of
from minimax_jax.jobs import orbax_plan
from torch_bridge import chunks, dcp_items

OPTIONS = {
    "orbax": {"to": "orbax", "dtype": "fp8", "workers": 2},
    "maxtext": {"to": "maxtext", "workers": 2},
    "dcp": {"to": "dcp", "dtype": "fp8", "workers": 2},
}
NOTED_BY_ORBAX = ("_CHECKPOINT_METADATA", "commit_success.txt")
"""What Orbax writes of time and place."""


class Killed(BaseException):
    """Stands for the death of the process."""


def dies_at(monkeypatch, count, name=None):
    """Die when a moment, or any, is reached for the `count`-th time, and all threads at whatever moment comes next."""
    left = [count]

    def die(reached):
        if name in (None, reached) or left[0] <= 0:
            left[0] -= 1
        if left[0] <= 0:
            raise Killed

    monkeypatch.setattr(points, "on_reach", die)


def count_units(monkeypatch):
    """A list that gets an item for each unit that is done, and not found done."""
    made = []
    monkeypatch.setattr(points, "on_reach", lambda name: made.append(name) if name == "before the journal" else None)
    return made


# ---- targets in other files than safetensors


def streamed_source(folder):
    """A checkpoint of one layer, in several files."""
    synthetic.synthesize(folder, synthetic.config(layers=1, experts=6), shard_bytes=50_000)
    return folder


def make_small(monkeypatch):
    """Several units, chunks and files; some units share a chunk of block scales, some lie in two files."""
    monkeypatch.setattr(orbax_plan, "_UNIT_BYTES", 1)
    monkeypatch.setattr(orbax_rows, "CHUNK_BYTES", 30_000)
    monkeypatch.setattr(chunks, "_UNIT_BYTES", 40_000)
    monkeypatch.setattr(dcp_items, "DEFAULT_SHARD_BYTES", 100_000)


def undisturbed(source, made, names):
    """The files of undisturbed runs, by target, and how many units they take."""
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        units = {name: convert_and_count(patch, source, made / name, name) for name in names}
    return {name: (files(made / name), units[name]) for name in names}


def convert_and_count(patch, source, out, name):
    made = count_units(patch)
    mj.convert(source, out, **OPTIONS[name])
    return len(made)


def files(folder):
    """Every file in a folder and below it, by path, but for what Orbax notes of time and place."""
    found = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
    return {name: file.read_bytes() for name, file in found.items() if name not in NOTED_BY_ORBAX}


def convert(source, out, name, **options):
    return mj.convert(source, out, **(OPTIONS[name] | options))


def stop(source, out, monkeypatch, name, count, moment="after the journal", **options):
    """Run a conversion that dies at a moment; its threads end what they have begun, up to the next one."""
    with monkeypatch.context() as patch:
        dies_at(patch, count, moment)
        with pytest.raises(Killed):
            convert(source, out, name, **options)


def goes_on(source, out, monkeypatch, name, whole, **options):
    """Run it to its end, and hold it against the undisturbed run: how many units were done."""
    with monkeypatch.context() as patch:
        made = count_units(patch)
        convert(source, out, name, **options)
    assert files(out) == whole[name][0]
    assert [path.name for path in out.parent.iterdir() if "partial" in path.name] == []
    return len(made)


def in_workshop(out, pattern):
    return sorted((workshop_of(out) / out.name).glob(pattern))


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])
