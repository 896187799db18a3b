"""The deployment runtime: one long-lived, mutually authenticated gRPC stream per site, opened by the site."""

from typing import TYPE_CHECKING

from fedclaw.lazy import on_demand

if TYPE_CHECKING:
    from fedclaw.transport.grpc.grid import GrpcGrid
    from fedclaw.transport.grpc.limits import Limits
    from fedclaw.transport.grpc.site_connection import SiteConnection

__getattr__ = on_demand(
    __name__,
    {
        "GrpcGrid": "fedclaw.transport.grpc.grid",
        "Limits": "fedclaw.transport.grpc.limits",
        "SiteConnection": "fedclaw.transport.grpc.site_connection",
    },
)

__all__ = ["GrpcGrid", "Limits", "SiteConnection"]
