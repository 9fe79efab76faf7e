"""Generated protobuf messages and gRPC stubs of `expertd.v1`; see proto/expertd/v1/expertd.proto."""
