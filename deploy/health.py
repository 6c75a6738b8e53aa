"""Checks a service's health inside a container: `health.py grpc HOST:PORT` or `health.py http URL`; exits with 0 or 1.

For a teacher with TLS it uses VAOPD_TLS_CA, VAOPD_TLS_CERT and VAOPD_TLS_KEY, as any client does.
"""

from __future__ import annotations

import sys
import urllib.error
import urllib.request

TIMEOUT_S = 5.0


def grpc_serving(address: str) -> bool:
    """Returns whether the standard gRPC health service reports the server as serving."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from vaopd.client import from_environment
    from vaopd.client.channel import make_channel_options

    tls = from_environment().get("tls")
    options = make_channel_options()
    with (
        grpc.insecure_channel(address, options) if tls is None else grpc.secure_channel(address, tls, options)
    ) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def http_ok(url: str) -> bool:
    try:
        # Docker hands its proxy to every container.
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(url, timeout=TIMEOUT_S) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, TimeoutError):
        return False


if __name__ == "__main__":
    kind, target = sys.argv[1:]
    sys.exit(not {"grpc": grpc_serving, "http": http_ok}[kind](target))
