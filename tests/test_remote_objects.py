"""A checkpoint in an object store: S3 by moto's server through s3fs, and fsspec's own memory."""

from collections import Counter

import boto3
import folders
import fsspec
import numpy as np
import pytest
import s3fs
from moto.server import ThreadedMotoServer
from raw_safetensors import write_file

import minimax_jax as mj
from minimax_jax.errors import ConfigError, FormatError
from minimax_jax.io import remote
from minimax_jax.io.beside import side_files
from minimax_jax.io.checkpoint import open_checkpoint
from minimax_jax.io.location import locate
from minimax_jax.io.reader import Reader

REGION = "eu-central-1"


@pytest.fixture(scope="module")
def address():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(remote, "WAITS_SECONDS", (0.0,) * 3)


@pytest.fixture
def s3(address, monkeypatch):
    """A client of an empty store, which the environment names."""
    known = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": REGION}
    for name, value in {**known, "AWS_ENDPOINT_URL": address, "AWS_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    client = boto3.client("s3", endpoint_url=address, region_name=REGION)
    for bucket in client.list_buckets()["Buckets"]:
        for entry in client.list_objects_v2(Bucket=bucket["Name"]).get("Contents", []):
            client.delete_object(Bucket=bucket["Name"], Key=entry["Key"])
        client.delete_bucket(Bucket=bucket["Name"])
    client.create_bucket(Bucket="models", CreateBucketConfiguration={"LocationConstraint": REGION})
    yield client
    client.close()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def calls(monkeypatch):
    """How often s3fs asked for what."""
    counted, call = Counter(), s3fs.S3FileSystem._call_s3

    async def count(self, method, *args, **options):
        counted[method] += 1
        return await call(self, method, *args, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", count)
    return counted


def upload(s3, folder, prefix="m2/hf"):
    for file in folder.iterdir():
        s3.upload_file(str(file), "models", f"{prefix}/{file.name}")
    return f"s3://models/{prefix}"


def test_a_conversion_from_s3_is_that_of_the_folder_byte_for_byte(served_hf, s3, tmp_path):
    url = upload(s3, served_hf)
    mj.convert(served_hf, tmp_path / "near")
    mj.convert(url, tmp_path / "far")
    assert folders.files(tmp_path / "far") == folders.files(tmp_path / "near")
    assert "tokenizer.json" in folders.files(tmp_path / "far")
    assert mj.verify(url, tmp_path / "near").good


def test_a_folder_is_listed(served_hf, s3):
    url = upload(s3, served_hf)
    s3.put_object(Bucket="models", Key="m2/hf/figures/a.png", Body=b"x")
    s3.put_object(Bucket="models", Key="m2/hf/.hidden", Body=b"x")
    s3.put_object(Bucket="models", Key="m2/hf/odd name?#%20.txt", Body=b"x")
    found = {file.name for file in side_files(locate(url))}
    assert found == {file.name for file in side_files(served_hf)} | {"odd name?#%20.txt"}
    assert [(each.name, each.what) for each in mj.inspect(url).left_behind] == [("figures", "a folder")]


def test_headers_take_two_requests_a_file(served_hf, s3, calls):
    url = upload(s3, served_hf)
    near = mj.inspect(served_hf)
    assert mj.inspect(url).total == near.total
    assert calls["get_object"] <= near.files + 2  # config.json and the index
    assert calls["head_object"] <= near.files + 3  # and that there is no sidecar


def test_a_large_tensor_is_one_request(s3, calls, tmp_path):
    write_file(tmp_path / "model.safetensors", a=(7,), big=(3 * remote.BLOCK_BYTES + 11,), c=(50,))
    checkpoint = open_checkpoint(locate(upload(s3, tmp_path)))
    calls.clear()
    with Reader(checkpoint) as reader:
        big = reader.read(checkpoint.tensors["big"])
        assert np.array_equal(big, np.full_like(big, 1))
        assert reader.read(checkpoint.tensors["c"]).tolist() == [2] * 50
    assert calls == {"get_object": 2, "head_object": 2}  # before the first byte, and after the last


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_object_that_is_replaced_is_an_error(s3, tmp_path, when):
    file = write_file(tmp_path / "model.safetensors", a=(7,))
    checkpoint = open_checkpoint(locate(upload(s3, tmp_path)))
    match = r"changed or replaced(.|\n)*s3://models/m2/hf/model\.safetensors"
    with pytest.raises(FormatError, match=match), Reader(checkpoint) as reader:
        if when == "after":
            reader.read(checkpoint.tensors["a"])
        s3.put_object(Bucket="models", Key="m2/hf/model.safetensors", Body=file.read_bytes()[:-1] + b"\xff")
        reader.read(checkpoint.tensors["a"])


def test_an_object_that_is_cut_short_is_never_data(s3, tmp_path):
    file = write_file(tmp_path / "model.safetensors", a=(2 * remote.BLOCK_BYTES,))
    checkpoint = open_checkpoint(locate(upload(s3, tmp_path)))
    s3.put_object(Bucket="models", Key="m2/hf/model.safetensors", Body=file.read_bytes()[:-1])
    with pytest.raises(FormatError), Reader(checkpoint) as reader:
        reader.read(checkpoint.tensors["a"])


@pytest.mark.parametrize("url", ["s3://models/nothing", "s3://nowhere/at/all"])
def test_nothing_there(s3, url):
    with pytest.raises(FormatError) as caught:
        mj.inspect(url)
    assert url in str(caught.value)


def test_a_config_that_is_not_there(served_hf, s3):
    url = upload(s3, served_hf)
    s3.delete_object(Bucket="models", Key="m2/hf/config.json")
    with pytest.raises(ConfigError, match=r"config\.json(.|\n)*No such object"):
        mj.inspect(url)


def test_no_credentials_is_said_at_once(served_hf, s3, monkeypatch):
    url = upload(s3, served_hf)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(FormatError) as caught:
        mj.inspect(url)
    assert "credentials" in str(caught.value) and url in str(caught.value)


def failing(monkeypatch, error, times):
    """Let so many of s3fs's range reads fail."""
    left, read = [times], s3fs.S3FileSystem.cat_file

    def fail(self, path, **options):
        if left[0]:
            left[0] -= 1
            raise error
        return read(self, path, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "cat_file", fail)


def test_a_store_that_is_busy_is_asked_again(served_hf, s3, monkeypatch):
    url = upload(s3, served_hf)
    failing(monkeypatch, OSError(5, "Please reduce your request rate"), 2)
    assert mj.inspect(url).total == mj.inspect(served_hf).total


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (OSError(5, "We encountered an internal error"), r"keeps failing(.|\n)*internal error"),
        (PermissionError("Access Denied"), r"refuses(.|\n)*Access Denied(.|\n)*credentials"),
        (OSError(22, "The authorization header is malformed; the region is wrong"), r"refuses(.|\n)*region"),
    ],
)
def test_a_store_that_refuses_or_keeps_failing(served_hf, s3, monkeypatch, error, match):
    url = upload(s3, served_hf)
    failing(monkeypatch, error, 10**9)
    with pytest.raises(FormatError, match=match) as caught:
        mj.inspect(url)
    assert url in str(caught.value)


@pytest.mark.parametrize("lost", [1, 10**9])
def test_fewer_bytes_than_asked_for_are_never_data(served_hf, s3, monkeypatch, lost):
    url, read = upload(s3, served_hf), s3fs.S3FileSystem.cat_file
    monkeypatch.setattr(
        s3fs.S3FileSystem, "cat_file", lambda self, path, **options: read(self, path, **options)[:-lost]
    )
    if lost == 1:
        with pytest.raises(FormatError, match="keeps failing"):  # the last byte never comes
            mj.inspect(url)
    else:
        with pytest.raises(FormatError, match="sent nothing"):
            mj.inspect(url)


def test_more_bytes_than_asked_for_are_never_data(s3, monkeypatch, tmp_path):
    write_file(tmp_path / "model.safetensors", a=(7,), big=(3 * remote.BLOCK_BYTES,))
    url, read = upload(s3, tmp_path), s3fs.S3FileSystem.cat_file
    monkeypatch.setattr(s3fs.S3FileSystem, "cat_file", lambda self, path, **options: read(self, path))
    with pytest.raises(FormatError, match="does not send the part"):
        open_checkpoint(locate(url))


def test_what_fsspec_knows_beyond_that(served_hf, tmp_path):
    memory = fsspec.filesystem("memory")
    for file in served_hf.iterdir():
        memory.pipe_file(f"/m2/{file.name}", file.read_bytes())
    mj.convert(served_hf, tmp_path / "near", dtype="fp8")
    mj.convert("memory://m2", tmp_path / "far", dtype="fp8")
    assert folders.files(tmp_path / "far") == folders.files(tmp_path / "near")
