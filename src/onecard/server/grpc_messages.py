"""The messages of ``inference.GRPCInferenceService`` and ``grpc.health.v1.Health``, made when they are first needed.

The numbers, types and names are those of the KServe specification ``inference_grpc.md``
(https://github.com/kserve/open-inference-protocol), of Triton's ``grpc_service.proto`` and ``model_config.proto``
(https://github.com/triton-inference-server/common), of whose ModelConfig only what a server of this kind has to say is
here, and of ``grpc/health/v1/health.proto`` (https://github.com/grpc/grpc-proto). They stand in a pool of their own, so
that a client's generated classes can live in the same process; and any version of protobuf that is installed will do.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

INFERENCE_SERVICE = "inference.GRPCInferenceService"
HEALTH_SERVICE = "grpc.health.v1.Health"

# One field a line: [repeated] type name number. A name in capitals is a message or an enum of the same table, looked
# for in the message itself first; map<T> is a map from strings; a field behind "| " belongs to the message's oneof.
_INFERENCE = """
ServerLiveRequest
ServerLiveResponse
  bool live 1
ServerReadyRequest
ServerReadyResponse
  bool ready 1
ModelReadyRequest
  string name 1
  string version 2
ModelReadyResponse
  bool ready 1
ServerMetadataRequest
ServerMetadataResponse
  string name 1
  string version 2
  repeated string extensions 3
ModelMetadataRequest
  string name 1
  string version 2
ModelMetadataResponse
  string name 1
  repeated string versions 2
  string platform 3
  repeated TensorMetadata inputs 4
  repeated TensorMetadata outputs 5
ModelMetadataResponse.TensorMetadata
  string name 1
  string datatype 2
  repeated int64 shape 3
InferParameter
  | bool bool_param 1
  | int64 int64_param 2
  | string string_param 3
  | double double_param 4
  | uint64 uint64_param 5
InferTensorContents
  repeated bool bool_contents 1
  repeated int32 int_contents 2
  repeated int64 int64_contents 3
  repeated uint32 uint_contents 4
  repeated uint64 uint64_contents 5
  repeated float fp32_contents 6
  repeated double fp64_contents 7
  repeated bytes bytes_contents 8
ModelInferRequest
  string model_name 1
  string model_version 2
  string id 3
  map<InferParameter> parameters 4
  repeated InferInputTensor inputs 5
  repeated InferRequestedOutputTensor outputs 6
  repeated bytes raw_input_contents 7
ModelInferRequest.InferInputTensor
  string name 1
  string datatype 2
  repeated int64 shape 3
  map<InferParameter> parameters 4
  InferTensorContents contents 5
ModelInferRequest.InferRequestedOutputTensor
  string name 1
  map<InferParameter> parameters 2
ModelInferResponse
  string model_name 1
  string model_version 2
  string id 3
  map<InferParameter> parameters 4
  repeated InferOutputTensor outputs 5
  repeated bytes raw_output_contents 6
ModelInferResponse.InferOutputTensor
  string name 1
  string datatype 2
  repeated int64 shape 3
  map<InferParameter> parameters 4
  InferTensorContents contents 5
ModelStreamInferResponse
  string error_message 1
  ModelInferResponse infer_response 2
ModelConfigRequest
  string name 1
  string version 2
ModelConfigResponse
  ModelConfig config 1
ModelConfig
  string name 1
  string platform 2
  int32 max_batch_size 4
  repeated ModelInput input 5
  repeated ModelOutput output 6
  | ModelDynamicBatching dynamic_batching 11
  map<ModelParameter> parameters 14
  string backend 17
ModelInput
  string name 1
  DataType data_type 2
  repeated int64 dims 4
ModelOutput
  string name 1
  DataType data_type 2
  repeated int64 dims 3
ModelDynamicBatching
  uint64 priority_levels 4
ModelParameter
  string string_value 1
ModelStatisticsRequest
  string name 1
  string version 2
ModelStatisticsResponse
  repeated ModelStatistics model_stats 1
ModelStatistics
  string name 1
  string version 2
  uint64 last_inference 3
  uint64 inference_count 4
  uint64 execution_count 5
  InferStatistics inference_stats 6
  repeated InferBatchStatistics batch_stats 7
StatisticDuration
  uint64 count 1
  uint64 ns 2
InferStatistics
  StatisticDuration success 1
  StatisticDuration fail 2
  StatisticDuration queue 3
  StatisticDuration compute_input 4
  StatisticDuration compute_infer 5
  StatisticDuration compute_output 6
  StatisticDuration cache_hit 7
  StatisticDuration cache_miss 8
InferBatchStatistics
  uint64 batch_size 1
  StatisticDuration compute_input 2
  StatisticDuration compute_infer 3
  StatisticDuration compute_output 4
ModelRepositoryParameter
  | bool bool_param 1
  | int64 int64_param 2
  | string string_param 3
  | bytes bytes_param 4
RepositoryIndexRequest
  string repository_name 1
  bool ready 2
RepositoryIndexResponse
  repeated ModelIndex models 1
RepositoryIndexResponse.ModelIndex
  string name 1
  string version 2
  string state 3
  string reason 4
RepositoryModelLoadRequest
  string repository_name 1
  string model_name 2
  map<ModelRepositoryParameter> parameters 3
RepositoryModelLoadResponse
RepositoryModelUnloadRequest
  string repository_name 1
  string model_name 2
  map<ModelRepositoryParameter> parameters 3
RepositoryModelUnloadResponse
SystemSharedMemoryStatusRequest
  string name 1
SystemSharedMemoryStatusResponse
  map<RegionStatus> regions 1
SystemSharedMemoryStatusResponse.RegionStatus
  string name 1
  string key 2
  uint64 offset 3
  uint64 byte_size 4
SystemSharedMemoryRegisterRequest
  string name 1
  string key 2
  uint64 offset 3
  uint64 byte_size 4
SystemSharedMemoryRegisterResponse
SystemSharedMemoryUnregisterRequest
  string name 1
SystemSharedMemoryUnregisterResponse
CudaSharedMemoryStatusRequest
  string name 1
CudaSharedMemoryStatusResponse
  map<RegionStatus> regions 1
CudaSharedMemoryStatusResponse.RegionStatus
  string name 1
  uint64 device_id 2
  uint64 byte_size 3
CudaSharedMemoryRegisterRequest
  string name 1
  bytes raw_handle 2
  int64 device_id 3
  uint64 byte_size 4
CudaSharedMemoryRegisterResponse
CudaSharedMemoryUnregisterRequest
  string name 1
CudaSharedMemoryUnregisterResponse
"""
_DATA_TYPES = ("TYPE_INVALID TYPE_BOOL TYPE_UINT8 TYPE_UINT16 TYPE_UINT32 TYPE_UINT64 TYPE_INT8 TYPE_INT16 TYPE_INT32 "
               "TYPE_INT64 TYPE_FP16 TYPE_FP32 TYPE_FP64 TYPE_STRING TYPE_BF16")  # fmt: skip
_HEALTH = """
HealthCheckRequest
  string service 1
HealthCheckResponse
  ServingStatus status 1
"""
_SERVING = "UNKNOWN SERVING NOT_SERVING SERVICE_UNKNOWN"
_FIELD = re.compile(
    r"(?P<oneof>\| )?(?P<repeated>repeated )?(?P<map>map<)?(?P<type>\w+)>? (?P<name>\w+) (?P<number>\d+)"
)
_ONEOF = {
    "InferParameter": "parameter_choice",
    "ModelConfig": "scheduling_choice",
    "ModelRepositoryParameter": "parameter_choice",
}


@functools.cache
def inference_messages() -> Mapping[str, Any]:
    """Message classes of the inference service by name, nested ones by ``Outer.Inner``."""
    return _classes("inference", _INFERENCE, {"DataType": _DATA_TYPES})


@functools.cache
def health_messages() -> Mapping[str, Any]:
    """Message classes of the health service by name."""
    return _classes("grpc.health.v1", _HEALTH, {"HealthCheckResponse.ServingStatus": _SERVING})


def _classes(package: str, table: str, enums: Mapping[str, str]) -> dict[str, Any]:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto3")
    messages: dict[str, Any] = {}
    for line in table.split("\n"):
        if line and not line.startswith(" "):
            outer, _, inner = line.rpartition(".")
            messages[line] = (messages[outer].nested_type if outer else file.message_type).add(name=inner)
    for name, values in enums.items():
        outer, _, inner = name.rpartition(".")
        enum = (messages[outer] if outer else file).enum_type.add(name=inner)
        for number, value in enumerate(values.split()):
            enum.value.add(name=value, number=number)
    known = {*messages, *enums}
    for name, field in _fields(table):
        _add_field(messages[name], name, field, package, known - set(messages), known)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}")) for name in messages}


def _fields(table: str) -> Iterator[tuple[str, re.Match[str]]]:
    message = ""
    for line in table.split("\n"):
        if not line.startswith(" "):
            message = line
        elif field := _FIELD.fullmatch(line.strip()):
            yield message, field
        else:
            raise ValueError(f"not a field: {line}")


def _add_field(message: Any, name: str, field: re.Match[str], package: str, enums: set[str], known: set[str]) -> None:
    made = message.field.add(name=field["name"], number=int(field["number"]))
    made.label = made.LABEL_REPEATED if field["repeated"] or field["map"] else made.LABEL_OPTIONAL
    if field["oneof"]:
        if not message.oneof_decl:
            message.oneof_decl.add(name=_ONEOF[name])
        made.oneof_index = 0
    holder = made
    if field["map"]:
        words = "".join(word.capitalize() for word in field["name"].split("_"))
        entry = message.nested_type.add(name=f"{words}Entry")
        entry.options.map_entry = True
        entry.field.add(name="key", number=1, label=made.LABEL_OPTIONAL, type=made.TYPE_STRING)
        holder = entry.field.add(name="value", number=2, label=made.LABEL_OPTIONAL)
        made.type, made.type_name = made.TYPE_MESSAGE, f".{package}.{name}.{entry.name}"
    kind = field["type"]
    if kind.islower():
        holder.type = getattr(holder, f"TYPE_{kind.upper()}")
        return
    kind = next(full for full in (f"{name}.{kind}", kind) if full in known)
    holder.type = holder.TYPE_ENUM if kind in enums else holder.TYPE_MESSAGE
    holder.type_name = f".{package}.{kind}"
