"""What a deployment sets, read from PIGEON_* environment variables once, at start."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError

from infra.adapters.kube_settings import KubeSettings
from schemas.errors import Malformed
from schemas.limits import Limits

PREFIX = "PIGEON_"
OBJECTS: Mapping[str, type[BaseModel]] = {"limits": Limits, "kube": KubeSettings}  # settings with fields of their own


class Settings(BaseModel):
    """One deployment's settings. The defaults are the embedded profile's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    profile: Literal["embedded", "emulators", "gcp"] = "embedded"  # where messages and documents are
    sandboxes: Literal["local", "kubernetes"] = "local"
    kube: KubeSettings = KubeSettings()  # of the pods, where sandboxes are pods
    project: str = "pigeon-local"  # of Google Cloud, or of its emulators
    state: Path = Path(".pigeon")  # the folder of everything that is kept; the gcp profile keeps nothing in one
    port: int = 8080
    network: Literal["none", "host"] = "none"
    unsafe_no_sandbox: bool = False
    python: Path | None = None  # an environment's bin/python3 that sandboxes offer; by default one is made, with pip
    worker_secret: SecretStr = SecretStr("")  # 32 bytes in hexadecimal, the same for all workers; "": a file in `state`
    health_host: str = "127.0.0.1"  # where `pigeon worker` answers probes; a pod's are sent to the pod's address
    health_port: int = 8081
    firebase_account: str = ""  # the service account that signs Firebase custom tokens; "": none are minted
    allowed_origins: tuple[str, ...] = ()  # for CORS; the gateway's own origin needs no entry
    supabase_jwks_url: str = ""
    supabase_jwt_secret: str = ""
    supabase_issuer: str = ""
    token_audience: str = "authenticated"  # noqa: S105 - Supabase's audience, no secret
    push_audience: str = ""  # of the tokens on push requests; without it nothing may be pushed
    push_service_account: str = ""  # the e-mail address that those tokens name
    push_keys_url: str = "https://www.googleapis.com/oauth2/v3/certs"  # Google's signing keys
    tick_seconds: float = 5.0  # how often the embedded ticker publishes; the cloud's scheduler does each minute
    limits: Limits = Limits()

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ, **overrides: Any) -> Settings:
        """Read PIGEON_STATE, PIGEON_NETWORK, ... and PIGEON_LIMITS and PIGEON_KUBE (JSON objects); `overrides` win.

        A field of the last two may have a variable of its own, such as PIGEON_LIMITS_CAPACITY, which wins over the
        object: parts of a deployment can then set theirs. Lists and objects in them are JSON. Raises Malformed,
        naming the variable, where a value is not what it should be.
        """
        values: dict[str, Any] = {}
        for name in cls.model_fields:
            text = environment.get(PREFIX + name.upper())
            if text is not None:
                values[name] = _value(name, text)
        for name in OBJECTS:
            if parts := _parts(name, environment):
                values[name] = {**values.get(name, {}), **parts}
        try:
            return cls.model_validate({**values, **overrides})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            variable = "_".join(part for part in first["loc"][:2] if isinstance(part, str))
            raise Malformed(f"{PREFIX}{variable.upper()}: {first['msg']}") from error


def _value(name: str, text: str) -> Any:
    if name == "allowed_origins":
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if name in OBJECTS:
        value = _json(name, text)
        if not isinstance(value, dict):
            raise Malformed(f"{PREFIX}{name.upper()}: not a JSON object")
        return value
    return text


def _parts(name: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """The fields of an object that have variables of their own: JSON where one is a list or an object itself."""
    parts = {}
    for field in OBJECTS[name].model_fields:
        text = environment.get(f"{PREFIX}{name}_{field}".upper())
        if text is not None:
            parts[field] = _json(f"{name}_{field}", text) if text[:1] in ("[", "{") else text
    return parts


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise Malformed(f"{PREFIX}{name.upper()}: not JSON") from error
