"""What the SDK knows of a server and its layers, and how it names the mistakes of a caller."""

from __future__ import annotations

import grpc
import numpy as np
import pytest
from fake_service import MAX_TOKENS, E, FakeServer, H, RefusedError
from grpc_health.v1 import health_pb2
from sdk_cases import Connect, fails_at_first, tokens

import expertd


def test_arguments_that_do_not_fit_the_layer_are_named(connect: Connect, server: FakeServer) -> None:
    driver = connect()
    hidden, logits = tokens(2)
    with pytest.raises(expertd.InvalidRequestError, match=r"hidden_states.*has 15 columns, layer 'a' expects 16"):
        driver.forward("a", hidden[:, 1:], routing_logits=logits)
    with pytest.raises(expertd.InvalidRequestError, match=r"routing_logits.*has 7 columns, layer 'a' expects 8"):
        driver.forward("a", hidden, routing_logits=logits[:, 1:])
    server.service.scale = None
    with pytest.raises(expertd.InvalidRequestError, match="hidden_states_scale"):
        connect().forward("a", hidden, routing_logits=logits)
    with pytest.raises(expertd.InvalidRequestError, match="timeout_s"):
        driver.forward("a", hidden, routing_logits=logits, timeout_s=0)
    with pytest.raises(expertd.LayerNotFoundError, match="there are a, b"):
        driver.forward("c", hidden, routing_logits=logits)
    assert server.service.parts == []


def test_layer_that_changed_is_looked_up_again(connect: Connect, server: FakeServer) -> None:
    server.service.hidden_size = H + 1
    driver = connect()
    hidden, logits = tokens(1)
    with pytest.raises(expertd.InvalidRequestError):
        driver.forward("a", hidden, routing_logits=logits)
    server.service.hidden_size = H
    assert driver.forward("a", hidden, routing_logits=logits).output.shape == (1, H)


def test_layers_and_server_info(connect: Connect, server: FakeServer) -> None:
    driver = connect()
    first, second = driver.layers()
    assert (first.name, second.name) == ("a", "b")
    assert (first.routing_method, first.activation) == (expertd.RoutingMethod.DEFAULT, expertd.Activation.SWIGLU)
    assert (first.routed_scaling_factor, first.hidden_states_scale) == (None, 1.0)
    assert np.array_equal(first.routing_bias, np.arange(E))
    assert driver.layer("b").state is expertd.LayerState.READY
    with pytest.raises(expertd.LayerNotFoundError):
        driver.layer("c")
    assert driver.server_info().max_batch_tokens == MAX_TOKENS
    before = server.service.info_calls
    hidden, logits = tokens(1)
    driver.forward("a", hidden, routing_logits=logits)
    assert server.service.info_calls == before, "what is known is not asked again"


def test_metadata_goes_with_every_call_and_request_ids_come_back(connect: Connect, server: FakeServer) -> None:
    driver = connect(metadata=(("authorization", "Bearer x"),), send_request_id=True)
    server.service.hook = fails_at_first(1, RefusedError(grpc.StatusCode.INTERNAL, "no"))
    hidden, logits = tokens(1)
    with pytest.raises(expertd.ServerError) as raised:
        driver.forward("a", hidden, routing_logits=logits)
    sent = server.service.metadata[-1]
    assert sent["authorization"] == "Bearer x"
    assert raised.value.request_id == sent["x-request-id"]


def test_wait_ready_follows_the_health_of_server_and_layer(connect: Connect, server: FakeServer) -> None:
    driver = connect()
    server.health.set("", health_pb2.HealthCheckResponse.SERVING)
    driver.wait_ready(timeout_s=10)
    with pytest.raises(expertd.TimeoutError, match=r"layer 'a' was not ready within 0\.2 s"):
        driver.wait_ready("a", timeout_s=0.2)
    server.health.set("a", health_pb2.HealthCheckResponse.NOT_SERVING)
    with pytest.raises(expertd.TimeoutError, match="NOT_SERVING"):
        driver.wait_ready("a", timeout_s=0.3)
    server.health.set("a", health_pb2.HealthCheckResponse.SERVING)
    driver.wait_ready("a", timeout_s=10)


def test_message_over_the_clients_limit_says_what_to_raise(connect: Connect, server: FakeServer) -> None:
    server.service.ballast = b"x" * 70_000
    hidden, logits = tokens(1)
    with pytest.raises(expertd.MessageTooLargeError, match=r"70.*raise ClientConfig\.max_message_bytes"):
        connect(max_message_bytes=64 * 1024).forward("a", hidden, routing_logits=logits)
    assert len(server.service.parts) == 1, "not retried"
