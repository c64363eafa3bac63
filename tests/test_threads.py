"""Eight threads at once on the same inputs: each gets what one alone gets, and the inputs stay what they were."""

import threading
from concurrent.futures import ThreadPoolExecutor

import folders
import jax.numpy as jnp
import numpy as np
import pytest

import minimax_jax as mj
from minimax_jax import synthetic

THREADS, ROUNDS = 8, 3
CONFIG = synthetic.config(layers=1, experts=3)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "hf"
    synthetic.synthesize(folder, CONFIG, shard_bytes=60_000)
    return folder


def at_once(call):
    """What `call(number)` gives in threads that all begin at the same moment, several times each."""
    gate = threading.Barrier(THREADS)

    def many(number):
        gate.wait()
        return [call(number) for _ in range(ROUNDS)]

    with ThreadPoolExecutor(THREADS) as pool:
        return [result for results in pool.map(many, range(THREADS)) for result in results]


def bytes_of(*arrays):
    return [(str(array.dtype), array.shape, np.asarray(array).tobytes()) for array in arrays]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, None])
def test_from_hf_and_to_hf(made, dtype):
    hf = folders.arrays(made)
    before = folders.described(hf)
    native = folders.described(mj.from_hf(hf, CONFIG, dtype=dtype))
    assert at_once(lambda _: folders.described(mj.from_hf(hf, CONFIG, dtype=dtype))) == [native] * THREADS * ROUNDS
    assert folders.described(hf) == before
    shared = mj.from_hf(hf, CONFIG, dtype=dtype)
    back = folders.described(mj.to_hf(shared, CONFIG, quantization=dtype is not None))
    found = at_once(lambda _: folders.described(mj.to_hf(shared, CONFIG, quantization=dtype is not None)))
    assert found == [back] * THREADS * ROUNDS and folders.described(shared) == native


def test_dequantize_and_quantize_of_threads_that_do_different_things():
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(THREADS, 130, 260)).astype(np.float32)
    alone = [mj.quantize(weight) for weight in weights]
    floats = [mj.dequantize(*pair, jnp.float32) for pair in alone]

    def both(number):
        codes, scales = mj.quantize(weights[number])
        return bytes_of(codes, scales, mj.dequantize(codes, scales, jnp.float32))

    expected = [bytes_of(*pair, float_) for pair, float_ in zip(alone, floats, strict=True)]
    assert at_once(both) == [one for one in expected for _ in range(ROUNDS)]


def test_conversions_and_verifications_side_by_side(made, tmp_path):
    targets = ["native", "hf", "hf-fp8", "native"]
    for number, to in enumerate(targets):
        mj.convert(made, tmp_path / f"alone-{number}", to=to)

    def convert(number):
        mj.convert(made, tmp_path / f"out-{number}", to=targets[number])
        return mj.verify(made, tmp_path / f"out-{number}").good

    with ThreadPoolExecutor(len(targets)) as pool:
        assert all(pool.map(convert, range(len(targets))))
    for number in range(len(targets)):
        assert folders.files(tmp_path / f"out-{number}") == folders.files(tmp_path / f"alone-{number}")
