"""The gRPC fuzzer's dictionary: pieces of Protocol Buffers, and messages that say odd things."""

from __future__ import annotations

import random
from typing import Any

from onecard.server.grpc_messages import INFERENCE_SERVICE, inference_messages
from tests.attacks.grpc_wire import infer_message
from tests.attacks.wire import MOST_ROWS, WIDTH

REGION_BYTES = 4096
"""Of the shared-memory object that the fuzzer makes and registers."""
REGION = "fuzz"
PIECES = [
    *(b"", b"\0", b"\x7f", b"\x80", b"\xff", b"\xff" * 9 + b"\x01", b"\x80" * 10, b"\x80" * 4 + b"\x10"),
    *(b"\x0a", b"\x12", b"\x1a", b"\x22", b"\x2a", b"\x32", b"\x3a", b"\x3a\0", b"\x1a\x01x", b"\x0b\x0c", b"\x0b"),
    *(b"\x3a\x80\0", b"\xba\0\x01x", b"\x3a\xff\xff\xff\xff\x0f", b"\xf8\xff\xff\xff\x0f\0", b"\xc3\x28"),
    b"\xed\xa0\x80",
]  # fmt: skip
MODELS = ["none", "", "n" * 3000, "\0", "../tag", "tag/versions/1", "tag ", "TAG", "\u202e", "%74ag"]
_VERSIONS = ["", "", "", "", "", "", "1", "9", "-1", "01", "v" * 600, "\0"]
_NAMES = ["y", "", "x_out", "count", "half", "flag", "pixel", "brain", "\0", "n" * 3000, "\u202e", "X"]
_DATATYPES = ["FP32", "FP16", "BF16", "FP64", "INT64", "INT8", "UINT8", "UINT64", "BOOL", "BYTES", "fp32", "", "FP32 "]
_DIMENSIONS = [0, 1, 2, 3, 4, 8, 9, 16, -1, 2**16, 2**31, 2**32, 2**62, 2**63 - 1, -(2**63)]
_INTEGERS = [0, 1, 15, 16, 32, 64, 4096, 4097, -1, 2**31, 2**32, 2**63 - 1, -(2**63)]
_TIMEOUTS = [0, 1, 50, 10**6, 10**7, -1, 2**63 - 1, -(2**63)]
_TEXTS = ["", "0", "16", "r", REGION, "../etc", "\0", "t" * 2000, "\u0130"]
_CONTENTS = {
    "bool_contents": [True, False],
    "int_contents": [0, 1, -1, 2**31 - 1, -(2**31)],
    "int64_contents": [0, 1, -(2**63), 2**63 - 1],
    "uint_contents": [0, 1, 255, 256, 2**32 - 1],
    "uint64_contents": [0, 1, 2**64 - 1],
    "fp32_contents": [0.0, 0.5, 1e38, -1e-45, float("nan"), float("inf")],
    "fp64_contents": [0.0, 0.5, 1e308, float("nan")],
    "bytes_contents": [b"", b"x", b"\xff\xfe"],
}
_INFER_PARAMETERS = (
    *("priority", "timeout", "sequence_id", "sequence_start", "binary_data_output", "shared_memory_region"),
    *("shared_memory_byte_size", "shared_memory_offset", "classification", "binary_data", "", "\0", "p" * 500),
)
READING = ("ServerMetadata", "ModelMetadata", "ModelConfig", "ModelStatistics", "RepositoryIndex", "ModelReady")
HEALTH = ("ServerLive", "ServerReady")
MEMORY = ("SystemSharedMemoryStatus", "SystemSharedMemoryRegister", "SystemSharedMemoryUnregister")
ABSENT = ("CudaSharedMemoryStatus", "CudaSharedMemoryRegister", "CudaSharedMemoryUnregister")
UNTOLD = ("TraceSetting", "LogSettings")
CONTROL = ("RepositoryModelLoad", "RepositoryModelUnload")


def method(name: str) -> str:
    """A method's full name."""
    return f"/{INFERENCE_SERVICE}/{name}"


def damaged(chance: random.Random, data: bytes) -> bytes:
    """Change a few bytes of a message: one flipped, a piece put in, some taken out, some doubled, the end cut off."""
    found = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(found) + 1)
        match chance.randrange(6):
            case 0:
                found[place : place + 1] = bytes([chance.randrange(256)])
            case 1:
                found[place : place + chance.randint(0, 3)] = chance.choice(PIECES)
            case 2:
                del found[place : place + chance.randint(1, 20)]
            case 3:
                found[place:place] = found[place : place + chance.randint(1, 60)]
            case 4:
                found[place:place] = chance.randbytes(chance.randint(1, 8))
            case _:
                del found[place:]
    return bytes(found)


def some_message(chance: random.Random, number: int) -> bytes:
    """A message that is worth damaging: one that is right, or an odd one."""
    if chance.random() < 0.5:
        return infer_message(number % 1_000_000, chance.randint(1, MOST_ROWS), chance.random() < 0.4)
    return odd_request(chance)


def odd_request(chance: random.Random) -> bytes:
    """A ``ModelInferRequest`` in which something is odd, as a client's library would write it."""
    odd = chance.random
    message = inference_messages()["ModelInferRequest"]()
    message.model_name = chance.choice(["tag"] * 4 + ["mixed"] * 3) if odd() < 0.9 else chance.choice(MODELS)
    message.model_version = chance.choice(_VERSIONS)
    message.id = chance.choice(["", "1", "i" * 512, "i" * 513, "\0\u2028"])
    if odd() < 0.4:
        _fill_parameters(chance, message.parameters)
    for _ in range(chance.choice([0, 1, 1, 1, 1, 1, 2, 5])):
        _fill_input(chance, message.inputs.add())
    for _ in range(chance.choice([0, 0, 1, 1, 2])):
        output = message.outputs.add(name="x_out" if odd() < 0.7 else chance.choice(_NAMES))
        if odd() < 0.5:
            _fill_parameters(chance, output.parameters)
    for _ in range(_near(chance, sum(not item.HasField("contents") for item in message.inputs))):
        message.raw_input_contents.append(chance.randbytes(chance.choice([16, 16, 32, 128, 0, 1, 15, 17, 1000])))
    return bytes(message.SerializeToString())


def _near(chance: random.Random, count: int) -> int:
    return max(0, count + chance.choice([0] * 8 + [-1, 1, 5]))


def _fill_input(chance: random.Random, item: Any) -> None:
    odd, rows = chance.random, chance.choice([1, 1, 2, 8])
    item.name = "x" if odd() < 0.7 else chance.choice(_NAMES)
    item.datatype = "FP32" if odd() < 0.7 else chance.choice(_DATATYPES)
    count = chance.choice([0, 1, 2, 2, 3, 65, 300])
    item.shape.extend([rows, WIDTH] if odd() < 0.6 else chance.choices(_DIMENSIONS, k=count))
    if odd() < 0.4:
        kind = "fp32_contents" if odd() < 0.5 else chance.choice(list(_CONTENTS))
        wanted = rows * WIDTH if odd() < 0.6 else chance.randint(0, 9)
        getattr(item.contents, kind).extend(chance.choices(_CONTENTS[kind], k=wanted))
    if odd() < 0.15:
        item.contents.bool_contents.append(True)
    if odd() < 0.3:
        _fill_parameters(chance, item.parameters)


def _fill_parameters(chance: random.Random, parameters: Any) -> None:
    for name in chance.choices(_INFER_PARAMETERS, k=chance.randint(1, 3)):
        match chance.randrange(6):
            case 0:
                parameters[name].bool_param = chance.random() < 0.5
            case 1 | 2:
                parameters[name].int64_param = chance.choice(_TIMEOUTS if name == "timeout" else _INTEGERS)
            case 3:
                parameters[name].string_param = chance.choice(_TEXTS)
            case 4:
                parameters[name].double_param = chance.choice([0.0, -1.5, 1e300, float("nan")])
            case _:
                parameters[name].SetInParent()  # a parameter without a value


def in_region(chance: random.Random, number: int) -> bytes:
    """A request whose tensor, and maybe its answer, is in the fuzzer's region, or beside it."""
    rows = chance.randint(1, MOST_ROWS)
    message = inference_messages()["ModelInferRequest"](model_name="tag", id=f"{number:010}")
    places = [message.inputs.add(name="x", datatype="FP32", shape=[rows, WIDTH])]
    if chance.random() < 0.5:
        places.append(message.outputs.add(name="x_out"))
    for place in places:
        size = rows * WIDTH * 4 if chance.random() < 0.7 else chance.choice(_INTEGERS)
        offset = chance.choice([0, 1, 64, REGION_BYTES - 16, REGION_BYTES, *_INTEGERS])
        name = REGION if chance.random() < 0.9 else chance.choice(_TEXTS)
        place.parameters["shared_memory_region"].string_param = name
        place.parameters["shared_memory_byte_size"].int64_param = size
        if chance.random() < 0.7:
            place.parameters["shared_memory_offset"].int64_param = offset
    return bytes(message.SerializeToString())


def many_fields(chance: random.Random) -> bytes:
    """Far more fields than any client writes."""
    return infer_message(1) + chance.choice([b"\x3a\0", b"\x2a\0", b"\x22\0", b"\x1a\0"]) * chance.choice(
        [9_000, 20_000]
    )


def asked(chance: random.Random, name: str, prefix: str) -> bytes:
    """A request of a method beside inference, odd more often than not.

    Args:
        chance: makes all choices.
        name: of the method.
        prefix: of the shared memory that may be registered.
    """
    messages = inference_messages()
    if f"{name}Request" not in messages:
        return chance.randbytes(chance.choice([0, 3, 40]))
    message = messages[f"{name}Request"]()
    odd = chance.random
    for field in message.DESCRIPTOR.fields:
        if field.name in ("name", "model_name"):
            setattr(
                message, field.name, chance.choice(["tag", "mixed", "none", REGION, f"r{chance.randrange(9)}", *MODELS])
            )
        elif field.name == "version":
            message.version = chance.choice(_VERSIONS)
        elif field.name == "key":
            message.key = chance.choice(
                [f"/{prefix}-fuzz", f"/{prefix}-none", f"{prefix}/../x", "/etc/passwd", "", "\0"]
            )
        elif field.name in ("offset", "byte_size"):
            setattr(message, field.name, chance.choice([0, 1, 64, REGION_BYTES, REGION_BYTES + 1, 2**63, 2**64 - 1]))
        elif field.name == "device_id":
            message.device_id = chance.choice(_INTEGERS)
        elif field.name == "raw_handle":
            message.raw_handle = chance.randbytes(chance.choice([0, 63, 64, 65]))
        elif field.name == "parameters" and odd() < 0.3:
            message.parameters[chance.choice(["config", "unload_dependents", "", "\0"])].string_param = "{}"
    data = bytes(message.SerializeToString())
    return damaged(chance, data) if odd() < 0.3 else data
