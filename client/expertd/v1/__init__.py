"""The wire contract, see proto/expertd/v1/expertd.proto: generated messages and stubs, and by hand `message_ring`."""
