"""The wire format: openpi's bytes, nothing executable, nothing oversized."""

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from workflow_src.policies import wire
from workflow_src.policies.wire import Metadata, WireError


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        dtype=st.sampled_from(["uint8", "int64", "float32", ">f8", "float16", "bool", "<U5"]),
        shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    )
)
def test_every_array_survives_with_dtype_and_shape(array):
    back = wire.unpack(wire.pack({"array": array}))["array"]
    assert back.dtype == array.dtype and back.shape == array.shape
    assert back.tobytes() == array.tobytes()


def test_arrays_come_back_writable_and_scalars_keep_their_type():
    back = wire.unpack(wire.pack({"a": np.arange(3.0), "b": np.float32(0.25), "c": [1, "x", None, True]}))
    back["a"][0] = 7
    assert type(back["b"]) is np.float32 and back["b"] == 0.25 and back["c"] == [1, "x", None, True]


def test_bytes_are_those_of_openpi():
    """Golden: what openpi-client 0.1.2 packs for this message."""
    message = {"actions": np.array([[1.5, -2.0]], dtype=np.float32), "n": np.int64(3)}
    golden = bytes.fromhex(
        "82a7616374696f6e7384c40b5f5f6e6461727261795f5fc3c40464617461c4080000c03f000000c0c4056474797065a33c6634c405736861706592"
        "0102a16e83c40d5f5f6e7067656e657269635f5fc3c4046461746103c4056474797065a33c6938"
    )
    assert wire.pack(message) == golden
    back = wire.unpack(golden)
    np.testing.assert_array_equal(back["actions"], message["actions"])
    assert back["n"] == 3


@pytest.mark.parametrize(
    "value", [np.array([object()]), np.zeros(2, complex), np.zeros(1, [("a", "f4")]), object(), {1, 2}]
)
def test_what_would_need_pickle_is_refused(value):
    with pytest.raises(WireError, match="cannot be sent"):
        wire.pack({"x": value})


def _array(**changes):
    fields = {b"__ndarray__": True, b"data": b"\0" * 8, b"dtype": "<f4", b"shape": [2]}
    return msgpack.packb({**fields, **{key.encode(): value for key, value in changes.items()}})


@pytest.mark.parametrize(
    "data",
    [
        _array(dtype="|O"),
        _array(dtype="O8"),
        _array(dtype="<c8"),
        _array(dtype="f4,f4"),
        _array(dtype="nonsense"),
        _array(dtype=None),
        _array(shape=[3]),
        _array(shape=[-2]),
        _array(shape=[2**40, 2**40]),
        _array(shape="2"),
        _array(data="text"),
        msgpack.packb({b"__ndarray__": True}),
        msgpack.packb({b"__npgeneric__": True, b"data": "x", b"dtype": "<f4"}),
        msgpack.packb({b"__npgeneric__": True}),
        b"",
        b"\xc1",
        wire.pack({"a": np.zeros(4)})[:-3],
        wire.pack({"a": 1}) + b"\0",
        "text",
        b"\x91" * 5000,
    ],
)
def test_malformed_messages_are_one_clear_error(data):
    with pytest.raises(WireError) as problem:
        wire.unpack(data)
    assert "\n" not in str(problem.value)


def test_messages_above_the_limit_are_refused_on_both_sides(monkeypatch):
    data = wire.pack({"a": np.zeros(1000, np.uint8)})
    monkeypatch.setattr(wire, "MAX_MESSAGE", 500)
    with pytest.raises(WireError, match="above the limit"):
        wire.pack({"a": np.zeros(1000, np.uint8)})
    with pytest.raises(WireError, match="above the limit"):
        wire.unpack(data)


def test_metadata_survives_and_its_digest_tells_servers_apart():
    ours = Metadata(name="bc", control_rate=5.0, chunk=1, batched=True, batch=51, image_size=48, revision="abc")
    back = Metadata.from_wire(wire.unpack(wire.pack(ours.to_wire())))
    assert back == ours and back.digest() == ours.digest()
    assert Metadata.from_wire({**ours.to_wire(), "revision": "abd"}).digest() != ours.digest()


def test_a_foreign_servers_metadata_is_kept_and_means_unbatched():
    foreign = {"reset_pose": np.zeros(3), "action_dim": 7, "chunk": "ten"}
    metadata = Metadata.from_wire(wire.unpack(wire.pack(foreign)))
    assert not metadata.batched and metadata.chunk == 0 and metadata.extra["action_dim"] == 7
    assert metadata.digest() != Metadata().digest()
    with pytest.raises(WireError, match="first message"):
        Metadata.from_wire([1])
