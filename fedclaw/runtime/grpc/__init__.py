"""The deployment runtime: one long-lived, mutually authenticated gRPC stream per site, opened by the site."""

from typing import TYPE_CHECKING

from fedclaw.lazy import on_demand

if TYPE_CHECKING:
    from fedclaw.runtime.grpc.grid import GrpcGrid
    from fedclaw.runtime.grpc.limits import Limits
    from fedclaw.runtime.grpc.link import SiteLink

__getattr__ = on_demand(
    __name__,
    {
        "GrpcGrid": "fedclaw.runtime.grpc.grid",
        "Limits": "fedclaw.runtime.grpc.limits",
        "SiteLink": "fedclaw.runtime.grpc.link",
    },
)

__all__ = ["GrpcGrid", "Limits", "SiteLink"]
