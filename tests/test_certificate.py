"""Digests of tensors and of whole checkpoints, and the certificate of a verification."""

import hashlib
import json
from pathlib import Path

import folders
import pytest
from command_line import run

import minimax_jax as mj
from minimax_jax.errors import JobError
from minimax_jax.jobs.certificate import certificate

EMBED = "model.embed_tokens.weight"


def test_digests_are_sha256_of_what_the_safetensors_library_reads(forms):
    seen = mj.verify(forms / "hf")
    assert seen.comparisons == () and seen.good
    (digested,) = seen.checkpoints
    tensors = folders.stored(forms / "hf")
    expected = {key: (dtype, shape, hashlib.sha256(data).hexdigest()) for key, (dtype, shape, data) in tensors.items()}
    assert {d.key: (d.dtype, list(d.shape), d.sha256) for d in digested.digests} == expected
    assert len(digested.digests) == len(expected)
    assert digested.nbytes == sum(len(data) for _, _, data in tensors.values())
    lines = sorted(f"{key} {dtype} {shape} {digest}\n" for key, (dtype, shape, digest) in expected.items())
    assert digested.sha256 == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_digests_do_not_depend_on_layout_sharding_and_workers(forms):
    fp8 = {name: mj.verify(forms / name).checkpoints[0] for name in ("hf", "one-file", "fp8")}
    assert len({digested.sha256 for digested in fp8.values()}) == 1
    assert len({digested.digests for digested in fp8.values()}) == 1
    assert fp8["fp8"].layout == "native" and fp8["hf"].layout == "hf"
    assert (
        mj.verify(forms / "bf16", workers=5).checkpoints[0].digests
        == mj.verify(forms / "hf-bf16").checkpoints[0].digests
    )
    assert mj.verify(forms / "bf16").checkpoints[0].sha256 != fp8["hf"].sha256


def test_the_certificate_is_complete_and_the_same_each_time(forms, tmp_path):
    seen = mj.verify(forms / "hf", forms / "bf16", by="bytes", output=tmp_path / "a.json")
    mj.verify(forms / "hf", forms / "bf16", by="bytes", workers=4, output=tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    found = json.loads((tmp_path / "a.json").read_bytes())
    assert found == json.loads(json.dumps(certificate(seen)))
    hf, bf16 = folders.stored(forms / "hf"), folders.stored(forms / "hf-bf16")
    scaled = folders.scaled_weights(forms / "hf")
    assert found["good"] is False and found["by"] == "bytes"
    assert found["weights"] == {"identical": len(bf16) - len(scaled), "equal": len(scaled), "different": 0}
    assert {difference["key"] for difference in found["differences"]} == scaled
    assert {difference["relation"] for difference in found["differences"]} == {"equal"}
    for told, tensors, path in zip(found["checkpoints"], (hf, bf16), ("hf", "bf16"), strict=True):
        assert told["path"] == str(forms / path) and told["tensors"] == len(tensors)
        assert told["bytes"] == sum(len(data) for _, _, data in tensors.values())
    assert set(found["tensors"]) == set(hf)
    for key, facts in found["tensors"].items():
        each = [fact_of(hf, key), fact_of(bf16, key)]
        assert facts == (each[0] if each[0] == each[1] else each)


def fact_of(tensors, key):
    if key not in tensors:
        return None
    dtype, shape, data = tensors[key]
    return {"dtype": dtype, "shape": shape, "sha256": hashlib.sha256(data).hexdigest()}


def test_the_certificate_of_one_checkpoint_compares_nothing(forms):
    found = certificate(mj.verify(forms / "hf"))
    assert found["weights"] is None and found["differences"] == [] and len(found["checkpoints"]) == 1
    assert found["tensors"][EMBED] == fact_of(folders.stored(forms / "hf"), EMBED)


@pytest.mark.parametrize("name", ["nowhere/certificate.json", "folder"])
def test_a_certificate_that_cannot_be_written_stops_it_before_the_work(forms, tmp_path, name):
    (tmp_path / "folder").mkdir()
    moments = []
    with pytest.raises(JobError, match="certificate cannot be written") as caught:
        mj.verify(forms / "hf", output=tmp_path / name, progress=moments.append)
    assert caught.value.problems[0].file == str(tmp_path / name) and not moments


@pytest.mark.parametrize("content", [b"notes", b'{"format": "another"}', b"{}"])
def test_no_other_file_is_overwritten_by_a_certificate(forms, tmp_path, content):
    file = tmp_path / "file.json"
    file.write_bytes(content)
    with pytest.raises(JobError, match="no certificate stands there"):
        mj.verify(forms / "hf", output=file)
    assert file.read_bytes() == content


def test_an_earlier_certificate_and_an_empty_file_give_way(forms, tmp_path):
    file = tmp_path / "c.json"
    file.touch()
    for name in ("hf", "bf16"):
        stdout, _ = run("verify", forms / name, "-o", file)
        assert stdout.endswith(f"certificate written to {file}\n")
    assert json.loads(file.read_bytes())["checkpoints"][0]["path"] == str(forms / "bf16")


def test_progress_counts_every_byte(forms):
    moments = []
    mj.verify(forms / "hf", forms / "bf16", progress=moments.append)
    done = [moment.done_bytes for moment in moments]
    total = sum(mj.inspect(forms / name).total.nbytes for name in ("hf", "bf16"))
    assert done == sorted(done) and done[-1] == total == moments[0].total_bytes


def test_nothing_is_written_to_the_checkpoints(forms):
    def snapshot():
        return {file: file.stat().st_mtime_ns for name in ("hf", "bf16") for file in Path(forms / name).iterdir()}

    before = snapshot()
    mj.verify(forms / "hf", forms / "bf16")
    assert snapshot() == before
