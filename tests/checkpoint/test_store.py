"""The store's files against tensorstore, which reads them by their metadata alone."""

import itertools
import math

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensorstore
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxseek.checkpoint import store
from jaxseek.checkpoint.store import Array, copy, write_metadata

DTYPES = ("bfloat16", "float16", "float32", "float8_e4m3fn", "int8", "uint8")


def numbers(shape, dtype):
    """Different numbers, as far as the dtype has them."""
    raw = np.random.default_rng(3).integers(0, 256, math.prod(shape) * np.dtype(dtype).itemsize, np.uint8)
    raw[raw & 0x7F >= 0x7C] = 1  # no NaN
    return raw.view(dtype).reshape(shape)


def write(folder, array, values):
    """As a conversion does: the bytes in the array's order go into files of their full size, in parts."""
    raw = np.ascontiguousarray(values.transpose(array.order)).reshape(-1).view(np.uint8)
    for name, size in array.files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(size))
    for start in range(0, len(raw), 7):
        stop = min(start + 7, len(raw))
        covered = 0
        for name, there, here, n in array.pieces(start, stop):
            assert here == covered
            covered += n
            with (folder / name).open("r+b") as file:
                file.seek(there)
                file.write(raw[start + here : start + here + n].tobytes())
        assert covered == stop - start
    write_metadata(folder, {array.path: array})


def by_tensorstore(folder, path):
    kv = {"driver": "file", "path": f"{folder}/params/{path}/"}
    return tensorstore.open({"driver": "zarr3", "kvstore": kv}).result().read().result()


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("room", [1, 10, 64, 10**6])
def test_tensorstore_reads_what_was_written_in_parts_whatever_the_order(dtype, room, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "CHUNK_BYTES", room)
    shape = (3, 5, 4)
    for order in itertools.permutations(range(3)):
        array = Array("a.b_" + "".join(map(str, order)), shape, jnp.dtype(dtype), order)
        values = numbers(shape, jnp.dtype(dtype))
        write(tmp_path, array, values)
        assert same(by_tensorstore(tmp_path, array.path), values)
        whole = tuple(slice(0, n) for n in shape)
        assert same(Array.of(tmp_path, array.path).read(tmp_path, whole, array.dtype), values)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_part_of_any_array_is_that_part(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("store")
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    order = tuple(data.draw(st.permutations(range(len(shape)))))
    dtype = jnp.dtype(data.draw(st.sampled_from(DTYPES)))
    room = data.draw(st.integers(1, 300))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(store, "CHUNK_BYTES", room)
        array = Array("x", shape, dtype, order)
    assert all(0 < c <= n for c, n in zip(array.chunk, shape))
    assert math.prod(array.chunk) * dtype.itemsize <= max(room, dtype.itemsize)
    assert len(array.files()) == math.prod(-(-n // c) for n, c in zip(shape, array.chunk))
    values = numbers(shape, dtype)
    write(folder, array, values)
    assert Array.of(folder, "x") == array  # whatever CHUNK_BYTES is by now
    assert same(by_tensorstore(folder, "x"), values)
    bounds = [sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2))) for n in shape]
    part = tuple(slice(*b) for b in bounds)
    assert same(array.read(folder, part, dtype), values[part])


def test_a_part_is_cast_as_it_is_read(tmp_path):
    array = Array("x", (4, 6), np.dtype(np.float32), (1, 0))
    values = np.random.default_rng(0).standard_normal((4, 6), np.float32)
    write(tmp_path, array, values)
    part = array.read(tmp_path, (slice(1, 4), slice(0, 5)), ml_dtypes.bfloat16)
    assert same(part, values[1:4, :5].astype(ml_dtypes.bfloat16))


def test_chunks_are_of_whole_rows_and_none_is_padded_where_the_rows_divide(monkeypatch):
    monkeypatch.setattr(store, "CHUNK_BYTES", 1000)
    even = Array("x", (7, 96, 10), np.dtype(np.uint8), (0, 1, 2))
    assert even.chunk == (1, 96, 10)
    assert Array("x", (7, 480, 10), np.dtype(np.uint8), (0, 1, 2)).chunk == (1, 96, 10)
    assert Array("x", (480, 7, 10), np.dtype(np.uint8), (1, 0, 2)).chunk == (96, 1, 10)
    prime = Array("x", (101, 10), np.dtype(np.uint8), (0, 1))
    assert prime.chunk == (100, 10)
    assert prime.files() == {"params/x/c.0.0": 1000, "params/x/c.1.0": 1000}  # the second one is padded
    assert Array("x", (3, 4000), np.dtype(np.uint8), (0, 1)).chunk == (1, 1000)


@pytest.mark.parametrize("room", [5, 40, 10**6])
def test_files_hold_every_byte_once(room, monkeypatch):
    monkeypatch.setattr(store, "CHUNK_BYTES", room)
    array = Array("x", (3, 5, 7), np.dtype(np.int8), (2, 0, 1))
    found = [(name, there + i) for name, there, _, n in array.pieces(0, array.nbytes) for i in range(n)]
    assert len(set(found)) == len(found) == array.nbytes
    assert all(at < array.files()[name] for name, at in found)


@pytest.mark.parametrize("shape", [(70,), (3, 70), (2, 3, 70)])
@pytest.mark.parametrize("flip", [False, True])
def test_copying_in_strips_copies_all(shape, flip):
    source = np.random.default_rng(0).standard_normal(shape[::-1] if flip else shape).astype(np.float32)
    view = source.T if flip else source
    out = np.zeros(shape, ml_dtypes.bfloat16)
    copy(out, view)
    assert same(out, view.astype(ml_dtypes.bfloat16))
