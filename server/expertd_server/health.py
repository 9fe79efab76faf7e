"""The `health` command: asks a server's grpc.health.v1 once, for container health checks and scripts."""

from __future__ import annotations

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

__all__ = ["check_health"]


def check_health(target: str, service: str, timeout_s: float, credentials: grpc.ChannelCredentials | None) -> int:
    """Print what the server at `target` ("host:port") says of `service` ("": the whole server).

    Returns 0 when it is SERVING, else 1.
    """
    channel = grpc.insecure_channel(target) if credentials is None else grpc.secure_channel(target, credentials)
    with channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        try:
            answer = check(health_pb2.HealthCheckRequest(service=service), timeout=timeout_s)
        except grpc.RpcError as error:
            details = error.details()
            if error.code() is grpc.StatusCode.NOT_FOUND and not details:
                details = f"the server knows no layer or service {service!r}"
            print(f"{target}: {error.code().name}: {details}", file=sys.stderr)
            return 1
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    print(f"{target}: {status}")
    return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1
