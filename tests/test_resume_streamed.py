"""Conversions to Orbax, MaxText and torch's DCP that are killed: they go on, redo little, and end in the same bytes."""

import json
import os
import shutil

import pytest
from resume_cases import (
    NOTED_BY_ORBAX,
    OPTIONS,
    convert,
    flip,
    goes_on,
    in_workshop,
    make_small,
    stop,
    streamed_source,
    truncate,
    undisturbed,
)

import minimax_jax as mj
from minimax_jax.errors import JobError
from minimax_jax.io import points
from minimax_jax.io.folder import workshop_of
from minimax_jax.io.journal import journals


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return streamed_source(tmp_path_factory.mktemp("source") / "hf")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    make_small(monkeypatch)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    return undisturbed(source, tmp_path_factory.mktemp("whole"), OPTIONS)


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


@pytest.mark.parametrize("damage", [flip, truncate, lambda file: file.unlink()])
@pytest.mark.parametrize("name", ["orbax", "dcp"])
def test_what_is_damaged_meanwhile_is_done_again(source, whole, tmp_path, monkeypatch, name, damage):
    out, total = tmp_path / "out", whole[name][1]
    stop(source, out, monkeypatch, name, total)
    damage(in_workshop(out, PIECES[name])[0])
    made = goes_on(source, out, monkeypatch, name, whole)
    assert 0 < made < total // 2


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
