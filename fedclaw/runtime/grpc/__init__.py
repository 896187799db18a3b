"""The deployment runtime: one long-lived, mutually authenticated gRPC stream per site, opened by the site."""

from fedclaw.runtime.grpc.grid import GrpcGrid
from fedclaw.runtime.grpc.limits import Limits
from fedclaw.runtime.grpc.link import SiteLink

__all__ = ["GrpcGrid", "Limits", "SiteLink"]
