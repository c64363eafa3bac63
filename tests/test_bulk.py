"""The collector of the process is off while many records are made, and as it was afterwards."""

import gc
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from raw_safetensors import entry

from minimax_jax.bulk import without_collector
from minimax_jax.io.header import parse_header


@pytest.fixture(autouse=True)
def _collector():
    assert gc.isenabled()
    yield
    gc.enable()


@without_collector
def is_on(error=None):
    if error is not None:
        raise error
    return gc.isenabled()


def test_it_is_off_meanwhile_and_on_afterwards():
    assert not is_on() and gc.isenabled()
    with pytest.raises(ValueError, match="wrong"):
        is_on(ValueError("wrong"))
    assert gc.isenabled()


def test_one_that_was_off_stays_off():
    gc.disable()
    assert not is_on() and not gc.isenabled()


def test_an_inner_function_does_not_switch_it_on():
    @without_collector
    def outer():
        return is_on(), gc.isenabled()

    assert outer() == (False, False) and gc.isenabled()


def test_it_is_on_after_many_threads():
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: is_on(), range(5000)))
    assert gc.isenabled()


def test_a_large_header_is_read_without_a_search():
    count = 20_000
    header = {f"model.{n}": entry("U8", [2], 2 * n, 2 * n + 2) for n in range(count)}
    text = json.dumps(header).encode()
    searches = []

    def note(phase, _):
        if phase == "start":
            searches.append(phase)

    gc.collect()
    gc.callbacks.append(note)
    try:
        found = parse_header(text, file=Path("f"), file_bytes=8 + len(text) + 2 * count)
    finally:
        gc.callbacks.remove(note)
    assert len(found.tensors) == count and len(searches) <= 1  # as soon as it is on again
