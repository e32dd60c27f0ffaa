"""The message classes are those of the official client, field for field."""

import subprocess
import sys

import pytest

from onecard.server.grpc_messages import HEALTH_SERVICE, health_messages, inference_messages
from onecard.server.oip_types import DATATYPES

service = pytest.importorskip("tritonclient.grpc.service_pb2", reason="needs tritonclient and grpcio")
config = pytest.importorskip("tritonclient.grpc.model_config_pb2")
NOT_WHOLE = {"ModelConfig", "ModelInput", "ModelOutput", "ModelDynamicBatching", "ModelStatistics"}


def described(field):
    kind = field.message_type or field.enum_type
    oneof = field.containing_oneof
    return (field.number, field.type, field.is_repeated, kind and kind.full_name, oneof and oneof.name)


def fields(message):
    return {field.name: described(field) for field in message.fields}


@pytest.mark.parametrize("name", sorted(inference_messages()))
def test_a_message_has_the_same_fields(name):
    ours = inference_messages()[name].DESCRIPTOR
    theirs = service.DESCRIPTOR.pool.FindMessageTypeByName(ours.full_name)
    if name in NOT_WHOLE:
        assert fields(ours).items() <= fields(theirs).items()
    else:
        assert fields(ours) == fields(theirs)
    for nested in ours.nested_types:
        assert fields(nested) == fields(theirs.nested_types_by_name[nested.name])


def test_every_method_that_is_served_has_its_messages():
    absent = {"TraceSetting", "LogSettings"}
    for method in service.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
        if method.name not in absent:
            assert {method.input_type.name, method.output_type.name} <= set(inference_messages())


def test_the_datatypes_of_the_configuration_are_the_same():
    ours = inference_messages()["ModelConfig"].DESCRIPTOR.file.enum_types_by_name["DataType"]
    theirs = config.DataType.DESCRIPTOR
    assert [(v.name, v.number) for v in ours.values] == [(v.name, v.number) for v in theirs.values]
    assert {f"TYPE_{datatype.name}" for datatype in DATATYPES.values()} <= set(ours.values_by_name)


def test_health_has_the_numbers_of_its_protocol():
    response = health_messages()["HealthCheckResponse"]
    assert HEALTH_SERVICE == "grpc.health.v1.Health"
    assert [response(status=name).SerializeToString() for name in ("SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")] == [
        b"\x08\x01",
        b"\x08\x02",
        b"\x08\x03",
    ]
    assert health_messages()["HealthCheckRequest"](service="x").SerializeToString() == b"\x0a\x01x"


def test_importing_the_front_needs_no_torch_and_no_grpcio():
    code = """
import sys
import onecard.server.grpc_server
assert not {"torch", "grpc", "google.protobuf"} & set(sys.modules), set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
