"""One call of the Kubernetes API: who we are there, what it answers, how it fails."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
import orjson
from kubernetes_asyncio.client import Configuration
from kubernetes_asyncio.config import (
    ConfigException,
    load_incluster_config,
    load_kube_config,
)

ANSWER_S = 10.0
NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
JSON = "application/json"
JSON_PATCH = "application/json-patch+json"
MERGE_PATCH = "application/merge-patch+json"
_CONFLICTS = frozenset({409, 422})
"""Somebody has changed it since it was read: a lost race, or a failed test of a JSON patch."""


class ApiError(Exception):
    """It did not answer, or not as was wished; the text says which call."""


class ConflictError(ApiError):
    """It is not what it was taken for: somebody else changes it."""


class AbsentError(ApiError):
    """There is no such thing."""


class Api:
    """Signs each call as the library says; its own client would ask a thread for each of them."""

    def __init__(self, configuration: Configuration, namespace: str) -> None:
        self._configuration = configuration
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=_context(configuration)),
            timeout=aiohttp.ClientTimeout(total=ANSWER_S),
        )
        self.namespace = namespace

    async def close(self) -> None:
        await self._http.close()

    async def get(self, path: str, **query: str) -> dict[str, Any]:
        return await self.call("GET", path, query=query)

    async def patch(self, path: str, body: list[Any] | dict[str, Any]) -> dict[str, Any]:
        kind = JSON_PATCH if isinstance(body, list) else MERGE_PATCH
        return await self.call("PATCH", path, body, kind=kind)

    async def call(
        self,
        method: str,
        path: str,
        body: list[Any] | dict[str, Any] | None = None,
        *,
        kind: str = JSON,
        query: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """The object it answers with."""
        url = str(self._configuration.host).rstrip("/") + path
        try:
            async with self._http.request(
                method,
                url,
                headers={"Accept": JSON, "Content-Type": kind, **await self._identity()},
                params=query,
                data=None if body is None else orjson.dumps(body),
                proxy=self._configuration.proxy,
                server_hostname=self._configuration.tls_server_name,
            ) as answer:
                raw = await answer.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise ApiError(f"{method} {path}: {str(error) or type(error).__name__}") from None
        told = _object(raw)
        if 200 <= answer.status < 300:
            return told
        why = f"{method} {path}: {answer.status} {told.get('message', '')}".rstrip()
        if answer.status in _CONFLICTS:
            raise ConflictError(why)
        raise AbsentError(why) if answer.status == 404 else ApiError(why)

    async def _identity(self) -> dict[str, str]:
        """A token that has expired is read anew; client certificates need no header."""
        told = (await self._configuration.auth_settings()).get("BearerToken")
        return {} if told is None else {"Authorization": str(told["value"])}

    async def may(self, verb: str, group: str, resource: str) -> bool:
        """Whether we are allowed to, in our namespace."""
        name, _, part = resource.partition("/")
        asked = {
            "namespace": self.namespace,
            "verb": verb,
            "group": group,
            "resource": name,
            "subresource": part,
        }
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": asked},
        }
        path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
        answer = await self.call("POST", path, review)
        return answer.get("status", {}).get("allowed") is True


async def connected(kubeconfig: str, namespace: str) -> Api:
    """As the service account of our pod, or as a kubeconfig says; ApiError where neither is."""
    configuration = Configuration()
    try:
        if kubeconfig:
            await load_kube_config(kubeconfig, client_configuration=configuration)
        else:
            load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]  # as it is
    except (ConfigException, OSError) as error:
        raise ApiError(f"no way to the Kubernetes API: {error}") from None
    return Api(configuration, namespace or _own_namespace())


def _context(configuration: Configuration) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=configuration.ssl_ca_cert)
    if configuration.cert_file:
        context.load_cert_chain(configuration.cert_file, keyfile=configuration.key_file)
    if not configuration.verify_ssl:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _own_namespace() -> str:
    try:
        return NAMESPACE_FILE.read_text().strip()
    except OSError:
        return "default"


def _object(raw: bytes) -> dict[str, Any]:
    try:
        told = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return {}
    return told if isinstance(told, dict) else {}
