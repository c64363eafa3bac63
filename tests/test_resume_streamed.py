"""Conversions to Orbax, MaxText and torch's DCP that are killed: they go on, redo little, and end in the same bytes."""

import errno
import json
import os
import shutil

import pytest
from resume_cases import Killed, count_units, dies_at

import minimax_jax as mj
from minimax_jax import synthetic
from minimax_jax.errors import JobError
from minimax_jax.io import orbax_rows, points
from minimax_jax.io.folder import workshop_of
from minimax_jax.io.journal import journals
from minimax_jax.jobs import orbax_plan
from torch_bridge import chunks, dcp_items

OPTIONS = {
    "orbax": {"to": "orbax", "dtype": "fp8", "workers": 2},
    "maxtext": {"to": "maxtext", "workers": 2},
    "dcp": {"to": "dcp", "dtype": "fp8", "workers": 2},
}
NOTED_BY_ORBAX = ("_CHECKPOINT_METADATA", "commit_success.txt")
"""What Orbax writes of time and place."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "hf"
    synthetic.synthesize(folder, synthetic.config(layers=1, experts=6), shard_bytes=50_000)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Several units, chunks and files; some units share a chunk of block scales, some lie in two files."""
    monkeypatch.setattr(orbax_plan, "_UNIT_BYTES", 1)
    monkeypatch.setattr(orbax_rows, "CHUNK_BYTES", 30_000)
    monkeypatch.setattr(chunks, "_UNIT_BYTES", 40_000)
    monkeypatch.setattr(dcp_items, "DEFAULT_SHARD_BYTES", 100_000)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """The files of undisturbed runs, by target, and how many units they take."""
    made = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        small.__wrapped__(patch)
        units = {name: convert_and_count(patch, source, made / name, name) for name in OPTIONS}
    return {name: (files(made / name), units[name]) for name in OPTIONS}


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


MOMENTS = {
    "orbax": {"before an array is laid out": 3},
    "maxtext": {"before an array is laid out": 3},
    "dcp": {},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_kill_at_every_named_moment_is_survived(source, whole, tmp_path, monkeypatch, name):
    out, total = tmp_path / "out", whole[name][1]
    of_all = {"before a write": 5, "before the journal": 9, "after the journal": total // 3}
    for moment, count in (MOMENTS[name] | of_all).items():
        stop(source, out, monkeypatch, name, count, moment)
        assert not out.exists()
    at_the_end = ("before the index",) if name == "dcp" else ()
    for moment in (*at_the_end, "before a JSON file takes its name", "before the rename"):
        stop(source, out, monkeypatch, name, 1, moment)
        assert not out.exists()
    assert goes_on(source, out, monkeypatch, name, whole) == 0


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_only_what_was_not_done_is_done(source, whole, tmp_path, monkeypatch, name, share):
    total = whole[name][1]
    count = max(1, int(share * total))
    stop(source, tmp_path / "out", monkeypatch, name, count)
    made = goes_on(source, tmp_path / "out", monkeypatch, name, whole)
    assert total - count - OPTIONS[name]["workers"] < made <= total - count


@pytest.mark.parametrize("name", OPTIONS)
def test_other_options_and_targets_are_refused_and_can_be_thrown_away(source, whole, tmp_path, monkeypatch, name):
    out = tmp_path / "out"
    stop(source, out, monkeypatch, name, 20)
    for other in ({"dtype": "f32"}, {"to": "native", "dtype": "bf16"}, {"to": "maxtext-unscanned", "dtype": "bf16"}):
        with pytest.raises(JobError, match="target differs") as caught:
            mj.convert(source, out, **other | ({"to": OPTIONS[name]["to"]} if "to" not in other else {}))
        assert "--restart" in caught.value.problems[0].remedy
    (journal,) = journals(workshop_of(out))
    ours, rest = journal.read_text().split("\n", 1)
    journal.write_text(json.dumps(json.loads(ours) | {"version": "0.0.1"}) + "\n" + rest)
    with pytest.raises(JobError, match="version differs"):
        convert(source, out, name)
    assert goes_on(source, out, monkeypatch, name, whole, restart=True) == whole[name][1]


@pytest.mark.parametrize("name", ["orbax", "dcp"])
def test_a_source_that_has_changed_is_refused(source, tmp_path, monkeypatch, name):
    shutil.copytree(source, tmp_path / "hf")
    stop(tmp_path / "hf", tmp_path / "out", monkeypatch, name, 20)
    victim = sorted((tmp_path / "hf").glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes())
    with pytest.raises(JobError, match=r"source file .* differs"):
        convert(tmp_path / "hf", tmp_path / "out", name)


@pytest.mark.parametrize("name", OPTIONS)
def test_what_the_disk_lost_is_found_before_the_destination_appears(source, whole, tmp_path, monkeypatch, name):
    out, left = tmp_path / "out", [whole[name][1]]

    def damage(reached):
        if reached == "before the journal":
            left[0] -= 1
            if left[0] == 0:
                flip(in_workshop(out, PIECES[name])[0])

    with monkeypatch.context() as patch:
        patch.setattr(points, "on_reach", damage)
        with pytest.raises(JobError, match="disk does not hold what was written"):
            convert(source, out, name, check="all")
    assert not out.exists()
    assert 0 < goes_on(source, out, monkeypatch, name, whole, check="all") < 10


PIECES = {
    "orbax": "state/model.layers.0.mlp.experts.down_projs/0.*",
    "maxtext": "state/*embedding/0.*",
    "dcp": "__0_1_0.distcp",
}


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, truncate, lambda file: file.unlink()])
@pytest.mark.parametrize("name", ["orbax", "dcp"])
def test_what_is_damaged_meanwhile_is_done_again(source, whole, tmp_path, monkeypatch, name, damage):
    out, total = tmp_path / "out", whole[name][1]
    stop(source, out, monkeypatch, name, total)
    damage(in_workshop(out, PIECES[name])[0])
    made = goes_on(source, out, monkeypatch, name, whole)
    assert 0 < made < total // 2


# ---- torch's DCP alone


def noted(out):
    (journal,) = journals(workshop_of(out))
    return journal, journal.read_text().splitlines(keepends=True)


def test_items_that_lie_elsewhere_than_their_turn_is_are_written_again(source, whole, tmp_path, monkeypatch):
    """A record that is true of the bytes, but not of where they belong, is not believed."""
    out, total = tmp_path / "out", whole["dcp"][1]
    stop(source, out, monkeypatch, "dcp", total)
    journal, lines = noted(out)
    moved = json.loads(lines[5])
    (file, offset, length), *rest = moved["items"]
    content = in_workshop(out, file)[0].read_bytes()[offset : offset + length]
    last = in_workshop(out, "*.distcp")[-1]
    with in_workshop(out, file)[0].open("ab") as stream:
        moved["items"] = [[file, stream.tell(), length], *rest]
        stream.write(content)
    journal.write_text("".join([*lines[:5], json.dumps(moved) + "\n", *lines[6:]]))
    last.write_bytes(last.read_bytes() + b"more than belongs there")
    assert goes_on(source, out, monkeypatch, "dcp", whole) == 1


@pytest.mark.parametrize(
    "items", [None, 7, [], [["../../x", 0, 1]], [["__0_0_0.distcp", -1, 8]], [["__0_0_0.distcp", 0, 2**60]], [[1]]]
)
def test_a_record_that_makes_no_sense_costs_its_unit(source, whole, tmp_path, monkeypatch, items):
    out, total = tmp_path / "out", whole["dcp"][1]
    stop(source, out, monkeypatch, "dcp", total)
    journal, lines = noted(out)
    journal.write_text("".join([lines[0], json.dumps(json.loads(lines[1]) | {"items": items}) + "\n", *lines[2:]]))
    assert goes_on(source, out, monkeypatch, "dcp", whole) == 1


def test_another_torch_and_other_units_are_another_job(source, tmp_path, monkeypatch):
    stop(source, tmp_path / "out", monkeypatch, "dcp", 5)
    with monkeypatch.context() as patch:
        patch.setattr("torch.__version__", "1.0")
        with pytest.raises(JobError, match="its torch differs"):
            convert(source, tmp_path / "out", "dcp")
    monkeypatch.setattr(chunks, "_UNIT_BYTES", 50_000)
    with pytest.raises(JobError, match="division into files differs"):
        convert(source, tmp_path / "out", "dcp")


def test_a_disk_that_fails_is_an_error_and_no_more(source, whole, tmp_path, monkeypatch):
    """torch is in C++ when it writes."""
    real, left = os.pwrite, [40]

    def full(fd, data, offset):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(JobError, match="file cannot be written"):
            convert(source, tmp_path / "out", "dcp")
    assert not (tmp_path / "out").exists()
    assert goes_on(source, tmp_path / "out", monkeypatch, "dcp", whole) < whole["dcp"][1]


# ---- Orbax alone


def test_chunks_that_several_units_share_are_mended(source, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    stop(source, out, monkeypatch, "orbax", whole["orbax"][1])
    (chunk,) = in_workshop(out, "state/model.layers.0.mlp.experts.down_projs_scale_inv/0.*")
    truncate(chunk)
    chunk.with_name(chunk.name + ".__lock").write_bytes(b"half")
    assert goes_on(source, out, monkeypatch, "orbax", whole) == 6  # experts


@pytest.mark.parametrize("file", ["_CHECKPOINT_METADATA", "state/lm_head.weight/.zarray"])
def test_a_layout_that_is_damaged_is_made_anew(source, whole, tmp_path, monkeypatch, file):
    out, total = tmp_path / "out", whole["orbax"][1]
    stop(source, out, monkeypatch, "orbax", total // 2)
    truncate(*in_workshop(out, file))
    stop(source, out, monkeypatch, "orbax", 3, "before an array is laid out")
    stop(source, out, monkeypatch, "orbax", 5)
    assert total - 7 < goes_on(source, out, monkeypatch, "orbax", whole) <= total - 5


def test_what_orbax_notes_is_the_same_but_for_time_and_place(source, tmp_path, monkeypatch):
    stop(source, tmp_path / "out", monkeypatch, "orbax", 5)
    for name in ("out", "other"):
        convert(source, tmp_path / name, "orbax", check="none")
    one, other = (json.loads((tmp_path / name / NOTED_BY_ORBAX[0]).read_text()) for name in ("out", "other"))
    assert {key for key in one if one[key] != other[key]} == {"init_timestamp_nsecs", "commit_timestamp_nsecs"}
    assert one.keys() == other.keys()


def test_threads_and_memory_may_change(source, whole, tmp_path, monkeypatch):
    options = {"workers": 3, "max_memory_bytes": 300 * 2**20}
    stop(source, tmp_path / "out", monkeypatch, "orbax", 20)
    assert goes_on(source, tmp_path / "out", monkeypatch, "orbax", whole, **options) <= whole["orbax"][1] - 20


def test_the_report_counts_scales_of_both_runs(source, tmp_path, monkeypatch):
    mj.convert(source, tmp_path / "native")
    undisturbed = convert(tmp_path / "native", tmp_path / "undisturbed", "orbax")
    stop(tmp_path / "native", tmp_path / "out", monkeypatch, "orbax", 20)
    resumed = convert(tmp_path / "native", tmp_path / "out", "orbax")
    assert undisturbed.kept_scales == resumed.kept_scales > 0 and resumed.fresh_scales == ()


def test_the_layout_and_every_chunk_are_flushed_before_a_record_speaks_of_them(source, tmp_path, monkeypatch):
    import tensorstore

    assert tensorstore.Context()["file_io_sync"].to_json() is True  # what writes the chunks
    flushed, real, seen = set(), os.fsync, []

    def fsync(fd):
        flushed.add((os.fstat(fd).st_dev, os.fstat(fd).st_ino))
        real(fd)

    def look(reached):
        if reached == "before the journal" and not seen:
            laid_out = (file for file in in_workshop(tmp_path / "out", "**/*") if not file.name[0].isdigit())
            seen.extend((file.name, (file.stat().st_dev, file.stat().st_ino) in flushed) for file in laid_out)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(points, "on_reach", look)
    convert(source, tmp_path / "out", "orbax", workers=1)
    assert {"_METADATA", ".zarray", "commit_success.txt", "state"} <= {name for name, _ in seen}
    assert [name for name, is_flushed in seen if not is_flushed] == []
