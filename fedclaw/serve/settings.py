"""conf/serve.yaml, checked: what a node serves, where it listens, and whom it lets in."""

import ipaddress
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from fedclaw.compress.record import Precision
from fedclaw.export.check import TrustSettings
from fedclaw.export.runtime import Device
from fedclaw.protocol.frozen import Frozen
from fedclaw.serve.names import ModelName, VersionName
from fedclaw.serve.routing.plan import STEPS, BreakerPolicy, Guards, Steps

Port = Annotated[int, Field(ge=0, le=65535)]
"""0: one that is free, which the node then names."""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _all_addresses(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _host(host: str) -> str:
    if not host or any(letter.isspace() or letter in "/@" for letter in host):
        raise ValueError(f"{host!r} is no address to listen on: give an IP address or a host name")
    return host


Host = Annotated[str, AfterValidator(_host)]


class VersionSettings(Frozen):
    """One version of a model."""

    bundle: Path
    name: VersionName | None = None
    """null: the first 12 digits of the bundle's digest."""


class ModelSettings(Frozen):
    """One model of a node."""

    bundle: Path | None = None
    """Its only version; or `versions`."""
    versions: tuple[VersionSettings, ...] = ()
    """The last one answers, until a canary, a test or a person says otherwise."""
    precision: Precision | Literal["recommended"] = "float32"
    pinned: bool = True
    """Loaded before the node is ready, and never unloaded; false: loaded when somebody asks."""

    @model_validator(mode="after")
    def _some_version(self) -> Self:
        if (self.bundle is None) == (not self.versions):
            raise ValueError("give bundle=PATH or versions=[{bundle: PATH}, …], one of the two")
        return self

    @property
    def listed(self) -> tuple[VersionSettings, ...]:
        """Every version, in order."""
        return self.versions if self.bundle is None else (VersionSettings(bundle=self.bundle),)


class TlsSettings(Frozen):
    """TLS 1.3 of the data ports and the admin port."""

    certificate: Path | None = None
    """PEM, with its chain."""
    private_key: Path | None = None
    """PEM, readable by its owner alone."""
    client_ca: Path | None = None
    """Clients must show a certificate of this CA (mutual TLS)."""
    client_crl: Path | None = None
    disabled: bool = False
    """Only for an address that this machine alone reaches, or behind a proxy on it."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.certificate is None) != (self.private_key is None):
            raise ValueError("certificate and private_key belong together")
        if self.disabled and self.certificate is not None:
            raise ValueError("disabled and certificate contradict each other")
        if self.client_crl is not None and self.client_ca is None:
            raise ValueError("client_crl needs client_ca")
        return self


class TokenSettings(Frozen):
    """OAuth2 bearer tokens: who signs them, and for whom."""

    jwks: str | None = None
    """A file, or an https URL, with the issuer's public keys."""
    jwks_ca: Path | None = None
    """Whose certificate the URL's server has, if not that of a public CA."""
    issuer: str | None = None
    audience: str | None = None
    algorithms: tuple[Literal["ES256", "RS256"], ...] = Field(default=("ES256", "RS256"), min_length=1)
    disabled: bool = False
    """Everybody may ask for everything; only for an address that this machine alone reaches."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        given = (self.jwks, self.issuer, self.audience)
        if any(item is not None for item in given) and None in given:
            raise ValueError("jwks, issuer and audience belong together")
        if self.disabled and self.jwks is not None:
            raise ValueError("disabled and jwks contradict each other")
        return self


class LimitSettings(Frozen):
    """What a client may cost the node."""

    body_bytes: int = Field(default=16 << 20, ge=1024)
    rows: int = Field(default=10_000, ge=1)
    """In one request."""
    requests_per_second: float = Field(default=1000.0, gt=0)
    """Of one principal, at all workers of the node together."""
    burst: int = Field(default=2000, ge=1)
    rows_per_second: float | None = Field(default=100_000.0, gt=0)
    """Of one principal, in all its requests together; null: no limit."""
    rows_burst: int = Field(default=1_000_000, ge=1)
    connections: int = Field(default=2000, ge=1)
    """Open at one worker."""
    connections_per_address: int = Field(default=1000, ge=1)
    """Of those, from one address."""
    proxies: tuple[str, ...] = ()
    """Addresses that stand for many clients, whom they limit themselves."""
    header_seconds: float = Field(default=5.0, gt=0)
    """Until a request's header is whole."""
    body_seconds: float = Field(default=30.0, gt=0)
    """Until its body is."""
    deadline_seconds: float = Field(default=10.0, gt=0)
    """A request that waits longer than this, or than it says itself, is not answered."""


class BatchSettings(Frozen):
    """How rows of several requests are answered together."""

    mode: Literal["auto", "always", "never"] = "auto"
    """auto: where it was measured to pay, at start."""
    rows: int | None = Field(default=None, ge=1)
    """At most in a batch; null: measured."""
    queue: int = Field(default=4096, ge=1)
    """Rows that wait; whoever comes then is told to come again."""
    threads: int | None = Field(default=None, ge=1)
    """That a worker computes with; null: measured."""


class AuditLogSettings(Frozen):
    """The log of who asked what."""

    inputs: Literal["none", "digest", "full"] = "none"
    sync_seconds: float = Field(default=1.0, ge=0)
    """How often lines are flushed to the disk, which only a crash of the whole machine loses; 0: each one."""
    when_full: Literal["refuse", "go_on"] = "refuse"
    """What happens to requests whose line cannot be written."""


class ReleaseSettings(Frozen):
    """How a published version comes to answer."""

    mode: Literal["canary", "shadow", "at_once"] = "canary"
    approval: Literal["automatic", "manual", "each_step"] = "automatic"
    """manual: a person's word lets it begin. each_step: a canary begins by itself, and waits for one before its share
    grows, each time, and before it becomes stable."""
    promote: bool = False
    """mode shadow: one that is known to agree goes on as a canary by itself."""
    steps: Steps = STEPS
    """Shares of the keys that a canary answers, one after the other."""
    guards: Guards = Guards(disagreement=0.02)
    """What rolls it back, and what lets it grow. guards.disagreement=null: it is not meant to give the same labels."""


class TracingSettings(Frozen):
    """OpenTelemetry traces. Headers that a collector asks for, as a token, are given to the process as OpenTelemetry's
    own environment variable OTEL_EXPORTER_OTLP_HEADERS."""

    endpoint: str | None = None
    """The collector's address for OTLP over HTTP, as https://collector:4318; null: no traces."""
    share: float = Field(default=0.01, ge=0, le=1)
    """Of the requests."""
    follow_parent: bool = False
    """Record each request whose `traceparent` says that it is recorded: for a front that sets it itself."""
    certificate: Path | None = None
    """The CA certificate (PEM) that the collector is checked against; null: those of the system."""


class DriftSettings(Frozen):
    """Whether what is asked still looks like what a model was trained on."""

    share: float = Field(default=0.1, ge=0, le=1)
    """Of the requests, whose rows are counted; 0: none, and drift is not looked for."""
    baseline: Literal["auto", "charged", "first_rows"] = "auto"
    """charged: the bundle's marginals.json, or nothing; first_rows: the first rows served; auto: the one, or the other
    where the bundle has none."""
    first_rows: int = Field(default=2000, ge=200)
    """How many sampled rows make a baseline where the first ones do."""
    window_seconds: int = Field(default=3600, ge=10)
    """A window is compared when it is over; with the ones before it, where it has too few rows."""
    alpha: float = Field(default=0.01, gt=0, lt=0.5)
    """Probability of a false alarm of a version in a window, at most."""
    least_rows: int = Field(default=200, ge=100)
    psi: float = Field(default=0.1, ge=0)
    """The least population stability index that matters."""
    ks: float = Field(default=0.1, ge=0, le=1)
    """The least Kolmogorov-Smirnov distance that matters."""
    change: float = Field(default=0.05, ge=0, le=1)
    """The least change that matters of the share of missing values, or of refused rows."""


class AdminSettings(Frozen):
    """The port of operators and of Prometheus."""

    host: Host = "127.0.0.1"
    port: Port = 9443
    requests_per_second: float = Field(default=50.0, gt=0)
    """Of one principal."""
    burst: int = Field(default=200, ge=1)


class NodeSettings(TrustSettings):
    """Everything that `python -m fedclaw.serve` is told."""

    bundle: Path | None = None
    model: ModelName | None = None
    """The name of the bundle's model; null: its run's."""
    models: Annotated[dict[ModelName, ModelSettings], BeforeValidator(lambda given: given or {})] = {}
    """By name. conf/serve.yaml has null, which a command line may replace; into an empty map it could put nothing."""
    state: Path = Path("node")
    """Directory of the node: its copies of bundles, routing, feedback, audit log."""
    name: ModelName = "node"
    """Of this node among those that share a database."""
    database: str | None = None
    """env:NAME or file:PATH that holds postgresql://…; null: SQLite in `state`."""
    host: Host = "127.0.0.1"
    port: Port = 8443
    grpc_port: Port | None = 8444
    """null: REST alone."""
    admin: AdminSettings = AdminSettings()
    workers: int = Field(default=1, ge=1, le=256)
    device: Device = "cpu"
    memory: int | None = Field(default=None, ge=1 << 20)
    """Bytes of models at one worker; the least recently used is unloaded. null: no limit."""
    tls: TlsSettings = TlsSettings()
    tokens: TokenSettings = TokenSettings()
    limits: LimitSettings = LimitSettings()
    batching: BatchSettings = BatchSettings()
    audit: AuditLogSettings = AuditLogSettings()
    release: ReleaseSettings = ReleaseSettings()
    breaker: BreakerPolicy = BreakerPolicy()
    """Of every version of every model."""
    tracing: TracingSettings = TracingSettings()
    drift: DriftSettings = DriftSettings()
    feedback_days: float = Field(default=30.0, gt=0)
    """How long an answer can be given feedback."""
    drain_seconds: float = Field(default=0.0, ge=0, le=300)
    """From the word to stop until no connection is taken any more: so long a proxy takes to see it."""

    @model_validator(mode="after")
    def _secure(self) -> Self:
        hosts = {self.host, self.admin.host}
        for name, disabled, given in (
            ("tls", self.tls.disabled, self.tls.certificate is not None),
            ("tokens", self.tokens.disabled, self.tokens.jwks is not None),
        ):
            if disabled and (outside := sorted(host for host in hosts if not is_loopback(host))):
                raise ValueError(
                    f"{name}.disabled=true is only for an address that this machine alone reaches, and "
                    f"{', '.join(outside)} is none"
                )
            if not disabled and not given:
                raise ValueError(_MISSING[name])
        return self

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        places = [
            ("port", self.host, self.port),
            ("grpc_port", self.host, self.grpc_port),
            ("admin.port", self.admin.host, self.admin.port),
        ]
        for (one, host, port), (other, its_host, its_port) in combinations(places, 2):
            # Sockets of a node share a port, so the kernel would give each of the two the other's connections.
            if port and port == its_port and (host == its_host or _all_addresses(host) or _all_addresses(its_host)):
                raise ValueError(f"{one} and {other} are both {port}: give each a port of its own")
        return self

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.bundle is not None and self.models:
            raise ValueError("give bundle=PATH for one model, or models={NAME: …}, not both")
        if self.model is not None and self.bundle is None:
            raise ValueError("model= names the model of bundle=")
        return self


_MISSING = {
    "tls": "give tls.certificate= and tls.private_key=, or, for trying it on this machine alone, tls.disabled=true",
    "tokens": "give tokens.jwks=, tokens.issuer= and tokens.audience= (`python -m fedclaw.serve keys` makes a key "
    "where there is no identity provider), or, for trying it on this machine alone, tokens.disabled=true",
}
