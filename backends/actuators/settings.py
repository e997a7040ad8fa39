"""What an operator tells each actuator: the tables below `[ratio]`, and nothing else of them."""

from __future__ import annotations

from dataclasses import dataclass

from backends.bounds import bounded
from policies.types import Pool


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaunch:
    control: str = ""
    """The socket of `slackwater fleet --control SOCKET`. Empty: the fleet of `serve --fleet`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Webhook:
    url: str = ""
    """Where the question is POSTed: docs/ratio.md has its schema."""
    secret: str = ""
    """Signs it: HMAC-SHA256 of the body in `x-slackwater-signature`. Empty: no signature."""
    answer_s: float = bounded(10.0, low=0.1)
    """For one answer; one that fails is asked for again."""
    poll_s: float = bounded(2.0, low=0.1)
    """A change that is pending is asked for again after this time."""
    within_s: float = bounded(600.0, low=1)
    """A change that is not over by then is cancelled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kubernetes:
    prefill: str = ""
    """The Deployment of the prefill servers, or the role of the group. Required."""
    decode: str = ""
    """The same of the decode servers. Required."""
    group: str = ""
    """The RoleBasedGroup that both are roles of. Empty: they are Deployments."""
    group_version: str = "v1alpha2"
    """Of the API `workloads.x-k8s.io`."""
    namespace: str = ""
    """Empty: the gateway's own."""
    kubeconfig: str = ""
    """Empty: the service account of the gateway's pod."""
    port: int = bounded(30000, low=1, high=65535)
    """Of a pod that has no port called `http`."""
    bootstrap_port: int = bounded(8998, low=1, high=65535)
    """Of a pod that has no port called `bootstrap`."""
    lease: str = "slackwater"
    """The Lease object whose holder is the one gateway that changes servers."""
    start_s: float = bounded(600.0, low=1)
    """A new pod that is not ready by then is given up, and the old one asked for again."""
    poll_s: float = bounded(2.0, low=0.1)
    """How often the pods are listed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ray:
    command: str = ""
    """What starts a server on a node, such as `python3 -m sglang.launch_server --model-path ...`;
    its address and its role come behind it. Required."""
    prefill: int = bounded(0, low=0)
    """Prefill servers at the beginning."""
    decode: int = bounded(0, low=0)
    """Decode servers at the beginning."""
    gpus: float = bounded(1.0, low=0)
    """Of one server: as many as its tensor parallelism."""
    cpus: float = bounded(1.0, low=0)
    """Of one server, in Ray's books."""
    pool: Pool = Pool.STRICT
    """Of all of them: `policies.pools`."""
    address: str = "auto"
    """The cluster; auto: the one that this machine is a node of."""
    namespace: str = "slackwater"
    """Only one gateway at a time changes the servers of a namespace; the others follow it."""
    python: str = ""
    """An interpreter with the cluster's versions of Ray and Python. Empty: the gateway's own."""
    outlive: bool = False
    """Whether servers go on without the gateway, to be found again by the next one."""
    start_s: float = bounded(600.0, low=1)
    """A server that is not ready by then is brought back to what it was."""
    poll_s: float = bounded(2.0, low=0.1)
    """How often the actors are asked how they are."""
    log: str = ""
    """What Ray itself has to say goes to this file. Empty: nowhere."""
    join_s: float = bounded(60.0, low=1)
    """The cluster must be joined within this time; else the gateway does not start."""
